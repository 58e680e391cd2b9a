"""SamplingParams laws have the right supports and frequencies; text streams never split a character."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lrt.config.decoding import BIAS, PENALTIES, SamplingParams
from lrt.inference.history import HistoryState
from lrt.inference.sampling import SamplingTensors, TokenHistory, adjusted, choose, probabilities, uniforms
from lrt.inference.streaming import TextStream

P = torch.tensor([[0.05, 0.4, 0.1, 0.3, 0.15]], dtype=torch.float64)
CPU = torch.device("cpu")


def law(**options) -> SamplingTensors:
    return SamplingTensors.of([SamplingParams(**options)], P.shape[1], CPU)


def left(**options) -> list[float]:
    """What P becomes under these laws."""
    return [round(x, 6) for x in probabilities(P.log(), law(**options))[0].tolist()]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.05, 0.4, 0.1, 0.3, 0.15]),
        ({"temperature": 0}, [0, 1, 0, 0, 0]),
        ({"temperature": 0, "top_k": 3, "min_p": 0.5}, [0, 1, 0, 0, 0]),
        ({"top_k": 2}, [0, 0.571429, 0, 0.428571, 0]),
        ({"top_k": 99}, [0.05, 0.4, 0.1, 0.3, 0.15]),
        ({"top_p": 0.39}, [0, 1, 0, 0, 0]),
        ({"top_p": 0.41}, [0, 0.571429, 0, 0.428571, 0]),
        ({"top_p": 1e-9}, [0, 1, 0, 0, 0]),
        ({"top_k": 1, "top_p": 5e-324}, [0, 1, 0, 0, 0]),  # 5e-324 times 0.4 is 0
        ({"top_k": 2, "top_p": 0.55}, [0, 1, 0, 0, 0]),  # of the two left, the first has 0.571
        ({"min_p": 0.3}, [0, 0.470588, 0, 0.352941, 0.176471]),
        ({"temperature": 0.5, "min_p": 0.3}, [0, 0.64, 0, 0.36, 0]),  # 0.15 is 0.375 of 0.4, but 0.14 once squared
    ],
)
def test_supports_and_masses(options, expected):
    assert left(**options) == pytest.approx(expected, abs=1e-6)


def test_top_p_keeps_no_token_beyond_those_that_reach_it():
    p = torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64)
    assert probabilities(p.log(), SamplingTensors.of([SamplingParams(top_p=0.5)], 3, CPU))[0].tolist() == [0, 1, 0]


def test_a_number_that_was_rounded_to_one_draws_a_token_of_the_support():
    """As float32 rounds the largest numbers below 1."""
    assert choose(P.log(), law(top_k=2), torch.ones(1, dtype=torch.float64)).tokens.tolist() == [3]


def test_equal_probabilities_keep_the_lower_id():
    p = probabilities(torch.zeros(1, 5), law(top_k=2))
    assert p[0].tolist() == [0.5, 0.5, 0, 0, 0]


def test_the_repetition_penalty_makes_seen_tokens_less_probable():
    logits, seen = torch.tensor([[2.0, -2.0, 1.0]]), torch.tensor([[True, True, False]])
    laws = SamplingTensors.of([SamplingParams(repetition_penalty=2.0)], 3, CPU)
    expected = torch.softmax(torch.tensor([[1.0, -4.0, 1.0]], dtype=torch.float64), -1)
    torch.testing.assert_close(probabilities(logits, laws, TokenHistory(seen=seen)), expected)


def test_draws_follow_the_probabilities():
    u = torch.from_numpy(uniforms(7, 0, 20_000))
    drawn, logprob, valid = choose(
        P.log().expand(len(u), -1), SamplingTensors.of([SamplingParams()] * len(u), 5, CPU), u
    )
    assert valid.all()
    share = torch.bincount(drawn, minlength=5) / len(u)
    torch.testing.assert_close(share.double(), P[0], atol=0.01, rtol=0)
    torch.testing.assert_close(logprob, P[0].log()[drawn])


LOGIT = st.floats(-3.0 * 2**126, 3.0 * 2**126, width=32)
ANY = st.builds(
    SamplingParams,
    temperature=st.floats(0, allow_infinity=False),
    top_k=st.none() | st.integers(1, 2**63),
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(*PENALTIES),
    presence_penalty=st.floats(-BIAS, BIAS),
    frequency_penalty=st.floats(-BIAS, BIAS),
    logit_bias=st.lists(st.tuples(st.integers(0, 4), st.floats(-BIAS, BIAS)), max_size=3).map(tuple),
)
"""Every law there is, subnormal numbers and the largest ones included."""


@settings(max_examples=500)
@example([0.0, 1, 2, 3, 4], SamplingParams(temperature=1e-310), 0.5)
@example([0.0, 1, 2, 3, 4], SamplingParams(temperature=100, top_p=5e-324), 0.999)
@example([1e30, -1e30, 2, 3, 3.4e38], SamplingParams(temperature=5e-324, repetition_penalty=PENALTIES[0]), 0.0)
@given(
    st.lists(st.floats(-3.0 * 2**126, 3.0 * 2**126, width=32), min_size=5, max_size=5),
    ANY,
    st.floats(0, 1, exclude_max=True),
)
def test_every_law_draws_a_token_of_its_support(logits, sampling, uniform):
    z, laws = torch.tensor([logits]), SamplingTensors.of([sampling], 5, CPU)
    state = HistoryState(1, 5, CPU)
    state.join(0, sampling, [1, 2])
    state.take([0, 0], [3, 3])
    history = state.rows(1, {})
    p = probabilities(z, laws, history)
    assert p.sum().item() == pytest.approx(1)
    token, logprob, valid = choose(z, laws, torch.tensor([uniform], dtype=torch.float64), history)
    assert valid.item() and p[0, token] > 0 and logprob.item() <= 0


def test_rows_without_a_distribution_are_said_to_be_invalid_and_disturb_no_other():
    good = torch.tensor([0.5, 1.0, -2.0])
    rows = torch.stack([good, torch.full((3,), float("nan")), good, torch.tensor([1.0, float("inf"), 0.0]), good])
    forbidden = torch.zeros(5, 3, dtype=torch.bool)
    forbidden[4] = True
    for law in (SamplingParams(), SamplingParams(temperature=0), SamplingParams(top_p=0.3)):
        laws, u = SamplingTensors.of([law] * 5, 3, CPU), torch.full((5,), 0.7).double()
        tokens, logprobs, valid = choose(rows, laws, u, TokenHistory(forbidden=forbidden))
        assert valid.tolist() == [True, False, True, False, False]
        assert ((tokens >= 0) & (tokens < 3)).all()
        one = SamplingTensors.of([law], 3, CPU)
        alone = choose(good[None], one, u[:1])
        assert (alone.tokens[0], alone.logprobs[0]) == (tokens[2], logprobs[2])


def test_penalties_and_bias_by_hand():
    """mu - count * frequency - (count > 0) * presence, on the answer's tokens alone, after the bias."""
    law = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, logit_bias=((0, 2.0), (4, -100.0)))
    state = HistoryState(2, 5, CPU)
    state.join(1, law, [1, 1, 2])  # the prompt's tokens do not count
    state.take([1], [2])
    state.take([1], [2])
    state.take([1], [3])
    laws = SamplingTensors.of([SamplingParams(), law], 5, CPU)
    z = adjusted(torch.ones(2, 5), laws, state.rows(2, {}))
    assert z.tolist() == [[1, 1, 1, 1, 1], [3, 1, 0, 0.25, -99]]
    state.join(1, law, [])
    assert adjusted(torch.ones(2, 5), laws, state.rows(2, {}))[1].tolist() == [3, 1, 1, 1, -99]
    state.join(1, SamplingParams(logit_bias=((0, 2.0), (0, 3.0))), [])  # a token that is named twice has both
    assert adjusted(torch.ones(2, 5), laws, state.rows(2, {}))[1].tolist() == [6, 1, 1, 1, 1]
    with pytest.raises(ValueError, match="logit_bias names token 5, but the vocabulary has 5"):
        state.join(0, SamplingParams(logit_bias=((5, 1.0),)), [])
    with pytest.raises(ValueError, match="stop_tokens names token 5, but the vocabulary has 5"):
        state.join(0, SamplingParams(stop_tokens=(4, 5), min_new_tokens=2), [])
    with pytest.raises(ValueError, match="stop_tokens"):
        SamplingParams(stop_tokens=(-1,))


