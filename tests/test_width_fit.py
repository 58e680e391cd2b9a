"""The line through differences over width: by hand, with what may not enter left out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
QUANTILE_4 = 2.7764451051977987
"""Student's t, 97.5 %, four degrees of freedom."""


def record(arm: str, width: int, seed: int, decoded: float, horizon: str = "flops_of_plain=10", depth: int = 3) -> str:
    model, train = {"width": width, "depth": depth}, {"horizon": horizon}
    return json.dumps({
        "arm": arm, "seed": seed, "grid": {"train.horizon": horizon}, "bpb": {"decoded": decoded},
        "config": {"model": model, "train": train},
    })  # fmt: skip


def printed(folder: Path, *lines: str, flags: tuple[str, ...] = ()) -> list[list[str]]:
    """The cells of the table's rows, its head apart."""
    files: dict[str, list[str]] = {}
    for line in lines:  # a sweep has models of one size
        model = json.loads(line)["config"]["model"]
        files.setdefault(f"width{model['width']}_depth{model['depth']}.jsonl", []).append(line)
    for name, text in files.items():
        (folder / name).write_text("\n".join(text) + "\n", encoding="utf-8")
    command = [
        sys.executable,
        "tools/width_fit.py",
        *flags,
        "--at",
        "256",
        "--",
        *(str(folder / name) for name in files),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in done.stdout.splitlines()[2:]]


def test_the_line_and_its_intervals_are_those_of_the_textbook(tmp_path):
    """Differences +-0.01 about -0.03 and -0.01: slope 0.02; the errors by hand."""
    away = {0: -0.01, 1: 0.0, 2: 0.01}
    plain = [record("plain", width, seed, 2.0 + seed) for width in (64, 128) for seed in away]
    mean = {64: -0.03, 128: -0.01}
    arm = [record("shift", width, seed, 2.0 + seed + mean[width] + away[seed]) for width in mean for seed in away]
    [row] = printed(tmp_path, *plain, *arm)
    assert row[:3] == ["shift", "64, 128", "6"]
    error = (4 * 0.01**2 / 4) ** 0.5  # four residuals of 0.01 over 6 - 2 degrees of freedom
    squares = 6 * 0.5**2
    slope, at = (cell.split(" ± ") for cell in row[3:])
    assert float(slope[0]) == pytest.approx(0.02, abs=5e-4)
    assert float(slope[1]) == pytest.approx(QUANTILE_4 * error / squares**0.5, abs=5e-4)
    assert float(at[0]) == pytest.approx(0.01, abs=5e-4)
    assert float(at[1]) == pytest.approx(QUANTILE_4 * error * (1 / 6 + 1.5**2 / squares) ** 0.5, abs=5e-4)


def test_other_budgets_depths_and_arms_of_one_width_stay_out(tmp_path):
    every = [record(arm, width, seed, 2.0) for arm in ("plain", "shift") for width in (64, 128) for seed in (0, 1)]
    strange = [record(arm, 128, 0, 9.0, "flops_of_plain=5") for arm in ("plain", "shift")]
    strange += [record("LRT", 64, seed, 1.0) for seed in (0, 1, 2)]
    [row] = printed(tmp_path, *every, *strange)
    assert row == ["shift", "64, 128", "4", "+0.000 ± 0.000", "+0.000 ± 0.000"]
    deep = [
        record(arm, width, seed, 2.0, depth=6) for arm in ("plain", "LRT") for width in (64, 128) for seed in (0, 1)
    ]
    assert [row[0] for row in printed(tmp_path, *every, *deep, flags=("--depth", "6"))] == ["LRT"]
