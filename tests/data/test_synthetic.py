"""Synthetic tasks: the answers are right, batches are functions of their key, and accuracy is of the decoded model."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import randomised, refusal

from lrt.cli.main import main
from lrt.config.model import ModelConfig
from lrt.data.loader import BatchShape
from lrt.data.recall_tasks import POWER
from lrt.data.state_tasks import PAD, PERMUTATIONS, QUERY, SWAPS, is_even
from lrt.data.synthetic import TASKS, TaskLoader, TaskRows, task_rows
from lrt.evaluation.task_accuracy import _ratio, accuracy, by_length
from lrt.inference.prefill import decode_step
from lrt.model.kv_cache import KVCache
from lrt.model.shapes import IGNORE

PERMUTED = list(itertools.permutations("abcde"))


def rows(name: str, length: int = 32) -> list[tuple[list[int], list[int]]]:
    batch = TaskRows(name, 0).batch(4, length, 5)
    return list(zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True))


def test_parity_and_sums_by_hand():
    for (bits, parities), (numbers, totals) in zip(rows("parity"), rows("sums"), strict=True):
        assert parities == [sum(bits[: t + 1]) % 2 for t in range(32)]
        assert totals == [sum(numbers[: t + 1]) % 7 for t in range(32)]
        assert set(bits) == {0, 1} and len(set(numbers)) > 3


def test_swaps_by_moving_letters():
    for drawn, answers in rows("swaps"):
        letters = list("abcde")
        for swap, answer in zip(drawn, answers, strict=True):
            a, b = SWAPS[swap]
            letters[a], letters[b] = letters[b], letters[a]
            assert PERMUTED[answer] == tuple(letters)


def test_few_shot_tasks_ask_only_what_the_row_has_told():
    for name in ("recall", "mapping"):
        for tokens, targets in rows(name):
            told, asked = {}, 0
            for t in range(0, 32, 2):
                if targets[t] != IGNORE:
                    assert told[tokens[t]] == targets[t] == tokens[t + 1]
                    asked += 1
                told[tokens[t]] = tokens[t + 1]
            assert asked >= 8 and all(target == IGNORE for target in targets[1::2])
    for tokens, targets in rows("copying"):
        assert tokens[:16] == tokens[16:] and targets[16:31] == tokens[17:]
        assert targets[:16] == [IGNORE] * 16 and targets[31] == IGNORE


def test_word_problems_by_moving_letters():
    for name, elements in (("s5", PERMUTATIONS), ("a5", [p for p in PERMUTATIONS if is_even(p)])):
        assert len(elements) == {"s5": 120, "a5": 60}[name]
        for drawn, answers in rows(name):
            letters = "abcde"
            for element, answer in zip(drawn, answers, strict=True):
                letters = "".join(letters[x] for x in elements[element])
                assert letters == "".join("abcde"[x] for x in elements[answer])
        seen = {x for drawn, _ in rows(name, 512) for x in drawn}
        assert seen == set(range(len(elements)))


def test_the_commutative_and_the_solvable_group():
    fours = [p for p in itertools.permutations(range(4)) if is_even(p)]
    for drawn, answers in rows("a4z5"):
        letters, total = "abcd", 0
        for element, answer in zip(drawn, answers, strict=True):
            letters = "".join(letters[x] for x in fours[element // 5])
            total = (total + element % 5) % 5
            assert (letters, total) == ("".join("abcd"[x] for x in fours[answer // 5]), answer % 5)
    for drawn, answers in rows("z60"):
        assert answers == [sum(drawn[: t + 1]) % 60 for t in range(32)]


def value(expression: list[int]) -> int:
    return eval("".join("01234+-*"[symbol] for symbol in expression)) % 5


ASKED = {
    "parity_check": lambda string: sum(string) % 2,
    "even_pairs": lambda string: sum(a != b for a, b in itertools.pairwise(string)) % 2,
    "cycle_navigation": lambda string: sum(step - 1 for step in string) % 5,
    "modular_arithmetic": value,
}


@pytest.mark.parametrize("name", ASKED)
def test_tasks_of_the_chomsky_hierarchy_ask_once_after_strings_of_every_length(name: str):
    lengths = set()
    for batch in (TaskRows(name, 0).batch(400, 41, 5), TaskRows(name, 1).batch(30, 41, 5, full=True)):
        for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
            size = tokens.index(QUERY)
            assert tokens[size + 1 :] == [PAD] * (40 - size)
            assert targets == [IGNORE] * size + [ASKED[name](tokens[:size])] + [IGNORE] * (40 - size)
            lengths.add(size) if len(batch.tokens) == 400 else None
            assert len(batch.tokens) == 400 or size == (39 if name == "modular_arithmetic" else 40)
    assert lengths == set(range(1, 41, 2 if name == "modular_arithmetic" else 1))


@pytest.mark.parametrize("pairs", [8, 16])
def test_mqar_asks_every_key_once_at_power_law_gaps(pairs: int):
    task, length, gaps = TaskRows(f"mqar-{pairs}-256", 0), 128, []
    batch = task.batch(2000, length, 3)
    for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        keys, values = tokens[: 2 * pairs : 2], tokens[1 : 2 * pairs : 2]
        values = [v - (v > 256) for v in values]
        asked = [t for t in range(length) if targets[t] != IGNORE]
        assert len(set(keys)) == pairs == len(asked) and set(keys) <= set(range(1, 128)) and min(values) >= 128
        for t in asked:
            assert t >= 2 * pairs and (t - 2 * pairs) % 2 == 0 and targets[t] == values[keys.index(tokens[t])]
        gaps.append((asked[0] - 2 * pairs) // 2)
    odds = np.arange(1, length // 2 - pairs + 1) ** (POWER - 1)
    share = gaps.count(0) / len(gaps)  # the first slot, of `pairs` draws without replacement
    draws = np.random.default_rng(0)
    twin = np.mean([0 in draws.choice(len(odds), pairs, replace=False, p=odds / odds.sum()) for _ in range(2000)])
    assert share == pytest.approx(twin, abs=0.03)


def test_large_vocabularies_leave_out_the_id_that_resets_the_memory():
    task = TaskRows("mqar-8", 0)
    batch = task.batch(300, 64, 1)
    assert task.vocab_size == 8193
    assert not (batch.tokens == 256).any() and batch.tokens.max() == 8192 and 8180 < batch.targets.max() <= 8192
    with pytest.raises(ValueError, match="at least 256 positions, not 64"):
        TaskRows("mqar-64", 0).batch(1, 64)


@pytest.mark.parametrize("hops", [1, 3])
def test_pointers_are_followed_one_by_one(hops: int):
    for tokens, targets in rows(f"pointers-{hops}", 31):
        successor = dict(zip(tokens[:20:2], tokens[1:20:2], strict=True))
        assert len(successor) == 10 and targets[:20] == [IGNORE] * 20 and targets[30] == IGNORE
        assert sorted(tokens[20:30]) == sorted(successor)
        for node, answer in zip(tokens[20:30], targets[20:30], strict=True):
            for _ in range(hops):
                node = successor[node]
            assert node == answer


@pytest.mark.parametrize("hops", [1, 2, 4])
def test_induction_hops_by_the_definition(hops: int):
    asked = 0
    for string, targets in rows(f"induction-{hops}", 64):
        for i, answer in enumerate(targets):
            place: int | None = i
            for _ in range(hops):
                if place is not None:
                    place = max((j for j in range(1, place + 1) if string[j - 1] == string[place]), default=None)
            assert answer == (IGNORE if place is None else string[place])
            asked += place is not None
    assert asked > 100


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("chess", "choose one of parity"),
        ("parity-3", "has 1 numbers; the most it takes are those of parity"),
        ("mqar-8-64-3", "mqar-8-8192"),
        ("mqar-0", "no such task"),
        ("pointers-", "no such task"),
        ("", "no such task"),
    ],
)
def test_a_wrong_name_is_refused_with_the_right_ones(name: str, message: str):
    with pytest.raises(ValueError, match=message):
        task_rows(f"task:{name}", "bytes")


@pytest.mark.parametrize("name", TASKS)
def test_batches_are_functions_of_seed_and_step_shared_out_over_ranks(name: str):
    train, val = task_rows(f"task:{name}", "bytes")
    shape = BatchShape(batch=8, length=32, bos=256, seed=1)
    whole = TaskLoader(train, shape)
    assert torch.equal(whole.batch(7).tokens, TaskLoader(train, shape).batch(7).tokens)
    reseeded = TaskLoader(train, replace(shape, seed=2))
    others = (TaskLoader(val, shape).batch(7), whole.batch(8), reseeded.batch(7))
    assert not any(torch.equal(whole.batch(7).tokens, other.tokens) for other in others)
    parts = [TaskLoader(train, replace(shape, rank=rank, world=4)).batch(7) for rank in range(4)]
    for i in range(3):
        assert torch.equal(torch.cat([part[i] for part in parts]), whole.batch(7)[i])


def test_accuracy_is_that_of_the_decoded_model():
    model = randomised(ModelConfig(depth=2, width=24, heads=2, context=64, vocab_size=257, bos=256), seed=2)
    task = TaskRows("recall", 1)
    found = accuracy(model, task, 16, rows=64)
    tokens, targets, _ = task.batch(64, 16, 16)
    scored = targets != IGNORE
    cache, said = KVCache.empty(model, 64, 16), []
    for t in range(16):
        logits, cache = decode_step(model, tokens[:, t], cache)
        said.append(logits.argmax(-1))
    right = (torch.stack(said, dim=1) == targets)[scored]
    assert found["all"] == pytest.approx(float(right.double().mean()))
    assert set(by_length(model, task, 8, (1, 2))) == {"8", "16"}


def test_errors_of_accuracy_by_hand():
    """All answers: as the deviation of the rows' shares over the root of their number, where rows ask equally often."""
    every, error = _ratio(torch.tensor([1.0, 2.0, 0.0]), torch.tensor([2.0, 2.0, 2.0]))
    assert every == 0.5 and error == pytest.approx(np.std([0.5, 1.0, 0.0], ddof=1) / 3**0.5)
    uneven, _ = _ratio(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 7.0]))
    assert uneven == 0.5
    cfg = ModelConfig(depth=1, width=16, heads=2, context=16, vocab_size=257, bos=256)
    for name in ("recall", "induction-1"):
        found = accuracy(randomised(cfg), TaskRows(name, 1), 16, rows=64)
        p = found["last"]
        assert found["items"] == 64 and 0 <= found["last_error"] <= (p * (1 - p) / 10) ** 0.5


