"""lrt report: means, deviations, paired differences are those of the records; pages and pictures are made of them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from helpers import refusal
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from lrt.cli.main import main
from lrt.experiments import draw, plots
from lrt.experiments.curves import Recorded, curves
from lrt.experiments.groups import RunGroup, read_groups
from lrt.experiments.plots import GREY, KNOWN, MOST_ARMS, OTHERS, arm_colours
from lrt.experiments.report import MARKS, _at_several, report_blocks
from lrt.experiments.verdict import next_commands, report_verdict
from lrt.schedule import Schedule
from lrt.utils.tables import Table


def record(arm: str, seed: int, decoded: float, compute: str = "compute=5", **more) -> dict:
    cost = float(compute.partition("=")[2])
    return {
        "arm": arm, "grid": {"train.horizon": compute}, "seed": seed, "parameters": 1234, "forwards_per_token": 1,
        "scaling_parameters": 1000, "tokens": 1000 * cost, "effective_compute": 1000 * cost, "flops": 2e12,
        "cpu_seconds": 10 * cost, "bpb": {"decoded": decoded, "zero_memory": decoded + 0.5}, "live_gap": 0.001,
        "in_context_score": 0.25, "decoded_at_length": {"1": decoded, "2": decoded + 0.1, "4": decoded + 0.2},
        "bpb_by_position": {"1": 3.0, "2-3": 2.0, "4": 5.0}, "sweep_residuals": [0.8 / k for k in SWEPT],
        "contraction": 0.1 * (seed + 1), "kv_errors": [9.0, *(0.08 / k for k in SWEPT)],
        "argmax_agreement": [0.0, *(1 - 0.08 / k for k in SWEPT)], "kl": [9.0, *(0.008 / k for k in SWEPT)],
        "decode_tokens_per_cpu_second": 200.0, "decoded_bfloat16": decoded + 0.01,
    } | (WITHOUT if arm == "plain" else {}) | more  # fmt: skip


SWEPT = range(1, 9)
WITHOUT = {"sweep_residuals": [], "contraction": 0.0, "kv_errors": [], "argmax_agreement": [], "kl": []}


@pytest.fixture
def records(tmp_path):
    lines = [record("plain", s, d) for s, d in ((0, 2.0), (1, 2.2))]
    lines += [record("settled", s, d) for s, d in ((1, 2.1), (0, 1.8), (2, 9.0))]
    lines += [record("plain", 0, 1.5, "compute=10"), record("settled", 0, 1.4, "compute=10")]
    task = {"task": "parity", "accuracy": {"32": {"all": 1.0, "last": 0.99}, "64": {"all": 0.75, "last": 0.5}}}
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")
    parity = json.dumps(record("settled", 0, 0.1) | task | {"grid": {}}) + "\n"
    (tmp_path / "parity.jsonl").write_text(parity, encoding="utf-8")
    return tmp_path


def test_groups_pair_by_seed(records):
    plain, settled = read_groups([records / "text.jsonl"])[:2]
    assert [r["seed"] for r in settled.records] == [0, 1, 2]

    def decoded(r):
        return r["bpb"]["decoded"]

    assert plain.mean(decoded) == pytest.approx(2.1)
    assert plain.deviation(decoded) == pytest.approx(0.02**0.5)  # n - 1
    assert settled.paired(plain, decoded) == pytest.approx([-0.2, -0.1])  # seed 2 has no partner


def test_tables_and_pictures(records, capsys):
    page = records / "results.md"
    page.write_text(f"# Results\n\n{MARKS[0]}\nold\n{MARKS[1]}\n\nThe end.\n", encoding="utf-8")
    files = [str(records / name) for name in ("text.jsonl", "parity.jsonl")]
    assert main(["report", *files, "--out", str(records / "out"), "--into", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Results") and text.endswith("The end.\n") and "\nold\n" not in text
    (row,) = [line for line in text.splitlines() if line.startswith("| settled") and "4.3000" in line]
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[:6] == ["settled", "3", "1,234", "1", "5.0", "2"]
    assert cells[7:9] == ["4.3000 ± 4.0731", "-0.1500 ± 0.0707"] and cells[9] == "4.3100" and cells[15] == "5.00"
    (swept,) = [line for line in text.splitlines() if line.startswith("| settled") and "0.20" in line]
    assert [cell.strip() for cell in swept.split("|")[1:-1]] == [
        "settled", "3", "0.20", "8.0e-01 / 4.0e-01 / 2.0e-01 / 1.0e-01", "8.0e-02 / 4.0e-02 / 2.0e-02 / 1.0e-02",
        "92.0% / 96.0% / 98.0% / 99.0%", "8.0e-03 / 4.0e-03 / 2.0e-03 / 1.0e-03",
    ]  # fmt: skip
    assert "100.0% / 99.0%" in text and "75.0% / 50.0%" in text
    pictures = {p.name for p in (records / "img").glob("*.png")}
    assert "results_text_decoded_bits_per_byte_against_cost.png" in pictures and len(pictures) == 6
    assert all(f"img/{name}" in text for name in pictures)
    html = (records / "out" / "report.html").read_text(encoding="utf-8")
    assert html.count("data:image/png;base64,") == 6 and "4.3000 ± 4.0731" in html
    assert "http://" not in html and "https://" not in html  # self-contained


def test_only_arms_of_several_budgets_are_drawn_against_cost():
    groups = [
        RunGroup("s", f"C = {c}", arm, ()) for arm, budgets in (("plain", (5, 10)), ("one", (5,))) for c in budgets
    ]
    assert [(g.arm, g.point) for g in _at_several(groups)] == [("plain", "C = 5"), ("plain", "C = 10")]


def test_figures_that_were_not_measured_are_empty_cells(records, capsys):
    """The demo's records lack them, and so do old ones."""
    lines = [record(arm, 0, 2.0) for arm in ("plain", "settled")]
    for line in lines:
        del line["in_context_score"], line["decoded_at_length"], line["decoded_bfloat16"]
    (records / "demo.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")
    assert main(["report", str(records / "demo.jsonl"), "--out", str(records / "out")]) == 0
    told = capsys.readouterr()
    row = next(line for line in told.out.splitlines() if line.startswith("| plain"))
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[9] == cells[12] == cells[13] == cells[14] == "" and cells[7] == "2.0000" and cells[15] == "5.00"
    assert told.err == f"written: {records / 'out' / 'report.html'}\n"


