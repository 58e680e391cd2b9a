"""Frozen configuration with validation: what a run is, in full. Recipes (`recipes.py`) return whole configurations."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

from lrt.schedule import Schedule

Projection = Literal["none", "shared", "layerwise"]
ValueEmbeddings = Literal["none", "alternating", "all"]
Dtype = Literal["auto", "bfloat16", "float32"]
Backend = Literal["auto", "masked", "merged"]
C = TypeVar("C")


def require(condition: bool, message: str) -> None:
    """Raise `ValueError(message)` unless `condition`; the message names the numbers and the remedy."""
    if not condition:
        raise ValueError(message)


def require_choice(name: str, value: str, choices: Any) -> None:
    """Raise `ValueError` unless `value` is one of a Literal's."""
    require(value in get_args(choices), f"{name} is {value!r}; choose one of {', '.join(get_args(choices))}")


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """The recurrent memory: where it is taken from and how it is injected (SPEC section 2)."""

    projection: Projection = "layerwise"
    """KVProjection: `shared` has one W_K, W_V for all layers (the paper's default), `layerwise` a pair a layer."""
    residual: bool = True
    """ResidualInjection: add gamma_l m_{t-1} to the stream before every block."""
    source: int | None = None
    """Block (1..L) after which the memory is taken; none means the last one, L."""
    gate_width: int | None = None
    """Channels of the attention input that the gates read; none means all of them."""

    def __post_init__(self) -> None:
        require_choice("model.memory.projection", self.projection, Projection)

    @property
    def on(self) -> bool:
        """Whether the model has any memory at all; without it, it is exactly the plain transformer."""
        return self.projection != "none" or self.residual


