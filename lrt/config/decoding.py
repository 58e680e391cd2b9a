"""How text is decoded: how a prompt is taken in, and how tokens are drawn. No torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lrt.config.typed_fields import check_fields
from lrt.passes import Pass, no_grad_pass

Weights = Literal["full", "int8"]
"""Large matrices as they are, or in 8 bits (docs/decoding.md#weights-in-8-bits)."""
DEFAULT_MODE = "interleaved-8"
"""Fast whether the memory settles soon or late: measured in docs/results/decoding.md."""
DEFAULT_TOLERANCE = 1e-4
"""Under every mode no measured prompt's logits differed from exact decoding's by 1e-3 (docs/results/decoding.md)."""
DEFAULT_CHUNK = 1024
DEFAULT_SWEEPS = 32
PENALTIES = (0.01, 100.0)
"""Smallest and largest repetition penalty: beyond them nothing but an overflow is gained."""
TURN, TOOL_TURN, NEXT = "USER: {}\nBOT:", "TOOL: {}\nBOT:", "\nUSER:"
"""Where a model has no chat template: how a turn is written, how a tool's result is, and what ends an answer."""
CALLED = "\nTOOL:"
"""What ends an answer that calls a tool, as NEXT ends any other."""
BIAS = 1e4
"""Largest size of a logit bias and of a presence or frequency penalty."""


class PrefillOptions(NamedTuple):
    """How to solve the recurrence over a prompt."""

    stride: int
    """0: exactly, token by token; 1: Jacobi sweeps; g: interleaved (Gauss-Seidel) sweeps of g subsets."""
    tolerance: float
    """Largest estimated error of any position's memory, relative to its norm, at which a row has settled."""
    max_sweeps: int
    """Sweeps per chunk before the rest is finished exactly."""
    chunk: int
    """Positions solved at a time."""

    @staticmethod
    def parse(
        mode: str,
        tolerance: float | None = DEFAULT_TOLERANCE,
        max_sweeps: int = DEFAULT_SWEEPS,
        chunk: int = DEFAULT_CHUNK,
    ) -> PrefillOptions:
        """Read `exact`, `jacobi` or `interleaved-G`; a tolerance of None is the default one.

        ValueError: another mode, or a number out of range.
        """
        match = re.fullmatch(r"exact|jacobi|interleaved-([1-9]\d*)", mode)
        if not match:
            raise ValueError(
                f"prefill mode {mode!r} is unknown: use exact, jacobi or interleaved-G, e.g. interleaved-8"
            )
        stride = int(match[1]) if match[1] else int(mode == "jacobi")
        tolerance = DEFAULT_TOLERANCE if tolerance is None else tolerance
        if not 0 <= tolerance < math.inf or max_sweeps < 1 or chunk < 1:
            raise ValueError(
                f"tolerance {tolerance}, max_sweeps {max_sweeps}, chunk {chunk}: use a tolerance >= 0, the others >= 1"
            )
        return PrefillOptions(stride, tolerance, max_sweeps, chunk)

    def __str__(self) -> str:
        name = "jacobi" if self.stride == 1 else f"interleaved-{self.stride}"
        return f"sweeps({name}, {self.tolerance:g})" if self.stride else "exact"

    def sweep(self, number: int, length: int) -> list[Pass]:
        """The passes of sweep `number` (from 1); the first one is a full pass, since it has nothing to read yet."""
        stride = min(self.stride, length) if number > 1 else 1
        return [no_grad_pass(range(i, length, stride)) for i in range(stride)]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is continued, and when it ends.

    What changes the draw applies in this order: logit bias, repetition penalty, frequency and presence penalty,
    temperature, top-k, top-p, min-p, each to what the one before left.
    """

    max_new_tokens: int = 256
    """Most tokens to generate."""
    min_new_tokens: int = 0
    """Tokens before which neither a stop token is drawn nor a stop text looked for."""
    temperature: float = 1.0
    """Logits are divided by it; 0 is greedy."""
    top_k: int | None = None
    """Keep the k most probable tokens (the lower id first among equals)."""
    top_p: float = 1.0
    """Keep the fewest most probable tokens whose probabilities reach p in sum."""
    min_p: float = 0.0
    """Keep tokens at least min_p times as probable as the most probable one."""
    repetition_penalty: float = 1.0
    """Divide positive and multiply negative logits of tokens in the prompt or the answer by it (CTRL, section 4.1)."""
    presence_penalty: float = 0.0
    """Taken from the logit of every token that the answer holds."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit for each time that the answer holds it."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids, and what is added to their logits."""
    seed: int = 0
    """The same seed gives the same text, whatever else is in the batch."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer, or one text; they are not part of it."""
    stop_tokens: tuple[int, ...] | None = None
    """Tokens that end the answer; they spell no text. None: the model's BOS, which opens the next document."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        check_fields(self, "sampling")
        low, high = PENALTIES
        size = f"between -{BIAS:g} and {BIAS:g}"
        for name, fine, range_ in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("min_new_tokens", self.min_new_tokens >= 0, "at least 0"),
            ("temperature", 0 <= self.temperature < float("inf"), "at least 0; 0 is greedy"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1, or none"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", low <= self.repetition_penalty <= high, f"between {low:g} and {high:g}"),
            ("presence_penalty", abs(self.presence_penalty) <= BIAS, size),
            ("frequency_penalty", abs(self.frequency_penalty) <= BIAS, size),
            ("logit_bias", all(i >= 0 and abs(b) <= BIAS for i, b in self.logit_bias), f"ids with values {size}"),
            ("seed", self.seed >= 0, "at least 0"),
            ("stop_tokens", all(i >= 0 for i in self.stop_tokens or ()), "ids, at least 0"),
            ("stop", all(self.stop), "texts of at least one character"),
        ):
            if not fine:
                raise ValueError(f"sampling.{name} is {vars(self)[name]}; it must be {range_}")