def test_arms_that_were_scored_on_different_text_are_named(tmp_path):
    one, other = "8 rows of the validation split of a.txt (1 % of it)", "8 rows of the validation split of b.txt"
    file = tmp_path / "x.jsonl"
    for scored, told in (((one, one), []), ((one, other), [f"- plain: {one}\n- lrt: {other}"])):
        lines = [record(arm, 0, 2.0, scored=text) for arm, text in zip(("plain", "lrt"), scored, strict=True)]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        blocks = report_blocks(read_groups([file]), "plain")
        assert [text for heading, text in blocks if heading.endswith("different text")] == told


def test_what_is_no_record_is_named(records, capsys):
    (records / "bad.jsonl").write_text('{"arm": 1}\n', encoding="utf-8")
    for arguments, said in (
        ([str(records / "bad.jsonl")], "bad.jsonl:1 is not the record of a run"),
        ([str(records / "none.jsonl")], "none.jsonl does not exist"),
        ([], "give at least one file"),
    ):
        assert said in refusal(capsys, ["report", *arguments, "--out", str(records / "out")])
    (records / "page.md").write_text("nothing", encoding="utf-8")
    arguments = [str(records / "text.jsonl"), "--out", str(records / "out"), "--into", str(records / "page.md")]
    assert "lacks the lines" in refusal(capsys, ["report", *arguments])