MEMORY_OFF = MemoryConfig(projection="none", residual=False)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A nanochat-style decoder-only transformer with a recurrent memory."""

    depth: int = 12
    """Blocks, L."""
    width: int | None = None
    """Model width, D; none means 64 x depth."""
    heads: int | None = None
    """Query heads, H; none means one per 128 channels (at least one)."""
    kv_heads: int | None = None
    """Key/value heads, K; none means as many as query heads."""
    context: int = 2048
    """Longest sequence (prompt and answer together) that the model is meant for, in tokens."""
    vocab_size: int = 32768
    """Vocabulary size, V; `lrt train` sets it from the tokenizer."""
    bos: int | None = None
    """Token that starts a document: the memory is reset there. None: only position 0 resets it."""
    window_pattern: str = "L"
    """A letter a layer, repeated: L sees everything, S a sliding window; the last layer is always L."""
    window: int | None = None
    """Positions a sliding-window layer sees, the current one included; none means half the context."""
    value_embeddings: ValueEmbeddings = "none"
    """Token-indexed value embeddings E_l: in no layer, in every second one (the last included), or in all."""
    residual_scalars: bool = True
    """Learned scalars alpha_l (stream) and beta_l (normalised embedding x0) before every block."""
    softcap: float | None = 15.0
    """Logits are softcap x tanh(logits / softcap); none leaves them as they are."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """The recurrent memory."""

    def __post_init__(self) -> None:
        require(self.depth >= 1, f"model.depth is {self.depth}; a model needs at least 1 block")
        width, heads, kv_heads = self.d, self.h, self.k
        require(width >= 2, f"model.width is {width}; it must be at least 2")
        require(heads >= 1 and width % heads == 0, f"model.width {width} is not a multiple of model.heads {heads}")
        require(width // heads % 2 == 0, f"head width {width // heads} is odd; rotary embeddings need an even one")
        require(
            kv_heads >= 1 and heads % kv_heads == 0, f"model.heads {heads} is not a multiple of kv_heads {kv_heads}"
        )
        require(self.vocab_size >= 2, f"model.vocab_size is {self.vocab_size}; at least 2 tokens are needed")
        require(self.context >= 1, f"model.context is {self.context}; it must be at least 1 token")
        in_range = self.bos is None or 0 <= self.bos < self.vocab_size
        require(in_range, f"model.bos {self.bos} lies outside the vocabulary of {self.vocab_size}")
        pattern = self.window_pattern
        require(bool(pattern) and set(pattern) <= {"L", "S"}, f"model.window_pattern {pattern!r} may hold only L and S")
        require(self.window is None or self.window >= 1, f"model.window is {self.window}; it must be at least 1")
        soft = self.softcap is None or 0 < self.softcap < math.inf
        require(soft, f"model.softcap is {self.softcap}; it must be positive or none")
        require(0 < self.rope_theta < math.inf, f"model.rope_theta is {self.rope_theta}; it must be positive")
        require_choice("model.value_embeddings", self.value_embeddings, ValueEmbeddings)
        source, gates = self.memory.source, self.memory.gate_width
        require(
            source is None or 1 <= source <= self.depth,
            f"model.memory.source is block {source}; this model has blocks 1..{self.depth}",
        )
        require(
            gates is None or 1 <= gates <= width,
            f"model.memory.gate_width is {gates}; it must be between 1 and the width, {width}",
        )

    # The letters of shapes.py, resolved to integers; the fields stay as given, so that overriding depth moves them.
    @property
    def d(self) -> int:
        """Width, D."""
        return 64 * self.depth if self.width is None else self.width

    @property
    def h(self) -> int:
        """Query heads, H."""
        return max(1, self.d // 128) if self.heads is None else self.heads

    @property
    def k(self) -> int:
        """Key/value heads, K."""
        return self.h if self.kv_heads is None else self.kv_heads

    @property
    def e(self) -> int:
        """Head width, E."""
        return self.d // self.h

    @property
    def source(self) -> int:
        """Block whose output is the memory, 1..L."""
        return self.memory.source or self.depth

    @property
    def gate_width(self) -> int:
        """Channels the gates read, G."""
        return self.memory.gate_width or self.d

    def windows(self) -> tuple[int | None, ...]:
        """The window of every layer: positions seen including the current one, or None for all of them."""
        short = self.window or max(1, self.context // 2)
        letters = [self.window_pattern[i % len(self.window_pattern)] for i in range(self.depth)]
        return tuple(short if c == "S" and i < self.depth - 1 else None for i, c in enumerate(letters))

    def has_value_embedding(self, layer: int) -> bool:
        """Whether block `layer` (0-based) has a value embedding."""
        alternate = layer % 2 == (self.depth - 1) % 2
        return self.value_embeddings == "all" or (self.value_embeddings == "alternating" and alternate)


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a model computes, never what: every choice gives the same values and gradients, up to rounding."""

    attention: Backend = "auto"
    """Attention of strided passes: `masked`, `merged`, or `auto`, what was faster where measured (docs/speed.md)."""
    recompute: bool = False
    """Keep only the inputs of blocks for the backward pass and compute the rest again."""
    compile: bool = False
    """Compile the blocks, for passes over slices; decoding compiles its own step."""

    def __post_init__(self) -> None:
        require_choice("train.attention", self.attention, Backend)
        fits = not (self.compile and self.attention == "merged")
        require(fits, "train.attention merged is not compiled; set it to masked or auto, or train.compile to false")

    @property
    def backend(self) -> Backend:
        """The backend that is left: a compiled block takes keys and values as one tensor, so there is only the mask."""
        return "masked" if self.compile else self.attention


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the text comes from and how it becomes tokens."""

    source: str = "python"
    """`python` (standard library sources), `python+site-packages`, a file, folder or glob, or `hf:owner/name`."""
    text_column: str = "text"
    """Column that holds the text in jsonl, parquet and Hugging Face datasets."""
    subset: str | None = None
    """Configuration of a Hugging Face dataset."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    tokenizer: str = "bytes"
    """`bytes`, `bpe` (trained on the text), or the path of a tokenizer.json or tokenizer folder."""
    vocab_size: int = 4096
    """Vocabulary of a `bpe` tokenizer."""
    validation: float = 0.02
    """Share of the documents held out for validation."""
    max_bytes: int | None = None
    """Stop reading the source after so many bytes of text."""
    folder: str = "runs/data"
    """Where token shards are kept; prepared once per source and tokenizer."""

    def __post_init__(self) -> None:
        require(0 < self.validation < 1, f"data.validation is {self.validation}; it must lie between 0 and 1")
        require(self.vocab_size >= 258, f"data.vocab_size is {self.vocab_size}; bytes and BOS alone need 258")
        limit = self.max_bytes
        require(limit is None or limit >= 1, f"data.max_bytes is {limit}; it must be at least 1 or none")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Muon for the matrices, AdamW for the rest; warm-up, flat, linear decay (SPEC section 2)."""

    matrix_lr: float = 0.02
    """Muon's rate for all matrices of the blocks and the memory projections."""
    embedding_lr: float = 0.3
    """AdamW's rate for token and value embeddings, at width 768; scaled by (width / 768)^-1/2."""
    head_lr: float = 0.004
    """AdamW's rate for the output head and the gates, at width 768; scaled likewise."""
    scalar_lr: float = 0.04
    """AdamW's rate for alpha, beta and gamma."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the matrices."""
    momentum: float = 0.95
    """Muon's momentum."""
    betas: tuple[float, float] = (0.8, 0.95)
    """AdamW's betas."""
    warmup: float = 0.01
    """Share of the steps over which the rate rises linearly from 0."""
    decay: float = 0.5
    """Share of the steps, at the end, over which it falls linearly."""
    final: float = 0.02
    """Share of the peak rate that the decay would reach one step after the last."""
    clip: float | None = 1.0
    """Largest gradient norm; none does not clip."""

    def __post_init__(self) -> None:
        shares = {"warmup": self.warmup, "decay": self.decay, "final": self.final}
        rates = ("matrix_lr", "embedding_lr", "head_lr", "scalar_lr", "weight_decay")
        for name, value in ((name, getattr(self, name)) for name in rates):
            require(0 <= value < math.inf, f"optim.{name} is {value}; it must be at least 0")
        require(0 <= self.momentum < 1, f"optim.momentum is {self.momentum}; it must be at least 0 and below 1")
        fine = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        require(fine, f"optim.betas are {self.betas}; give two numbers, at least 0 and below 1")
        for name, share in shares.items():
            require(0 <= share <= 1, f"optim.{name} is {share}; it is a share and must lie between 0 and 1")
        require(self.warmup + self.decay <= 1, f"optim.warmup {self.warmup} + decay {self.decay} exceed 1")
        require(self.clip is None or self.clip > 0, f"optim.clip is {self.clip}; it must be positive or none")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, in what order of passes, and on what machine."""

    schedule: str = "settled-1..3"
    """Passes per step: parallel, interleaved-S, refinement-K, chunked-C, sequential, settled-R (see `lrt schedule`)."""
    batch: int = 32
    """Rows of one optimizer step, over all devices."""
    micro_batch: int | None = None
    """Rows of one forward and backward on one device; none means the whole share of the batch."""
    length: int = 2048
    """Positions of a row, T."""
    horizon: str = "ratio=20"
    """When to stop: steps=N, tokens=N, ratio=R (tokens per scaling parameter: matrices and head, not the memory), or
    compute=C (R times token forwards per token: every pass counts, one without gradient a third)."""
    seed: int = 0
    """Seed of initialisation, data order and drawn schedules."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: cuda where there is one."""
    dtype: Dtype = "auto"
    """Autocast type of training; evaluation is float32. `auto`: bfloat16 where the device multiplies it natively."""
    compile: bool = False
    """Compile the blocks; does not pay for runs of a few minutes on a CPU."""
    attention: Backend = "auto"
    """Attention of strided passes: `masked`, `merged`, or `auto`, what was faster where measured (docs/speed.md)."""
    recompute: bool = False
    """Keep only the inputs of blocks for the backward pass and compute the rest again: less memory, a third slower."""
    eval_every: int = 250
    """Steps between evaluations; the last step is always evaluated. 0: only then."""
    eval_rows: int = 64
    """Validation rows of an evaluation."""
    save_every: int = 1000
    """Steps between checkpoints; the last step is always saved. 0: only then."""
    keep: int = 2
    """Checkpoints kept."""
    log_every: int = 10
    """Steps between metric lines; the loss is read from the device only then."""
    gap_warning: float = 0.02
    """Live gap (decoded minus parallel BPB) above which a warning is shown."""

    def __post_init__(self) -> None:
        schedule = Schedule.parse(self.schedule)
        self.horizon_parts()
        require(self.length >= 2, f"train.length is {self.length}; a row needs at least 2 positions")
        for drawn in schedule.every_draw() if schedule.weights else ():
            drawn.passes(self.length)  # raises now, not at the step that draws fewer passes than weights
        require(self.batch >= 1, f"train.batch is {self.batch}; it must be at least 1")
        require(self.eval_rows >= 1, f"train.eval_rows is {self.eval_rows}; it must be at least 1")
        require(self.keep >= 1, f"train.keep is {self.keep}; at least 1 checkpoint must be kept")
        require(self.log_every >= 1, f"train.log_every is {self.log_every}; it must be at least 1")
        for name, value in (("eval_every", self.eval_every), ("save_every", self.save_every), ("seed", self.seed)):
            require(value >= 0, f"train.{name} is {value}; it must be at least 0")
        require_choice("train.dtype", self.dtype, Dtype)
        _ = self.execution  # checks its own
        micro = self.micro_batch
        require(
            micro is None or (micro >= 1 and self.batch % micro == 0),
            f"train.micro_batch {micro} must divide batch {self.batch}",
        )

    @property
    def execution(self) -> Execution:
        """How the model computes."""
        return Execution(attention=self.attention, recompute=self.recompute, compile=self.compile)

    def horizon_parts(self) -> tuple[str, float]:
        """The horizon's kind and number."""
        kind, _, text = self.horizon.partition("=")
        try:
            number = float(text)
        except ValueError:
            number = 0.0
        known = kind in ("steps", "tokens", "ratio", "compute")
        fine = known and 0 < number < math.inf
        require(fine, f"train.horizon is {self.horizon!r}; write steps=1000, tokens=1e6, ratio=20 or compute=20")
        return kind, number


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run: data, model, optimizer, training."""

    name: str = "run"
    """Name of the run; its folder is runs/NAME unless --out says otherwise."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    data: DataConfig = field(default_factory=DataConfig)
    """The text."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The training."""

    def __post_init__(self) -> None:
        length, context = self.train.length, self.model.context
        require(
            length <= context,
            f"train.length {length} exceeds model.context {context}; shorten the one or raise the other",
        )


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON-ready data."""
    return dataclasses.asdict(config)


def from_dict(cls: type[C], data: Any, where: str = "config") -> C:
    """Rebuild a configuration from `to_dict`'s output; unknown or ill-typed fields raise ValueError naming them."""
    require(isinstance(data, dict), f"{where} is a {type(data).__name__}; it must be an object of named fields")
    known = {f.name: f for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    unknown = sorted(set(data) - set(known))
    require(not unknown, f"{where} has no field {', '.join(map(repr, unknown))}; known fields: {', '.join(known)}")
    values: dict[str, Any] = {}
    for name, value in data.items():
        nested = _NESTED.get(str(known[name].type))
        value = from_dict(nested, value, f"{where}.{name}") if nested else value
        values[name] = tuple(value) if isinstance(value, list) else value
        if nested is None:
            _check_type(f"{where}.{name}", values[name], str(known[name].type))
    return cls(**values)


_NESTED: dict[str, type] = {c.__name__: c for c in (MemoryConfig, ModelConfig, DataConfig, OptimConfig, TrainConfig)}
_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
    "None": (type(None),),
    "Projection": (str,),
    "ValueEmbeddings": (str,),
    "Dtype": (str,),
    "Backend": (str,),
}


def _check_type(where: str, value: Any, annotation: str) -> None:
    if annotation == "tuple[float, float]":
        fits = isinstance(value, tuple) and len(value) == 2 and all(type(x) in (int, float) for x in value)
    else:
        kinds = sum((_TYPES[part.strip()] for part in annotation.split("|")), ())
        fits = isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds)
    require(fits, f"{where} is {value!r}; it must be {annotation}")
