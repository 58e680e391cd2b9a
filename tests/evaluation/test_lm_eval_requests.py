"""Requests of the harness at their edges: what cannot be scored or decoded as asked is refused, never dropped."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from serving import make_run

from lrt.training import checkpoint

pytest.importorskip("lm_eval")

from lrt.evaluation.lm_eval import MAX_NEW, Harness, read_options


@pytest.fixture(scope="module")
def harness(tmp_path_factory) -> Harness:
    return Harness(checkpoint.load_model(make_run(tmp_path_factory.mktemp("run") / "run", context=64), "cpu"), "exact")


def asked(*args: Any) -> Any:
    return SimpleNamespace(args=args)


@pytest.mark.parametrize("context", ["", "def"])
def test_a_continuation_of_nothing_is_refused_since_it_would_win(context: str, harness: Harness):
    with pytest.raises(ValueError, match="a continuation has no tokens"):
        harness.loglikelihood([asked("def", "x"), asked(context, "")])


def test_requests_at_their_edges(harness: Harness):
    assert harness.generate_until([]) == [] and harness.loglikelihood([]) == []
    assert harness.loglikelihood_rolling([asked("")]) == [0.0]
    (score, _), (alone, _) = harness.loglikelihood([asked("", "def"), asked("def", "x")])
    assert score < 0 and alone < 0
    answers = harness.generate_until([asked("def", {"max_gen_toks": 3}), asked("def", {"max_new_tokens": 3})])
    assert answers[0] == answers[1] != harness.generate_until([asked("def", {"max_gen_toks": 5})])[0]


UNHEEDED: list[tuple[dict[str, Any], str]] = [
    ({"num_beams": 4}, "num_beams: 4"),
    ({"repetition_penalty": 2.0}, "repetition_penalty"),
    ({"max_length": 10}, "max_length"),
    ({"stop": ["x"]}, "stop"),
    ({"temperature": 0.7}, "samples"),
    ({"do_sample": True}, "samples"),
    ({"max_gen_toks": "5"}, "whole number"),
    ({"max_gen_toks": True}, "whole number"),
    ({"until": {"a": 1}}, "until"),
    ({"until": [1]}, "until"),
]


@pytest.mark.parametrize(("options", "reason"), UNHEEDED)
def test_options_that_would_not_be_heeded_are_refused(options: dict[str, Any], reason: str):
    with pytest.raises(ValueError, match=reason):
        read_options(options)


def test_options_of_greedy_decoding_are_read():
    assert read_options({}) == ((), MAX_NEW)
    neutral = {"num_beams": 1, "repetition_penalty": 1, "temperature": 0.0, "top_p": 1.0, "do_sample": True}
    assert read_options({"until": ["", "x"], "max_tokens": 7} | neutral) == (("x",), 7)
    assert read_options({"until": "", "max_gen_toks": 3, "max_tokens": 7}) == ((), 3)
    assert read_options({"do_sample": False, "temperature": 0.7, "until": None}) == ((), MAX_NEW)