def test_the_same_results_given_twice_count_once(records):
    text, copy = records / "text.jsonl", records / "copy" / "text.jsonl"
    copy.parent.mkdir()
    copy.write_bytes(text.read_bytes())
    once, twice = read_groups([text]), read_groups([text, copy, text])
    assert once == twice and [len(g.records) for g in once] == [2, 3, 1, 1]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 5, "config": {"model": {"memory": {"shift": True}}, "train": {"seed": 5}}}, "in model.memory.shift;"),
        ({"seed": 5, "config": {"train": {"length": 64, "seed": 5}}}, "differs in train.length;"),
        ({"seed": 0, "bpb": {"decoded": 1.0, "zero_memory": 1.0}}, "is of the same seed as another;"),
        ({"seed": 5, "config": {"model": {"later": 1}, "train": {"seed": 5, "threads": 4, "length": 32}}}, ""),
    ],
)
def test_runs_that_are_no_further_seeds_of_an_arm_are_refused(tmp_path, capsys, change, told):
    """A mean over them would be of nothing; what one version's records do not know is passed over."""
    config = {"model": {"memory": {"shift": False}}, "train": {"length": 32, "seed": 0, "threads": 1}}
    one, other = record("plain", 0, 2.0) | {"config": config}, record("plain", 0, 2.5) | {"config": config} | change
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in (one, other)), encoding="utf-8")
    if not told:
        assert [len(g.records) for g in read_groups([file])] == [2]
        return
    error = refusal(capsys, ["report", str(file), "--out", str(tmp_path / "out")])
    assert "a.jsonl:2: this run of arm 'plain' " in error and told in error
    assert not (tmp_path / "out").exists()


def test_a_baseline_that_is_no_arm_is_refused(records, capsys):
    file = str(records / "text.jsonl")
    error = refusal(capsys, ["report", file, "--out", str(records / "out"), "--baseline", "pain"])
    assert "--baseline is 'pain', which is no arm; give one of " in error


@pytest.mark.parametrize("change", [{"arm": 3}, {"grid": []}, {"seed": "0"}, {"seed": None}, {"bpb": 1.0}])
def test_records_of_other_types_are_named(records, capsys, change):
    (records / "bad.jsonl").write_text(json.dumps(record("plain", 0, 2.0) | change) + "\n", encoding="utf-8")
    error = refusal(capsys, ["report", str(records / "bad.jsonl"), "--out", str(records / "out")])
    assert f"bad.jsonl:1: {next(iter(change))} is" in error


def test_a_bar_in_a_name_does_not_end_a_cell():
    lines = Table(["a", "b"], [["x | y", "1\n2"]]).markdown().splitlines()
    assert lines[2] == r"| x \| y | 1 2 |" and len({len(line) for line in lines}) == 1


# The verdict.


def verdicts(folder, *lines: dict) -> list[str]:
    file = folder / "v.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return report_verdict(read_groups([file]), "plain")


def test_a_report_begins_with_verdict_words_and_what_is_next(records):
    groups = read_groups([records / "text.jsonl"])
    (first, text), (second, words), (third, commands), *_ = report_blocks(groups, "plain", [records / "text.jsonl"])
    assert (first, second, third) == ("verdict", "what the words mean", "next")
    assert (
        isinstance(words, Table)
        and isinstance(text, str)
        and {"decoded", "live gap", "C"} <= {row[0] for row in words.rows}
    )
    assert text.count("\n") == 1 and "plain decodes best, 2.100 bits per byte (2 seeds)" in text
    assert commands == f"    lrt report {records / 'text.jsonl'} --baseline settled"
    assert next_commands([records / "a b.jsonl"], groups, "settled")[0].endswith("/a b.jsonl' --baseline plain")


def test_seeds_that_agree_and_seeds_that_do_not(tmp_path):
    def pairs(*differences: float) -> str:
        runs = [record("plain", s, 2.0 + s) for s in range(len(differences))]
        (line,) = verdicts(tmp_path, *runs, *(record("a, b", s, 2.0 + s + x) for s, x in enumerate(differences)))
        return line

    assert "“a, b” decodes best, 2.350 bits per byte (2 seeds)" in pairs(-0.1, -0.2)
    assert "It is -0.150 ± 0.071 from plain, all 2 seeds of one sign." in pairs(-0.1, -0.2)
    assert "no difference beyond the seeds' spread" in pairs(-0.3, 0.1)
    assert "no difference beyond the seeds' spread" in pairs(-0.5, -0.01, -0.01)
    assert "one seed, and seeds differ by 0.03" in pairs(-0.2)
    assert "plain decodes best" in pairs(0.2, 0.3) and "The next, “a, b”, is +0.250" in pairs(0.2, 0.3)


