"""What a suite of tasks is: parts that are scored one by one, so that an evaluation that was stopped goes on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lrt.data.normalised import Spelling
from lrt.data.tokenizer import Tokenizer
from lrt.evaluation.likelihood import Candidate, Likelihood, likelihoods
from lrt.model.lrt import LRT

Scores = dict[str, Any]
"""Figures of a part or of a whole suite, as plain data: `accuracy`, its standard `error`, how many `items`."""


@dataclass(kw_only=True)
class Scorer:
    """A model, and how it scores."""

    model: LRT
    tokenizer: Tokenizer
    mode: str
    """How texts are taken in: exact, jacobi, interleaved-G or zero_memory."""
    limit: int | None = None
    """Items of each part; None takes all."""
    normalised: bool = False
    """Whether tokens may lose text; otherwise a text that they do not spell raises ValueError."""
    progress: Callable[[int, int], None] = lambda done, total: None
    """Takes how many items of a part are done, and how many there are."""
    spelling: Spelling = field(init=False)
    """What of the texts the tokens lost."""

    def __post_init__(self) -> None:
        self.spelling = Spelling(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        """The text as ids, without BOS."""
        return self.spelling.encode(text, self.normalised)

    def likelihoods(self, candidates: Sequence[Candidate]) -> list[Likelihood]:
        """What the model says of the candidates."""
        return likelihoods(self.model, candidates, self.mode)


class Suite(NamedTuple):
    """Tasks that are reported together."""

    name: str
    parts: Mapping[str, Callable[[Scorer], Scores]]
    """What scores each part, by its name, in order."""
    summarise: Callable[[Mapping[str, Scores]], Scores]
    """Figures of the whole from those of all parts."""
    data: str
    """Fingerprint of the items."""


def share(hits: int, items: int) -> Scores:
    """Accuracy with its standard error, sqrt(p (1 - p) / (n - 1)), items independent."""
    accuracy = hits / items
    return {"accuracy": accuracy, "error": math.sqrt(accuracy * (1 - accuracy) / max(items - 1, 1)), "items": items}


def mean_of(parts: Iterable[Scores], value: str = "accuracy", error: str = "error") -> Scores:
    """Mean of the parts' figures, each counted once, and its standard error from theirs."""
    scores = list(parts)
    return {
        value: sum(s[value] for s in scores) / len(scores),
        error: math.sqrt(sum(s[error] ** 2 for s in scores)) / len(scores),
        "items": sum(s["items"] for s in scores),
    }


def fingerprint(texts: Iterable[str]) -> str:
    """Sha256 of texts in their order, 16 hex digits."""
    digest = hashlib.sha256()
    for text in texts:
        content = text.encode("utf-8", "surrogatepass")
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()[:16]
