"""lm-eval through the decoding engine and through HFLM on the exported folder: the same numbers on local tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import config, randomised

from lrt.cli.main import main
from lrt.config.run import RunConfig, TrainConfig
from lrt.data.tokenizer import train_bpe
from lrt.training import checkpoint
from lrt.training.checkpoint import load_model

lm_eval = pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
TASKS = {
    "local_mc": """
task: local_mc
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "local_gen": """
task: local_gen
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["x", "\\n\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    "local_ppl": """
task: local_ppl
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
}


def write_tasks(folder: Path) -> Path:
    """Task files on local data; the longest text takes three windows of the model's context."""
    rows = [
        {"question": " ".join(WORDS[: i + 2]), "choices": [" dog", " fox jumps", " the"], "answer": i % 3,
         "text": " ".join(WORDS[i:] * (12 if i == 2 else 1))}
        for i in range(5)
    ]  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"dataset_path: json\ntest_split: test\ndataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}}}\n"
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text + data)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return some_run(tmp_path_factory.mktemp("runs") / "run", 270)


def some_run(folder: Path, vocabulary: int) -> Path:
    """A random model with a BPE of the words."""
    words = train_bpe([" ".join(WORDS)] * 40, vocabulary)
    model = config(vocab_size=words.vocab_size, bos=words.bos, context=48)
    words.save(folder / "tokenizer")
    settings = RunConfig(model=model, train=TrainConfig(length=32))
    checkpoint.save(folder, 1, settings, randomised(model, scale=0.2).float(), {}, extra={}, keep=1)
    return folder


def samples(lm, names: list[str], tasks: Path) -> dict:
    """What the harness keeps of every example, by task."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = simple_evaluate(lm, tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=True)
    return {name: [s["resps"] for s in sorted(found["samples"][name], key=lambda s: s["doc_id"])] for name in names}


@pytest.mark.parametrize("prefill", ["exact", "sweeps", "zero_memory"])
def test_both_routes_give_the_same_numbers(run: Path, prefill: str, tmp_path: Path, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    from lrt.evaluation.lm_eval import Harness
    from lrt.integrations.hf.export import wrapped
    from lrt.integrations.hf.fast_tokenizer import fast_tokenizer

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    tasks, loaded = write_tasks(tmp_path / "tasks"), load_model(run)
    mode = {"exact": "exact", "sweeps": "interleaved-8", "zero_memory": "zero_memory"}[prefill]
    ours = samples(Harness(loaded, mode, rows=3), ["local_mc", "local_ppl"], tasks)
    settings = {"tokenizer": fast_tokenizer(loaded), "batch_size": 3, "max_length": 48, "device": "cpu"}
    model = wrapped(loaded, prefill)
    theirs = samples(HFLM(pretrained=model, **settings), ["local_mc"], tasks)
    theirs |= samples(HFLM(pretrained=model, add_bos_token=False, **settings), ["local_ppl"], tasks)
    for mine, other in zip(ours["local_mc"], theirs["local_mc"], strict=True):
        for (a, greedy), (b, also) in zip((x[0] for x in mine), (x[0] for x in other), strict=True):
            assert abs(float(a) - float(b)) < 1e-4
            assert str(greedy) == str(also)
    nats = [[float(torch.tensor(x[0][0])) for x in found["local_ppl"]] for found in (ours, theirs)]
    assert max(abs(a - b) for a, b in zip(*nats, strict=True)) < 1e-4
    assert len(set(nats[0])) == len(nats[0])
    if prefill != "zero_memory":  # decode.generate has memory, always
        routes = (Harness(loaded, mode, rows=2), HFLM(pretrained=model, **settings))
        answers = [samples(lm, ["local_gen"], tasks) for lm in routes]
        assert answers[0] == answers[1]
        assert len({str(x) for x in answers[0]["local_gen"]}) > 1


def test_a_continuation_longer_than_the_context_is_refused_and_one_that_fits_is_scored_whole(run: Path):
    from lrt.evaluation.lm_eval import Harness
    from lrt.inference.generate import score

    loaded = load_model(run)
    harness, bos = Harness(loaded, "exact"), loaded.tokenizer.bos
    with pytest.raises(ValueError, match="a continuation has 49 tokens, the model's context 48"):
        harness._loglikelihood_tokens([(None, [bos], [1]), (None, [bos], [7] * 49)])
    (whole, _), (cut, _) = harness._loglikelihood_tokens([(None, [bos], [7] * 48), (None, [bos, 5, 6], [7] * 48)])
    ids = torch.tensor([[bos] + [7] * 48, [6] + [7] * 48])
    nats = score(loaded.model, ids[:, :-1], ids[:, 1:], mode="exact").nats.double().sum(1)
    assert torch.tensor([whole, cut]).allclose(-nats.float(), atol=1e-4)


def test_the_command_names_its_mode(run: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    tasks = write_tasks(tmp_path / "tasks")
    flags = ["--include-path", str(tasks), "--limit", "2", "--device", "cpu"]
    assert main(["eval", str(run), "--tasks", "local_mc,local_ppl", *flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["mode"] == "sweeps(interleaved-8, 0.0001)"
    assert 0 <= found["results"]["local_mc"]["acc,none"] <= 1
    assert main(["eval", str(run), "--tasks", "local_mc", *flags, "--mode", "exact"]) == 0
    assert "scored by exact" in capsys.readouterr().out
    assert main(["eval", str(run), "--tasks", "no_such_task", *flags]) == 2
    assert "no task no_such_task" in capsys.readouterr().err


CORE_TASKS = {
    "copa": """