def test_a_model_learns_to_copy_and_the_command_line_trains_tasks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = "--model.depth 2 --model.width 32 --model.heads 2 --model.context 32 --train.length 16 --train.batch 32"
    task = "--data.tokenizer bytes --data.source task:sums --train.horizon steps=60 --train.eval-every 0"
    assert main(["train", *small.split(), *task.split(), "--out", "run"]) == 0
    assert main(["eval", "run", "--rows", "8", "--json"]) == 0
    bits = float(capsys.readouterr().out.split('"decoded": ')[1].split(",")[0])
    assert bits < 2.75  # log2(7) = 2.81 is chance
    wide = "--data.tokenizer bytes --data.source task:mqar-4-300 --train.horizon steps=2 --train.eval-every 0"
    assert main(["train", *small.split(), *wide.split(), "--out", "wide"]) == 0
    assert main(["eval", "wide", "--rows", "8"]) == 0
    assert "there is no such task; choose one of parity" in refusal(
        capsys, ["train", "--data.source", "task:chess", "--out", "other"]
    )


def test_lengths_that_a_task_does_not_take_are_left_out():
    model = randomised(ModelConfig(depth=1, width=24, heads=2, context=64, vocab_size=257, bos=256), seed=2)
    assert set(by_length(model, TaskRows("pointers-2", 1), 64, (1, 2, 8))) == {"64", "128"}
