"""`lrt bench decode`: every figure as it is measured, every part, and the comparison with transformers."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from helpers import PLAIN_OPTIONS, config, randomised, refusal, tokens
from serving import make_run

from lrt.benchmarks import convergence
from lrt.benchmarks import latency as bench
from lrt.cli.bench import main as run_bench
from lrt.cli.main import main
from lrt.config.benchmarks import DecodingBenchmark
from lrt.config.model import MEMORY_OFF
from lrt.evaluation.contraction import exact_states


def test_the_bench_prints_each_figure_and_ends_in_json(capsys):
    small = "--recipe cpu_demo --batches 1 2 10000000 --contexts 8 --steps 1 --no-compile --device cpu --json"
    assert run_bench(["decode", *small.split()]) == 0
    *told, last = capsys.readouterr().out.splitlines()
    assert [(c["batch"], c["context"]) for c in json.loads(last)["decode"]] == [(1, 8), (2, 8)]
    assert [(c["batch"], c["context"]) for c in json.loads(last)["left_out"]] == [(10_000_000, 8)]
    assert [line.split()[:4] for line in told[:2]] == [["batch", "1", "context", "8"], ["batch", "2", "context", "8"]]
    assert "left out: its cache of" in told[2]


def test_the_bench_measures_every_part(tmp_path):
    model = randomised(config(vocab_size=64), seed=2, scale=0.2).float()
    prompts = tokens(model.config, 2, 20)
    settings = DecodingBenchmark(batches=(1, 10**7), contexts=(8, 16), steps=1, compile=False)
    cells = list(bench.latencies(model.config, torch.device("cpu"), settings))
    prefills = bench.prefill_times(model, prompts, ["jacobi", "interleaved-4"])
    assert [(c["batch"], c["context"], "ms" in c) for c in cells] == [
        (1, 8, True), (1, 16, True), (10**7, 8, False), (10**7, 16, False)
    ]  # fmt: skip
    assert bench.score_times(model, prompts)["max_nats_diff"] < 1e-2
    assert all(c["max_logit_diff"] < 1e-2 and c["greedy_agree"] > 0.9 for c in prefills)
    exact = exact_states(model, prompts).hidden
    points = convergence.curve(model, prompts, "jacobi", 20, exact)
    assert points[-1].logit_diff < 1e-4
    assert points[-1].greedy_agree == 1
    convergence.draw({"random": {"jacobi": points}}, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_more_prompts_than_one_group_are_compared_as_each_by_itself():
    model = randomised(config(vocab_size=64), seed=2, scale=0.2).float()
    prompts = tokens(model.config, bench.GROUP + 1, 12)
    (cell,) = bench.prefill_times(model, prompts, ["jacobi"])
    alone = [bench.prefill_times(model, prompt[None], ["jacobi"])[0] for prompt in prompts]
    for key in ("sweeps", "forward_equivalents", "stepped"):
        assert cell[key] == max(one[key] for one in alone)
    assert cell["max_logit_diff"] == pytest.approx(max(one["max_logit_diff"] for one in alone), abs=1e-5)
    assert cell["greedy_agree"] == pytest.approx(sum(one["greedy_agree"] for one in alone) / len(alone))


def test_prompts_come_from_another_text_where_one_is_named(tmp_path, capsys):
    run, text = make_run(tmp_path / "run"), tmp_path / "text.txt"
    text.write_text("a quite different text, a little of it\n" * 40, encoding="utf-8")
    flags = f"--checkpoint {run} --lengths 16 --prompts 2 --batches 1 --contexts 8 --steps 1 --no-compile --json"
    assert "--source" in refusal(capsys, ["bench", "decode", *flags.split()])
    assert main(["bench", "decode", *flags.split(), "--source", str(text)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {cell["length"] for cell in found["prefill"]} == {16}
    assert found["score"]["rows"] == 2


def test_the_bench_decodes_beside_transformers():
    pytest.importorskip("transformers")
    plain = dataclasses.replace(config(depth=2, width=32, context=32, **PLAIN_OPTIONS), memory=MEMORY_OFF)
    found = bench.against_transformers(plain, torch.device("cpu"), False, tokens=4, repeats=1)
    speeds = [found[f"{name}_tokens_per_second"] for name in ("transformers", "eager")]
    assert all(s > 0 for s in speeds) and found["eager_ratio"] == pytest.approx(speeds[1] / speeds[0])
