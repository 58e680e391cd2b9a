"""What is measured or planned, and on what machines. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lrt.config.decoding import PrefillOptions
from lrt.config.model import MOST, Backend
from lrt.config.recipes import RecipeName
from lrt.config.run import Device, Dtype
from lrt.config.typed_fields import named
from lrt.schedule import Schedule
from lrt.utils.require import require, require_at_least, require_at_most

TIMED_SCHEDULES = (
    "interleaved-2", "interleaved-4", "interleaved-8", "refinement-1", "refinement-3",
    "settled-1", "settled-2", "settled-3",
)  # fmt: skip
MOST_TIMED = 2**20
"""Of anything that is timed: more would not end."""
MOST_LOAD = 100_000
"""Of clients, tokens, seconds and rounds."""
MOST_POWER = 1e24
"""What no cluster has of anything: bytes, FLOP/s, devices."""
PREFILL_MODES = ("jacobi", "interleaved-2", "interleaved-4", "interleaved-8", "interleaved-16")


@dataclass(frozen=True, kw_only=True)
class StepBenchmark:
    """Time training steps of every schedule against the plain transformer's."""

    device: Device = "auto"
    """`cpu`, `cuda`, `mps` (untested) or `auto`."""
    recipe: RecipeName | None = None
    """Take model and length from a recipe; by default depth 4, width 256, vocabulary 4096, shared projections."""
    depth: int | None = None
    """Blocks, in place of the recipe's."""
    width: int | None = None
    """Model width, in place of the recipe's."""
    vocab_size: int | None = None
    """Vocabulary, in place of the recipe's."""
    batch: int = 16
    """Rows of a step."""
    length: int | None = None
    """Positions of a row; by default 512, or the recipe's."""
    dtype: Dtype = "auto"
    """Autocast type; `auto`: bfloat16 where the device multiplies it natively."""
    schedules: tuple[str, ...] = TIMED_SCHEDULES
    """Rows beside the plain one."""
    repeats: int = 5
    """Timed steps per row; the median counts."""
    compile: bool = False
    """Compile the blocks, the plain model's too."""
    attention: Backend = "auto"
    """Attention of strided passes: `masked`, `flex` or `auto`."""
    recompute: bool = False
    """Compute blocks again in the backward pass."""
    memory: bool = True
    """Also take each row's peak memory, in a process of its own."""
    profile: bool = False
    """Also divide each row's step among its parts."""
    peer: bool = False
    """Also time transformers' own nanochat model of the same sizes (its whole step with fused AdamW alone)."""

    def __post_init__(self) -> None:
        require_at_most(MOST_TIMED, batch=self.batch, repeats=self.repeats, length=self.length)
        require_at_least(1, batch=self.batch, repeats=self.repeats, depth=self.depth, width=self.width)
        require_at_least(2, length=self.length, vocab_size=self.vocab_size)
        for name in self.schedules:
            require(Schedule.parse(name) == Schedule.parse(name).at_largest(), f"schedule {name} has a range; fix it")


@dataclass(frozen=True, kw_only=True)
class DecodingBenchmark:
    """What is measured."""

    recipe: RecipeName = "d12"
    """Model of the latency figures; its weights are random, which latency does not mind."""
    checkpoint: Path | None = None
    """Run folder of the trained model whose prefill and scoring are measured; without one they are left out."""
    batches: tuple[int, ...] = (1, 8, 32)
    """Rows of the latency figures."""
    contexts: tuple[int, ...] = (128, 512, 1024, 2048, 4096)
    """Tokens already in the cache, filled synthetically."""
    lengths: tuple[int, ...] = (256, 1024)
    """Prompt lengths."""
    prompts: int = 4
    """Prompts of each length, from the run's held-out text; the first four are timed, all are compared."""
    modes: tuple[str, ...] = PREFILL_MODES
    """Ways of prefill that are measured."""
    source: str | None = None
    """Take the prompts from this text source instead."""
    steps: int = 15
    """Timed pairs per latency figure; the median is reported."""
    compile: bool = True
    """Compile the step."""
    peer: bool = False
    """Also time `generate` of transformers' own nanochat model beside the backbone without memory."""
    device: Device = "auto"
    """cpu, cuda, mps (untested) or auto."""

    def __post_init__(self) -> None:
        require_at_least(1, steps=self.steps, prompts=self.prompts)
        require_at_most(MOST_TIMED, steps=self.steps)
        for mode in self.modes:
            PrefillOptions.parse(mode)
        for name, sizes in (("batches", self.batches), ("contexts", self.contexts), ("lengths", self.lengths)):
            require(bool(sizes), f"--{name} are none; give at least one number")
            require_at_least(1, **{name: min(sizes)})
            require_at_most(MOST, **{name: max(sizes)})


