"""CORE: the 22 in-context-learning tasks of DCLM, scored with memory (arXiv 2406.11794, section 3.5 and appendix G).

The published evaluation bundle is a folder: core.yaml lists the tasks, eval_data/ holds their items as JSON lines, and
eval_meta_data.csv the accuracy of a random guess. Three kinds of items: several answers to one question, several
questions to one answer (schema), and a text to be continued exactly.
"""

from __future__ import annotations

import math
import random
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lrt.config.decoding import DEFAULT_MODE
from lrt.config.model import require
from lrt.data import Tokenizer
from lrt.model.loss import token_nats
from lrt.model.lrt import LRT
from lrt.model.recurrence import states
from lrt.utils.files import read_csv, read_jsonl, read_yaml, require_fields, require_kind

KINDS: dict[str, dict[str, type]] = {
    "multiple_choice": {"query": str, "choices": list, "gold": int},
    "schema": {"context_options": list, "continuation": str, "gold": int},
    "language_modeling": {"context": str, "continuation": str},
}
"""Kinds of tasks, and what an item of each holds."""
OPTIONS = {"multiple_choice": "choices", "schema": "context_options"}
ENTRY = {"label": str, "icl_task_type": str, "dataset_uri": str, "continuation_delimiter": str, "num_fewshot": list}
MOST_SHOTS = 1000
TASKS_OF_CORE = 22
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


class Known(NamedTuple):
    """A task of CORE whose items lie as JSON lines in a folder without a task list."""

    kind: str
    shots: int
    chance: float
    delimiter: str = " "


MC, SCHEMA, LM = KINDS
KNOWN = {
    "jeopardy_all": Known(LM, 10, 0.0, "\nAnswer: "), "bigbench_qa_wikidata": Known(LM, 10, 0.0),
    "arc_easy": Known(MC, 10, 0.25), "arc_challenge": Known(MC, 10, 0.25), "copa": Known(MC, 0, 0.5),
    "commonsense_qa": Known(MC, 10, 0.2), "piqa": Known(MC, 10, 0.5), "openbook_qa": Known(MC, 0, 0.25),
    "lambada_openai": Known(LM, 0, 0.0), "winograd_wsc": Known(SCHEMA, 0, 0.5), "winogrande": Known(SCHEMA, 0, 0.5),
    "bigbench_dyck_languages": Known(LM, 10, 0.0), "agi_eval_lsat_ar": Known(MC, 3, 0.25),
    "bigbench_cs_algorithms": Known(LM, 10, 0.0), "bigbench_operators": Known(LM, 10, 0.0),
    "bigbench_repeat_copy_logic": Known(LM, 10, 0.0), "boolq": Known(MC, 10, 0.62),
    "bigbench_language_identification": Known(MC, 10, 0.0909),
}  # fmt: skip
"""By file name, as the evaluation gauntlet lays them out: shots and chance as CORE has them."""


def read_bundle(folder: Path) -> list[CoreTask]:
    """The bundle's tasks, or those of a folder of task files (KNOWN), which may lie in folders by category.

    ValueError: what is missing from it, of another type, or of a kind unknown here.
    """
    files = sorted(file for file in folder.rglob("*.jsonl") if file.stem in KNOWN)
    if files and not (folder / "core.yaml").exists():
        return [_known_task(file, KNOWN[file.stem]) for file in files]
    for name in ("core.yaml", "eval_meta_data.csv", "eval_data"):
        require((folder / name).exists(), f"{folder / name} does not exist; give the folder of the evaluation bundle")
    chances, where = _chances(folder / "eval_meta_data.csv"), f"{folder / 'core.yaml'}"
    tasks = read_yaml(folder / "core.yaml", "task list")
    require_fields(tasks, {"icl_tasks": list}, where)
    require(bool(tasks["icl_tasks"]), f"{where} lists no task; unpack the bundle again")
    return [_task(folder, entry, chances, f"{where}, task {n}") for n, entry in enumerate(tasks["icl_tasks"], 1)]


def _known_task(file: Path, known: Known) -> CoreTask:
    items = [_checked(item, known.kind, f"{file}:{number}") for number, item in read_jsonl(file, "items")]
    require(bool(items), f"{file} holds no item; unpack it again")
    return CoreTask(file.stem, known.kind, known.shots, known.delimiter, items, known.chance)


