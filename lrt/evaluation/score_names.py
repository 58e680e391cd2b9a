"""What scores are called wherever they are printed: bits per byte of which text, and of how much of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lrt.utils.files import read_json, require_fields, require_kind

ANSWERS = "the answers in "
"""Beginning of the name of a text of which answers alone are scored."""
BEGINNING = "the first "
"""Beginning of the name of a text of which no more than that was read."""
FIGURES = ("zero_memory", "merged", "decoded", "live_gap")
LEGEND = (
    "bits per byte, lower is better. decoded: token by token, what you get; merged: as the training computes it; "
    "live gap: decoded less merged; zero memory: the memory switched off"
)
"""One line under figures of `BPB.as_dict`."""


def read_result(file: Path) -> dict[str, Any]:
    """A run's result.json, whose `bpb` is such figures, null where one was not finite. ValueError: one is no number."""
    result = read_json(file, "result")
    require_fields(result, {"bpb": dict}, str(file))
    return result | {"bpb": checked_figures(result["bpb"], f"{file}: bpb")}


def checked_figures(bpb: dict[str, Any], where: str) -> dict[str, Any]:
    """Figures of `BPB.as_dict` that were read from a file. ValueError: one is no number."""
    require_fields(bpb, {"rows": int, "schedule": str} | ({"text": str} if "text" in bpb else {}), where)
    numbers = {name: bpb.get(name) for name in (*FIGURES, "share")}
    for name, value in numbers.items():
        if value is not None:
            require_kind(value, float, f"{where}: {name}")
    return bpb | numbers


def unit(bpb: Mapping[str, Any]) -> str:
    """What to call the figures of `BPB.as_dict`, which an older version may have written."""
    of = ["the answers"] * str(bpb.get("text")).startswith(ANSWERS) + ["the normalised text"] * bool(
        bpb.get("normalised")
    )
    return "BPB" + (f" of {', '.join(of)}" if of else "")


def share_text(bpb: Mapping[str, Any]) -> str:
    """The rows, the text and the share of it that figures of `BPB.as_dict` are of."""
    if "text" not in bpb:
        return f"{bpb['rows']} held-out rows"
    share = bpb["share"]
    of = "the whole" if bpb["text"].removeprefix(ANSWERS).startswith(BEGINNING) else "it"
    return f"{bpb['rows']} rows of {bpb['text']}" + ("" if share is None else f" ({percent(share)} of {of})")


def signed(difference: float, digits: int = 4) -> str:
    """A difference with its sign, which one that is rounded to nothing has not."""
    rounded = round(difference, digits)
    return f"{rounded:+.{digits}f}" if rounded else f"{0:.{digits}f}"


def percent(share: float) -> str:
    """A share as a percentage of two digits that count; all is 100 %, and nothing less is."""
    return f"{100 * share:.3g} %" if share < 0.9995 or share == 1 else "99.9 %"
