"""Reports: tables and pictures of recorded runs, made from the records alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from lrt.evaluation.score_names import signed
from lrt.experiments import plots
from lrt.experiments.groups import Measure, RunGroup, mean_and_deviation
from lrt.experiments.pages import glossary, png
from lrt.experiments.plots import MOST_ARMS, arm_colours, decoded
from lrt.experiments.suite_tables import length_table, suite_tables
from lrt.experiments.verdict import baseline_of, next_commands, report_verdict
from lrt.utils.files import printable, read_text, write_text
from lrt.utils.require import require
from lrt.utils.tables import Table

HEADER = (
    "method", "seeds", "parameters", "forwards / token", "C", "TFLOP", "CPU s", "decoded BPB", "less baseline",
    "bfloat16", "zero memory", "live gap", "in-context", "2x length", "4x length", "CPU ms / token",
)  # fmt: skip
SWEEPS = (1, 2, 4, 8)
SWEEP_HEADER = ("method", "seeds", "contraction", *(
    f"{name}, after {' / '.join(map(str, SWEEPS))} sweeps" for name in ("residual", "K/V error", "argmax agrees", "KL")
))  # fmt: skip
Block = tuple[str, Table | Figure | str]
MARKS = "<!-- lrt report: begin -->", "<!-- lrt report: end -->"


ABOUT = (
    "Tables: means over seeds, with standard deviations (n - 1) where there are several. Pictures: medians, in a band "
    "from the least to the most of the seeds. Decoded: exact recurrence, in float32. CPU: time of one thread."
)
TEXT_WORDS = (
    "bits per byte", "decoded", "less baseline", "C", "zero memory", "live gap", "in-context", "sweep", "residual",
    "contraction", "K/V error, KL",
)  # fmt: skip


def report_blocks(groups: Sequence[RunGroup], baseline: str, files: Sequence[Path] = ()) -> list[Block]:
    """A verdict, a glossary, what to do next, then tables and pictures of the groups, under headings."""
    suites = [g for g in groups if "suite" in g.records[0]]
    groups = [g for g in groups if g not in suites]
    text = [g for g in groups if "accuracy" not in g.records[0]]
    sweeps = dict.fromkeys(g.sweep for g in groups)
    colours = arm_colours([g.arm for g in groups if g.sweep == sweep] for sweep in sweeps)
    sentences = report_verdict(groups, baseline)
    blocks: list[Block] = [("verdict", "\n".join(f"- {line}" for line in sentences))] if sentences else []
    blocks += [("what the words mean", glossary(*TEXT_WORDS))] if text else []
    commands = next_commands(files, groups, baseline) if files and groups else []
    blocks += [("next", "\n".join(f"    {command}" for command in commands))] if commands else []
    blocks += suite_tables(suites, baseline)
    for sweep in dict.fromkeys(g.sweep for g in text):
        budgets = _at_several([g for g in text if g.sweep == sweep and "train.horizon" in g.point])
        if len({g.arm for g in budgets}) > 1:
            heading = f"{sweep}: decoded bits per byte against cost{_of(budgets)}"
            blocks.append((heading, plots.budgets(budgets, colours)))
    for sweep, point in dict.fromkeys((g.sweep, g.point) for g in groups):
        members = [g for g in groups if (g.sweep, g.point) == (sweep, point)]
        heading = (f"{sweep}: {point}" if point else sweep) + _of(members)
        of_text = members[0] in text
        blocks += _texts(heading, members, baseline, colours) if of_text else _tasks(heading, members, colours)
    for sweep in dict.fromkeys(g.sweep for g in text):
        last = _last_compared([g for g in text if g.sweep == sweep])
        members = [g for g in text if (g.sweep, g.point) == (sweep, last)]
        blocks += _inside((f"{sweep}: {last}" if last else sweep) + _of(members), members, colours)
    return blocks


def _last_compared(groups: Sequence[RunGroup]) -> str:
    """The last point of a sweep's grid at which arms can be compared, or the last."""
    arms = Counter(g.point for g in groups)
    return next((point for point in reversed(arms) if arms[point] > 1), groups[-1].point)


def _at_several(groups: list[RunGroup]) -> list[RunGroup]:
    """The groups of arms that were trained at more than one budget: a line each; one point says nothing of cost."""
    points = {arm: {g.point for g in groups if g.arm == arm} for arm in {g.arm for g in groups}}
    return [g for g in groups if len(points[g.arm]) > 1]


def _texts(heading: str, groups: list[RunGroup], baseline: str, colours: plots.Colours) -> list[Block]:
    base = baseline_of(groups, baseline)
    blocks: list[Block] = [(heading, Table(HEADER, [_row(g, base) for g in groups]))]
    scored = {g.arm: "; ".join(dict.fromkeys(r["scored"] for r in g.records if "scored" in r)) for g in groups}
    if len(set(filter(None, scored.values()))) > 1:  # older records do not say
        listed = "\n".join(f"- {arm}: {text or 'not said'}" for arm, text in scored.items())
        blocks.append((f"{heading}: scored on different text", listed))
    if others := [g for g in groups if g is not base and g.paired(base, decoded)]:
        blocks.append((f"{heading}: differences", plots.bars(others, base, colours)))
    swept = [g for g in groups if all("kl" in r and r["kl"] for r in g.records)]  # the others are old, or do not recur
    if swept:
        blocks.append((f"{heading}: sweeps", Table(SWEEP_HEADER, [_sweeps(g) for g in swept])))
    return blocks