def _chances(file: Path) -> dict[str, float]:
    """The accuracy of a random guess in each task, from a column of percentages."""
    chances = {}
    for row in read_csv(file, "table of baselines", ["Eval Task", "Random baseline"]):
        text = row["Random baseline"].strip()
        fine = re.fullmatch(r"[0-9]{1,2}(\.[0-9]{0,18})?", text)
        require(fine is not None, f"{file}: the {text[:20]!r} of {row['Eval Task']} is no percentage below 100")
        chances[row["Eval Task"]] = float(text) / 100
    return chances


def _task(folder: Path, entry: Any, chances: dict[str, float], where: str) -> CoreTask:
    entry = {"continuation_delimiter": " "} | require_kind(entry, dict, where)
    require_fields(entry, ENTRY, where)
    label, kind, shots = entry["label"], entry["icl_task_type"], entry["num_fewshot"]
    require(kind in KINDS, f"task {label} is of kind {kind!r}; known are {', '.join(KINDS)}")
    require(label in chances, f"{folder / 'eval_meta_data.csv'} has no random baseline of {label}; add it")
    few = bool(shots) and type(shots[0]) is int and 0 <= shots[0] <= MOST_SHOTS
    require(few, f"{where}: num_fewshot is {shots}; it must begin with a number from 0 to {MOST_SHOTS}")
    path = folder / "eval_data" / entry["dataset_uri"]
    inside = path.resolve().is_relative_to((folder / "eval_data").resolve())
    require(inside, f"{where}: dataset_uri {entry['dataset_uri']!r} leads out of the bundle; give a file in eval_data")
    require(path.is_file(), f"{path}, the items of {label}, does not exist; unpack the whole bundle")
    items = [_checked(item, kind, f"{path}:{number}") for number, item in read_jsonl(path, "items")]
    require(bool(items), f"{path}, the items of {label}, is empty; unpack the bundle again")
    return CoreTask(label, kind, shots[0], entry["continuation_delimiter"], items, chances[label])


def _checked(item: Item, kind: str, where: str) -> Item:
    """The item, if it has what its kind of task asks for."""
    require_fields(item, KINDS[kind], where)
    options = item[OPTIONS[kind]] if kind in OPTIONS else [item["continuation"]]
    spoken = bool(options) and all(isinstance(option, str) and option.strip() for option in options)
    require(spoken, f"{where}: {OPTIONS.get(kind, 'continuation')} must be texts that are not empty")
    gold = item["gold"] if "gold" in KINDS[kind] else 0
    require(0 <= gold < len(options), f"{where}: gold is {gold}; it must number one of the {len(options)} options")
    return item


def examples(task: CoreTask, number: int, seed: int = 1234) -> list[Item]:
    """The solved items in front of item `number`: drawn without it, a function of task, item and seed."""
    others = [item for i, item in enumerate(task.items) if i != number]
    draw = random.Random(f"{seed}-{zlib.crc32(task.label.encode())}-{number}")
    return draw.sample(others, min(task.shots, len(others)))


def texts(task: CoreTask, item: Item, shots: Sequence[Item]) -> list[tuple[str, str]]:
    """Context and answer of every candidate; each answer of `schema` is the same text after another question."""
    before = "".join(f"{_question(task, s, s.get('gold', 0))}{_answer(task, s, s.get('gold', 0))}\n\n" for s in shots)
    count = len(item[OPTIONS[task.kind]]) if task.kind in OPTIONS else 1
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
    model: LRT,
    tokenizer: Tokenizer,
    tasks: Sequence[CoreTask],
    *,
    limit: int | None = None,
    mode: str = DEFAULT_MODE,
    tell: Callable[[str, dict[str, Any]], None] = lambda label, scores: None,
) -> dict[str, Any]:
    """Accuracy and centred accuracy, (accuracy - chance) / (1 - chance), of each task, and CORE: the latter's mean.

    Both with their standard errors (n - 1, items independent). `tell` takes each task's figures as they come.
    """
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
        error = math.sqrt(accuracy * (1 - accuracy) / max(len(chosen) - 1, 1)) / (1 - task.chance)
        found[task.label] = {"accuracy": accuracy, "centred": centred, "centred_error": error, "items": len(chosen)}
        tell(task.label, found[task.label])
    scores = found.values()
    return {
        "core": sum(t["centred"] for t in scores) / len(found),
        "core_error": math.sqrt(sum(t["centred_error"] ** 2 for t in scores)) / len(found),
        "tasks": found,
        "mode": mode,
    }
