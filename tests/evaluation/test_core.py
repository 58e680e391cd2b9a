"""CORE: prompts, candidates and centred accuracy on a bundle made here, with a model that knows some answers."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from helpers import config, randomised, refusal

from lrt.config.model import ModelConfig
from lrt.data.tokenizer import ByteTokenizer
from lrt.evaluation import core as module
from lrt.evaluation.core import KNOWN, CoreTask, candidates, core_suite, examples, read_bundle, score_task, texts
from lrt.evaluation.likelihood import Likelihood
from lrt.evaluation.suite import Scorer
from lrt.model.loss import ScheduledLoss
from lrt.model.lrt import LRT
from lrt.schedule import Schedule

ENTRIES = [
    {"label": "colours", "dataset_uri": "a/colours.jsonl", "num_fewshot": [1], "icl_task_type": "multiple_choice"},
    {"label": "pronouns", "dataset_uri": "pronouns.jsonl", "num_fewshot": [0], "icl_task_type": "schema"},
    {"label": "count", "dataset_uri": "count.jsonl", "num_fewshot": [2], "icl_task_type": "language_modeling",
     "continuation_delimiter": ": "},
]  # fmt: skip
ITEMS = {
    "a/colours.jsonl": [
        {"query": f"{thing} is", "choices": ["red", "green"], "gold": gold}
        for thing, gold in (("blood", 0), ("grass", 1), ("rust", 0), ("moss", 1))
    ],
    "pronouns.jsonl": [{"context_options": ["cat sat", "dog ran"], "continuation": "home", "gold": 1}],
    "count.jsonl": [{"context": f"after {i} ", "continuation": str(i + 1)} for i in range(3)],
}


@pytest.fixture
def bundle(tmp_path):
    (tmp_path / "eval_data" / "a").mkdir(parents=True)
    (tmp_path / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": ENTRIES}), encoding="utf-8")
    (tmp_path / "eval_meta_data.csv").write_text(
        "Eval Task,Task Category,Random baseline\ncolours,x,50.0\npronouns,x,50.0\ncount,x,0.0\n",
        encoding="utf-8",
    )
    for name, items in ITEMS.items():
        text = "".join(json.dumps(item) + "\n" for item in items)
        (tmp_path / "eval_data" / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_prompts_of_the_three_kinds(bundle):
    colours, pronouns, count = read_bundle(bundle)
    assert (colours.shots, colours.delimiter, colours.chance, count.delimiter) == (1, " ", 0.5, ": ")
    (shot,) = examples(colours, 0)
    assert shot in colours.items[1:] and examples(colours, 0) == [shot]
    front = f"{shot['query']} {shot['choices'][shot['gold']]}\n\n"
    assert texts(colours, colours.items[0], [shot]) == [(front + "blood is", " red"), (front + "blood is", " green")]
    assert texts(pronouns, pronouns.items[0], []) == [("cat sat", " home"), ("dog ran", " home")]
    assert texts(count, count.items[1], [count.items[0]]) == [("after 0: 1\n\nafter 1", ": 2")]


def scorer(model: LRT | None = None, **options) -> Scorer:
    return Scorer(model=model or randomised(config()), tokenizer=ByteTokenizer(), mode="exact", **options)


def test_candidates_score_the_answer(bundle):
    colours, tokenizer = read_bundle(bundle)[0], ByteTokenizer()
    red, green = candidates(colours, colours.items[0], [], scorer())
    assert tokenizer.decode(red.ids[-red.scored :]) == " red" and tokenizer.decode(red.ids) == "blood is red"
    assert (red.ids[0], green.scored) == (tokenizer.bos, 6)


def test_a_model_that_knows_the_answers_gets_them_and_accuracy_is_centred(bundle):
    tasks, tokenizer = read_bundle(bundle), ByteTokenizer()
    told = [text for task in tasks for i, item in enumerate(task.items) for text in _solved(task, i, item)]
    model = LRT(ModelConfig(depth=2, width=64, heads=2, context=64, vocab_size=257, bos=256), seed=1)
    loss, optimizer = ScheduledLoss(model, Schedule.parse("settled-1..2")), torch.optim.AdamW(model.parameters(), 3e-3)
    rows = torch.tensor([[256, *tokenizer.encode(text.ljust(48))][:49] for text in told])
    for step in range(150):
        loss(rows[:, :-1], rows[:, 1:], step=step).loss.backward()
        optimizer.step(), optimizer.zero_grad()
    model.eval()
    suite = core_suite(bundle)
    found = {label: score(scorer(model)) for label, score in suite.parts.items()}
    assert {label: scores["accuracy"] for label, scores in found.items()} == {"colours": 1, "pronouns": 1, "count": 1}
    assert suite.summarise(found)["centred"] == pytest.approx(1) and found["colours"]["items"] == 4
    assert not suite.summarise(found)["whole"]
    tasks[0].items[0]["gold"] = 1  # what it knows is now wrong
    assert score_task(tasks[0], scorer(model))["centred"] == pytest.approx((0.75 - 0.5) / 0.5)
    assert score_task(tasks[2], scorer(model, limit=2))["items"] == 2


def test_standard_errors_by_hand(bundle, monkeypatch):
    answers, seen = iter([True, False, True]), []
    monkeypatch.setattr(module, "candidates", lambda *_: [None])
    monkeypatch.setattr(module, "ITEMS_AT_ONCE", 2)
    monkeypatch.setattr(Scorer, "likelihoods", lambda _, some: [Likelihood(0.0, next(answers)) for _ in some])
    task = CoreTask("made", "language_modeling", 0, " ", [{}, {}, {}], 0.25)
    scores = score_task(task, scorer(progress=lambda *told: seen.append(told)))
    assert scores["accuracy"] == pytest.approx(2 / 3) and scores["centred"] == pytest.approx((2 / 3 - 0.25) / 0.75)
    assert scores["error"] == pytest.approx((2 / 9 / 2) ** 0.5) == scores["centred_error"] * 0.75
    assert seen == [(2, 3), (3, 3)]
    both = module._summary({"a": scores, "b": scores | {"centred": 1.0, "centred_error": 0.0}})
    assert both["centred"] == pytest.approx((scores["centred"] + 1) / 2)
    assert both["centred_error"] == pytest.approx(scores["centred_error"] / 2)


def test_solved_examples_are_drawn_without_the_item_itself():
    task = CoreTask("made", "language_modeling", 3, " ", [{"context": str(i)} for i in range(5)], 0.0)
    for number in range(5):
        drawn = [item["context"] for item in examples(task, number)]
        assert len(set(drawn)) == 3 and str(number) not in drawn
    assert len({str(examples(task, number)) for number in range(5)}) > 1
    assert examples(task._replace(shots=9), 0) and len(examples(task._replace(shots=9), 0)) == 4


def test_a_task_that_is_there_twice_is_refused(bundle, tmp_path):
    (bundle / "core.yaml").write_text(
        yaml.safe_dump({"icl_tasks": [ENTRIES[0], dict(ENTRIES[0], num_fewshot=[0])]}), encoding="utf-8"
    )
    with pytest.raises(ValueError, match="has the task 'colours' twice"):
        read_bundle(bundle)
    for folder in ("a", "b"):
        (tmp_path / "files" / folder).mkdir(parents=True)
        item = {"query": "It rained, so", "choices": ["wet.", "dry."], "gold": 0}
        (tmp_path / "files" / folder / "copa.jsonl").write_text(json.dumps(item) + "\n")
    with pytest.raises(ValueError, match="has the task 'copa' twice"):
        read_bundle(tmp_path / "files")


def _solved(task, number: int, item) -> list[str]:
    question, answer = texts(task, item, examples(task, number))[item.get("gold", 0)]
    return [question + answer]


def test_what_is_missing_from_a_bundle_is_named(bundle, capsys):
    (bundle / "eval_data" / "count.jsonl").unlink()
    with pytest.raises(ValueError, match=r"count.jsonl, the items of count, does not exist"):
        read_bundle(bundle)
    assert "core.yaml does not exist" in refusal(capsys, ["core", "nowhere", "--bundle", str(bundle / "eval_data")])
    assert "core.yaml is no folder" in refusal(capsys, ["core", "nowhere", "--bundle", str(bundle / "core.yaml")])


def edit(key: str, value: object) -> dict:
    return {"icl_tasks": [ENTRIES[0] | {key: value}]}


LIES = [
    ("core.yaml", "", "is nothing"),
    ("core.yaml", "icl_tasks", "must be an object"),
    ("core.yaml", "icl_tasks: 3", "icl_tasks is 3"),
    ("core.yaml", "icl_tasks: []", "lists no task"),
    ("core.yaml", "icl_tasks: [3]", "task 1 is 3"),
    ("core.yaml", edit("label", 3), "label is 3"),
    ("core.yaml", edit("icl_task_type", "chess"), "kind 'chess'"),
    ("core.yaml", edit("num_fewshot", 3), "num_fewshot is 3"),
    ("core.yaml", edit("num_fewshot", []), "num_fewshot is []"),
    ("core.yaml", edit("num_fewshot", ["2"]), "num_fewshot is ['2']"),
    ("core.yaml", edit("num_fewshot", [-1]), "num_fewshot is [-1]"),
    ("core.yaml", edit("num_fewshot", [10**9]), "from 0 to 1000"),
    ("core.yaml", edit("dataset_uri", "../core.yaml"), "leads out of the bundle"),
    ("core.yaml", edit("dataset_uri", "/etc/passwd"), "leads out of the bundle"),
    ("core.yaml", edit("dataset_uri", "a"), "does not exist"),
    ("core.yaml", edit("continuation_delimiter", None), "continuation_delimiter is None"),
    ("eval_meta_data.csv", "", "its first line must name"),
    ("eval_meta_data.csv", "Eval Task,Chance\ncolours,5", "its first line must name"),
    *(
        ("eval_meta_data.csv", f"Eval Task,Random baseline\ncolours,{bad}", "no percentage below 100")
        for bad in ("100", "-1", "nan", "inf", "", "x", "1e1", "\u0661")
    ),
    ("eval_data/a/colours.jsonl", "", "is empty"),
    ("eval_data/a/colours.jsonl", "[]", "must be an object"),
    *(
        ("eval_data/a/colours.jsonl", ITEMS["a/colours.jsonl"][0] | change, said)
        for change, said in (
            ({"gold": 2}, "gold is 2"), ({"gold": -1}, "gold is -1"), ({"gold": True}, "gold is True"),
            ({"gold": "0"}, "gold is '0'"), ({"choices": []}, "must be texts"), ({"choices": "ab"}, "choices is 'ab'"),
            ({"choices": ["a", 3]}, "must be texts"), ({"choices": ["a", " "]}, "not empty"),
            ({"query": 3}, "query is 3"),
        )
    ),
    ("eval_data/pronouns.jsonl", {"continuation": "x", "gold": 0}, "lacks 'context_options'"),
    ("eval_data/count.jsonl", {"context": "x", "continuation": ""}, "not empty"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "said"), LIES)
def test_bundles_that_lie_are_refused_in_one_line(bundle, name: str, content, said: str, capsys):
    text = content if isinstance(content, str) else json.dumps(content)
    (bundle / name).write_text(text, encoding="utf-8")
    error = refusal(capsys, ["core", "nowhere", "--bundle", str(bundle)])
    assert name.split("/")[-1].split(".")[0] in error
    assert said in error or said == "is nothing"


def test_a_folder_of_task_files_is_read_as_the_gauntlet_lays_it_out(tmp_path):

    items = {
        "world_knowledge/jeopardy_all": {"context": "CAPITALS: of France", "continuation": "Paris", "category": "x"},
        "language_understanding/winograd_wsc": {"context_options": ["A", "B"], "continuation": "is.", "gold": 1},
        "commonsense_reasoning/copa": {"query": "It rained, so", "choices": ["it was wet.", "it was dry."], "gold": 0},
        "elsewhere/unknown_task": {"any": "thing"},
    }
    for name, item in items.items():
        file = tmp_path / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(item) + "\n" for _ in range(3)))
    tasks = {task.label: task for task in read_bundle(tmp_path)}
    assert set(tasks) == {"jeopardy_all", "winograd_wsc", "copa"} and len(KNOWN) == 18
    assert [(t.kind, t.shots, t.chance) for t in tasks.values()] == [
        ("multiple_choice", 0, 0.5), ("schema", 0, 0.5), ("language_modeling", 10, 0.0),
    ]  # fmt: skip
    task = tasks["jeopardy_all"]
    shown = texts(task, task.items[0], examples(task, 0)[:1])
    assert shown == [("CAPITALS: of France\nAnswer: Paris\n\nCAPITALS: of France", "\nAnswer: Paris")]
    (tmp_path / "commonsense_reasoning" / "copa.jsonl").write_text('{"query": "x", "choices": ["a"]}\n')
    with pytest.raises(ValueError, match="copa.jsonl:1 lacks 'gold'"):
        read_bundle(tmp_path)
