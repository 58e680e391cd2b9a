"""What the server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """One server's counters. What they say of the work that a prompt took, they say of whether it was kept.

    So those stand in a registry of their own, which is shown only where all clients may know of each other.
    """

    def __init__(self) -> None:
        r, p = self.registry, self.private = CollectorRegistry(), CollectorRegistry()
        self.requests = Counter("lrt_requests", "Requests answered.", ["path", "status"], registry=r)
        self.prompt_tokens = Counter("lrt_prompt_tokens", "Prompt tokens of admitted answers.", registry=r)
        self.reused_tokens = Counter("lrt_reused_tokens", "Prompt tokens that a kept state had taken in.", registry=p)
        self.swept_tokens = Counter("lrt_swept_tokens", "Prompt tokens taken in by sweeps.", registry=p)
        self.tokens = Counter("lrt_generated_tokens", "Tokens generated.", registry=r)
        self.steps = Counter("lrt_steps", "Steps of the running batch.", registry=p)
        self.cancelled = Counter("lrt_cancelled", "Answers whose client went away.", registry=r)
        self.expired = Counter("lrt_expired", "Answers given up at their deadline.", registry=r)
        self.refused = Counter("lrt_refused", "Requests refused because the queue was full.", registry=r)
        self.running = Gauge("lrt_rows_running", "Rows in use.", registry=r)
        self.waiting = Gauge("lrt_waiting", "Answers and scores that wait.", registry=r)
        self.kept_bytes = Gauge("lrt_kept_bytes", "Bytes of kept states.", registry=p)
        self.first_token = Histogram(
            "lrt_first_token_seconds", "From submission to an answer's first token.", buckets=SECONDS, registry=r
        )
        self.seconds = Histogram(
            "lrt_answer_seconds", "From submission to an answer's end.", buckets=SECONDS, registry=r
        )
