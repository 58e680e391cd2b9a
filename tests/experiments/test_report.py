"""lrt report: means, deviations, paired differences are those of the records; pages and pictures are made of them."""

from __future__ import annotations

import json

import pytest

from lrt.cli.main import main
from lrt.experiments.groups import read_groups
from lrt.experiments.report import MARKS
from lrt.utils.tables import Table


def record(arm: str, seed: int, decoded: float, compute: str = "compute=5", **more) -> dict:
    cost = float(compute.partition("=")[2])
    return {
        "arm": arm, "grid": {"train.horizon": compute}, "seed": seed, "parameters": 1234, "forwards_per_token": 1,
        "scaling_parameters": 1000, "tokens": 1000 * cost, "effective_compute": 1000 * cost, "flops": 2e12,
        "cpu_seconds": 10 * cost, "bpb": {"decoded": decoded, "zero_memory": decoded + 0.5}, "live_gap": 0.001,
        "in_context_score": 0.25, "decoded_at_length": {"1": decoded, "2": decoded + 0.1, "4": decoded + 0.2},
        "bpb_by_position": {"1": 3.0, "2-3": 2.0}, "sweep_residuals": [0.8 / k for k in SWEPT],
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


def test_what_is_no_record_is_named(records, capsys):
    (records / "bad.jsonl").write_text('{"arm": 1}\n', encoding="utf-8")
    for arguments, said in (
        ([str(records / "bad.jsonl")], "bad.jsonl:1 is not the record of a run"),
        ([str(records / "none.jsonl")], "none.jsonl does not exist"),
        ([], "give at least one file"),
    ):
        assert main(["report", *arguments, "--out", str(records / "out")]) == 2
        assert said in capsys.readouterr().err
    (records / "page.md").write_text("nothing", encoding="utf-8")
    arguments = [str(records / "text.jsonl"), "--out", str(records / "out"), "--into", str(records / "page.md")]
    assert main(["report", *arguments]) == 2
    assert "lacks the lines" in capsys.readouterr().err


def test_the_same_results_given_twice_count_once(records):
    text, copy = records / "text.jsonl", records / "copy" / "text.jsonl"
    copy.parent.mkdir()
    copy.write_bytes(text.read_bytes())
    once, twice = read_groups([text]), read_groups([text, copy, text])
    assert once == twice and [len(g.records) for g in once] == [2, 3, 1, 1]


@pytest.mark.parametrize("change", [{"arm": 3}, {"grid": []}, {"seed": "0"}, {"seed": None}, {"bpb": 1.0}])
def test_records_of_other_types_are_named(records, capsys, change):
    (records / "bad.jsonl").write_text(json.dumps(record("plain", 0, 2.0) | change) + "\n", encoding="utf-8")
    assert main(["report", str(records / "bad.jsonl"), "--out", str(records / "out")]) == 2
    error = capsys.readouterr().err
    assert f"bad.jsonl:1: {next(iter(change))} is" in error and error.count("\n") == 1


def test_a_bar_in_a_name_does_not_end_a_cell():
    lines = Table(["a", "b"], [["x | y", "1\n2"]]).markdown().splitlines()
    assert lines[2] == r"| x \| y | 1 2 |" and len({len(line) for line in lines}) == 1
