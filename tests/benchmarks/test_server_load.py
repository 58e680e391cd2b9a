"""The server's bench: its clients count what the server makes, in both loops, streaming or not."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile

import pytest
from helpers import refusal
from serving import Server, make_run

from lrt.benchmarks import server_load as bench

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_clients_count_the_servers_tokens(tmp_path):
    with Server(make_run(tmp_path / "run")) as server:
        clients = bench.Clients(*server.address, 5, tuple(range(1, 60)))
        for load in (bench.Load(3), bench.Load(3, True), bench.Load(3, True, 30.0), bench.Load(3, True, None, 20, 10)):
            before = server.metric("lrt_generated_tokens_total")
            found = asyncio.run(bench._measure(clients, load, 0.4))
            made = server.metric("lrt_generated_tokens_total") - before
            assert 1 <= made <= 5 * found["requests"]
            assert 0 < found["first_ms"] <= found["answer_ms"] * 1.5
            assert found["first_p95_ms"] >= found["first_ms"]
            assert found["tokens_per_second"] == pytest.approx(made / found["seconds"])


def test_ratios_are_within_a_round_and_the_table_shows_them():
    settings = bench.LoadBenchmark(clients=(1, 4), rounds=2, tokens=8)
    speeds = iter([10.0, 7.0, 30.0, 20.0, 5.0, 3.0, 20.0, 10.0] * 2)

    def cell(load, seconds):
        assert load.rate is None or load.rate > 0
        figures = dict.fromkeys(("requests", "first_ms", "first_p95_ms", "answer_ms"), 1.0)
        return {"tokens_per_second": next(speeds)} | figures

    rows = bench._rounds(settings, cell)
    ratio = {(r["clients"], r["stream"], r["loop"]): r["ratio"] for r in rows}
    assert ratio[4, False, "closed"] == 3.0
    assert ratio[4, True, "closed"] == 4.0
    result = {"run": "r", "tokens": 8, "cores": 2, "seconds": 1.0, "rows": rows}
    assert any(line.split()[:5] == ["4", "closed", "yes", "20", "4.00"] for line in bench.lines(result))


def test_prompts_of_a_length_share_their_beginning_and_nothing_else():
    words = range(1000, 2000)
    bodies = [bench.Load(1, True, None, 30, 10).body(number, 8, words) for number in range(1, 9)]
    assert {tuple(b["prompt"][:10]) for b in bodies} == {tuple(range(1000, 1010))}
    assert {len(b["prompt"]) for b in bodies} == {40}
    assert len({b["prompt"][10] for b in bodies}) == len(bodies)
    assert bodies[0]["stream"] and bodies[0]["max_tokens"] == 8
    assert isinstance(bench.Load(1).body(3, 8, ())["prompt"], str)


def test_long_prompts_are_streams_in_a_closed_loop():
    settings = bench.LoadBenchmark(clients=(1, 4), tokens=8, prompts=(16, 256), shared=(0, 512))
    asked = []

    def cell(load, seconds):
        asked.append(load)
        return dict.fromkeys(
            ("tokens_per_second", "requests", "first_ms", "first_p95_ms", "answer_ms"), 2.0 * load.clients
        )

    rows = bench._rounds(settings, cell)
    assert {(x.clients, x.prompt, x.shared) for x in asked} == {
        (c, n, s) for c in (1, 4) for n in (16, 256) for s in (0, 512)
    }
    assert all(x.stream and x.rate is None for x in asked) and len(asked) == 8
    assert [r["ratio"] for r in rows if r["clients"] == 4] == [4.0] * 4
    shown = bench.lines({"run": "r", "tokens": 8, "cores": 2, "seconds": 1.0, "rows": rows})
    assert shown[1].split()[:5] == ["clients", "loop", "stream", "prompt", "shared"]
    assert shown[2].split()[:5] == ["1", "closed", "yes", "16", "0"]


def test_wrong_flags_are_named(capsys, tmp_path):
    assert "--clients are (0,)" in refusal(capsys, ["bench", "serve", "nowhere", "--clients", "0"])
    assert "--prompts take numbers from 1 on" in refusal(capsys, ["bench", "serve", "nowhere", "--prompts", "0"])
    run = make_run(tmp_path / "run")
    assert "come to 964; the context is" in refusal(capsys, ["bench", "serve", str(run), "--prompts", "900"])


def test_a_server_that_does_not_start_is_told_in_its_own_line(capsys):
    says = "import sys; print('a warning', file=sys.stderr); sys.exit('lrt serve: RUN is not a folder')"
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-c", says]
        with (
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as server,
            pytest.raises(ValueError, match="^RUN is not a folder$"),
        ):
            bench._address(server, log)
        assert capsys.readouterr().err == "a warning\n" and bench._rest(log) == ""


@pytest.mark.parametrize(("shared", "error"), [((), "--shared is empty"), ((64,), "give --prompts")])
def test_shared_tokens_stand_before_prompts_of_a_length(shared: tuple[int, ...], error: str):
    with pytest.raises(ValueError, match=error):
        bench.LoadBenchmark(shared=shared)
