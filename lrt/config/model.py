"""What a model is, and how it computes: frozen dataclasses with validation. A whole run is in `run.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from lrt.config.typed_fields import check_fields
from lrt.utils.require import require, require_choice

Projection = Literal["none", "gates", "shared", "layerwise"]
ValueEmbeddings = Literal["none", "alternating", "all"]
LastLayer = Literal["L", "S"]
Backend = Literal["auto", "masked", "flex"]
MLPKind = Literal["relu2", "swiglu"]
Biases = Literal["none", "qkv", "attention", "all"]
QKNorm = Literal["none", "before", "after"]
RopeKind = Literal["none", "linear", "llama3"]
MemoryStart = Literal["uniform", "zero"]
Injection = Literal["scaled", "matched", "share"]


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """The recurrent memory: where it is taken from and how it is injected (docs/method.md#memory)."""

    projection: Projection = "layerwise"
    """KVProjection: `shared` has one W_K, W_V for all layers (the paper's default), `layerwise` a pair a layer;
    `gates` has the gates alone, as if the memory were always zero: the control of what gating does by itself."""
    residual: bool = True
    """ResidualInjection: add gamma_l m_{t-1} to the stream before every block."""
    injection: Injection = "scaled"
    """What it adds: `scaled`: gamma m; `matched`: gamma m brought to the length of the stream; `share`: that, and the
    stream keeps 1 - gamma of itself where there is a memory."""
    source: int | float | None = None
    """Block (1..L) after which the memory is taken; none means the last one, L; a fraction between 0 and 1 means that
    share of L. 0 is the token shift: the memory is RMSNorm of the previous token's embedding, without recurrence."""
    shift: bool = False
    """Read the previous token's embedding beside the recurrent memory, by a W_K, W_V and gamma of its own. Says nothing
    new with source 0, which is that shift, nor without projections and residual, where nothing is read."""
    start: MemoryStart = "uniform"
    """Where W_K and W_V start: `uniform`, as the other matrices, or `zero`."""
    blocks: tuple[int, int] | None = None
    """First and last block (1..depth) that read memory; the others have neither gates, projections nor gamma. None
    means all."""
    gate_width: int | None = None
    """Channels of the attention input that the gates read; none means all of them."""

    def __post_init__(self) -> None:
        check_fields(self, "model.memory")
        require_choice("model.memory.projection", self.projection, Projection)
        require_choice("model.memory.start", self.start, MemoryStart)
        require_choice("model.memory.injection", self.injection, Injection)
        fits = self.residual or self.injection == "scaled"
        require(fits, f"model.memory.injection is {self.injection}, but model.memory.residual is off; turn it on")
        share = self.source
        require(
            not isinstance(share, float) or 0 < share < 1,
            f"model.memory.source is {share}; write a whole number for a block, or a fraction between 0 and 1",
        )

    @property
    def gated(self) -> bool:
        """Whether attention has gates."""
        return self.projection != "none"

    @property
    def projected(self) -> bool:
        """Whether a W_K and W_V make keys and values of memory."""
        return self.projection in ("shared", "layerwise")

    @property
    def on(self) -> bool:
        """Whether the model reads any memory at all."""
        return self.projected or self.residual

    @property
    def recurrent(self) -> bool:
        """Whether it reads what a block computed at the previous position: then a parallel pass is not exact."""
        return self.on and self.source != 0

    @property
    def shifted(self) -> bool:
        """Whether it reads the previous token's embedding, which every pass knows."""
        return self.on and (self.shift or self.source == 0)

    @property
    def sources(self) -> int:
        """Memories that are read: each has a W_K, W_V and gamma of its own."""
        return self.recurrent + self.shifted


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are slowed down so that a model reaches beyond the length it was first trained on."""

    kind: RopeKind = "none"
    """`linear`: all by the factor; `llama3`: the slow ones by the factor, the fast ones not, a ramp between."""
    factor: float = 1.0
    """How many times slower."""
    low: float = 1.0
    """Llama 3: channels that turn at most so often over the original context are slowed in full."""
    high: float = 4.0
    """Llama 3: channels that turn at least so often over it are left alone."""
    original: int = 8192
    """Llama 3: the original context, in tokens."""

    def __post_init__(self) -> None:
        check_fields(self, "model.backbone.rope")
        require_choice("model.backbone.rope.kind", self.kind, RopeKind)
        sound = 1 <= self.factor < math.inf and 0 < self.low < self.high < math.inf and self.original >= 1
        numbers = f"factor {self.factor}, low {self.low}, high {self.high}, original {self.original}"
        require(sound, f"model.backbone.rope has {numbers}; use finite factor >= 1, 0 < low < high, original >= 1")


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Where the backbone departs from nanochat's, as other families' checkpoints need it. The defaults do not."""

    head_width: int | None = None
    """Channels of a head, E; none means width / heads."""
    mlp: MLPKind = "relu2"
    """`relu2`: two matrices and ReLU squared; `swiglu`: three, down(silu(glu(x)) up(x))."""
    mlp_width: int | None = None
    """Hidden channels of the MLP; none means 4 x width."""
    tied: bool = False
    """The head is the embedding's matrix."""
    biases: Biases = "none"
    """Biases of the projections: of query, key and value, of the output too, or of the MLP's as well."""
    norm_weights: bool = False
    """Learned weights of the norms before attention, before the MLP and before the head (the memory's has none)."""
    norm_eps: float = 1e-6
    """Added to the mean square in every norm."""
    embedding_norm: bool = True
    """RMSNorm of the token embedding."""
    qk_norm: QKNorm = "after"
    """RMSNorm of queries and keys: after RoPE without weights (nanochat), before it with weights (Qwen3), or none."""
    rope: RopeScaling = field(default_factory=RopeScaling)
    """Scaling of the rotary frequencies."""

    def __post_init__(self) -> None:
        check_fields(self, "model.backbone")
        require_choice("model.backbone.mlp", self.mlp, MLPKind)
        require_choice("model.backbone.biases", self.biases, Biases)
        require_choice("model.backbone.qk_norm", self.qk_norm, QKNorm)
        for name, size in (("head_width", self.head_width), ("mlp_width", self.mlp_width)):
            require(size is None or size >= 1, f"model.backbone.{name} is {size}; it must be at least 1, or none")
        require(0 < self.norm_eps < 1, f"model.backbone.norm_eps is {self.norm_eps}; it must be positive and small")


MOST, MOST_BLOCKS = 2**24, 2**12
"""Largest sizes of a model, and most blocks: above what anybody has trained, below what overflows."""
MEMORY_OFF = MemoryConfig(projection="none", residual=False)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer, nanochat-style unless `backbone` says otherwise, with a recurrent memory."""

    depth: int = 12
    """Blocks, L."""
    loops: int = 1
    """Times the stack of blocks is run over, with the same weights: the looped transformer. Each time has keys and
    values of its own, and x0 enters again by beta."""
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
    """A letter a layer, repeated: L sees everything, S a sliding window. The last layer goes by `last_layer`."""
    last_layer: LastLayer = "L"
    """L as in nanochat, whatever the pattern says; S too confines it to the window. With S everywhere the state no
    longer grows with the text."""
    window: int | None = None
    """Positions a sliding-window layer sees, the current one included; none means half the context."""
    document_attention: bool = False
    """Confine attention to the document that a position belongs to: in packed rows, from its BOS on. The memory is
    reset there in any case."""
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
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """Departures of the backbone from nanochat's."""

    def __post_init__(self) -> None:
        check_fields(self, "model")
        self._require_sizes()
        require(self.depth >= 1, f"model.depth is {self.depth}; a model needs at least 1 block")
        looped = self.loops == 1 or (self.loops > 1 and self.residual_scalars)
        require(looped, f"model.loops is {self.loops}; it must be at least 1, and loops need model.residual_scalars")
        width, heads, kv_heads = self.d, self.h, self.k
        require(width >= 2, f"model.width is {width}; it must be at least 2")
        even = self.backbone.head_width is not None or (heads >= 1 and width % heads == 0)
        require(heads >= 1 and even, f"model.width {width} is not a multiple of model.heads {heads}")
        require(self.e % 2 == 0, f"head width {self.e} is odd; rotary embeddings need an even one")
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
        require_choice("model.last_layer", self.last_layer, LastLayer)
        require_choice("model.value_embeddings", self.value_embeddings, ValueEmbeddings)
        source, gates, blocks = self.memory.source, self.memory.gate_width, self.memory.blocks
        require(
            source is None or 0 <= source <= self.layers,
            f"model.memory.source is block {source}; this model has blocks 1..{self.layers}, and 0 is the token shift",
        )
        require(
            blocks is None or 1 <= blocks[0] <= blocks[1] <= self.depth,
            f"model.memory.blocks is {blocks}; give the first and the last block, within 1..{self.depth}",
        )
        require(
            gates is None or 1 <= gates <= width,
            f"model.memory.gate_width is {gates}; it must be between 1 and the width, {width}",
        )

    def _require_sizes(self) -> None:
        """Refuse what no machine can hold, before anything of that size is computed with."""
        back = self.backbone
        inside = {"backbone.head_width": back.head_width, "backbone.mlp_width": back.mlp_width}
        sizes = {"depth": self.depth, "loops": self.loops, "heads": self.heads, "width": self.width}
        sizes |= {"window": self.window, "context": self.context, "vocab_size": self.vocab_size} | inside
        for name, size in sizes.items():
            most = MOST_BLOCKS if name in ("depth", "loops") else MOST
            require(size is None or size <= most, f"model.{name} is {size}; it may be at most {most:,}")

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
        return self.backbone.head_width or self.d // self.h

    @property
    def mlp_width(self) -> int:
        """Hidden channels of the MLP."""
        return self.backbone.mlp_width or 4 * self.d

    @property
    def layers(self) -> int:
        """Blocks that a forward runs, the loops counted."""
        return self.depth * self.loops

    @property
    def source(self) -> int:
        """Block whose output is the memory, 1..L, loops counted; 0 for the token shift."""
        chosen = self.memory.source
        if isinstance(chosen, float):
            return max(1, math.floor(chosen * self.layers + 0.5))
        return self.layers if chosen is None else chosen

    @property
    def feeds_back(self) -> bool:
        """Whether the memory depends on earlier memory: some block up to the source block reads it."""
        return self.memory.recurrent and self._first_reader <= self.source

    @property
    def blocks_below(self) -> int:
        """Blocks below both the first that reads memory and the source block: what they compute is no sweep's work."""
        return max(0, min(self._first_reader, self.source) - 1) if self.memory.recurrent else 0

    @property
    def _first_reader(self) -> int:
        return 1 if self.memory.blocks is None else self.memory.blocks[0]

    def blocks_run(self, *, top: bool = True, again: bool = False) -> range:
        """Blocks that a pass runs, from 0, loops counted: to the top or to the source block.

        `again`: earlier passes have been at all its positions, so that blocks below the memory need not run again.
        """
        return range(self.blocks_below if again else 0, self.layers if top else self.source)

    @property
    def gate_width(self) -> int:
        """Channels the gates read, G."""
        return self.memory.gate_width or self.d

    def reads_memory(self, block: int) -> bool:
        """Whether block `block` (0-based, of the stack) reads memory."""
        first, last = self.memory.blocks or (1, self.depth)
        return first <= block + 1 <= last

    @property
    def memory_text(self) -> str:
        """The memory in words, for people."""
        m = self.memory
        if not m.on:
            return "none"
        recurrent = [f"source block {self.source}"] if m.recurrent else []
        shift = ["the previous token's embedding (token shift)"] if m.shifted else []
        window = "" if m.blocks is None else f", read by blocks {m.blocks[0]}..{m.blocks[1]}"
        way = "" if m.injection == "scaled" else f", injected as {m.injection}"
        return f"{m.projection} projections, {' and '.join(recurrent + shift)}{window}{way}"

    def windows(self) -> tuple[int | None, ...]:
        """The window of every layer: positions seen including the current one, or None for all of them."""
        short = self.window or max(1, self.context // 2)
        letters = [self.window_pattern[i % len(self.window_pattern)] for i in range(self.depth - 1)]
        return self.loops * tuple(short if c == "S" else None for c in [*letters, self.last_layer])

    def has_value_embedding(self, layer: int) -> bool:
        """Whether block `layer` (0-based) has a value embedding."""
        alternate = layer % 2 == (self.depth - 1) % 2
        return self.value_embeddings == "all" or (self.value_embeddings == "alternating" and alternate)


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a model computes, never what: every choice gives the same values and gradients, up to rounding."""

    attention: Backend = "auto"
    """`masked`: one mask a pass; `auto`: on a CPU long passes attend in blocks of queries; `flex`: FlexAttention where
    a pass of several positions needs a mask; it trains on cuda alone (docs/speed.md)."""
    recompute: bool = False
    """Keep only the inputs of blocks for the backward pass and compute the rest again."""
    compile: bool = False
    """Compile the blocks, for passes over slices; decoding compiles its own step."""

    def __post_init__(self) -> None:
        check_fields(self, "train")
        require_choice("train.attention", self.attention, Backend)

    @property
    def backend(self) -> Backend:
        """The backend that is left: a compiled block has one shape for all its keys, so `auto` means the mask there."""
        return "masked" if self.compile and self.attention == "auto" else self.attention
