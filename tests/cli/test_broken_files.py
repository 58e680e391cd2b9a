"""Every kind of file that somebody else may have written, broken in two hundred ways: one line or a result."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pytest
import yaml
from breaking import broken, ends_plainly, every_time
from pyarrow import parquet
from serving import make_run

from lrt.cli.main import main
from lrt.config.model import ModelConfig
from lrt.config.recipes import recipe
from lrt.config.run import DataConfig, RunConfig, TrainConfig
from lrt.data.tokenizer import train_bpe

MANY = int(os.environ.get("LRT_TEST_FILES", "200"))
"""Files of each kind."""
TRAIN = [
    "train", "--model.depth", "1", "--model.width", "32", "--model.heads", "2", "--model.context", "32",
    "--train.length", "16", "--train.batch", "2", "--train.eval-every", "0", "--train.eval-rows", "1",
    "--train.device", "cpu", "--train.horizon", "steps=2", "--train.threads", "1", "--data.source", "text.txt",
    "--data.tokenizer", "bytes", "--data.folder", "data",
]  # fmt: skip
TOKENIZE = "tokenize --source text.txt --tokenizer run/tokenizer --folder new"
SUITE = "eval run --suite parity --limit 1 --lengths 4 --out scored"
IMPORT = "convert llama --out new/run"
TEXT = "".join(f"line {i} of a text\n" for i in range(200))
SWEEP = """
seeds = [0]
[base]
data = { source = "text.txt", tokenizer = "bytes", vocab_size = 258 }
model = { depth = 1, width = 32, heads = 2, context = 32 }
train = { length = 16, batch = 2, horizon = "steps=1", eval_every = 0, eval_rows = 1, schedule = "parallel" }
[arms.plain]
model.memory = { projection = "none", residual = false }
"""


class Kind(NamedTuple):
    """A kind of file: where one lies, and the command that reads it."""

    file: str
    command: str


KINDS = {
    "config.json of another family": Kind("llama/config.json", "convert llama --out new"),
    "index of weights": Kind("sharded/model.safetensors.index.json", "convert sharded --out new"),
    "weights of another family": Kind("llama/model.safetensors", "convert llama --out new"),
    "config.json of an export": Kind("exported/config.json", "convert exported --out new"),
    "tokenizer.json": Kind(
        "run/tokenizer/tokenizer.json", "tokenize --source text.txt --tokenizer run/tokenizer --folder new"
    ),
    "tokenizer_config.json": Kind("run/tokenizer/tokenizer_config.json", TOKENIZE),
    "generation_config.json": Kind("llama/generation_config.json", "convert llama --out new"),
    "chat template": Kind("llama/chat_template.jinja", "convert llama --out new"),
    "checkpoint description": Kind("run/checkpoints/step_00000001/meta.json", "eval run --source text.txt --rows 1"),
    "checksums": Kind("run/checkpoints/step_00000001/SHA256SUMS", "sample run --max-new-tokens 2"),
    "weights of a run": Kind("run/checkpoints/step_00000001/model.safetensors", "sample run --max-new-tokens 2"),
    "manifest": Kind("data/*/manifest.json", "eval trained --rows 1"),
    "token shards": Kind("data/*/val_00000.bin", "eval trained --rows 1"),
    "metrics": Kind("trained/metrics.jsonl", "train --resume trained"),
    "result at export": Kind("trained/result.json", "export trained new"),
    "records": Kind("results.jsonl", "report results.jsonl --out new"),
    "record of a sweep": Kind("swept/plain-seed0/record.json", "sweep sweep.toml --out swept --jobs 1"),
    "sweep": Kind("sweep.toml", "sweep sweep.toml --out new --jobs 1"),
    "bundle, YAML": Kind("bundle/core.yaml", "core run --bundle bundle"),
    "bundle, CSV": Kind("bundle/eval_meta_data.csv", "core run --bundle bundle"),
    "bundle, items": Kind("bundle/eval_data/colours.jsonl", "core run --bundle bundle"),
    "text": Kind("text.txt", "eval run --source text.txt --rows 1"),
    "JSON lines": Kind("rows.jsonl", "eval run --source rows.jsonl --rows 1"),
    "JSON": Kind("rows.json", "eval run --source rows.json --rows 1"),
    "CSV": Kind("rows.csv", "eval run --source rows.csv --rows 1"),
    "Parquet": Kind("rows.parquet", "eval run --source rows.parquet --rows 1"),
    "Arrow": Kind("rows.arrow", "eval run --source rows.arrow --rows 1"),
    "TSV": Kind("rows.tsv", "eval run --source rows.tsv --rows 1"),
    "dialogues": Kind("talks.jsonl", "eval run --source talks.jsonl --rows 1"),
    "weights of an export": Kind("exported/model.safetensors", "convert exported --out new"),
    "record of a suite": Kind("scored/parity-exact.jsonl", SUITE),
    "checksums of an export": Kind("summed/SHA256SUMS", "convert summed --out new"),
    "gzip": Kind("text.txt.gz", "eval run --source text.txt.gz --rows 1"),
    "Zstandard": Kind("text.txt.zst", "eval run --source text.txt.zst --rows 1"),
    "packed JSON lines": Kind("rows.jsonl.gz", "eval run --source rows.jsonl.gz --rows 1"),
    "Arrow stream": Kind("stream.arrow", "eval run --source stream.arrow --rows 1"),
    "Parquet with dictionaries": Kind("words.parquet", "eval run --source words.parquet --rows 1"),
    "Parquet of dialogues": Kind("talks.parquet", "eval run --source talks.parquet --rows 1"),
    "config.json on its way to GGUF": Kind("llama/config.json", f"{IMPORT} && export new/run new/out --to gguf"),
    "tokenizer.json on its way to GGUF": Kind("llama/tokenizer.json", f"{IMPORT} && export new/run new/out --to gguf"),
    "tokenizer.json on its way to Llama": Kind(
        "llama/tokenizer.json", f"{IMPORT} && export new/run new/out --to llama"
    ),
    "BLiMP": Kind("blimp/colours.jsonl", "eval run --suite blimp --bundle blimp --out new"),
    "kept scores of parts": Kind("halved/parity-exact.parts.jsonl", SUITE.replace("scored", "halved")),
}


def texts() -> None:
    """The same text as a file of every form."""
    rows = [{"text": line} for line in TEXT.splitlines()]
    Path("text.txt").write_text(TEXT)
    Path("text.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("rows.json").write_text(json.dumps(rows))
    Path("rows.csv").write_text("text,x\n" + "".join(f'"{row["text"]}",1\n' for row in rows))
    Path("rows.tsv").write_text("text\tx\n" + "".join(f"{row['text']}\t1\n" for row in rows))
    talk = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day to you"}]}
    Path("talks.jsonl").write_text((json.dumps(talk) + "\n") * 40)
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, "rows.parquet")
    for name, make in (("rows.arrow", pyarrow.ipc.new_file), ("stream.arrow", pyarrow.ipc.new_stream)):
        with pyarrow.OSFile(name, "wb") as file, make(file, table.schema) as writer:
            writer.write_table(table)
    with pyarrow.OSFile("text.txt.zst", "wb") as file, pyarrow.CompressedOutputStream(file, "zstd") as packed:
        packed.write(TEXT.encode())
    Path("rows.jsonl.gz").write_bytes(gzip.compress(Path("rows.jsonl").read_bytes()))
    words = pyarrow.array([row["text"] for row in rows]).dictionary_encode()
    parquet.write_table(pyarrow.table({"text": words, "tools": pyarrow.nulls(len(rows))}), "words.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([talk] * 40), "talks.parquet", compression="zstd")


def families() -> None:
    """A checkpoint of another family, whole and in parts."""
    transformers = pytest.importorskip("transformers")
    tokenizer = train_bpe([TEXT], 300)
    settings = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(settings)
    for name, size in (("llama", "1GB"), ("sharded", "10KB")):
        model.save_pretrained(name, max_shard_size=size)
        tokenizer.save(Path(name))
        facts = {"bos_token": "<|bos|>", "eos_token": "<|bos|>", "chat_template": "{{ messages }}"}
        Path(name, "tokenizer_config.json").write_text(json.dumps(facts))
        Path(name, "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")


def bundle() -> None:
    """An evaluation bundle of one task."""
    Path("bundle/eval_data").mkdir(parents=True)
    kind = {"num_fewshot": [1], "icl_task_type": "multiple_choice"}
    entry = {"label": "colours", "dataset_uri": "colours.jsonl"} | kind
    Path("bundle/core.yaml").write_text(yaml.safe_dump({"icl_tasks": [entry]}))
    Path("bundle/eval_meta_data.csv").write_text("Eval Task,Task Category,Random baseline\ncolours,x,50.0\n")
    items = [{"query": q, "choices": ["a", "b"], "gold": i % 2} for i, q in enumerate("xyz")]
    Path("bundle/eval_data/colours.jsonl").write_text("".join(json.dumps(x) + "\n" for x in items))


def half_scored() -> None:
    """Minimal pairs, and the scores of a suite that was stopped after its only part."""
    Path("blimp").mkdir()
    pairs = [{"sentence_good": f"line {i}", "sentence_bad": f"enil {i}", "UID": "colours"} for i in range(3)]
    pairs = [pair | {"field": "syntax", "linguistics_term": "x", "pairID": str(i)} for i, pair in enumerate(pairs)]
    Path("blimp/colours.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    record = json.loads(Path("scored/parity-exact.jsonl").read_text())
    ((part, scores),) = record["accuracy"].items()
    lines = [{"of": record["of"]}, {"part": part, "scores": scores, "cpu_seconds": 0.1, "lost": ""}]
    Path("halved").mkdir()
    Path("halved/parity-exact.parts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def without_seal(text: str) -> str:
    """JSON without its seals: no other check is reached behind one that does not fit."""
    return re.sub(r',?\s*"seal": "sha256:[0-9a-f]{64}"', "", text)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a good file of every kind."""
    home = tmp_path_factory.mktemp("files")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr("lrt.experiments.sweep.recipe", small_recipe)
        texts()
        make_run(home / "run", context=32)
        families()
        assert main([*TRAIN, "--out", "trained"]) == 0
        assert main(["export", "trained", "exported"]) == 0
        Path("sweep.toml").write_text(SWEEP)
        assert main(["sweep", "sweep.toml", "--out", "swept", "--jobs", "1"]) == 0
        shutil.copy("swept/results.jsonl", "results.jsonl")
        bundle()
        assert main(SUITE.split()) == 0
        half_scored()
        shutil.copytree("exported", "summed")
        for file in (*home.rglob("*.json"), *home.rglob("*.jsonl")):
            file.write_text(without_seal(file.read_text("utf-8")), "utf-8")
        Path("exported/SHA256SUMS").unlink()
    return home


