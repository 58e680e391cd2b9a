"""What a server is allowed to do, and how it decodes."""

from __future__ import annotations

from dataclasses import dataclass

from lrt.config.decoding import DEFAULT_MODE, PrefillOptions
from lrt.config.typed_fields import named
from lrt.utils.require import require, require_at_least, require_at_most

DAY = 86_400.0
"""Seconds."""
MOST_ROWS = 2**16


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Limits and decoding of a server."""

    rows: int = 32
    """Answers that decode together."""
    queue: int = 128
    """Answers that may wait for a row; a request that does not fit is refused (429)."""
    max_prompt: int | None = None
    """Longest prompt in tokens; by default what the model's context leaves room for."""
    max_output: int | None = None
    """Most tokens of one answer; by default the model's context."""
    max_choices: int = 64
    """Most answers of one request: prompts times n."""
    max_body: int = 1_000_000
    """Largest request body in bytes."""
    deadline: float = 120.0
    """Seconds after which a request is given up (408)."""
    connections: int = 900
    """Most connections; beyond them the one that has kept the server waiting longest is dropped."""
    connections_per_peer: int = 300
    """Most connections from one address; behind a proxy, those of all its clients."""
    header_seconds: float = 10.0
    """Seconds that a request's headers may take to arrive."""
    body_seconds: float = 30.0
    """Seconds that a request's body may take to arrive (408)."""
    store_metrics: bool = False
    """Show in /metrics what tells whether a prompt was kept: only where all who ask may know of each other."""
    allow_origin: tuple[str, ...] = ()
    """Origins whose pages may use the API (CORS), such as https://example.org; by default none but its own."""
    keep_mb: int = 256
    """Memory for the states of finished conversations, in MB; 0 keeps none."""
    prefill: str = DEFAULT_MODE
    """How long prompts are taken in: jacobi or interleaved-G sweeps, or exact: all prompts step with the batch."""
    tolerance: float = 1e-5
    """Estimated relative error of the memory at which sweeps stop; 1e-5 is near rounding (docs/serving.md)."""
    chunk: int = 128
    """Positions of a long prompt that are taken in between two steps of the batch."""
    sweep_from: int = 64
    """Tokens from which a prompt is swept; shorter ones step with the batch, at no cost to the others."""

    def __post_init__(self) -> None:
        PrefillOptions.parse(self.prefill, self.tolerance, 1, self.chunk)
        counts = ("rows", "queue", "max_choices", "max_body", "sweep_from", "connections", "connections_per_peer")
        require_at_least(1, **named(self, *counts))
        require_at_most(MOST_ROWS, rows=self.rows)
        for name, limit in named(self, "max_prompt", "max_output").items():
            require(limit is None or limit >= 1, f"--{name.replace('_', '-')} is {limit}; give at least 1, or none")
        require(self.keep_mb >= 0, f"--keep-mb is {self.keep_mb}; give at least 0, which keeps nothing")
        for name, seconds in named(self, "deadline", "header_seconds", "body_seconds").items():
            fine = 0 < seconds <= DAY
            require(fine, f"--{name.replace('_', '-')} is {seconds}; give some seconds, at most a day")
        wrong = [x for x in self.allow_origin if not x.startswith(("http://", "https://")) or x.count("/") != 2]
        require(not wrong, f"--allow-origin names {wrong[:1]}; give origins such as https://example.org")

    @property
    def prefill_options(self) -> PrefillOptions:
        """How long prompts are taken in."""
        return PrefillOptions.parse(self.prefill, self.tolerance, chunk=self.chunk)

    @property
    def shapes(self) -> tuple[int, ...]:
        """Numbers of rows a step computes: 8, 16, 32, .. up to all. Steps of 4 rows and more agree bit for bit where
        this was measured (docs/serving.md), so that a row does not notice how many others there are."""
        sizes = [8]
        while sizes[-1] < self.rows:
            sizes.append(2 * sizes[-1])
        return tuple(sizes)
