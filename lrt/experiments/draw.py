"""A schedule drawn: passes down, positions across, the exact prefix marked; as text and as SVG."""

from __future__ import annotations

from html import escape

from lrt.schedule import Pass, Passes, Schedule, effective_forwards, exact_prefix, memory_only, token_forwards

LOSS, GRADIENT, SILENT, ABSENT = "█", "▓", "░", "·"
LEGEND = {LOSS: "gradient and loss", GRADIENT: "gradient, no loss", SILENT: "no gradient (settles the memory)"}
COLOURS = {LOSS: "#2f6fde", GRADIENT: "#9dbcf2", SILENT: "#c9c9c9", ABSENT: "none"}
MOST = 40
"""Passes drawn; the rest are counted."""


def figures(schedule: Schedule, length: int) -> str:
    """One line of what the schedule costs and gives."""
    passes = schedule.passes(length)
    return (
        f"{len(passes)} passes, {token_forwards(passes, length):.2f} token forwards, "
        f"{effective_forwards(schedule, length):.2f} effective, exact prefix {exact_prefix(passes, length)}"
    )


def mark(p: Pass, position: int) -> str:
    """How `p` treats a position."""
    if position not in p.positions:
        return ABSENT
    return LOSS if p.weight > 0 else GRADIENT if p.grad else SILENT


def as_text(schedule: Schedule, length: int) -> str:
    """The drawing for a terminal."""
    passes = schedule.passes(length)
    early = memory_only(passes)
    width = max(len(str(p)) for p in passes)
    tens = "".join(str(t // 10 % 10) if t % 10 == 0 else " " for t in range(length))
    lines = [
        f"{schedule} over {length} positions: {figures(schedule, length)}",
        "",
        f"{'pass':>4}  {'positions':<{width}}  {tens}",
    ]
    lines.append(" " * (8 + width) + "".join(str(t % 10) for t in range(length)))
    for i, p in enumerate(passes[:MOST]):
        row = "".join(mark(p, t) for t in range(length))
        lines.append(f"{i:>4}  {p!s:<{width}}  {row}{'  stops at the source block' if early[i] else ''}")
    if len(passes) > MOST:
        lines.append(f"      ... and {len(passes) - MOST} more")
    lines.append(f"{'exact':>4} {'':<{width}}  {'^' * exact_prefix(passes, length)}")
    used = {mark(p, p.positions[0]) for p in passes}
    return "\n".join([*lines, "", "  ".join(f"{sign} {text}" for sign, text in LEGEND.items() if sign in used)])


def as_svg(schedule: Schedule, length: int, cell: int = 18) -> str:
    """The drawing as an SVG document that suits light and dark pages."""
    passes = schedule.passes(length)
    shown = passes[:MOST]
    left, top, cost = 150, 66, figures(schedule, length)
    width, height = max(left + length * cell, 12 + 7 * len(cost)) + 20, top + len(shown) * cell + 62
    body = [_text(12, 20, f"{schedule} over {length} positions", 14), _text(12, 38, cost, 11)]
    for i, p in enumerate(shown):
        y = top + i * cell
        body.append(_text(12, y + cell - 5, f"{i}   {p}", 11))
        body += [_cell(left + t * cell, y, cell, COLOURS[mark(p, t)]) for t in range(length)]
    body += _axis(length, left, top, cell)
    foot = top + len(shown) * cell
    body += _prefix(exact_prefix(passes, length), left, foot, cell)
    body += _legend(passes, left, foot + 34)
    style = "text{font-family:ui-monospace,monospace;fill:#222}@media(prefers-color-scheme:dark){text{fill:#ddd}}"
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{style}</style>{"".join(body)}</svg>\n'


def _text(x: float, y: float, text: str, size: int) -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}">{escape(text)}</text>'


def _cell(x: int, y: int, cell: int, colour: str) -> str:
    side = cell - 3
    return f'<rect x="{x}" y="{y}" width="{side}" height="{side}" rx="3" fill="{colour}" stroke="#8888" />'


def _axis(length: int, left: int, top: int, cell: int) -> list[str]:
    every = 1 if length <= 32 else 8
    return [_text(left + t * cell + 2, top - 6, str(t), 9) for t in range(0, length, every)]


def _prefix(prefix: int, left: int, y: int, cell: int) -> list[str]:
    line = f'<rect x="{left}" y="{y + 2}" width="{prefix * cell - 3}" height="3" fill="#d9822b" />'
    return [line, _text(12, y + 11, "exact prefix", 11)]


def _legend(passes: Passes, left: int, y: int) -> list[str]:
    used = {mark(p, p.positions[0]) for p in passes}
    parts, x = [], 12
    for sign, text in LEGEND.items():
        if sign in used:
            parts += [_cell(x, y - 10, 16, COLOURS[sign]), _text(x + 20, y + 1, text, 11)]
            x += 40 + 7 * len(text)
    return parts