output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
""",
    "winogrande": """
output_type: multiple_choice
doc_to_text: gold
doc_to_choice: "{{context_options}}"
doc_to_target: "{{continuation}}"
""",
    "lambada_openai": """
output_type: loglikelihood
doc_to_text: "{{context}}"
doc_to_target: " {{continuation}}"
""",
}
"""CORE's tasks without solved examples, in the harness's words, over the same files."""


def write_core(folder: Path) -> Path:
    """Files of three tasks in the gauntlet's layout, and task files of the harness that read them."""
    ends, begins = ["dog", "fox", "the"], [" ".join(WORDS[i : i + 3]) for i in range(6)]
    texts = [f"{a} {b}" for a in begins for b in begins]
    items = {
        "copa": [{"query": t, "choices": ends, "gold": i % 3} for i, t in enumerate(texts)],
        "winogrande": [
            {"context_options": [t, f"{b} dog"], "continuation": "over the fox", "gold": i % 2}
            for i, (t, b) in enumerate(zip(texts, reversed(texts), strict=True))
        ],
        "lambada_openai": [{"context": t, "continuation": ends[i % 3]} for i, t in enumerate(texts)],
    }
    (folder / "yaml").mkdir(parents=True)
    for name, rows in items.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = f"dataset_path: json\ntest_split: test\ndataset_kwargs: {{data_files: {{test: {file}}}}}\n"
        metric = f"task: own_{name}\nmetric_list: [{{metric: acc}}]\ntarget_delimiter: ' '\n"
        (folder / "yaml" / f"{name}.yaml").write_text(metric + CORE_TASKS[name] + data)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["exact", "interleaved-8"])
def test_core_is_right_on_the_same_items_as_the_harness(mode: str, tmp_path: Path, monkeypatch):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from lrt.evaluation.core import candidates, is_right, read_bundle
    from lrt.evaluation.lm_eval import Harness
    from lrt.evaluation.suite import Scorer

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    loaded, folder = load_model(some_run(tmp_path / "run", 400)), write_core(tmp_path / "core")
    words = [loaded.tokenizer.encode(f"a {end}")[1:] for end in ("dog", "fox", "the")]
    assert all(len(word) == 1 for word in words)
    others = [i for i in range(loaded.model.config.vocab_size) if [i] not in words]
    loaded.model.head.weight.data[others] = 0.0  # so that one of the three is mostly the most probable word
    manager = TaskManager(include_path=str(folder / "yaml"), include_defaults=False)
    names = [f"own_{name}" for name in CORE_TASKS]
    done = simple_evaluate(
        Harness(loaded, mode), tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    scorer = Scorer(model=loaded.model, tokenizer=loaded.tokenizer, mode=mode)
    for task in read_bundle(folder):
        theirs = [s["acc"] for s in sorted(done["samples"][f"own_{task.label}"], key=lambda s: s["doc_id"])]
        each = [candidates(task, item, [], scorer) for item in task.items]
        ours = [is_right(task, i, c, scorer.likelihoods(c)) for i, c in zip(task.items, each, strict=True)]
        assert ours == [bool(acc) for acc in theirs] and len(ours) == 36
        assert 0 < sum(ours) < 36
