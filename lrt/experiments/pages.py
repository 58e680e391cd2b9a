"""Pictures and pages from recorded runs: loss and BPB against tokens, effective compute and wall-clock."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from lrt.utils.files import read_jsonl
from lrt.utils.tables import Table

AXES = {
    "tokens": "tokens seen",
    "effective_forwards": "effective compute (token forwards)",
    "seconds": "training seconds",
}
COLOURS = ("#6b7280", "#d9822b", "#2f6fde", "#1f9d61", "#a855f7", "#dc2626", "#0891b2", "#854d0e")


@dataclass(frozen=True)
class Recorded:
    """A run read back from its folder's metrics.jsonl."""

    name: str
    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]


def read_run(folder: Path, name: str | None = None) -> Recorded:
    """The events of a run; a missing or damaged file raises ValueError naming the line."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the folder of a run")
    events = [event for _, event in read_jsonl(path, "metrics", loose=True, torn=True)]
    kinds = {kind: [e for e in events if e.get("kind") == kind] for kind in ("train", "eval")}
    return Recorded(name or folder.name, kinds["train"], kinds["eval"])


def curves(runs: Sequence[Recorded]) -> Figure:
    """Training loss (above) and decoded validation BPB (below) of every run on the three axes."""
    figure = Figure(figsize=(13, 6.4), layout="constrained")
    grid = figure.subplots(2, 3, sharex="col", sharey="row")
    for column, (key, label) in enumerate(AXES.items()):
        for run, colour in zip(runs, COLOURS, strict=False):
            loss, bpb = grid[0][column], grid[1][column]
            loss.plot(
                [e[key] for e in run.train], _smooth([e["loss"] for e in run.train]), color=colour, label=run.name
            )
            x = [e[key] for e in run.evals]
            bpb.plot(x, [e["bpb"]["decoded"] for e in run.evals], "o-", ms=3.5, color=colour, label=run.name)
            bpb.plot(x, [e["bpb"]["zero_memory"] for e in run.evals], ":", lw=1, color=colour)
        grid[1][column].set_xlabel(label)
        grid[1][column].xaxis.set_major_formatter(EngFormatter(sep=""))
        for axes in grid[:, column]:
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
    _limit(grid[0][0], [_smooth([e["loss"] for e in run.train]) for run in runs])
    _limit(grid[1][0], [[e["bpb"]["decoded"] for e in run.evals] for run in runs])
    grid[0][0].set_ylabel("training loss, nats per token\n(weighted mean over the passes)")
    grid[1][0].set_ylabel("validation bits per byte\ndecoded (solid), zero memory (dotted)")
    grid[1][0].legend(frameon=False, fontsize=8)
    return figure


def _smooth(values: Sequence[float], weight: float = 0.8) -> list[float]:
    out: list[float] = []
    for v in values:
        out.append(v if not out else weight * out[-1] + (1 - weight) * v)
    return out


def _limit(axes: Any, series: Sequence[Sequence[float]]) -> None:
    """Show where the curves settle rather than where they begin; what lies above runs out of the frame."""
    ordered = sorted(y for ys in series for y in ys)
    if ordered:
        low = ordered[0]
        high = max(ordered[int(0.85 * (len(ordered) - 1))], *(ys[-1] for ys in series if ys))
        axes.set_ylim(low - 0.08 * (high - low) - 1e-3, high + 0.2 * (high - low) + 1e-3)


def png(figure: Figure) -> bytes:
    """The picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def page(title: str, intro: str, blocks: Sequence[tuple[str, Table | Figure | str]]) -> str:
    """One self-contained HTML page of tables, pictures and texts, each under its heading (or none)."""
    parts = [f"<h2>{escape(heading)}</h2>{_html(heading or title, block)}" for heading, block in blocks]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style><h1>{escape(title)}</h1><p>{escape(intro)}</p>"
        f"{''.join(parts)}</html>\n"
    )


def _html(heading: str, block: Table | Figure | str) -> str:
    if isinstance(block, Table):
        return block.html()
    if isinstance(block, str):
        return f"<pre>{escape(block)}</pre>"
    return f'<img alt="{escape(heading)}" src="data:image/png;base64,{base64.b64encode(png(block)).decode()}">'


STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:78rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.3rem .7rem;text-align:left;border-bottom:1px solid #8884;"
    "white-space:nowrap}.wide{overflow-x:auto}img{max-width:100%;background:#fff;margin:1rem 0}"
    "pre{white-space:pre-wrap;background:#8881;padding:.8rem;border-radius:.4rem}"
    "@media(prefers-color-scheme:dark){body{color:#ddd;background:#16181c}}"
)
