"""lm-eval's `local-completions` through the server scores a local task as the library scores it directly."""

from __future__ import annotations

import json

import pytest
import torch
from serving import Server, make_run

from lrt.data.tokenizer import ByteTokenizer
from lrt.inference.generate import score

pytestmark = [pytest.mark.filterwarnings("ignore")]  # lm-eval and what it imports
TASK = """
task: lrt_local
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""
DOCUMENTS = [
    {"question": "def area(self, width", "choices": [", height):", " quick", "\n"], "answer": 0},
    {"question": "the quick brown fox", "choices": [" jumps over", " return", " é"], "answer": 0},
    {"question": "# the lazy dog\n    return width", "choices": [" * height", " dog", " + area"], "answer": 0},
]


@pytest.mark.parametrize("kind", ["bpe", pytest.param("bytes", marks=pytest.mark.slow)])
def test_local_completions_agree_with_exact_scoring(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    simple_evaluate = pytest.importorskip("lm_eval").simple_evaluate
    from lm_eval.tasks import TaskManager

    run = make_run(tmp_path / "tiny", tokenizer=ByteTokenizer() if kind == "bytes" else None)
    documents = tmp_path / "documents.jsonl"
    documents.write_text("".join(json.dumps(d) + "\n" for d in DOCUMENTS), encoding="utf-8")
    (tmp_path / "task.yaml").write_text(TASK.format(file=documents), encoding="utf-8")
    with Server(run) as server:
        args = (
            f"model=tiny,base_url={server.url}/v1/completions,tokenizer={run / 'tokenizer'},"
            "tokenizer_backend=huggingface,num_concurrent=2,max_length=255"
        )
        found = simple_evaluate(
            model="local-completions", model_args=args, tasks=["lrt_local"], log_samples=True, bootstrap_iters=0,
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        )  # fmt: skip
    assert found is not None
    tokenizer, checked = server.loaded.tokenizer, 0
    for sample in found["samples"]["lrt_local"]:
        answers = [r[0] for r in sample["resps"]]
        for (context, choice), (nats, greedy) in zip(_pairs(sample["arguments"]), answers, strict=True):
            ids, n = tokenizer.encode(context + choice), len(tokenizer.encode(context))
            row = torch.tensor([ids])
            exact = -score(server.loaded.model, row[:, :-1], row[:, 1:], mode="exact").nats[0, n - 1 :]
            assert float(nats) == pytest.approx(float(exact.sum()), abs=1e-4)
            assert greedy in (False, "False")
            checked += 1
    assert checked == 9


def _pairs(arguments) -> list[tuple[str, str]]:
    """Context and continuation of every request, in the log's order; its form differs between versions."""
    if isinstance(arguments, dict):
        return [(a["arg_0"], a["arg_1"]) for a in (arguments[f"gen_args_{i}"] for i in range(len(arguments)))]
    return [tuple(a) for a in arguments]
