"""Synthetic tasks: the answers are right, batches are functions of their key, and accuracy is of the decoded model."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from helpers import randomised

from lrt.cli.main import main
from lrt.config.model import ModelConfig
from lrt.data.synthetic import SWAPS, TASKS, TaskLoader, TaskRows, task_rows
from lrt.evaluation.in_context import in_context_score
from lrt.evaluation.synthetic import accuracy, by_length
from lrt.inference.generate import decode_step
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


@pytest.mark.parametrize("name", TASKS)
def test_batches_are_functions_of_seed_and_step_shared_out_over_ranks(name: str):
    train, val = task_rows(f"task:{name}", "bytes")
    whole = TaskLoader(train, 8, 32, seed=1)
    assert torch.equal(whole.batch(7).tokens, TaskLoader(train, 8, 32, seed=1).batch(7).tokens)
    others = (TaskLoader(val, 8, 32, 1).batch(7), whole.batch(8), TaskLoader(train, 8, 32, 2).batch(7))
    assert not any(torch.equal(whole.batch(7).tokens, other.tokens) for other in others)
    parts = [TaskLoader(train, 8, 32, 1, rank, 4).batch(7) for rank in range(4)]
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


def test_a_model_learns_to_copy_and_the_command_line_trains_tasks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = "--model.depth 2 --model.width 32 --model.heads 2 --model.context 32 --train.length 16 --train.batch 32"
    task = "--data.tokenizer bytes --data.source task:sums --train.horizon steps=60 --train.eval-every 0"
    assert main(["train", *small.split(), *task.split(), "--out", "run"]) == 0
    assert main(["eval", "run", "--rows", "8", "--json"]) == 0
    bits = float(capsys.readouterr().out.split('"decoded": ')[1].split(",")[0])
    assert bits < 2.75  # log2(7) = 2.81 is chance
    assert main(["train", "--data.source", "task:chess", "--out", "other"]) == 2
    assert "there is no such task; choose one of parity" in capsys.readouterr().err


def test_in_context_score():
    nats = torch.from_numpy(np.concatenate([np.full((3, 16), 4.0), np.full((3, 16), 1.5)], axis=1))
    assert in_context_score(nats) == pytest.approx(2.5)
    with pytest.raises(ValueError, match="too short"):
        in_context_score(nats[:, :8])
