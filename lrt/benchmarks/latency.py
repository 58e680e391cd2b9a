"""What memory costs per decoded token, and what prefill by sweeps saves.

Latency is measured against the same backbone without memory, prefill and scoring against exact decoding, in one run
and in turns, so that whatever else the machine does falls on both sides alike.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from lrt.benchmarks.peer import nanochat
from lrt.config.benchmarks import DecodingBenchmark
from lrt.config.decoding import DEFAULT_MODE, PrefillOptions, SamplingParams
from lrt.config.model import MEMORY_OFF, MemoryConfig, ModelConfig
from lrt.config.recipes import recipe as find_recipe
from lrt.inference.generate import generate, score
from lrt.inference.prefill import compiled, decode_step, next_logits
from lrt.inference.weights import by_columns
from lrt.model.flops import cache_bytes_per_token
from lrt.model.kv_cache import KVCache
from lrt.model.lrt import LRT
from lrt.model.recurrence import Effort, OneToken, advance, prefill_options, solve
from lrt.model.shapes import TokensBN, next_tokens
from lrt.utils.hardware import resolve_device, synchronise

CACHE_GIB = 6.0
"""Cells of the latency grid with a larger cache are left out, aloud."""
GREEDY = 64
"""Greedy tokens that are compared after each prompt."""
WARM = 3
"""Steps before those that count: they compile, and fill caches."""
TIMED, GROUP = 4, 8
"""Prompts whose prefill is timed, and prompts that are compared at once."""
DECODE_LINE = "batch {batch:3d}  context {context:5d}  {ms:8.2f} ms  plain {plain_ms:8.2f} ms  {overhead:+.1%}"
LEFT_OUT_LINE = "batch {batch:3d}  context {context:5d}  left out: its cache of {cache_gib:.3g} GiB is too large"
PREFILL_LINE = (
    "{length:5d} tokens  {mode:30s}  {speedup:5.2f} x exact  {forward_equivalents:5.2f} forwards  "
    "logits {max_logit_diff:.1e}  greedy {greedy_agree:.3f}"
)
SCORE_LINE = "score {rows} x {length}: {speedup:.2f} x exact, loss {loss_diff:+.1e} relative"
X = TypeVar("X")


def run(settings: DecodingBenchmark, tell: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Measure; the result is plain JSON data: `decode`, what is `left_out` of it, `prefill`, `score` and `setting`.

    `tell` takes a line of text for each figure as soon as it is there. Prefill and scoring are measured on a trained
    model alone, since sweeps converge on one and mean nothing on random weights.
    """
    device = resolve_device(settings.device)
    result: dict[str, Any] = {"decode": [], "left_out": [], "prefill": [], "score": {}}
    if settings.checkpoint is None:
        config = replace(find_recipe(settings.recipe).model, memory=MemoryConfig(projection="shared"))
    else:
        config = _trained(settings, settings.checkpoint, device, result, tell)
    result["setting"] = {
        "device": str(device), "threads": torch.get_num_threads(), "compiled": settings.compile,
        "recipe": str(settings.checkpoint or settings.recipe), "depth": config.depth, "width": config.d,
        "projection": config.memory.projection,
    }  # fmt: skip
    for cell in latencies(config, device, settings):
        result["decode" if "ms" in cell else "left_out"].append(cell)
        tell((DECODE_LINE if "ms" in cell else LEFT_OUT_LINE).format(**cell))
    if result["decode"]:
        result["setting"]["median_overhead"] = median(cell["overhead"] for cell in result["decode"])
    if settings.peer:
        result["peer"] = against_transformers(replace(config, memory=MEMORY_OFF), device, settings.compile)
        speeds = {name: value for name, value in result["peer"].items() if name.endswith("second")}
        tell("greedy, one row: " + ", ".join(f"{name} {value:,.1f}" for name, value in speeds.items()))
    return result