@dataclass(frozen=True, kw_only=True)
class LoadBenchmark:
    """Measure a served model: tokens per second, and time to the first token, by number of clients."""

    clients: tuple[int, ...] = (1, 8, 32)
    """Clients at the same time; the ratios are against the first number."""
    tokens: int = 64
    """Tokens of every answer."""
    seconds: float = 10.0
    """Length of every measurement."""
    load: float = 0.7
    """Arrival rate of the open loop, as a share of the closed loop's."""
    rounds: int = 1
    """Rounds over all numbers of clients, in turns; the median of each figure is reported."""
    prompts: tuple[int, ...] = ()
    """Lengths of prompts in tokens: streams of these in a closed loop, in place of short prompts in both loops."""
    shared: tuple[int, ...] = (0,)
    """Tokens, the same for all, that stand before such prompts."""
    keep_mb: int = 256
    """Memory of the server for kept states, in MB; 0 keeps none, so that every prompt is taken in whole."""

    def __post_init__(self) -> None:
        require(bool(self.shared), "--shared is empty; give numbers from 0 on")
        require(bool(self.prompts) or self.shared == (0,), "--shared stands before prompts of a length; give --prompts")
        sizes = (*self.prompts, *(n + 1 for n in self.shared))
        require(min(sizes) >= 1, "--prompts take numbers from 1 on, --shared from 0 on")
        require(bool(self.clients) and min(self.clients) >= 1, f"--clients are {self.clients}; give numbers from 1 on")
        require(self.seconds > 0 and self.tokens >= 1 and self.rounds >= 1, "give positive seconds, tokens and rounds")
        require(0 < self.load <= 100, f"--load is {self.load}; give a share above 0, and at most 100")
        require(self.keep_mb >= 0, f"--keep-mb is {self.keep_mb}; give at least 0, which keeps nothing")
        require_at_most(MOST_LOAD, tokens=self.tokens, seconds=self.seconds, rounds=self.rounds)
        for name, numbers in (("clients", self.clients), ("prompts", self.prompts), ("shared", self.shared)):
            require_at_most(MOST_LOAD, **{name: max(numbers, default=0)})


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The machines."""

    devices: int = 8
    """Devices in all."""
    per_node: int = 8
    """Devices of one machine."""
    memory: float = 80e9
    """Bytes of one device."""
    flops: float = 989e12
    """Peak FLOP/s of one device in the training's number type (H100, dense bfloat16; for a CPU, measure it)."""
    efficiency: float = 0.4
    """Share of the peak that the passes reach; what `lrt bench train` calls MFU."""
    within: float = 450e9
    """Bytes/s that a device sends inside its machine."""
    across: float = 50e9
    """Bytes/s that a device sends to other machines."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            require(0 < value < MOST_POWER, f"--cluster.{name} is {value}; give more than 0, less than {MOST_POWER:g}")
        for name, value in named(self, "memory", "flops", "within", "across").items():
            require(value >= 1, f"--cluster.{name} is {value}; give at least 1")
        require(self.efficiency <= 1, f"--cluster.efficiency is {self.efficiency}; it is a share, at most 1")

    @property
    def speed(self) -> float:
        """Bytes/s of the slowest link of a ring over all devices."""
        return self.within if self.devices <= self.per_node else self.across
