"""The pages' commands and examples, run in their order where a reader's own files lie; trainings are of few steps."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from serving import Server
from test_readme import COMMAND, PAGES, ROOT

import lrt
from lrt.cli.main import main
from lrt.data.tokenizer import train_bpe

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
PYTHON = re.compile(r"^```python\n(.*?)^```", re.S | re.M)
RUN = {
    "README.md": (), "tutorial.md": (), "data.md": (), "decoding.md": (), "library.md": (), "serving.md": (),
    "recipes.md": ("hf:owner", "--resume"), "ecosystem.md": ("--tasks", "--to gguf", "my_model --prefill", "--log-to"),
}  # fmt: skip
"""Pages, and what marks a command on them that needs the network, another package or a folder that is not its own."""
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FEW = "steps=6"
"""So long do trainings take here."""


def save_llama(folder: Path) -> None:
    """A random checkpoint of 16 small blocks, with a tokenizer."""
    transformers = pytest.importorskip("transformers")
    words = train_bpe(["It was a bright morning.\n"] * 50, 290)
    words.save(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 16, "num_attention_heads": 2}
    settings = transformers.LlamaConfig(
        vocab_size=words.vocab_size,
        max_position_embeddings=256,
        bos_token_id=words.bos,
        eos_token_id=words.bos,
        **sizes,
    )
    transformers.LlamaForCausalLM(settings).save_pretrained(folder)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """What the pages take for granted: `make demo`, the reader's own texts, and `runs/mine`."""
    folder = tmp_path_factory.mktemp("reader")
    datasets = pytest.importorskip("datasets")
    text = "It was a bright morning when the old lady walked down to the village, and said nothing.\n"
    lines = [text.replace("bright", f"bright, {i}th") for i in range(4000)]
    code = (ROOT / "lrt" / "schedule.py").read_text(encoding="utf-8")
    for name, content in {"my_texts/a.txt": "".join(lines), "code/a.py": code, "book.txt": text * 400}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    (folder / "news.txt").write_text("".join(reversed(lines[:1500])), encoding="utf-8")
    (folder / "books").mkdir()
    datasets.Dataset.from_dict({"text": ["".join(lines[i : i + 9]) for i in range(0, 900, 9)]}).to_parquet(
        folder / "books" / "a.parquet"
    )
    turns = [(f"name {i % 10}", DIGITS[i % 10]) for i in range(3000)]
    talks = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": f"{a} {i}"}]}
        for i, (q, a) in enumerate(turns)
    ]
    (folder / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talks), encoding="utf-8")
    (folder / "pretrained").symlink_to(ROOT / "pretrained")
    save_llama(folder / "Llama-3.2-1B")
    for run in ("runs/demo/lrt", "runs/mine"):
        data = {"source": str(folder / "my_texts")}
        lrt.train("cpu_demo", str(folder / run), data=data, train={"horizon": FEW}, progress=False)
    return folder


def steps_of(page: str) -> Iterator[tuple[str, str]]:
    """The commands and examples of a page, in its order: ("command", its line) or ("python", its code)."""
    joined = page.replace("\\\n", " ")
    marks = [(one.start(), "command", f"{one[1]}{one[2]}") for one in COMMAND.finditer(joined)]
    marks += [(one.start(), "python", one[1]) for one in PYTHON.finditer(joined)]
    yield from ((kind, text) for _, kind, text in sorted(marks))


def shortened(line: str) -> list[str]:
    """The arguments of a command, its training short."""
    args = shlex.split(line, comments=True)
    if args[0] == "train":
        args = [re.sub(r"^\w+=[\w.]+$", FEW, a) if args[i - 1] == "--train.horizon" else a for i, a in enumerate(args)]
        args += [] if "--train.horizon" in args else ["--train.horizon", FEW]
    return args


def served(folder: Path, args: list[str]) -> None:
    """A server as a command starts it: its page answers, and SIGTERM ends it."""
    command = [sys.executable, "-m", "lrt", *args, "--port", "0"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        said, address = "", None
        for line in process.stdout or ():
            said += line
            if address := re.search(r"http://[\w.:]+", line):
                break
        assert address is not None, said
        assert httpx.get(address[0], timeout=60).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM, said


def ran(folder: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = shortened(line)
    if args[0] == "serve":
        return served(folder, args)
    monkeypatch.setattr(sys, "stdin", io.StringIO("name 3\n"))
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(args)
    assert code == 0, f"lrt {line}\n{said.getvalue()[-1500:]}"
    return None


@pytest.mark.parametrize("name", RUN)
def test_a_page_runs_from_its_top_to_its_end(prepared: Path, tmp_path: Path, name: str, monkeypatch):
    page, known, folder = PAGES[name].read_text(encoding="utf-8"), {}, tmp_path / "reader"
    shutil.copytree(prepared, folder, symlinks=True)
    if "--out runs/mine" in page:
        shutil.rmtree(folder / "runs" / "mine")
    monkeypatch.chdir(folder)
    for kind, text in steps_of(page):
        if kind == "command" and not any(mark in text for mark in RUN[name]):
            ran(folder, text, monkeypatch)
        elif kind == "python" and "127.0.0.1:8000" in text:
            with Server(folder / "runs/demo/lrt") as server:
                exec(compile(text.replace("http://127.0.0.1:8000", server.url), name, "exec"), known)
        elif kind == "python":
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(text, name, "exec"), known)
