"""How fast prefill sweeps converge on a trained model: residual and error against exact decoding, sweep by sweep."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lrt.config.benchmarks import PREFILL_MODES
from lrt.config.decoding import PrefillOptions
from lrt.evaluation.contraction import exact_states
from lrt.model.loss import token_nats
from lrt.model.lrt import LRT
from lrt.model.recurrence import change_of, finish, sweep_forwards
from lrt.model.run_passes import run_passes
from lrt.model.shapes import TokensBN, next_tokens
from lrt.model.state import Buffer


class Point(NamedTuple):
    """The state of a prompt after some sweeps; maxima are over rows and positions."""

    sweeps: int
    forwards: float
    """Plain-forward equivalents per position, the final full pass included where there is one."""
    residual: float
    """Largest change of the memory in this sweep, relative to its norm; infinite for the first."""
    logit_diff: float
    """Largest difference of a logit from exact decoding."""
    greedy_agree: float
    """Share of positions whose most probable token is that of exact decoding."""
    loss_diff: float
    """Mean nats of the next token minus those of exact decoding, relative."""


@torch.no_grad()
def curve(model: LRT, tokens: TokensBN, mode: str, sweeps: int, exact: Tensor) -> list[Point]:
    """Sweep `tokens` [B, T] that many times in `mode`, as one chunk; `exact` is the head's input, decoded exactly."""
    n = tokens.shape[1]
    plan, buffer, old, points = PrefillOptions.parse(mode, 0.0, sweeps, n), Buffer(), None, []
    lengths = torch.full_like(tokens[:, 0], n)
    truth, targets = model.logits(exact), next_tokens(tokens)
    loss = token_nats(model, exact, targets).sum()
    for number in range(1, sweeps + 1):
        *_, (_, _, buffer) = run_passes(model, tokens, plan.sweep(number, n), model.starts(tokens), buffer)
        new = buffer.memory(range(1, n + 1))
        assert new is not None
        _, hidden = finish(model, tokens, buffer, new)
        logits = model.logits(hidden)
        points.append(
            Point(
                number,
                sweep_forwards(model.config, number),
                float(change_of(old, new, lengths).max()),
                float((logits - truth).abs().max()),
                float((logits.argmax(-1) == truth.argmax(-1)).float().mean()),
                float(token_nats(model, hidden, targets).sum() / loss - 1),
            )
        )
        old = new
    return points


def picture(
    folders: dict[str, Path | str], path: Path | str, *, rows: int = 8, length: int = 1024, sweeps: int = 12
) -> dict[str, dict[str, list[Point]]]:
    """Curves of trained models on their own held-out text, drawn; `folders` maps titles to run folders."""
    from lrt.evaluation.held_out import held_out
    from lrt.training.checkpoint import load_model

    curves = {}
    for title, folder in folders.items():
        loaded = load_model(folder)
        tokens = held_out(loaded, None, rows=rows, length=length).rows.tokens
        exact = exact_states(loaded.model, tokens).hidden
        curves[title] = {mode: curve(loaded.model, tokens, mode, sweeps, exact) for mode in PREFILL_MODES}
    draw(curves, path)
    return curves


def draw(curves: dict[str, dict[str, list[Point]]], path: Path | str) -> None:
    """Residual and logit error against forward equivalents: a row of axes per model, a line per mode; PNG or SVG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(curves), 2, figsize=(9, 2.9 * len(curves)), squeeze=False, sharex=True)
    for row, (name, modes) in zip(axes, curves.items(), strict=True):
        for mode, points in modes.items():
            forwards = [p.forwards for p in points]
            row[0].semilogy(forwards[1:], [p.residual for p in points[1:]], ".-", label=mode)
            row[1].semilogy(forwards, [p.logit_diff for p in points], ".-", label=mode)
        row[0].set_ylabel("change of memory")
        row[1].set_ylabel("largest logit error")
        for panel in row:
            panel.set_title(name, fontsize=9)
            panel.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    for panel in axes[-1]:
        panel.set_xlabel("plain-forward equivalents")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