def _trained(
    settings: DecodingBenchmark,
    folder: Path,
    device: torch.device,
    result: dict[str, Any],
    tell: Callable[[str], None],
) -> ModelConfig:
    """Measure prefill and scoring on the run's held-out text, or another; returns its model's configuration."""
    from lrt.evaluation.held_out import held_out
    from lrt.training.checkpoint import load_model

    loaded = load_model(folder, device)
    text = held_out(loaded, settings.source, rows=settings.prompts, length=max(settings.lengths))
    prompts = text.rows.tokens.to(device)
    for length in settings.lengths:
        for cell in prefill_times(loaded.model, prompts[:, :length], settings.modes):
            result["prefill"].append(cell)
            tell(PREFILL_LINE.format(**cell))
    result["score"] = score_times(loaded.model, prompts)
    tell(SCORE_LINE.format(**result["score"]))
    return loaded.config.model


def against_transformers(
    config: ModelConfig, device: torch.device, compile: bool, *, tokens: int = 128, repeats: int = 5
) -> dict[str, Any]:
    """Greedy tokens per second of one row after a prompt of 16, in turns with transformers' nanochat of the same sizes.

    Ours decodes as `lrt sample` does, uncompiled like transformers', and compiled too if `compile`; medians.
    """
    model, other = by_columns(LRT(config, device)), nanochat(config, device).eval()
    prompt = list(range(1, 17))
    greedy = SamplingParams(max_new_tokens=tokens, temperature=0.0, stop_tokens=())

    def ours(run: OneToken) -> None:
        assert sum(1 for _ in generate(model, [prompt], greedy, run=run)) == tokens

    def theirs() -> None:
        out = other.generate(torch.tensor([prompt], device=device), max_new_tokens=tokens, do_sample=False)
        assert out.shape[1] == len(prompt) + tokens

    works = {"transformers": theirs, "eager": partial(ours, next_logits)}
    works |= {"compiled": partial(ours, compiled())} if compile else {}
    times = [{name: _timed(device, work)[1] for name, work in works.items()} for _ in range(repeats + 1)][1:]
    speeds = {f"{name}_tokens_per_second": tokens / median(t[name] for t in times) for name in works}
    ratios = {f"{name}_ratio": median(t["transformers"] / t[name] for t in times) for name in works}
    return {"depth": config.depth, "width": config.d, "tokens": tokens} | speeds | ratios


@torch.no_grad()
def latencies(config: ModelConfig, device: torch.device, settings: DecodingBenchmark) -> Iterator[dict[str, Any]]:
    """Milliseconds per step with memory and without, and the median overhead of pairs taken in turns; cell by cell.

    Of a cell whose cache is larger than `CACHE_GIB` only its size is said.
    """
    models = [LRT(c, device) for c in (config, replace(config, memory=MEMORY_OFF))]
    runs = [compiled() if settings.compile else next_logits for _ in models]
    for batch, context in itertools.product(settings.batches, settings.contexts):
        size = 4 * batch * context * cache_bytes_per_token(config, 1) / 2**30
        if size > CACHE_GIB:
            yield {"batch": batch, "context": context, "cache_gib": size}
            continue
        cache = _filled(models[0], batch, context)
        tokens = torch.ones(batch, dtype=torch.int64, device=device)
        works = [partial(advance, model, tokens, cache, None, run) for model, run in zip(models, runs, strict=True)]
        times = [[_timed(device, work)[1] for work in works] for _ in range(WARM + settings.steps)][WARM:]
        yield {
            "batch": batch,
            "context": context,
            "ms": 1e3 * median(lrt for lrt, _ in times),
            "plain_ms": 1e3 * median(plain for _, plain in times),
            "overhead": median(lrt / plain for lrt, plain in times) - 1,
        }


def _filled(model: LRT, rows: int, length: int) -> KVCache:
    """A state of rows that have seen `length` tokens, filled with noise."""
    cache = KVCache.empty(model, rows, length + 1)
    for x in (*cache.keys, *cache.values, cache.memory):
        x.normal_()
    return cache._replace(length=cache.length + length, longest=length)


def _timed(device: torch.device, work: Callable[[], X]) -> tuple[X, float]:
    """What `work` returns, and the seconds it took."""
    synchronise(device)
    start = time.perf_counter()
    result = work()
    synchronise(device)
    return result, time.perf_counter() - start


