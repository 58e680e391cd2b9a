"""Frozen configuration with validation: what a run is, in full. Recipes (`recipes.py`) return whole configurations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from lrt.config.model import MOST, Backend, Execution, ModelConfig
from lrt.config.typed_fields import check_fields, field_value, hints_of, named
from lrt.passes import rewriting, token_forwards
from lrt.schedule import Curriculum
from lrt.utils.files import SURROGATE, one_line, require_name
from lrt.utils.require import require, require_choice, require_seed

Dtype = Literal["auto", "bfloat16", "float32"]
Device = Literal["auto", "cpu", "cuda", "mps"]
TASK = "task:"
"""Beginning of a source that is a synthetic task."""
PAUSES = "+pauses"
"""End of a tokenizer's name that asks for a pause after every token."""
Parallelism = Literal["ddp", "fsdp"]
TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow"]
C = TypeVar("C")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the text comes from and how it becomes tokens."""

    source: str = "python"
    """`python` (standard library sources), `python+site-packages`, a file, folder or glob, or `hf:owner/name`; several
    with commas between them, read one after the other, or drawn from by weight: books/*.parquet@0.7,code/@0.3."""
    text_column: str = "text"
    """Column that holds the text, or messages, in jsonl, parquet and Hugging Face datasets. Rows without a `text` are
    dialogues where they hold messages, or a prompt and its answer: answers alone are learned (docs/data.md)."""
    subset: str | None = None
    """Configuration of a Hugging Face dataset."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    tokenizer: str = "bytes"
    """`bytes`, `bpe` (trained on the text), or the path of a tokenizer.json or tokenizer folder; each may end in
    `+pauses`: a latent position after every token."""
    vocab_size: int = 4096
    """Vocabulary of a `bpe` tokenizer."""
    validation: float = 0.02
    """Share of the documents held out for validation."""
    validation_source: str | None = None
    """Another text to hold out instead: then all of the source is trained on."""
    max_bytes: int | None = None
    """Stop reading the source after so many bytes of text."""
    normalised: bool = False
    """Take a tokenizer whose tokens lose text (unknown words, lower-casing, ..); scores are of the normalised text."""
    folder: str = "runs/data"
    """Where token shards are kept; prepared once per source and tokenizer."""

    def __post_init__(self) -> None:
        check_fields(self, "data")
        require(0 < self.validation < 1, f"data.validation is {self.validation}; it must lie between 0 and 1")
        require(self.vocab_size >= 258, f"data.vocab_size is {self.vocab_size}; bytes and BOS alone need 258")
        require(self.vocab_size <= MOST, f"data.vocab_size is {self.vocab_size}; it may be at most {MOST:,}")
        limit = self.max_bytes
        require(limit is None or limit >= 1, f"data.max_bytes is {limit}; it must be at least 1 or none")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Muon for the matrices, AdamW for the rest; warm-up, flat, linear decay (docs/method.md#optimizer)."""

    matrix_lr: float = 0.02
    """Muon's rate for all matrices of the blocks and the memory projections."""
    embedding_lr: float = 0.3
    """AdamW's rate for token and value embeddings, at width 768; scaled by (width / 768)^-1/2."""
    head_lr: float = 0.004
    """AdamW's rate for the output head, biases and weights of norms, at width 768; scaled likewise."""
    scalar_lr: float = 0.04
    """AdamW's rate for alpha, beta and gamma."""
    alpha_lr: float | None = None
    """AdamW's rate for alpha; none means scalar_lr (the paper's authors use 0.005)."""
    beta_lr: float | None = None
    """AdamW's rate for beta; none means scalar_lr (the paper's authors use 0.5)."""
    gamma_lr: float | None = None
    """AdamW's rate for gamma; none means scalar_lr (the paper's authors use 0.5)."""
    memory_lr: float | None = None
    """Muon's rate for W_K and W_V of the memory; none means matrix_lr."""
    memory_warmup: float = 0.0
    """Share of the steps over which the rate of W_K, W_V and gamma rises linearly, on top of the ordinary rate."""
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
        check_fields(self, "optim")
        for name, value in named(self, "matrix_lr", "embedding_lr", "head_lr", "scalar_lr", "weight_decay").items():
            require(0 <= value < math.inf, f"optim.{name} is {value}; it must be at least 0")
        for name, value in named(self, "alpha_lr", "beta_lr", "gamma_lr", "memory_lr").items():
            require(value is None or 0 <= value < math.inf, f"optim.{name} is {value}; it must be at least 0, or none")
        require(0 <= self.momentum < 1, f"optim.momentum is {self.momentum}; it must be at least 0 and below 1")
        fine = all(0 <= beta < 1 for beta in self.betas)
        require(fine, f"optim.betas are {self.betas}; give two numbers, at least 0 and below 1")
        for name, share in named(self, "warmup", "decay", "final", "memory_warmup").items():
            require(0 <= share <= 1, f"optim.{name} is {share}; it is a share and must lie between 0 and 1")
        require(self.warmup + self.decay <= 1, f"optim.warmup {self.warmup} + decay {self.decay} exceed 1")
        clips = self.clip is None or 0 < self.clip < math.inf
        require(clips, f"optim.clip is {self.clip}; it must be positive or none")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, in what order of passes, and on what machine."""

    schedule: str = "settled-1..3"
    """Passes per step: parallel, interleaved-S, refinement-K, chunked-C, sequential, settled-R, hop-R (see
    `lrt schedule`), sizes fixed, drawn (1..3:p=0.8/0.1/0.1) or adaptive (1..3:tolerance=0.1:budget=1.5); or one after
    the other: parallel@0.5,settled-1..3."""
    consistency: float = 0.0
    """Weight of the consistency term: the mean squared distance of the memory that passes write from what they read."""
    batch: int = 32
    """Rows of one optimizer step, over all devices."""
    micro_batch: int | None = None
    """Rows of one forward and backward on one device; none means the whole share of the batch."""
    parallel: Parallelism = "ddp"
    """What torchrun's processes do: `ddp` replicates the model, `fsdp` shards it (docs/scaling.md)."""
    reshard: bool = False
    """Under fsdp, give a block back after every pass: least memory, but a gather per pass instead of one per step."""
    length: int = 2048
    """Positions of a row, T."""
    horizon: str = "ratio=20"
    """When to stop: steps=N, tokens=N, ratio=R (tokens per scaling parameter: matrices and head, not the memory),
    compute=C (R times token forwards per token: every pass counts, one without gradient a third, one that stops at
    source block s of L the share s/L of that), flops=F, or flops_of_plain=C (the training FLOPs that the same model
    without memory spends at compute C)."""
    seed: int = 0
    """Seed of initialisation, data order and drawn schedules."""
    device: str = "auto"
    """`cpu`, `cuda`, `mps` (Apple's, untested), or `auto`: cuda where there is one."""
    threads: int | None = None
    """CPU threads; none takes one where more are slower, as small models on busy machines have it (measured)."""
    dtype: Dtype = "auto"
    """Autocast type of training; evaluation is float32. `auto`: bfloat16 where the device multiplies it natively."""
    compile: bool = False
    """Compile the blocks; does not pay for runs of a few minutes on a CPU."""
    attention: Backend = "auto"
    """`masked`: one mask a pass; `auto`: on a CPU long passes attend in blocks of queries; `flex`: FlexAttention where
    a pass of several positions needs a mask; it trains on cuda alone (docs/speed.md)."""
    recompute: bool = False
    """Keep only the inputs of blocks for the backward pass and compute the rest again: less memory, a third slower."""
    eval_every: int = 250
    """Steps between evaluations; the last step is always evaluated. 0: only then."""
    eval_rows: int = 64
    """Validation rows of an evaluation."""
    save_minutes: float = 10.0
    """Minutes after which a checkpoint is written in any case. 0: never for the time's sake."""
    save_every: int = 1000
    """Steps between checkpoints; the last step is always saved. 0: only then."""
    keep: int = 2
    """Newest checkpoints kept; the best one by decoded BPB is kept beside them."""
    max_skipped: int = 10
    """Steps in a row whose loss or gradient is not finite after which training stops; each one is skipped."""
    log_every: int = 10
    """Steps between metric lines; the loss is read from the device only then."""
    log_to: str = ""
    """Trackers beside metrics.jsonl, with commas between them: tensorboard, wandb, trackio, mlflow. None by default."""
    init_from: str | None = None
    """Run whose weights (not its optimizer) training starts from; `lrt train --init-from` sets it, and the model."""
    gap_warning: float = 0.02
    """Live gap (decoded minus parallel BPB) above which a warning is shown."""

    def __post_init__(self) -> None:
        check_fields(self, "train")
        schedule = Curriculum.parse(self.schedule)
        self.horizon_parts()
        require(self.length >= 2, f"train.length is {self.length}; a row needs at least 2 positions")
        require(0 <= self.consistency < math.inf, f"train.consistency is {self.consistency}; it must be at least 0")
        for drawn, _ in schedule.shares():
            if drawn.weights:
                drawn.passes(self.length)  # raises now, not at the step that draws fewer passes than weights
        require(1 <= self.batch <= MOST, f"train.batch is {self.batch}; it must be at least 1, and at most {MOST:,}")
        for name, value in named(self, "eval_rows", "log_every", "max_skipped").items():
            require(value >= 1, f"train.{name} is {value}; it must be at least 1")
        require(self.keep >= 1, f"train.keep is {self.keep}; at least 1 checkpoint must be kept")
        minutes = self.save_minutes
        require(0 <= minutes < math.inf, f"train.save_minutes is {minutes}; give minutes, or 0 for none")
        for name, value in named(self, "eval_every", "save_every").items():
            require(value >= 0, f"train.{name} is {value}; it must be at least 0")
        require_seed("train.seed", self.seed)
        threads = self.threads
        require(
            threads is None or threads >= 1, f"train.threads is {threads}; it must be at least 1, or none to choose"
        )
        gap = self.gap_warning
        require(0 <= gap < math.inf, f"train.gap_warning is {gap}; give bits per byte, at least 0")
        require_choice("train.dtype", self.dtype, Dtype)
        require_choice("train.parallel", self.parallel, Parallelism)
        for name in self.trackers:
            require_choice("train.log_to", name, TrackerName)
        _ = self.execution  # checks its own
        micro = self.micro_batch
        require(
            micro is None or (micro >= 1 and self.batch % micro == 0),
            f"train.micro_batch {micro} must divide batch {self.batch}",
        )

    @property
    def trackers(self) -> tuple[TrackerName, ...]:
        """The names in `log_to`."""
        names: Any = (name.strip() for name in self.log_to.split(","))
        return tuple(name for name in names if name)

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
        valid = kind in ("steps", "tokens", "ratio", "compute", "flops", "flops_of_plain")
        require(
            valid and 0 < number < math.inf,
            f"train.horizon is {self.horizon!r}; write steps=1000, tokens=1e6, ratio=20, compute=20, flops=1e15 or "
            "flops_of_plain=20",
        )
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
        check_fields(self, "config")
        require_name(self.name, "name")
        _require_storable(self, "")
        length, context = self.train.length, self.model.context
        require(
            length <= context,
            f"train.length {length} exceeds model.context {context}; shorten the one or raise the other",
        )


def _require_storable(config: Any, where: str) -> None:
    """ValueError: a number that float32, in which models are computed, holds as 0 or as infinity; a text that no JSON
    file holds, such as a path that is no UTF-8.
    """
    for name, value in vars(config).items():
        if dataclasses.is_dataclass(value):
            _require_storable(value, f"{where}{name}.")
        for x in value if isinstance(value, tuple) else (value,):
            extreme = isinstance(x, float) and math.isfinite(x) and x != 0 and not TINY <= abs(x) <= 1 / TINY
            halved = isinstance(x, str) and SURROGATE.search(x) is not None
            require(not halved, f"{where}{name} is {one_line(ascii(x), 80)}: it is no UTF-8; choose a name that is")
            require(not extreme, f"{where}{name} is {x}; its size must lie between {TINY} and {1 / TINY}, or be 0")


def require_sense(config: RunConfig) -> None:
    """ValueError unless model, schedule and loss go together: every pass serves something, every option has an effect.

    Asked where a training begins, not where a configuration is read: what was trained stays readable.
    """
    t, memory = config.train, config.model.memory.recurrent
    runs = [(drawn, drawn.passes(t.length)) for drawn, _ in Curriculum.parse(t.schedule).shares()]
    for drawn, passes in runs:
        require(
            memory or token_forwards(passes, t.length) <= 1,
            f"the passes of {drawn} repeat one another: the model has no recurrence; set train.schedule to parallel",
        )
        require(passes[-1].weight > 0, f"the last pass of {drawn} has no loss and serves nothing; give it a weight")
    require(
        not t.consistency or (memory and any(any(rewriting(passes)) for _, passes in runs)),
        f"train.consistency is {t.consistency}, but no pass of {t.schedule} writes memory in place of some that it "
        "read; set it to 0, or train.schedule to settled-1..3, say",
    )


def expected_vocabulary(data: DataConfig) -> int | None:
    """Ids of the tokenizer that `data` describes, or asks a BPE for; None of one in a file, and of a task's own."""
    if data.source.startswith(TASK):
        return None
    kind = data.tokenizer.removesuffix(PAUSES)
    size = {"bytes": 257, "bpe": data.vocab_size}.get(kind)
    return None if size is None else size + data.tokenizer.endswith(PAUSES)


def with_vocabulary(config: RunConfig) -> RunConfig:
    """`config` whose model has the vocabulary of its tokenizer, where that is known before it is trained or read."""
    size = expected_vocabulary(config.data)
    return config if size is None else replace(config, model=replace(config.model, vocab_size=size))


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON-ready data."""
    return dataclasses.asdict(config)


def from_dict(cls: type[C], data: Any, where: str = "config") -> C:
    """Rebuild a configuration from `to_dict`'s output; unknown or ill-typed fields raise ValueError naming them."""
    require(isinstance(data, dict), f"{where} is a {type(data).__name__}; it must be an object of named fields")
    hints = hints_of(cls)
    unknown = sorted(set(data) - set(hints))
    require(not unknown, f"{where} has no field {', '.join(map(repr, unknown))}; known fields: {', '.join(hints)}")
    values = {name: _RENAMED.get((hints[name][1], str(value)), value) for name, value in data.items()}
    return cls(**{name: _field(*hints[name], value, f"{where}.{name}") for name, value in values.items()})


TINY = 1e-30
"""The smallest size of a number of a configuration: its square, or 1 through it, is still one in float32's range."""
MOST_BITS = 63
"""Of a whole number, beside its sign; what torch and files hold."""
_RENAMED = {("Backend", "merged"): "auto"}
"""What older configurations call a choice, by its type."""


def _field(hint: Any, written: str, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_dict(hint, value, where)
    bits = value.bit_length() if isinstance(value, int) else 0
    require(bits <= MOST_BITS, f"{where} is a whole number of {bits} bits; it must fit 64")
    return field_value(hint, written, value, where)


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`old` with the leaves of `new` put in; keys that `old` does not have stay, so that they can be refused."""
    both = {k: merged(old[k], v) if isinstance(v, dict) and isinstance(old.get(k), dict) else v for k, v in new.items()}
    return old | both


def overridden(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """`config` with the fields of `changes` put in, nested as `to_dict` nests them. ValueError: no such field."""
    return from_dict(RunConfig, merged(to_dict(config), dict(changes)))
