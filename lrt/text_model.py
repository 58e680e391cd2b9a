"""Three calls: `lrt.load` a run, `lrt.train` one, and ask the model for text by text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, final

import torch

from lrt.config.decoding import DEFAULT_MODE, SamplingParams
from lrt.config.recipes import recipe
from lrt.config.run import RunConfig, overridden
from lrt.data.tokenizer import Tokenizer
from lrt.inference.chat import complete
from lrt.inference.generate import score
from lrt.model.lrt import LRT
from lrt.training.checkpoint import load_model
from lrt.training.logging import Jsonl, Live
from lrt.training.trainer import train as train_run
from lrt.utils.files import expand_home
from lrt.utils.hardware import resolve_device

SAMPLING = SamplingParams(temperature=0.8)
"""How text is drawn where nothing else is said, as `lrt sample` draws it."""


class TextScore(NamedTuple):
    """How probable a model finds a text."""

    nats: float
    """Negative log-likelihood of the whole text, decoded with memory; its end is not scored."""
    tokens: int
    bytes: int
    """Of the text in UTF-8."""
    bits_per_byte: float
    mode: str
    """How the recurrence was solved: `exact`, `zero_memory`, or such as `sweeps(interleaved-8, 0.0001)`."""


@final
@dataclass(frozen=True)
class TextModel:
    """A trained model and its tokenizer: text in, text out."""

    model: LRT
    """In evaluation mode."""
    tokenizer: Tokenizer
    config: RunConfig
    """What it was trained with."""
    run: Path
    """The run's folder."""

    def generate(self, prompt: str = "", *, mode: str = DEFAULT_MODE, drafts: int = 0, **sampling: Any) -> str:
        """What the model writes after `prompt`, which is not repeated.

        Args:
            prompt: the beginning of a document.
            mode: how the prompt is taken in: `exact`, `jacobi` or `interleaved-G`.
            drafts: most tokens guessed ahead where the text repeats itself, and checked together.
            sampling: fields of `SamplingParams`, such as `temperature=0.7, max_new_tokens=100, seed=1`.

        Raises:
            ValueError: the prompt does not fit the context, or a value is out of range. TypeError: no such field.
        """
        return "".join(self.stream(prompt, mode=mode, drafts=drafts, **sampling))

    def stream(self, prompt: str = "", *, mode: str = DEFAULT_MODE, drafts: int = 0, **sampling: Any) -> Iterator[str]:
        """The same text piece by piece, as soon as it is certain; arguments and errors are those of `generate`."""
        params = replace(SAMPLING, **sampling)
        return complete(self.model, self.tokenizer, prompt, params, mode=mode, drafts=drafts)

    def score(self, text: str, *, mode: str = DEFAULT_MODE) -> TextScore:
        """How probable the decoded model finds `text`, as a document of its own.

        `mode` is one of `generate`'s, or `zero_memory`: one parallel pass without memory. ValueError: the text is
        empty, or longer than the model's context.
        """
        ids, context = self.tokenizer.encode(text), self.model.config.context
        if not 1 <= len(ids) <= context:
            raise ValueError(f"the text has {len(ids)} tokens; give 1 to {context}, the model's context")
        row = torch.tensor([[self.tokenizer.bos, *ids]], device=self.model.device)
        scored = score(self.model, row[:, :-1], row[:, 1:], mode=mode)
        nats, size = float(scored.nats.cpu().double().sum()), len(text.encode())
        return TextScore(nats, len(ids), size, nats / size / math.log(2), scored.mode)


def load(run: str | Path, device: str = "auto") -> TextModel:
    """The model of a run folder (its newest checkpoint) or of one checkpoint folder, with its tokenizer.

    `device` is auto, cpu, cuda or mps. ValueError: there is no checkpoint, or it is damaged.
    """
    loaded = load_model(expand_home(run), resolve_device(device))
    return TextModel(loaded.model, loaded.tokenizer, loaded.config, loaded.run)


def train(
    config: RunConfig | str,
    out: str | Path | None = None,
    *,
    resume: bool | None = False,
    progress: bool = True,
    **overrides: Mapping[str, Any] | str,
) -> TextModel:
    """Train a recipe or a configuration, and load the result.

    Args:
        config: a recipe's name, such as `cpu_demo`, or a whole configuration.
        out: the run's folder, and its name; by default runs/NAME.
        resume: True goes on with the run in `out`, None goes on if there is one, False begins.
        progress: show progress on standard error; metrics.jsonl in the folder holds every figure in any case.
        overrides: fields to change, by part: `data={"source": "book.txt"}, train={"horizon": "steps=500"}`.

    Raises:
        ValueError: an unknown field or bad value, bad text, a folder that holds a run already.
    """
    config = overridden(recipe(config) if isinstance(config, str) else config, overrides)
    folder = Path("runs") / config.name if out is None else expand_home(out)
    config = config if out is None or "name" in overrides else replace(config, name=folder.absolute().name)
    with Live() as live:
        sinks = [Jsonl(folder / "metrics.jsonl"), *([live] if progress else [])]
        train_run(config, folder, resume=resume, sinks=sinks)
    return load(folder, config.train.device)