def test_the_best_recurrent_arm_stands_beside_the_token_shift(tmp_path):
    def line(late: float, *others: dict) -> str:
        arms = {"plain": (2.0, None), "shift": (1.8, 0), "late": (late, 1), "last": (1.9, 3)}
        runs = [record(arm, 0, decoded, source=source) for arm, (decoded, source) in arms.items()]
        (said,) = verdicts(tmp_path, *runs, *others)
        return said

    beside = "The best with a recurrence, late, is"
    assert f"{beside} -0.100 from shift: one seed" in line(1.7) and "late decodes best" in line(1.7)
    assert f"{beside} +0.050 from shift: one seed" in line(1.85) and "shift decodes best" in line(1.85)
    plain, late = record("plain", 0, 2.0, source=None), record("late", 0, 1.9, source=1)
    assert "recurrence" not in verdicts(tmp_path, plain, late)[0]
    assert "recurrence" not in verdicts(tmp_path, plain, record("shift", 0, 1.9, source=0))[0]


def test_points_of_a_grid_come_by_their_numbers(tmp_path):
    budgets = ("compute=10", "compute=20", "compute=2.5", "compute=5")
    lines = verdicts(tmp_path, *(record("plain", 0, 2.0, budget) for budget in budgets))
    assert [line.partition(":")[0].rpartition("=")[2] for line in lines] == ["2.5", "5", "10", "20"]


def test_pictures_of_rows_are_of_the_last_point_that_compares(tmp_path):
    runs = [record(arm, 0, 2.0, budget) for budget in ("compute=10", "compute=5") for arm in ("plain", "late")]
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in (*runs, record("late", 0, 2.0, "compute=20"))))
    headings = [heading for heading, _ in report_blocks(read_groups([file]), "plain")]
    assert [h for h in headings if "by position" in h] == ["p: train.horizon compute=10: by position"]


def test_an_arm_of_other_seeds_is_not_compared(tmp_path):
    (line,) = verdicts(tmp_path, record("plain", 0, 2.0), record("other", 1, 1.0))
    assert "other decodes best" in line and "not compared" in line


# Pictures.


def arms_of(names: list[str]) -> list[dict]:
    positions = {"1": 3.0, "2-3": 2.0, "4-7": 1.5, "8": 9.0}
    return [
        record(name, seed, 2 + k / 10 + seed / 100, bpb_by_position=positions)
        for k, name in enumerate(names) for seed in range(3)
    ]  # fmt: skip


@pytest.fixture
def many(tmp_path):
    names = ["plain", "shift", *(f"an arm with quite a long name, number {k}" for k in range(7))]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(r) + "\n" for r in arms_of(names)), encoding="utf-8")
    return read_groups([tmp_path / "many.jsonl"])


def test_an_arm_has_one_colour_and_no_two_of_a_picture_share_one():
    sweeps = [["plain", "a", "b"], ["b", "c", "plain"], ["lrt", "c", *(f"x{k}" for k in range(MOST_ARMS - 2))]]
    colours = arm_colours([*sweeps, [f"y{k}" for k in range(40)]])
    assert colours["plain"] == GREY and colours["lrt"] == KNOWN["lrt"] and set(colours.values()) <= {GREY, *OTHERS}
    assert all(len({colours[name] for name in names}) == len(names) for names in sweeps)
    crowd = Counter(colours[f"y{k}"] for k in range(40))
    assert set(crowd) == set(OTHERS) and max(crowd.values()) == 4
    assert not set(KNOWN.values()) & {arm_colours([["plain", "a", "b"]])[name] for name in "ab"}
    assert arm_colours([["a", "plain"]])["plain"] == arm_colours([["plain"]])["plain"] == GREY


def test_every_picture_draws_an_arm_in_its_colour(many):
    colours = arm_colours([[g.arm for g in many]])
    for figure in (plots.positions(many, colours), plots.convergence(many, colours), plots.budgets(many, colours)):
        for axes in figure.axes:
            drawn = {str(line.get_label()): line.get_color() for line in axes.lines}
            assert drawn and all(colours[arm] == colour for arm, colour in drawn.items())
    run = {"tokens": 1, "effective_forwards": 1, "seconds": 1, "loss": 2.0, "bpb": {"decoded": 2.0, "zero_memory": 2.0}}
    figure = curves([Recorded(name, [run], [run]) for name in ("plain", "lrt")])
    assert [line.get_color() for line in figure.axes[0].lines] == [GREY, KNOWN["lrt"]]
    bars = plots.bars(many[1:], many[0], colours).axes[0].patches
    assert [bar.get_facecolor()[:3] for bar in bars] == [to_rgb(colours[g.arm]) for g in reversed(many[1:])]


