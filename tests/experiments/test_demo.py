"""The demo, shrunk: three arms at equal effective compute, a table, a page, a picture, and report.json as promised."""

from __future__ import annotations

import json
import shlex

import pytest

from lrt.cli.main import main
from lrt.experiments.demo import ARMS, HEADER


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    text = "".join(f"def function_{i}(x):\n    return [x] * {i}\n\n" for i in range(900))
    (folder / "text.py").write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(shlex.split("demo --compute 0.1 --source text.py --out out")) == 0
    return folder / "out"


def test_report_json_has_what_is_promised(demo):
    runs = json.loads((demo / "report.json").read_text(encoding="utf-8"))["runs"]
    assert [r["name"] for r in runs] == list(ARMS)
    assert [r["schedule"] for r in runs] == ["parallel", "interleaved-2", "settled-1..3"]
    assert [r["projection"] for r in runs] == ["none", "shared", "layerwise"]
    for r in runs:
        assert {"parameters", "tokens", "token_forwards", "effective_compute", "wall_seconds"} <= set(r)
        assert set(r["bpb"]) == {"zero_memory", "passes", "merged", "decoded"}
        assert r["live_gap"] == pytest.approx(r["bpb"]["decoded"] - r["bpb"]["merged"])
        assert r["decode_tokens_per_second"] > 0
    assert len(runs[1]["bpb"]["passes"]) == 3
    assert runs[0]["live_gap"] == pytest.approx(0, abs=1e-5)


def test_effective_compute_is_equal_and_tokens_are_not(demo):
    runs = json.loads((demo / "report.json").read_text(encoding="utf-8"))["runs"]
    plain, interleaved, settled = (r["effective_compute"] for r in runs)
    assert interleaved == pytest.approx(plain, rel=0.1)
    assert settled == pytest.approx(plain, rel=0.3)  # r is drawn: few steps stray from its mean
    assert runs[0]["tokens"] > 1.5 * runs[1]["tokens"]


def test_pages_and_pictures(demo):
    page = (demo / "report.html").read_text(encoding="utf-8")
    assert all(column in page for column in HEADER)
    assert all(f"sample: {name}" in page for name in ARMS)
    assert "http://" not in page and "https://" not in page  # self-contained
    assert (demo / "report.png").read_bytes().startswith(b"\x89PNG")
    assert all((demo / name / "result.json").exists() for name in ARMS)


def test_a_second_demo_does_not_overwrite_the_first(demo, capsys):
    assert main(["demo", "--out", str(demo)]) == 2
    assert "exists; remove it or choose another --out" in capsys.readouterr().err
