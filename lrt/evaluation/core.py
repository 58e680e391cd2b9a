"""CORE: the 22 in-context-learning tasks of DCLM, scored with memory (arXiv 2406.11794, section 3.5 and appendix G).

The published evaluation bundle is a folder: core.yaml lists the tasks, eval_data/ holds their items as JSON lines, and
eval_meta_data.csv the accuracy of a random guess. Three kinds of items: several answers to one question, several
questions to one answer (schema), and a text to be continued exactly.
"""

from __future__ import annotations

import csv
import json
import random
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lrt.config.decoding import DEFAULT_MODE
from lrt.config.model import require
from lrt.data import Tokenizer
from lrt.inference.generate import states
from lrt.model.loss import token_nats
from lrt.model.transformer import LRT

KINDS = ("multiple_choice", "schema", "language_modeling")
Item = dict[str, Any]


class CoreTask(NamedTuple):
    """One task of the bundle."""

    label: str
    kind: str
    """One of KINDS."""
    shots: int
    """Solved items in front of each."""
    delimiter: str
    """Between question and answer."""
    items: list[Item]
    chance: float
    """Accuracy of a random guess, 0..1."""


class Candidate(NamedTuple):
    """A text whose last tokens are scored."""

    ids: list[int]
    scored: int
    """How many of the last ids are the answer."""


def read_bundle(folder: Path) -> list[CoreTask]:
    """The bundle's tasks. ValueError: what is missing from it, or of a kind unknown here."""
    import yaml

    for name in ("core.yaml", "eval_meta_data.csv", "eval_data"):
        require((folder / name).exists(), f"{folder / name} does not exist; give the folder of the evaluation bundle")
    with (folder / "eval_meta_data.csv").open(encoding="utf-8", newline="") as file:
        chances = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(file)}
    tasks = []
    for entry in yaml.safe_load((folder / "core.yaml").read_text(encoding="utf-8"))["icl_tasks"]:
        label, kind = entry["label"], entry["icl_task_type"]
        path = folder / "eval_data" / entry["dataset_uri"]
        require(kind in KINDS, f"task {label} is of kind {kind!r}; known are {', '.join(KINDS)}")
        require(label in chances, f"{folder / 'eval_meta_data.csv'} has no random baseline of {label}; add it")
        require(path.is_file(), f"{path}, the items of {label}, does not exist; unpack the whole bundle")
        items = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        delimiter = entry.get("continuation_delimiter", " ")
        tasks.append(CoreTask(label, kind, entry["num_fewshot"][0], delimiter, items, chances[label]))
    return tasks


def examples(task: CoreTask, number: int, seed: int = 1234) -> list[Item]:
    """The solved items in front of item `number`: drawn without it, a function of task, item and seed."""
    others = [item for i, item in enumerate(task.items) if i != number]
    draw = random.Random(f"{seed}-{zlib.crc32(task.label.encode())}-{number}")
    return draw.sample(others, min(task.shots, len(others)))


def texts(task: CoreTask, item: Item, shots: Sequence[Item]) -> list[tuple[str, str]]:
    """Context and answer of every candidate; each answer of `schema` is the same text after another question."""
    before = "".join(f"{_question(task, s, s.get('gold', 0))}{_answer(task, s, s.get('gold', 0))}\n\n" for s in shots)
    options = {"multiple_choice": "choices", "schema": "context_options"}
    count = len(item[options[task.kind]]) if task.kind in options else 1
    return [(before + _question(task, item, i), _answer(task, item, i)) for i in range(count)]


def _question(task: CoreTask, item: Item, option: int) -> str:
    if task.kind == "schema":
        return item["context_options"][option]
    return item["query"] if task.kind == "multiple_choice" else item["context"].strip()


def _answer(task: CoreTask, item: Item, option: int) -> str:
    return task.delimiter + (item["choices"][option] if task.kind == "multiple_choice" else item["continuation"])


def candidates(
    task: CoreTask, item: Item, shots: Sequence[Item], tokenizer: Tokenizer, context: int
) -> list[Candidate]:
    """The candidates as ids, cut on the left to `context`; the answer is what follows the context's own tokens."""
    found = []
    for question, answer in texts(task, item, shots):
        whole, alone = tokenizer.encode(question + answer), tokenizer.encode(question.rstrip())
        same = next((i for i, (a, b) in enumerate(zip(whole, alone, strict=False)) if a != b), len(alone))
        ids = [tokenizer.bos, *whole]
        scored = len(whole) - same
        require(scored < context, f"an answer of {task.label} has {scored} tokens; the model's context is {context}")
        found.append(Candidate(ids[-context:], scored))
    return found


@torch.no_grad()
def right(model: LRT, task: CoreTask, item: Item, found: list[Candidate], mode: str) -> bool:
    """Whether the model, decoding with memory, prefers the right candidate, or would write the continuation itself."""
    longest = max(len(c.ids) for c in found)
    ids = torch.tensor([c.ids + [c.ids[0]] * (longest - len(c.ids)) for c in found], device=model.device)
    hidden = torch.cat([h for _, h, _ in states(model, ids, mode=mode)], dim=1)[:, :-1]
    spans = [slice(len(c.ids) - c.scored - 1, len(c.ids) - 1) for c in found]
    if task.kind == "language_modeling":
        said = model.logits(hidden[:, spans[0]]).argmax(-1)
        return bool((said == ids[:, 1:][:, spans[0]]).all())
    nats = token_nats(model, hidden, ids[:, 1:])
    means = [float(row[span].double().mean()) for row, span in zip(nats, spans, strict=True)]
    return means.index(min(means)) == item["gold"]


def core(
    model: LRT, tokenizer: Tokenizer, tasks: Sequence[CoreTask], *, limit: int | None = None, mode: str = DEFAULT_MODE
) -> dict[str, Any]:
    """Accuracy and centred accuracy, (accuracy - chance) / (1 - chance), of each task, and CORE: the latter's mean."""
    found = {}
    for task in tasks:
        chosen = range(len(task.items))[:limit]
        hits = 0
        for number in chosen:
            shots = examples(task, number)
            options = candidates(task, task.items[number], shots, tokenizer, model.config.context)
            hits += right(model, task, task.items[number], options, mode)
        accuracy = hits / len(chosen)
        centred = (accuracy - task.chance) / (1 - task.chance)
        found[task.label] = {"accuracy": accuracy, "centred": centred, "items": len(chosen)}
    return {"core": sum(t["centred"] for t in found.values()) / len(found), "tasks": found, "mode": mode}
