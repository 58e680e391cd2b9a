"""Pictures and pages from recorded runs: loss and BPB against tokens, effective compute and wall-clock."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from lrt.utils.files import printable, read_jsonl
from lrt.utils.tables import Table

AXES = {
    "tokens": "tokens seen",
    "effective_forwards": "effective compute (token forwards)",
    "seconds": "training seconds",
}
GREY = "#6b7280"
OTHERS = (
    "#d9822b", "#2f6fde", "#1f9d61", "#a855f7", "#dc2626", "#0891b2", "#854d0e", "#db2777", "#65a30d", "#312e81",
)  # fmt: skip
KNOWN = {"plain": GREY, "shift": OTHERS[0], "lrt": OTHERS[1], "LRT": OTHERS[1], "paper": OTHERS[2],
         "the paper's": OTHERS[2]}  # fmt: skip
"""Arms that most reports have: the same colour in all of them."""
MOST_ARMS = len(OTHERS)
"""Arms that can be told apart by colour."""
WORDS = {
    "bits per byte": "what a model needs to write down a byte of text that it has not seen; lower is better",
    "decoded": "measured token by token, as the model is used",
    "merged": "measured as the training computes it: all positions at once",
    "zero memory": "the same model with its memory switched off",
    "live gap": "decoded less merged; near zero if the model decodes what it was trained to",
    "token forwards": "how often a token went through the model, over all passes",
    "seed": "the chance that a run begins with; several seeds show how much is luck",
    "less baseline": "decoded less the baseline's, seed by seed; below zero is better",
    "C": "effective compute: token forwards per scaling parameter, those without gradient counted a third, those that "
         "stop at source block s of L the share s/L of that",
    "in-context": "loss early in a row less loss late, in nats per token: what a longer context is worth",
    "sweep": "one pass that computes all memories again from those of the sweep before, instead of token by token",
    "residual": "the largest relative change of any memory in a sweep",
    "contraction": "the factor by which a sweep shrinks the residual; below one sweeps settle",
    "K/V error, KL": "how far keys and values, and the predictions (in nats), are from exact decoding",
}  # fmt: skip
"""What the columns of reports mean."""


def arm_colours(pictures: Iterable[Iterable[str]]) -> dict[str, str]:
    """A colour for each arm, the same in all of these pictures; plain is grey.

    Arms that share a picture differ, unless they are more than MOST_ARMS.
    """
    together = [list(dict.fromkeys(names)) for names in pictures]
    colours = {name: KNOWN[name] for names in together for name in names if name in KNOWN}
    for names in sorted(together, key=lambda names: len(names) > MOST_ARMS):
        for name in names:
            beside = {other for seen in together if name in seen and len(seen) <= MOST_ARMS for other in seen}
            taken = {colours.get(other) for other in beside}
            colours.setdefault(name, next((c for c in OTHERS if c not in taken), OTHERS[len(colours) % len(OTHERS)]))
    return colours


def glossary(*words: str) -> Table:
    """The meaning of some WORDS."""
    return Table(("word", "meaning"), [(word, WORDS[word]) for word in words])


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
    figure = Figure(figsize=(9.2, 6), layout="constrained")
    grid, colours = figure.subplots(2, 3, sharex="col", sharey="row"), arm_colours([[run.name for run in runs]])
    for column, (key, label) in enumerate(AXES.items()):
        for run in runs:
            loss, bpb, colour = grid[0][column], grid[1][column], colours[run.name]
            loss.plot(
                [e[key] for e in run.train], _smooth([e["loss"] for e in run.train]), color=colour, label=run.name
            )
            x = [e[key] for e in run.evals]
            bpb.plot(x, [e["bpb"]["decoded"] for e in run.evals], "o-", ms=3.5, color=colour, label=run.name)
            bpb.plot(x, [e["bpb"]["zero_memory"] for e in run.evals], ":", lw=1, color=colour)
        grid[1][column].set_xlabel(label)
        grid[1][column].xaxis.set_major_formatter(EngFormatter(sep=""))
        grid[1][column].xaxis.set_major_locator(MaxNLocator(5))
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
    return printable(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style><h1>{escape(title)}</h1><p>{escape(intro)}</p>"
        f"{''.join(parts)}</html>\n"
    )


def _html(heading: str, block: Table | Figure | str) -> str:
    if isinstance(block, Table):
        return block.html()
    if isinstance(block, str):
        return f"<pre>{escape(block)}</pre>"
    source = f"data:image/png;base64,{base64.b64encode(png(block)).decode()}"
    least = round(LEGIBLE * block.get_figwidth())
    return f'<div class="wide"><img alt="{escape(heading)}" style="min-width:{least}px" src="{source}"></div>'


LEGIBLE = 72
"""Pixels of the screen an inch of a picture keeps at least, so that its letters can be read; its frame scrolls."""
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:78rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.3rem .7rem;text-align:left;border-bottom:1px solid #8884;"
    "white-space:nowrap}td:last-child{white-space:normal}.wide{overflow-x:auto}img{width:100%;max-width:60rem;"
    "background:#fff;margin:1rem 0}h1,h2,p{overflow-wrap:anywhere}"
    "pre{white-space:pre-wrap;background:#8881;padding:.8rem;border-radius:.4rem}"
    "@media(prefers-color-scheme:dark){body{color:#ddd;background:#16181c}}"
)