class Taken(NamedTuple):
    """Prompts taken in."""

    logits: Tensor
    """[B, T, V]"""
    greedy: Tensor
    """The tokens that greedy decoding adds, [B, GREEDY]."""
    effort: Effort


@torch.no_grad()
def _solved(model: LRT, prompts: TokensBN, plan: PrefillOptions) -> tuple[Tensor, KVCache, Effort]:
    """The head's input at every position, the state behind it, and the effort of the hardest chunk."""
    cache = KVCache.empty(model, len(prompts), prompts.shape[1] + GREEDY)
    parts = [solved for _, solved in solve(model, prompts, None, cache, plan)]
    effort = max((p.effort for p in parts), key=lambda e: e.forwards)
    return torch.cat([p.hidden for p in parts], dim=1), parts[-1].cache, effort


@torch.no_grad()
def _take_in(model: LRT, prompts: TokensBN, plan: PrefillOptions) -> Taken:
    hidden, cache, effort = _solved(model, prompts, plan)
    logits = model.logits(hidden)
    last, greedy = logits[:, -1], []
    for _ in range(GREEDY):
        greedy.append(last.argmax(-1))
        last, cache = decode_step(model, greedy[-1], cache)
    return Taken(logits, torch.stack(greedy, dim=1), effort)


def prefill_times(model: LRT, prompts: TokensBN, modes: Sequence[str]) -> list[dict[str, Any]]:
    """Every mode against exact decoding: the worst difference over all prompts, `GROUP` at once.

    The first `TIMED` prompts are timed, one at a time and in turns; the median counts.
    """
    plans = {mode: prefill_options(model, mode) for mode in ("exact", *modes)}
    compared: dict[str, list[dict[str, Any]]] = {mode: [] for mode in modes}
    for group in prompts.split(GROUP):
        exact = _take_in(model, group, plans["exact"])
        for mode in modes:
            compared[mode].append(_differences(_take_in(model, group, plans[mode]), exact))
    times: dict[str, list[float]] = {mode: [] for mode in plans}
    for prompt, mode in itertools.product(prompts[:TIMED], plans):
        work = partial(_solved, model, prompt[None], plans[mode])
        times[mode].append(_timed(prompt.device, work)[1])
    seconds = {mode: median(taken) for mode, taken in times.items()}
    return [
        {"length": prompts.shape[1], "mode": str(plans[mode]), "seconds": seconds[mode],
         "exact_seconds": seconds["exact"], "speedup": seconds["exact"] / seconds[mode]}
        | {key: max(part[key] for part in parts) for key in parts[0] if key != "equal"}
        | {"greedy_agree": sum(part["equal"] for part in parts) / (GREEDY * len(prompts))}
        for mode, parts in compared.items()
    ]  # fmt: skip


def _differences(taken: Taken, exact: Taken) -> dict[str, Any]:
    """How far prompts taken in are from exact decoding, and what they took."""
    return {
        "max_logit_diff": float((taken.logits - exact.logits).abs().max()),
        "equal": int((taken.greedy == exact.greedy).sum()),
        "sweeps": taken.effort.sweeps, "forward_equivalents": taken.effort.forwards,
        "stepped": int(taken.effort.stepped.max()),
    }  # fmt: skip


def score_times(model: LRT, rows: TokensBN) -> dict[str, Any]:
    """Scoring by sweeps against scoring token by token, all rows at once."""
    targets = next_tokens(rows)
    swept, seconds = _timed(rows.device, lambda: score(model, rows, targets, mode=DEFAULT_MODE))
    exact, slow = _timed(rows.device, lambda: score(model, rows, targets, mode="exact"))
    return {
        "rows": len(rows),
        "length": rows.shape[1],
        "mode": swept.mode,
        "seconds": seconds,
        "exact_seconds": slow,
        "speedup": slow / seconds,
        "loss_diff": float(swept.nats.sum() / exact.nats.sum() - 1),
        "max_nats_diff": float((swept.nats - exact.nats).abs().max()),
        "forward_equivalents": swept.effort.forwards,
    }
