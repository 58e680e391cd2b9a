"""Settings that a run does not look at, as it is otherwise set: who gives one by name is told. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lrt.config.run import PAUSES, TASK, RunConfig

Rule = tuple[str, bool, str]
"""Fields of one part, whether they are looked at, and what says otherwise."""
OF_PROJECTIONS = "it is for W_K and W_V, and model.memory.projection is {}"


def unread(config: RunConfig, flags: Iterable[str], columns: bool = True) -> list[str]:
    """A sentence for each of the flags given (`--data.vocab-size`) that changes nothing in this configuration.

    columns: whether its text has columns, which its files tell.
    """
    fields = {flag.removeprefix("--").replace("-", "_"): flag for flag in flags}
    rules = [("data.text_column", columns, "the source is plain text, without columns"), *_rules(config)]
    reasons = {name: why for names, is_read, why in rules if not is_read for name in names.split()}
    return [f"{flag} changes nothing: {reasons[field]}" for field, flag in fields.items() if field in reasons]


def _rules(config: RunConfig) -> Iterator[Rule]:
    yield from _of_data(config)
    yield from _of_model(config)
    yield from _of_training(config)


def _of_data(config: RunConfig) -> Iterator[Rule]:
    data = config.data
    task, downloaded = data.source.startswith(TASK), "hf:" in f"{data.source},{data.validation_source}"
    text = "data.text_column data.validation data.validation_source data.max_bytes data.normalised data.folder"
    yield text, not task, f"data.source is {data.source}, which is drawn as it is needed"
    yield "data.subset data.split", downloaded, "it is for datasets (hf:owner/name)"
    is_bpe = data.tokenizer.removesuffix(PAUSES) == "bpe" and not task
    yield "data.vocab_size", is_bpe, f"it is for data.tokenizer bpe, and that is {data.tokenizer}"
    brought = data.tokenizer.removesuffix(PAUSES) not in ("bpe", "bytes")
    yield "data.normalised", brought, f"data.tokenizer is {data.tokenizer}, which loses no text"
    yield "data.validation", data.validation_source is None, "data.validation_source is held out instead"


def _of_model(config: RunConfig) -> Iterator[Rule]:
    model, memory, rope = config.model, config.model.memory, config.model.backbone.rope
    windows = any(window is not None for window in model.windows())
    yield "model.bos", False, "it is the tokenizer's"
    yield "model.window", windows, f"no layer has one: model.window_pattern is {model.window_pattern}"
    yield "model.memory.source model.memory.shift", memory.on, "model.memory reads nothing"
    yield "model.memory.shift", memory.source != 0, "model.memory.source is 0, which is that shift"
    reads = memory.on or memory.projection == "gates"
    yield "model.memory.blocks", reads, "model.memory reads nothing"
    yield "model.memory.gate_width", memory.gated, "it is for gates, and model.memory.projection is none"
    yield "model.memory.start", memory.projected, OF_PROJECTIONS.format(memory.projection)
    inside = "model.backbone.rope."
    yield f"{inside}factor", rope.kind != "none", f"{inside}kind is none"
    bounds = " ".join(inside + name for name in ("low", "high", "original"))
    yield bounds, rope.kind == "llama3", f"{inside}kind is {rope.kind}"


def _of_training(config: RunConfig) -> Iterator[Rule]:
    model, memory, optim, train = config.model, config.model.memory, config.optim, config.train
    yield "optim.memory_lr", memory.projected, OF_PROJECTIONS.format(memory.projection)
    yield "optim.memory_warmup", memory.on, "model.memory reads nothing"
    yield "optim.gamma_lr", memory.residual, "model.memory.residual is off"
    yield "optim.alpha_lr optim.beta_lr", model.residual_scalars, "model.residual_scalars is off"
    yield "optim.final", optim.decay > 0, "optim.decay is 0"
    yield "train.reshard", train.parallel == "fsdp", f"it is for train.parallel fsdp, and that is {train.parallel}"
    yield "train.gap_warning", memory.recurrent, "the model has no recurrence, so there is no gap"
