"""A self-contained HTML page of tables, pictures and texts, and what the words in it mean."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from matplotlib.figure import Figure

from lrt.utils.files import printable
from lrt.utils.tables import Table

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


def glossary(*words: str) -> Table:
    """The meaning of some WORDS."""
    return Table(("word", "meaning"), [(word, WORDS[word]) for word in words])


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