def breaks(kind: str, count: int, home: Path, capfd) -> list[str]:
    """Break the file of a kind so many times, and run its command; what did not end plainly."""
    pattern, command = KINDS[kind]
    (file,) = home.glob(pattern)
    original = file.read_bytes()
    assert_good(command, capfd)

    def one(chance: random.Random) -> None:
        file.write_bytes(broken(original, chance))
        for part in command.split(" && "):
            ends_plainly(part.split(), capfd)
        clean()

    try:
        return every_time(count, one)
    finally:
        file.write_bytes(original)


def small_recipe(name: str) -> RunConfig:
    """A recipe whose training ends at once: what is left of a broken sweep may lack the sizes."""
    named = recipe(name)
    model = ModelConfig(depth=1, width=32, heads=2, context=32)
    train = TrainConfig(length=16, batch=2, horizon="steps=1", eval_every=0, eval_rows=1, schedule="parallel")
    return replace(named, model=model, train=train, data=DataConfig(source="text.txt"))


def assert_good(command: str, capfd) -> None:
    """Unbroken, the command succeeds: otherwise its failures would show nothing."""
    for part in command.split(" && "):
        assert main(part.split()) == 0, capfd.readouterr().err
    capfd.readouterr()
    clean()


def clean() -> None:
    """Remove what a command has made."""
    shutil.rmtree("new", ignore_errors=True)
    Path("halved/parity-exact.jsonl").unlink(missing_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_broken_files_end_in_one_line_or_a_result(kind: str, home: Path, monkeypatch, capfd):
    monkeypatch.chdir(home)
    monkeypatch.setattr("lrt.experiments.sweep.recipe", small_recipe)
    assert breaks(kind, MANY, home, capfd) == []