def _sweeps(g: RunGroup) -> list[str]:
    """Seeds' means of how far passes after some sweeps are from exact decoding."""
    kinds = (("sweep_residuals", 1, ".1e"), ("kv_errors", 0, ".1e"), ("argmax_agreement", 0, ".1%"), ("kl", 0, ".1e"))
    return [g.arm, str(len(g.records)), f"{g.mean(lambda r: r['contraction']):.2f}"] + [
        " / ".join(f"{g.mean(lambda r, k=k, n=name, f=first: r[n][k - f]):{form}}" for k in SWEEPS)
        for name, first, form in kinds
    ]


def _of(groups: Sequence[RunGroup]) -> str:
    """What headings add where tokens do not spell the text."""
    lossy = any(record.get("normalised") for g in groups for record in g.records)
    return " (bits per byte of the normalised text)" if lossy else ""


def _inside(heading: str, groups: list[RunGroup], colours: plots.Colours) -> list[Block]:
    """What happens within rows, shown for one point of a sweep's grid, if its arms can be told apart."""
    if len(groups) > MOST_ARMS:
        return []
    blocks: list[Block] = [(f"{heading}: by position", plots.positions(groups, colours))]
    if any(g.records[0]["sweep_residuals"] for g in groups):
        blocks.append((f"{heading}: sweeps of prefill", plots.convergence(groups, colours)))
    return blocks


def _row(g: RunGroup, base: RunGroup) -> list[str]:
    first = g.records[0]
    difference = mean_and_deviation(g.paired(base, decoded)) if g is not base else None
    return [
        g.arm, str(len(g.records)), f"{first['parameters']:,}", str(first["forwards_per_token"]),
        f"{g.mean(lambda r: r['effective_compute'] / r['scaling_parameters']):.1f}",
        f"{g.mean(lambda r: r['flops'] / 1e12):.3g}", f"{g.mean(lambda r: r['cpu_seconds']):.0f}",
        _spread(g.mean(decoded), g.deviation(decoded), len(g.records)),
        "" if difference is None else _spread(*difference, len(g.paired(base, decoded)), sign="+"),
        _where_measured(g, "decoded_bfloat16", lambda r: r["decoded_bfloat16"], ".4f"),
        f"{g.mean(lambda r: r['bpb']['zero_memory']):.3f}", signed(g.mean(lambda r: r["live_gap"])),
        _where_measured(g, "in_context_score", lambda r: r["in_context_score"], ".3f"),
        *(_where_measured(g, "decoded_at_length", lambda r, n=n: r["decoded_at_length"][n], ".3f") for n in ("2", "4")),
        f"{g.mean(lambda r: 1e3 / r['decode_tokens_per_cpu_second']):.2f}",
    ]  # fmt: skip


def _where_measured(g: RunGroup, name: str, measure: Measure, form: str) -> str:
    """The seeds' mean of a figure that some records lack (those of the demo, and old ones): then an empty cell."""
    return f"{g.mean(measure):{form}}" if all(name in r for r in g.records) else ""


def _spread(mean: float, deviation: float, seeds: int, sign: str = "") -> str:
    return f"{mean:{sign}.4f}" + (f" ± {deviation:.4f}" if seeds > 1 else "")


def _tasks(heading: str, groups: list[RunGroup], colours: plots.Colours) -> list[Block]:
    return [(heading, length_table(groups)), (f"{heading}: by length", plots.lengths(groups, colours))]


def markdown(blocks: Sequence[Block], pictures: Path, link: str) -> str:
    """Tables as Markdown, pictures written into `pictures` and linked."""
    pictures.mkdir(parents=True, exist_ok=True)
    parts = []
    for heading, block in blocks:
        if isinstance(block, Table):
            parts += [f"### {heading}", block.markdown()]
        elif isinstance(block, str):
            parts += [f"### {heading}", block]
        else:
            name = "results_" + re.sub(r"[^a-z0-9]+", "_", heading.lower()).strip("_") + ".png"
            (pictures / name).write_bytes(png(block))
            parts.append(f"![{heading}]({link}{name})")
    return printable("\n\n".join(parts))


def replace_marked(page: Path, text: str) -> None:
    """Put `text` between a page's MARKS. ValueError: no such page, or no marks."""
    require(page.is_file(), f"{page} does not exist; write it, with the lines {' and '.join(MARKS)}")
    before, begin, rest = read_text(page, "page").partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    require(bool(begin and end), f"{page} lacks the lines {' and '.join(MARKS)} between which the report goes")
    write_text(page, f"{before}{begin}\n\n{text}\n\n{end}{after}")
