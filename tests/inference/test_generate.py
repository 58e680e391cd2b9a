"""Decoding equals the reference loop, however the work is split over prefill, steps and rows."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import BELOW, BOTH, SHIFT, VARIANTS, close, config, generated, label, randomised, tokens, truth
from hypothesis import given, settings
from hypothesis import strategies as st

from lrt.config.decoding import DEFAULT_TOLERANCE, PrefillOptions, SamplingParams
from lrt.evaluation.contraction import exact_states
from lrt.inference.generate import generate, score
from lrt.inference.prefill import compiled, decode_step, next_logits, prefill
from lrt.model.kv_cache import KVCache
from lrt.model.loss import IGNORE
from lrt.model.lrt import LRT
from lrt.model.recurrence import ROUNDING, SweepRates, advance, change_of, solve, sweep_forwards
from lrt.model.reference import reference

MODES = ["exact", "jacobi", "interleaved-3"]
CFG = config()
IDS = [
    f"{c.memory.projection}-{'residual' if c.memory.residual else 'kv'}-{c.source}-{c.window_pattern}" for c in VARIANTS
]


@pytest.fixture(scope="module")
def model() -> LRT:
    return randomised(CFG)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cfg", [*VARIANTS, SHIFT, BOTH, *BELOW], ids=[*IDS, "shift", "both", *map(label, BELOW)])
def test_any_split_equals_the_reference(cfg, mode):
    """Ragged prompts in chunks, then another prompt on the kept state, then steps; documents start inside rows."""
    model, rows = randomised(cfg), tokens(cfg, 3, 21)
    assert (rows[:, 1:] == cfg.bos).any()
    expected, lengths, every = truth(model, rows), torch.tensor([11, 4, 15]), torch.arange(3)
    options = PrefillOptions.parse(mode, 1e-13, max_sweeps=50, chunk=6)
    first = prefill(model, rows, lengths=lengths, capacity=25, mode=options)
    close(first.logits, expected[every, lengths - 1])
    more = torch.stack([rows[i, n : n + 3] for i, n in enumerate(lengths)])
    second = prefill(model, more, cache=first.cache, mode=options)
    close(second.logits, expected[every, lengths + 2])
    cache = second.cache
    for at in (lengths + 3, lengths + 4, lengths + 5):
        logits, cache = decode_step(model, rows[every, at], cache)
        close(logits, expected[every, at])


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from([*BELOW, *(config(source=s, window=w, shift=s == 3) for s in (0, 2, 3) for w in (1, 4, 9))]),
    st.lists(st.integers(1, 18), min_size=1, max_size=4),
    st.integers(1, 20),
    st.integers(1, 7),
    st.integers(0, 99),
)
def test_sweeps_equal_the_reference_for_any_lengths_chunk_and_stride(cfg, lengths, chunk, stride, seed):
    model, rows = randomised(cfg, seed), tokens(cfg, len(lengths), max(lengths), seed)
    found = prefill(
        model,
        rows,
        mode=PrefillOptions.parse(f"interleaved-{stride}", 1e-13, chunk=chunk),
        lengths=torch.tensor(lengths),
    )
    close(found.logits, truth(model, rows)[torch.arange(len(lengths)), torch.tensor(lengths) - 1])


@pytest.mark.parametrize("cfg", BELOW, ids=label)
@pytest.mark.parametrize("mode", MODES[1:])
def test_forwards_are_counted_by_the_blocks_that_sweeps_run(mode: str, cfg):
    """Only the first sweep runs the blocks that no memory reaches; memory that feeds no memory needs that one alone."""
    model, rows, ran = randomised(cfg), tokens(cfg, 1, 12), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, out: ran.append(out[0].shape[1]))
    found = prefill(model, rows, mode=PrefillOptions.parse(mode, 1e-13, max_sweeps=5))
    steps = int(found.effort.stepped) * cfg.layers
    assert found.effort.forwards == pytest.approx(sum(ran) / 12 / cfg.layers)
    assert sum(ran) - steps == round(12 * sweep_forwards(cfg, found.effort.sweeps) * cfg.layers)
    assert (found.effort.sweeps > 1) == cfg.feeds_back
    assert found.effort.residual == 0


@pytest.mark.parametrize("source", [2, 3])
@pytest.mark.parametrize("mode", MODES[1:])
def test_what_does_not_settle_is_finished_exactly(mode, source):
    model, rows = randomised(config(source=source)), tokens(CFG, 3, 16)
    lengths = torch.tensor([16, 9, 1])
    found = prefill(model, rows, mode=PrefillOptions.parse(mode, 1e-13, max_sweeps=2), lengths=lengths)
    close(found.logits, truth(model, rows)[torch.arange(3), lengths - 1])
    assert found.effort.residual == 0
    assert found.effort.stepped[0] > 0
    assert found.effort.stepped[2] == 0


def test_as_many_sweeps_as_positions_always_suffice(model):
    rows = tokens(CFG, 2, 12)
    found = prefill(model, rows, mode=PrefillOptions.parse("jacobi", 0.0, max_sweeps=12))
    assert found.effort.stepped.sum() == 0
    close(found.logits, truth(model, rows)[:, -1])


@pytest.mark.parametrize("mode", ["jacobi", "interleaved-2", "interleaved-8"])
def test_the_tolerance_means_the_same_in_every_mode(mode: str):
    assert PrefillOptions.parse(mode).tolerance == DEFAULT_TOLERANCE == PrefillOptions.parse(mode, None).tolerance
    solved = prefill(randomised(config()), torch.tensor([[0, 5, 6, 7]]), mode=mode)
    assert solved.mode == f"sweeps({mode}, {DEFAULT_TOLERANCE:g})"
    assert PrefillOptions.parse(mode, 1e-2).tolerance == 1e-2
    with pytest.raises(ValueError, match="tolerance nan"):
        PrefillOptions.parse(mode, float("nan"))


def test_the_error_is_what_the_coming_sweeps_would_still_add():
    """A series of known rate: sum of what is left; never less than the slower rate says, never more than the change."""
    progress = SweepRates.unknown(3, torch.device("cpu"))
    for sweep in range(4):
        progress = progress.after(torch.tensor([0.1**sweep, 0.4**sweep, 0.9**sweep]))
    left = [sum(rate**k for k in range(4, 200)) for rate in (0.1, 0.4)]
    torch.testing.assert_close(progress.error(), torch.tensor([*left, 0.9**3]))
    faster = progress.after(torch.tensor([1e-9, 0.4**3 * 0.01, 0.9**3 * 0.01]))
    slow = [1e-9 / 9, 0.4**3 * 0.01 * 0.4 / 0.6, 0.9**3 * 0.01]
    torch.testing.assert_close(faster.error(), torch.tensor(slow))
    assert (SweepRates.unknown(1, torch.device("cpu")).after(torch.tensor([0.3])).error() == 0.3).all()


@pytest.mark.parametrize("mode", ["jacobi", "interleaved-2", "interleaved-8"])
def test_a_settled_memory_is_as_near_as_its_residual_says(mode: str):
    """Rates of a random model waver, so the estimate is held to a factor of two."""
    model, rows = randomised(CFG, scale=0.2), tokens(CFG, 1, 60)
    truth_of = exact_states(model, rows).memory
    for tolerance in (1e-3, 1e-5, 1e-7):
        (_, solved), *_ = solve(
            model, rows, torch.tensor([60]), KVCache.empty(model, 1, 60), PrefillOptions.parse(mode, tolerance)
        )
        wrong = float(change_of(solved.memory, truth_of, torch.tensor([60])).max())
        assert 0 < solved.effort.residual <= tolerance
        assert wrong <= 2 * solved.effort.residual


def test_a_looser_tolerance_takes_fewer_sweeps_and_says_so():
    model, rows = randomised(CFG, scale=0.2), tokens(CFG, 2, 40)  # weak injections, so that the memory settles
    loose, tight = (prefill(model, rows, mode=PrefillOptions.parse("interleaved-8", t)) for t in (1e-2, 1e-9))
    assert loose.mode == "sweeps(interleaved-8, 0.01)"
    assert loose.effort.sweeps < tight.effort.sweeps
    assert tight.effort.residual <= 1e-9 < loose.effort.residual <= 1e-2


def test_a_row_does_not_depend_on_how_fast_the_others_settle():
    model, rows = randomised(CFG, scale=0.2), tokens(CFG, 4, 30)
    loose = PrefillOptions.parse("interleaved-4", 1e-2)
    together = prefill(model, rows, mode=loose)
    for i, row in enumerate(rows):
        close(together.logits[i : i + 1], prefill(model, row[None], mode=loose).logits)


@pytest.mark.parametrize("cfg", [config(projection="none", residual=False, source=3), SHIFT], ids=["none", "shift"])
def test_without_recurrence_one_pass_is_exact(cfg):
    model, rows = randomised(cfg), tokens(cfg, 2, 20)
    found = prefill(model, rows)
    assert (found.effort.sweeps, found.effort.residual, found.effort.forwards) == (1, 0.0, 1.0)
    close(found.logits, truth(model, rows)[:, -1])


@pytest.mark.parametrize("mode", MODES)
def test_score_is_the_likelihood_of_the_decoded_model(model, mode):
    rows = tokens(CFG, 2, 20)
    targets = torch.roll(rows, -1, 1)
    targets[:, 5] = IGNORE
    scored = score(model, rows, targets, mode=PrefillOptions.parse(mode, 1e-13, chunk=7))
    expected = -truth(model, rows).log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    close(scored.nats, torch.where(targets == IGNORE, 0.0, expected))


def test_score_with_zero_memory_reads_none(model):
    rows = tokens(CFG, 2, 20)
    targets = torch.roll(rows, -1, 1)
    plain = randomised(CFG)
    with torch.no_grad():
        for p in plain.memory_parameters():
            p.zero_()
    scored = score(model, rows, targets, mode="zero_memory")
    assert scored.mode == "zero_memory"
    close(scored.nats, score(plain, rows, targets, mode="exact").nats)


REQUESTS = st.lists(
    st.tuples(
        st.lists(st.integers(0, CFG.vocab_size - 1), min_size=1, max_size=12),
        st.builds(
            SamplingParams,
            max_new_tokens=st.integers(1, 8),
            temperature=st.sampled_from([0.0, 0.7, 1.0]),
            top_k=st.sampled_from([None, 1, 4]),
            top_p=st.sampled_from([0.5, 1.0]),
            min_p=st.sampled_from([0.0, 0.2]),
            repetition_penalty=st.sampled_from([1.0, 1.3]),
            seed=st.integers(0, 9),
            stop_tokens=st.sampled_from([None, (), (1, 2, 3)]),
        ),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=12, deadline=None)
@given(REQUESTS)
def test_a_request_gives_the_same_text_alone_and_in_any_batch(requests):
    """Log-probabilities agree to 1e-10 in float64; the tokens are the same."""
    model = randomised(CFG)
    prompts, sampling = [p for p, _ in requests], [s for _, s in requests]
    for i, row in enumerate(generated(model, prompts, sampling)):
        (alone,) = generated(model, [prompts[i]], [sampling[i]])
        assert [t for t, _ in row] == [t for t, _ in alone]
        close(torch.tensor([x for _, x in row]), torch.tensor([x for _, x in alone]))


def test_at_a_fixed_batch_shape_a_row_is_bitwise_the_same_whatever_the_others(model):
    prompts = tokens(CFG, 5, 9).tolist()
    law = SamplingParams(max_new_tokens=9, stop_tokens=(), seed=4)
    a = generated(model, [prompts[0], prompts[1], prompts[2]], law, mode="exact")
    b = generated(model, [prompts[0], prompts[3], prompts[4]], law, mode="exact")
    assert a[0] == b[0]
    assert a[1] != b[1]


def test_rows_that_have_all_stopped_leave_the_step(model):
    """The step computes the first 2, 4, .. rows, as many as hold those that go on."""
    prompts, rows = tokens(CFG, 5, 4).tolist(), []
    laws = [SamplingParams(temperature=0, max_new_tokens=n, stop_tokens=()) for n in (6, 3, 2, 5, 2)]

    def counting(model: LRT, tokens: torch.Tensor, *rest) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows.append(len(tokens))
        return next_logits(model, tokens, *rest)

    together = generated(model, prompts, laws, mode="exact", run=counting)
    assert rows == [5, 4, 4, 4, 2]
    for i, prompt in enumerate(prompts):
        assert [t for t, _ in together[i]] == [t for t, _ in generated(model, [prompt], laws[i], mode="exact")[0]]


def test_generation_follows_the_reference(model):
    """Greedy text: every token is the reference's most probable one, its log-probability the reference's."""
    prompt = tokens(CFG, 1, 8)[0].tolist()
    greedy = SamplingParams(temperature=0, max_new_tokens=12, stop_tokens=())
    (made,) = generated(model, [prompt], greedy, mode=PrefillOptions.parse("interleaved-8", 1e-12))
    text = [t for t, _ in made]
    expected = truth(model, torch.tensor([prompt + text]))[0, len(prompt) - 1 : -1].log_softmax(-1)
    assert expected.argmax(-1).tolist() == text
    close(expected.amax(-1), torch.tensor([x for _, x in made], dtype=torch.float64))


def test_samples_share_a_prompt_and_differ_by_number_alone(model):
    prompts, law = tokens(CFG, 2, 7).tolist(), SamplingParams(max_new_tokens=6, stop_tokens=(), seed=3)
    four = generated(model, prompts, law, samples=2)
    assert four[0] != four[1]
    assert [t for t, _ in four[2]] == [t for t, _ in generated(model, prompts[1:], law)[0]]


def test_a_kept_state_goes_on_as_if_nothing_had_happened(model):
    prompt, law = tokens(CFG, 1, 7).tolist(), SamplingParams(temperature=0, max_new_tokens=5, stop_tokens=())
    last, first = None, []
    for last in generate(model, prompt, law, mode="exact", capacity=40):
        first += [e.token for e in last.emissions]
    assert last is not None
    said = [first[-1], 3, 5]
    go_on = generated(model, [said], law, cache=last.cache, mode="exact")
    afresh = generated(model, [prompt[0] + first[:-1] + said], law, mode="exact", capacity=40)
    assert [t for t, _ in go_on[0]] == [t for t, _ in afresh[0]]


def test_answers_end_at_stop_tokens_stop_texts_length_and_capacity(model):
    prompt = [tokens(CFG, 1, 7)[0].tolist()]
    law = SamplingParams(temperature=0, max_new_tokens=30, stop_tokens=())
    free = [t for t, _ in generated(model, prompt, law)[0]]
    stop = free[2]
    stopped = dataclasses.replace(law, stop_tokens=(stop,))
    assert [t for t, _ in generated(model, prompt, stopped)[0]] == free[: free.index(stop) + 1]

    def spell(ids):
        return "".join(chr(ord("a") + i) for i in ids).encode()

    text = spell(free).decode()
    by_text = dataclasses.replace(law, stop=(text[3:5],))
    pieces = [e for made in generate(model, prompt, by_text, decode_bytes=spell) for e in made.emissions]
    assert "".join(e.text for e in pieces) == text[: text.index(text[3:5])]
    assert [e.finish for e in pieces][-2:] == [None, "stop"]
    full = list(generate(model, prompt, law, capacity=12))
    assert len(full) == 6
    assert full[-1].emissions[0].finish == "length"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: prefill(m, torch.zeros(1, 0, dtype=torch.int64)), "at least 1 token"),
        (lambda m: prefill(m, torch.tensor([[3, 19]])), "token 19 is outside the vocabulary of 19"),
        (lambda m: prefill(m, torch.tensor([[3, -1]])), "token -1 is outside"),
        (lambda m: prefill(m, torch.ones(1, 65, dtype=torch.int64)), "65 tokens but the capacity is 64"),
        (lambda m: prefill(m, torch.ones(1, 9, dtype=torch.int64), capacity=8), "9 tokens but the capacity is 8"),
        (lambda m: prefill(m, torch.ones(1, 9, dtype=torch.int64), lengths=torch.tensor([0])), "between 1 and the 9"),
        (lambda m: prefill(m, torch.ones(1, 9, dtype=torch.int64), mode="newton"), "'newton' is unknown: use exact"),
        (lambda m: PrefillOptions.parse("jacobi", max_sweeps=0), "max_sweeps 0"),
        (lambda m: prefill(m, torch.ones(1, 9, dtype=torch.int64), cache=KVCache.empty(m, 2, 20)), "1 prompts for a"),
        (lambda m: next(generate(m, [[1], []])), "prompt 1 is empty"),
        (lambda m: next(generate(m, [])), "there are no prompts: give at least one"),
        (lambda m: next(generate(m, [[1]], SamplingParams(stop=("x",)))), "stop texts need decode_bytes"),
        (lambda m: next(generate(m, [[1]], [])), "0 samplings"),
        (lambda m: next(generate(m, [[1] * 70])), "70 tokens but the capacity is 64"),
        (lambda m: KVCache.empty(m, 1, 8).put(torch.tensor([0]), KVCache.empty(m, 1, 9)), "capacity 9 cannot join"),
        (lambda m: KVCache.load("nowhere/state"), "nowhere/state does not exist"),
    ],
)
def test_errors_name_the_culprit_and_the_remedy(model, call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(model)
    assert "\n" not in str(error.value)


def test_steps_need_no_gradient_and_leave_the_model_alone(model):
    found = prefill(model, tokens(CFG, 1, 5))
    assert not found.logits.requires_grad
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler itself
def test_the_compiled_step_equals_the_plain_one_and_compiles_twice_at_most():
    """Once for views of the slots, once for the whole of them; never per token."""
    cfg = config(context=400)
    model, rows, run = randomised(cfg, seed=1, scale=0.2).float(), tokens(cfg, 2, 200), compiled()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    ours = theirs = KVCache.empty(model, 2, 200)
    theirs = theirs.take(torch.arange(2))
    active = torch.ones(2, dtype=torch.bool)
    with torch.no_grad():
        for t in range(200):
            a, ours = advance(model, rows[:, t], ours, active, run)
            b, theirs = decode_step(model, rows[:, t], theirs, active)
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_low_precision_sweeps_stop_where_rounding_moves_the_memory_and_say_so(dtype):
    """Without that floor no row would settle, and a prompt would be taken in token by token."""
    model, rows = randomised(CFG, scale=0.2).to(dtype), tokens(CFG, 2, 40)
    found = prefill(model, rows)
    assert found.mode == f"sweeps(interleaved-8, {ROUNDING[dtype]:g})"
    assert not found.effort.stepped.any()
    assert score(model, rows, rows).mode == found.mode
    assert prefill(model.double(), rows).mode == "sweeps(interleaved-8, 0.0001)"


def test_the_memory_of_a_solution_is_that_of_the_reference(model):
    rows, lengths = tokens(CFG, 2, 12), torch.tensor([12, 9])
    for mode in (PrefillOptions.parse("exact"), PrefillOptions.parse("interleaved-4", 1e-13, chunk=5)):
        parts = solve(model, rows, lengths, KVCache.empty(model, 2, 12), mode)
        memory = torch.cat([solved.memory for _, solved in parts], dim=1)
        for row, ids, n in zip(memory, rows, lengths.tolist(), strict=True):
            close(row[:n], reference(dict(model.state_dict()), CFG, ids[:n].tolist()).memory)
