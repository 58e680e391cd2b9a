"""`lrt bench train` on tiny shapes: its report holds what it promises. No time is ever asserted."""

from __future__ import annotations

import json
import math

import pytest
import torch
from helpers import refusal

from lrt.benchmarks.peer import PEER, nanochat
from lrt.benchmarks.profile import PARTS
from lrt.benchmarks.training_step import PLAIN, SteppedModel, ideal, shape
from lrt.cli.bench import main as bench
from lrt.config.benchmarks import StepBenchmark
from lrt.schedule import Schedule

TINY = "--device cpu --depth 2 --width 16 --vocab-size 30 --batch 2 --length 16 --repeats 1 --dtype float32"
ROW = {
    "schedule", "ms", "ratio", "ideal", "ratio_over_ideal", "step_ms", "step_ratio", "tokens_per_second",
    "flops_per_second", "mfu",
}  # fmt: skip


def report(capsys, flags: str) -> dict:
    assert bench(["train", *TINY.split(), "--json", *flags.split()]) == 0
    out = capsys.readouterr().out.strip().splitlines()
    assert any(line.startswith("plain") for line in out)
    return json.loads(out[-1])


def test_rows_of_every_schedule_with_their_ideals(capsys):
    result = report(capsys, "--no-memory --profile")
    ideals = {row["schedule"]: row["ideal"] for row in result["rows"]}
    assert {name: round(value, 3) for name, value in ideals.items()} == {
        "plain": 1.0, "interleaved-2": 2.0, "interleaved-4": 2.0, "interleaved-8": 2.0, "refinement-1": 2.0,
        "refinement-3": 4.0, "settled-1": 1.333, "settled-2": 1.667, "settled-3": 2.0,
    }  # fmt: skip
    assert result["device"] == "cpu" and result["dtype"] == "float32"
    assert result["rows"][0]["ratio"] == result["rows"][0]["step_ratio"] == 1.0
    for row in result["rows"]:
        assert set(row) == ROW | {"parts"}
        assert math.isclose(row["ratio_over_ideal"], row["ratio"] / row["ideal"])
        assert row["step_ms"] >= row["ms"] > 0 and row["flops_per_second"] > 0
        assert tuple(row["parts"]) == PARTS
        assert all(row["parts"][part] > 0 for part in PARTS)


def test_peak_memory_is_taken_in_a_process_of_its_own(capsys):
    result = report(capsys, "--schedules settled-1 --recompute --attention masked")
    assert [row["schedule"] for row in result["rows"]] == ["plain", "settled-1"]
    assert result["recompute"] is True and result["attention"] == "masked"
    assert all(row["peak_mb"] >= row["idle_mb"] > 10 for row in result["rows"])


def test_the_peer_is_a_row_of_its_own(capsys):
    pytest.importorskip("transformers")
    result = report(capsys, "--no-memory --schedules settled-1 --peer --profile")
    plain, peer, _ = result["rows"]
    assert peer["schedule"] == "transformers" and peer["ratio"] > 0 and "parts" not in peer
    assert peer["ideal"] == plain["ideal"] == 1.0


def test_the_peer_has_our_shape_and_our_loss_at_the_start():
    """Both begin with a head near zero: the loss is that of guessing; and the matrices are as many."""
    pytest.importorskip("transformers")
    settings = StepBenchmark(depth=2, width=128, vocab_size=30, batch=2, length=16, dtype="float32", device="cpu")
    ours, theirs = SteppedModel(settings, PLAIN), SteppedModel(settings, PEER)
    batch = ours.loader.batch(0)
    assert theirs.loss(*batch).item() == pytest.approx(math.log(30), rel=0.05)
    matrices = [p.numel() for p in ours.model.parameters() if p.ndim == 2]
    assert sum(p.numel() for p in nanochat(shape(settings)[0], torch.device("cpu")).parameters()) == sum(matrices)


def test_shapes_come_from_the_recipe_unless_given():
    config, length = shape(StepBenchmark(recipe="cpu_demo", depth=2))
    assert (config.depth, config.d, length) == (2, 64, 128)
    config, length = shape(StepBenchmark())
    assert (config.depth, config.d, config.vocab_size, config.memory.projection, length) == (
        4,
        256,
        4096,
        "shared",
        512,
    )


def test_ideal_counts_token_forwards():
    assert ideal(Schedule.parse("interleaved-3").passes(10)) == pytest.approx(2.0)
    assert ideal(Schedule.parse("settled-2:settle=1").passes(10)) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("flags", "part"), [("--schedules settled-1..3", "range"), ("--repeats 0", "--repeats"), ("--batch 0", "--batch")]
)
def test_bad_flags_are_one_line(flags, part, capsys):
    assert part in refusal(capsys, ["bench", "train", *flags.split()])
