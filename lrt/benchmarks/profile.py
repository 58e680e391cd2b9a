"""Where a training step's time goes, part by part, forward and backward together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from lrt.model.lrt import LRT

PARTS = ("embedding", "attention", "mlp", "blocks' rest", "head and loss", "optimizer", "data")
"""`blocks' rest`: injections, norms, residual sums, memory projections shared by the layers. `head and loss` takes in
all forward work outside the model, the buffer's splits among it."""
REST = "head and loss"
BACKWARD = "autograd::engine::evaluate_function: "


@contextlib.contextmanager
def named(module: nn.Module, name: str) -> Iterator[None]:
    """Make a module's forward show under `name` in a profile."""
    open_ranges: list[record_function] = []

    def enter(*_: Any) -> None:
        open_ranges.append(record_function(name))
        open_ranges[-1].__enter__()

    def leave(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    handles = (module.register_forward_pre_hook(enter), module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def parts(step: Callable[[], Any], model: LRT) -> dict[str, float]:
    """Milliseconds of each of PARTS in one call of `step`; on cuda, of its kernels. Eager steps only."""
    labels: list[tuple[nn.Module, str]] = [(model.embedding, "embedding")]
    for block in model.blocks:
        labels += [(block, "blocks' rest")]
        labels += [(block.get_submodule("attention"), "attention"), (block.get_submodule("mlp"), "mlp")]
    cuda = model.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with contextlib.ExitStack() as stack:
        for module, label in labels:
            stack.enter_context(named(module, label))
        profiler = stack.enter_context(profile(activities=activities, acc_events=True))
        step()
    return attribute(list(profiler.events() or ()), cuda)


def attribute(events: list[FunctionEvent], cuda: bool) -> dict[str, float]:
    """Share events out: each operation to the innermost named range around it, its backward to the same part."""
    made_by: dict[int, str] = {}
    spent: dict[str, float] = dict.fromkeys(PARTS, 0.0)

    def part(e: FunctionEvent) -> str:
        if e.name in PARTS:
            return e.name
        if e.name.startswith(BACKWARD):
            return made_by.get(e.sequence_nr, REST)
        return part(e.cpu_parent) if e.cpu_parent is not None else REST

    for e in sorted(events, key=lambda e: e.time_range.start):
        part_name = part(e)
        if e.sequence_nr >= 0 and not e.name.startswith(BACKWARD):
            made_by.setdefault(e.sequence_nr, part_name)
        spent[part_name] += (e.self_device_time_total if cuda else e.self_cpu_time_total) / 1e3
    return spent
