"""The demo, shrunk: four arms at equal training FLOPs, a table, a verdict, a page, a picture, report.json."""

from __future__ import annotations

import contextlib
import io
import json
import shlex

import pytest
from helpers import refusal

from lrt.cli.main import main
from lrt.config.recipes import LRT_SCHEDULE
from lrt.experiments.demo import ARMS, FIGURES, LINES, next_commands, opening, verdict
from lrt.experiments.runner import at_once


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    text = "".join(f"def function_{i}(x):\n    return [x] * {i}\n\n" for i in range(900))
    (folder / "text.py").write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            assert main(shlex.split("demo --compute 0.1 --source text.py --out out")) == 0
    (folder / "out" / "said.txt").write_text(said.getvalue(), encoding="utf-8")
    return folder / "out"


def test_report_json_has_what_is_promised(demo):
    runs = json.loads((demo / "report.json").read_text(encoding="utf-8"))["runs"]
    assert [r["name"] for r in runs] == list(ARMS)
    assert [r["schedule"] for r in runs] == ["parallel", "parallel", LRT_SCHEDULE, "interleaved-2"]
    assert [r["projection"] for r in runs] == ["none", "shared", "shared", "shared"]
    for r in runs:
        assert {"parameters", "tokens", "token_forwards", "effective_compute", "wall_seconds"} <= set(r)
        assert set(r["bpb"]) == {"zero_memory", "passes", "merged", "decoded"}
        assert r["live_gap"] == pytest.approx(r["bpb"]["decoded"] - r["bpb"]["merged"])
        assert r["decode_tokens_per_second"] > 0
    assert len(runs[3]["bpb"]["passes"]) == 3
    assert runs[0]["live_gap"] == pytest.approx(0, abs=1e-5)


def test_flops_are_equal_and_tokens_are_not(demo):
    runs = json.loads((demo / "report.json").read_text(encoding="utf-8"))["runs"]
    plain, shift, settled, interleaved = (r["flops"] for r in runs)
    assert shift == pytest.approx(plain, rel=0.1) and interleaved == pytest.approx(plain, rel=0.15)
    assert settled == pytest.approx(plain, rel=0.3)  # r is drawn: few steps stray from its mean
    assert runs[0]["tokens"] > 1.5 * runs[3]["tokens"]


def test_the_arms_are_named_before_anything_is_done(demo):
    """And what comes next is said as it goes."""
    said = (demo / "said.txt").read_text(encoding="utf-8").splitlines()
    assert list(LINES) == list(ARMS) and len(opening(2)) == len(ARMS) + 2
    assert [line.strip() for line in said[: len(ARMS) + 2]] == [line.strip() for line in opening(at_once())]
    assert any(line.startswith("all runs") and "next " in line for line in said)
    assert any("scoring paper, 4 of 4" in line for line in said)


def test_the_verdict_names_the_best_arm_and_the_distances():
    rows = [
        {"name": name, "bpb": {"decoded": bits}}
        for name, bits in (("plain", 2.0), ("shift", 1.9), ("lrt", 2.05), ("paper", 2.1))
    ]
    said = verdict(rows)
    assert "shift decodes best, 1.900" in said
    assert "shift -0.100, lrt +0.050, paper +0.100" in said


def test_what_it_says_to_try_next_exists(demo):
    said = json.loads((demo / "report.json").read_text(encoding="utf-8"))
    assert said["verdict"] in (demo / "report.html").read_text(encoding="utf-8").replace("&#x27;", "'")
    commands = next_commands(demo).splitlines()[1:]
    assert all((demo / "lrt" / "result.json").exists() and str(demo / "lrt") in line for line in commands)


def test_pages_and_pictures(demo):
    page = (demo / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in (*FIGURES, *ARMS))
    assert all(f"sample: {name}" in page for name in ARMS)
    assert "http://" not in page and "https://" not in page  # self-contained
    assert (demo / "report.png").read_bytes().startswith(b"\x89PNG")
    assert all((demo / name / "result.json").exists() for name in ARMS)


def test_a_second_demo_does_not_overwrite_the_first(demo, capsys):
    assert "exists; remove it or choose another --out" in refusal(capsys, ["demo", "--out", str(demo)])
