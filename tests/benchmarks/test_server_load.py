"""The server's bench: its clients count what the server makes, in both loops, streaming or not."""

from __future__ import annotations

import asyncio

import pytest
from serving import Server, make_run

from lrt.benchmarks import server_load as bench
from lrt.cli.main import main

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_clients_count_the_servers_tokens(tmp_path):
    with Server(make_run(tmp_path / "run")) as server:
        for stream, rate in ((False, None), (True, None), (True, 30.0)):
            before = server.metric("lrt_generated_tokens_total")
            found = asyncio.run(bench._measure(*server.address, 5, 3, 0.4, stream, rate))
            made = server.metric("lrt_generated_tokens_total") - before
            assert 1 <= made <= 5 * found["requests"]
            assert 0 < found["first_ms"] <= found["answer_ms"] * 1.5
            assert found["first_p95_ms"] >= found["first_ms"]
            assert found["tokens_per_second"] == pytest.approx(made / found["seconds"])


def test_ratios_are_within_a_round_and_the_table_shows_them():
    settings = bench.LoadBenchmark(clients=(1, 4), rounds=2, tokens=8)
    speeds = iter([10.0, 7.0, 30.0, 20.0, 5.0, 3.0, 20.0, 10.0] * 2)

    def cell(clients, seconds, stream, rate):
        assert rate is None or rate > 0
        figures = dict.fromkeys(("requests", "first_ms", "first_p95_ms", "answer_ms"), 1.0)
        return {"tokens_per_second": next(speeds)} | figures

    rows = bench._rounds(settings, cell)
    ratio = {(r["clients"], r["stream"], r["loop"]): r["ratio"] for r in rows}
    assert ratio[4, False, "closed"] == 3.0
    assert ratio[4, True, "closed"] == 4.0
    result = {"run": "r", "tokens": 8, "cores": 2, "seconds": 1.0, "rows": rows}
    assert any(line.split()[:5] == ["4", "closed", "yes", "20", "4.00"] for line in bench.lines(result))


def test_wrong_flags_are_named(capsys):
    assert main(["bench", "serve", "nowhere", "--clients", "0"]) == 2
    assert "--clients are (0,)" in capsys.readouterr().err