def test_a_row_draws_the_same_beside_rows_of_other_laws():
    others = [SamplingParams(top_k=2), SamplingParams(temperature=0), SamplingParams(repetition_penalty=3.0)]
    logits, u = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)), torch.full((4,), 0.37).double()
    seen = torch.zeros(4, 50, dtype=torch.bool)
    mixed = choose(logits, SamplingTensors.of([SamplingParams(), *others], 50, CPU), u, TokenHistory(seen=seen))
    for i, one in enumerate([SamplingParams(), *others]):
        laws = SamplingTensors.of([one], 50, CPU)
        token, logprob, _ = choose(logits[i : i + 1], laws, u[:1], TokenHistory(seen=seen[:1]))
        assert (token[0], logprob[0]) == (mixed[0][i], mixed[1][i])


def test_uniforms_depend_on_seed_and_sample_and_only_grow():
    assert uniforms(1, 0, 5).tolist() == uniforms(1, 0, 9)[:5].tolist()
    assert len({uniforms(s, j, 1)[0] for s in range(3) for j in range(3)}) == 9


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 5e-324},
        {"presence_penalty": float("nan")},
        {"frequency_penalty": float("inf")},
        {"logit_bias": ((0, float("inf")),)},
        {"min_new_tokens": -1},
        {"max_new_tokens": 0},
        {"seed": -1},
        {"stop": ("",)},
    ],
)
def test_wrong_parameters_are_named(wrong):
    with pytest.raises(ValueError, match=f"sampling.{next(iter(wrong))} is .*; it must be "):
        SamplingParams(**wrong)


def spell(ids) -> bytes:
    return bytes(ids)


@given(st.text(max_size=30) | st.binary(max_size=30))
def test_streamed_pieces_are_the_text_and_never_split_a_character(text):
    data = text.encode() if isinstance(text, str) else text
    stream = TextStream(spell)
    pieces = [stream.push(byte) for byte in data]
    assert "".join(pieces) + stream.close() == data.decode(errors="replace")
    if isinstance(text, str):
        assert all("�" not in piece or "�" in text for piece in pieces)


@example("ab", ["b", "ab"])
@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_streams_end_at_the_first_stop_text(text, stops):
    stream, out, n = TextStream(spell, stops), "", 0
    while n < len(text) and not stream.stopped:
        out += stream.push(ord(text[n]))
        assert text.startswith(out)
        n += 1
    out += stream.close()
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    assert stream.stopped == bool(ends)
    if not ends:
        assert out == text
    else:
        assert n == min(ends)
        assert not any(stop in out for stop in stops)
        assert out == text[: min(text.index(stop) for stop in stops if stop in text[:n])]  # of two, the one begun first
