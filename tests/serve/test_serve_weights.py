"""A server whose large matrices are in 8 bits: an answer is what it is alone, whatever else is in the batch."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from serving import Server, post

from lrt.inference import weights
from lrt.inference.weights import Int8Linear

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
TEXTS = ("the quick", "def area(self", "# the", "fox jumps over the lazy dog", "return width * height\n" * 6)
ASKED = [
    {"prompt": text, "max_tokens": 12 + 3 * i, "seed": i, "temperature": temperature, "logprobs": 2, "ignore_eos": True}
    for i, text in enumerate(TEXTS) for temperature in (0.0, 0.9)
]  # fmt: skip


@pytest.fixture(scope="module")
def small(run):
    """The test's model has no matrix that is worth it by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "LEAST", 32 * 32)
        server = Server(run, weights="int8", keep_mb=0)
    with server:
        yield server


def choices(server: Server, body: dict) -> list[dict]:
    answer = post(server, "/v1/completions", body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


def test_answers_in_a_batch_equal_those_alone(small: Server):
    assert isinstance(small.loaded.model.head, Int8Linear)
    alone = [choices(small, body) for body in ASKED]
    with ThreadPoolExecutor(24) as pool:  # up to 32 rows: another number of rows computes at once
        crowd = [pool.submit(choices, small, body) for body in ASKED * 2 + [ASKED[0] | {"n": 12}]]
        together = [one.result() for one in crowd]
    for i, body in enumerate(ASKED * 2):
        mine, before = together[i][0], alone[i % len(ASKED)][0]
        assert mine["text"] == before["text"], body
        assert mine["logprobs"]["token_logprobs"] == pytest.approx(before["logprobs"]["token_logprobs"], abs=1e-5)


def test_they_are_not_those_of_full_weights(small: Server, server: Server):
    """Or the test above would be another test of full weights."""
    eight, full = (choices(s, ASKED[8])[0]["logprobs"]["token_logprobs"][0] for s in (small, server))
    assert 0 < abs(eight - full) < 1