def test_lines_are_medians_in_bands_and_a_lone_last_position_is_left_out(many):
    axes = plots.positions(many, arm_colours([[g.arm for g in many]])).axes[0]
    assert len(axes.lines) == len(axes.collections) == len(many)
    assert [t.get_text() for t in axes.get_xticklabels()] == ["1", "2-3", "4-7"]
    assert np.asarray(axes.lines[0].get_ydata()).tolist() == [3.0, 2.0, 1.5]
    settled = plots.convergence(many[1:2], arm_colours([[many[1].arm]])).axes[0]
    assert len(settled.lines) == 1 and np.asarray(settled.lines[0].get_ydata()).tolist() == [0.8 / k for k in SWEPT]


def test_the_chart_of_differences_says_which_side_is_better(many):
    axes = plots.bars(many[1:], many[0], arm_colours([[g.arm for g in many]])).axes[0]
    assert axes.get_xlabel().startswith("left is better") and axes.get_xlabel().endswith("of plain")


def test_no_letter_is_cut_off(many):
    """Every text lies within its picture, and legends cover no line."""
    colours = arm_colours([[g.arm for g in many]])
    run = {"tokens": 1, "effective_forwards": 1, "seconds": 1, "loss": 2.0, "bpb": {"decoded": 2.0, "zero_memory": 2.0}}
    accuracy = [replace(g, records=tuple(r | {"accuracy": {"8": {"all": 1.0}}} for r in g.records)) for g in many]
    figures = [
        plots.positions(many, colours), plots.convergence(many, colours), plots.budgets(many, colours),
        plots.bars(many[1:], many[0], colours), plots.lengths(accuracy, colours),
        curves([Recorded(g.arm, [run], [run]) for g in many]),
        draw.picture(Schedule.parse("interleaved-2:weights=0/1"), 5),
        draw.picture(Schedule.parse("refinement-2:weights=0.25/0.5/1:detach"), 8),
        draw.picture(Schedule.parse("sequential"), 64),
    ]  # fmt: skip
    for figure in figures:
        assert not cut_off(figure)


def cut_off(figure: Figure) -> bool:
    """Whether anything that is drawn, letters included, reaches over the figure's edge."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn, (width, height) = figure.get_tightbbox(canvas.get_renderer()), figure.get_size_inches()
    slack = 0.01  # inches
    return not (drawn.x0 >= -slack and drawn.y0 >= -slack and drawn.x1 <= width + slack and drawn.y1 <= height + slack)


@pytest.mark.parametrize("costs", [(1, 1.9), (13, 31), (5, 10), (1, 4.9), (2, 11), (5, 80), (1, 4000)])
def test_no_two_numbers_of_an_axis_touch(costs, tmp_path):
    """Costs stand on logarithmic axes, whose decades may be wider than all of them."""
    rows = [record("shift", 0, 2.0, f"compute={cost}") for cost in costs]
    (tmp_path / "costs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    groups = read_groups([tmp_path / "costs.jsonl"])
    figure = plots.budgets(groups, arm_colours([["shift"]]))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    for axes in figure.axes:
        low, high = axes.get_xlim()
        labels = [label for x, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True) if low <= x <= high]
        boxes = [label.get_window_extent(canvas.get_renderer()) for label in labels]
        assert len(boxes) >= 2
        assert all(left.x1 + 3 < right.x0 for left, right in pairwise(boxes))


def test_a_title_that_is_cut_is_found():
    figure = Figure(figsize=(2, 2), layout="constrained")
    figure.subplots().set_title("a title that is much longer than two inches are wide")
    assert cut_off(figure)


@pytest.mark.parametrize("change", [{"flops": "many"}, {"bpb": {}}, {"kl": [None]}, {"scaling_parameters": 0}])
def test_a_record_with_a_figure_of_another_kind_is_one_line(change: dict, tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text(json.dumps(record("settled", 0, 1.8) | change) + "\n", encoding="utf-8")
    line = refusal(capsys, ["report", str(tmp_path / "x.jsonl"), "--out", str(tmp_path / "new")])
    assert "x.jsonl lacks a figure, or holds another kind of value" in line and len(line) < 300 and "\n" not in line
