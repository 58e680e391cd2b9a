"""CORE: the 22 in-context-learning tasks of DCLM, scored with memory (arXiv 2406.11794, section 3.5 and appendix G).

The published evaluation bundle is a folder: core.yaml lists the tasks, eval_data/ holds their items as JSON lines, and
eval_meta_data.csv the accuracy of a random guess. Three kinds of items: several answers to one question, several
questions to one answer (schema), and a text to be continued exactly.
"""

from __future__ import annotations

import functools
import json
import random
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lrt.evaluation.likelihood import Candidate, Likelihood
from lrt.evaluation.suite import Scorer, Scores, Suite, fingerprint, mean_of, share
from lrt.utils.files import read_csv, read_jsonl, read_yaml, require_fields, require_kind
from lrt.utils.require import require
from lrt.utils.sequences import common_beginning

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
ITEMS_AT_ONCE = 64
"""Items that are tokenised and scored together."""
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


class FewShot(NamedTuple):
    """A task of CORE whose items lie as JSON lines in a folder without a task list."""

    kind: str
    shots: int
    chance: float
    delimiter: str = " "


MC, SCHEMA, LM = KINDS
KNOWN = {
    "jeopardy_all": FewShot(LM, 10, 0.0, "\nAnswer: "), "bigbench_qa_wikidata": FewShot(LM, 10, 0.0),
    "arc_easy": FewShot(MC, 10, 0.25), "arc_challenge": FewShot(MC, 10, 0.25), "copa": FewShot(MC, 0, 0.5),
    "commonsense_qa": FewShot(MC, 10, 0.2), "piqa": FewShot(MC, 10, 0.5), "openbook_qa": FewShot(MC, 0, 0.25),
    "lambada_openai": FewShot(LM, 0, 0.0), "winograd_wsc": FewShot(SCHEMA, 0, 0.5),
    "winogrande": FewShot(SCHEMA, 0, 0.5),
    "bigbench_dyck_languages": FewShot(LM, 10, 0.0), "agi_eval_lsat_ar": FewShot(MC, 3, 0.25),
    "bigbench_cs_algorithms": FewShot(LM, 10, 0.0), "bigbench_operators": FewShot(LM, 10, 0.0),
    "bigbench_repeat_copy_logic": FewShot(LM, 10, 0.0), "boolq": FewShot(MC, 10, 0.62),
    "bigbench_language_identification": FewShot(MC, 10, 0.0909),
}  # fmt: skip
"""By file name, as the evaluation gauntlet lays them out: shots and chance as CORE has them."""


def read_bundle(folder: Path) -> list[CoreTask]:
    """The bundle's tasks, or those of a folder of task files (KNOWN), which may lie in folders by category.

    ValueError: what is missing from it, of another type, or of a kind unknown here.
    """
    require(folder.is_dir(), f"{folder} is no folder; give that of the evaluation bundle or of its task files")
    files = sorted(file for file in folder.rglob("*.jsonl") if file.stem in KNOWN)
    if files and not (folder / "core.yaml").exists():
        return _different([_known_task(file, KNOWN[file.stem]) for file in files], str(folder))
    for name in ("core.yaml", "eval_meta_data.csv", "eval_data"):
        require((folder / name).exists(), f"{folder / name} does not exist; give the folder of the evaluation bundle")
    chances, where = _chances(folder / "eval_meta_data.csv"), f"{folder / 'core.yaml'}"
    tasks = read_yaml(folder / "core.yaml", "task list")
    require_fields(tasks, {"icl_tasks": list}, where)
    require(bool(tasks["icl_tasks"]), f"{where} lists no task; unpack the bundle again")
    entries = enumerate(tasks["icl_tasks"], 1)
    return _different([_task(folder, entry, chances, f"{where}, task {n}") for n, entry in entries], where)


def _different(tasks: list[CoreTask], where: str) -> list[CoreTask]:
    labels = [task.label for task in tasks]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    require(twice is None, f"{where} has the task {twice!r} twice; leave one of them")
    return tasks


def _known_task(file: Path, setting: FewShot) -> CoreTask:
    items = [_checked(item, setting.kind, f"{file}:{number}") for number, item in read_jsonl(file, "items")]
    require(bool(items), f"{file} holds no item; unpack it again")
    return CoreTask(file.stem, setting.kind, setting.shots, setting.delimiter, items, setting.chance)


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
    draw, others = random.Random(f"{seed}-{zlib.crc32(task.label.encode())}-{number}"), len(task.items) - 1
    return [task.items[i + (i >= number)] for i in draw.sample(range(others), min(task.shots, others))]


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


def candidates(task: CoreTask, item: Item, shots: Sequence[Item], scorer: Scorer) -> list[Candidate]:
    """The candidates as ids; what is scored is what follows the context's own tokens."""
    made = []
    for question, answer in texts(task, item, shots):
        ids, context = scorer.encode(question + answer), scorer.tokenizer.encode(question.rstrip())
        same = common_beginning(ids, context)
        require(same < len(ids), f"{answer!r}, an answer of {task.label}, has no token of its own")
        made.append(Candidate([scorer.tokenizer.bos, *ids], len(ids) - same))
    return made


def is_right(task: CoreTask, item: Item, options: Sequence[Candidate], answers: Sequence[Likelihood]) -> bool:
    """Whether the right candidate has the highest mean log-probability, or the continuation would be written itself."""
    if task.kind == "language_modeling":
        return answers[0].greedy
    means = [one.logprob / option.scored for one, option in zip(answers, options, strict=True)]
    return means.index(max(means)) == item["gold"]


def score_task(task: CoreTask, scorer: Scorer) -> Scores:
    """Accuracy of a task and its centred accuracy, (accuracy - chance) / (1 - chance), with standard errors."""
    total, hits = len(task.items[: scorer.limit]), 0
    for first in range(0, total, ITEMS_AT_ONCE):
        block = range(first, min(first + ITEMS_AT_ONCE, total))
        each = [candidates(task, task.items[i], examples(task, i), scorer) for i in block]
        answers = iter(scorer.likelihoods([candidate for options in each for candidate in options]))
        hits += sum(
            is_right(task, task.items[i], options, [next(answers) for _ in options])
            for i, options in zip(block, each, strict=True)
        )
        scorer.progress(block.stop, total)
    scores, room = share(hits, total), 1 - task.chance
    return scores | {"centred": (scores["accuracy"] - task.chance) / room, "centred_error": scores["error"] / room}


def core_suite(folder: Path) -> Suite:
    """CORE, or as many of its tasks as lie in the folder. ValueError: see `read_bundle`."""
    tasks = read_bundle(folder)
    parts = {task.label: functools.partial(score_task, task) for task in tasks}
    facts = [json.dumps([t.label, t.kind, t.shots, t.delimiter, t.chance, t.items]) for t in tasks]
    return Suite("core", parts, _summary, fingerprint(facts))


def _summary(parts: Mapping[str, Scores]) -> Scores:
    """CORE: the mean centred accuracy."""
    return mean_of(parts.values(), "centred", "centred_error") | {"whole": len(parts) == TASKS_OF_CORE}
