"""Exported folders: loaded by the package, without it, in a fresh environment; and the way back."""

from __future__ import annotations

import ast
import json
import os
import re
import resource
import signal
import subprocess
import sys
import venv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import config, randomised

from lrt.cli.main import main
from lrt.config.decoding import SamplingParams
from lrt.config.run import RunConfig, TrainConfig
from lrt.data.tokenizer import ByteTokenizer, train_bpe
from lrt.inference.chat import complete
from lrt.inference.generate import score
from lrt.integrations.convert import convert
from lrt.integrations.hf.export import card
from lrt.training import checkpoint
from lrt.training.checkpoint import load_model

transformers = pytest.importorskip("transformers")
PROMPT = "the quick  brown\nfüx"
OUTSIDE = """
import json, sys
if sys.argv[2] == "blocked":
    sys.modules["lrt"] = None  # any import of it fails
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
folder, prompt = sys.argv[1], sys.argv[3]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
ids = tokenizer(prompt, return_tensors="pt").input_ids
base = AutoModel.from_pretrained(folder, trust_remote_code=True)(ids).last_hidden_state
out = model.generate(ids, max_new_tokens=24, do_sample=False)[0]
print(json.dumps({
    "ids": ids[0].tolist(), "text": tokenizer.decode(out, skip_special_tokens=True), "module": type(model).__module__,
    "logits": model(ids).logits[0].tolist(),
    "same": bool(torch.equal(model.model.core.logits(base), model(ids).logits)),
}))
"""


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def run(request, tmp_path_factory) -> Path:
    """A run whose every parameter is drawn, with a tokenizer, and a recorded evaluation."""
    folder = tmp_path_factory.mktemp("runs") / request.param
    words = ByteTokenizer() if request.param == "bytes" else train_bpe(["the quick brown fox\n"] * 50, 290)
    shift = request.param == "bpe"
    model = config(vocab_size=words.vocab_size, bos=words.bos, context=96, shift=shift)
    settings = RunConfig(name="small", model=model, train=TrainConfig(length=64, schedule="interleaved-2"))
    words.save(folder / "tokenizer")
    checkpoint.save(folder, 7, settings, randomised(model, scale=0.2).float(), {}, extra={}, keep=1)
    bpb = {
        "decoded": 1.5,
        "merged": 1.25,
        "zero_memory": 2.75,
        "live_gap": 0.25,
        "rows": 64,
        "schedule": "interleaved-2",
    }
    checkpoint.write_json(folder / "result.json", {"name": "small", "bpb": bpb, "progress": {"step": 7}})
    return folder


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    folder = run.with_name(run.name + "-exported")
    assert main(["export", str(run), str(folder), "--prefill", "exact"]) == 0
    return folder


def sampled(run: Path, count: int = 24) -> str:
    """What `lrt sample` says, prompt included; it stops at BOS."""
    loaded = load_model(run)
    laws = SamplingParams(max_new_tokens=count, temperature=0)
    return PROMPT + "".join(complete(loaded.model, loaded.tokenizer, PROMPT, laws, mode="exact"))


def bare() -> dict[str, str]:
    """The environment without a path to this package."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}


def outside(python: str, folder: Path, home: Path, blocked: str) -> dict:
    """What a process of its own finds in an exported folder."""
    hub = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(home / "code")}
    done = subprocess.run(
        [python, "-c", OUTSIDE, str(folder), blocked, PROMPT],
        capture_output=True, text=True, cwd=home, env=bare() | hub,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check(found: dict, run: Path) -> None:
    loaded = load_model(run)
    ids = [loaded.tokenizer.bos, *loaded.tokenizer.encode(PROMPT)]
    assert found["ids"] == ids
    assert found["text"] == sampled(run)
    assert found["same"]
    row = torch.tensor([ids])
    for target in (1, 5):
        nats = score(loaded.model, row, torch.full_like(row, target), mode="exact").nats[0]
        theirs = -torch.tensor(found["logits"]).log_softmax(-1)[:, target]
        assert (theirs - nats).abs().max() < 1e-4


def test_a_process_without_the_package_loads_it(run: Path, exported: Path, tmp_path: Path):
    found = outside(sys.executable, exported, tmp_path, "blocked")
    assert found["module"].startswith("transformers_modules")
    check(found, run)


@pytest.mark.slow
def test_a_fresh_environment_with_torch_and_transformers_alone(run: Path, exported: Path, tmp_path: Path):
    """`lrt sample` and `generate` say the same, letter for letter."""
    home = tmp_path / "env"
    venv.create(home, with_pip=True)
    python = str(home / "bin" / "python")
    pins = Path(__file__).parents[2] / "constraints.txt"
    command = [python, "-m", "pip", "install", "--quiet", "-c", str(pins), "torch", "transformers"]
    subprocess.run(command, check=True)
    absent = subprocess.run([python, "-c", "import lrt"], capture_output=True, cwd=tmp_path, env=bare())
    assert absent.returncode != 0
    check(outside(python, exported, tmp_path, "free"), run)


def test_the_package_loads_it_without_remote_code(run: Path, exported: Path):
    from lrt.integrations.hf import LRTForCausalLM

    model = transformers.AutoModelForCausalLM.from_pretrained(exported)
    assert type(model) is LRTForCausalLM
    assert model.config.prefill == "exact"
    core = load_model(run).model
    assert all(torch.equal(p, dict(core.named_parameters())[n]) for n, p in model.model.core.named_parameters())
    assert model.generation_config.eos_token_id == core.config.bos
    assert model.generation_config.max_new_tokens is None


def test_the_code_that_travels_is_the_packages(exported: Path):
    from lrt.integrations.hf.export import flat, sources

    package = Path(checkpoint.__file__).parents[1]
    for name in sources():
        text = (exported / f"{name}.py").read_text()
        assert not re.search(r"^\s*(from|import) lrt", text, re.M), name
    model = (exported / f"{flat('lrt.model.transformer')}.py").read_text()
    original = (package / "model" / "transformer.py").read_text()
    assert model == re.sub(r"from (lrt\.[\w.]+) import", lambda m: f"from .{flat(m[1])} import", original)
    assert "lrt_commands" not in sources()


def test_the_code_that_travels_needs_torch_and_transformers_alone(exported: Path):
    """Their own requirements included; a library of ours would be missing where the model is loaded.

    yaml and tomllib (tomli before Python 3.11) are imported where files of their kinds are read, of which an export
    has none.
    """
    unread = {"yaml", "tomli", "tomllib"}
    there = {"torch", "transformers", "huggingface_hub", "safetensors", "numpy", "tokenizers"} | set(
        sys.stdlib_module_names
    )
    for file in exported.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert {name.split(".")[0] for name in names} <= there | unread, (file.name, names)
        top = [node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.Import)]
        assert not {alias.name for node in top for alias in node.names} & unread, file.name


def test_the_card_names_figures_and_modes(exported: Path):
    text = (exported / "README.md").read_text()
    for words in (
        "decoded, token by token | 1.5000",
        "zero memory | 2.7500",
        "interleaved-2",
        "prefill='exact'",
        "step 7",
    ):
        assert words in text


def test_the_card_of_another_step_has_that_steps_figures(run: Path, tmp_path: Path):
    """The result is of the run's last step; an earlier checkpoint may hold an evaluation of its own, or none."""
    loaded = load_model(run)
    bpb = json.loads((run / "result.json").read_text())["bpb"] | {"decoded": 4.5}
    for step, extra, words in (
        (3, {}, ["No evaluation was recorded at step 3."]),
        (5, {"bpb": bpb}, ["64 held-out rows, float32:", "| decoded, token by token | 4.5000 |"]),
    ):
        other = replace(loaded, step=step, extra=extra)
        assert all(word in card(other, "sweeps") for word in words) and "1.5000" not in card(other, "sweeps")
    checkpoint.save(tmp_path / "run", 5, loaded.config, loaded.model, {}, extra={"bpb": bpb}, keep=1)
    loaded.tokenizer.save(tmp_path / "run" / "tokenizer")
    assert main(["export", "--to", "run", str(tmp_path / "run"), str(tmp_path / "brief")]) == 0
    rounded = card(load_model(tmp_path / "brief"), "sweeps")
    assert "float32, before the weights were rounded to bfloat16:" in rounded and "4.5000" in rounded


def test_it_comes_back_as_a_run(run: Path, exported: Path, tmp_path: Path):
    convert(exported, tmp_path / "back")
    before, after = load_model(run), load_model(tmp_path / "back")
    assert before.config.model == after.config.model
    assert before.config.train.schedule == after.config.train.schedule
    assert all(torch.equal(a, b) for a, b in zip(before.model.parameters(), after.model.parameters(), strict=True))
    assert before.tokenizer.encode(PROMPT) == after.tokenizer.encode(PROMPT)
    assert sampled(tmp_path / "back") == sampled(run)


def test_a_flipped_bit_of_an_export_is_refused(run: Path, tmp_path: Path):
    """By conversion in every file, by transformers in what it reads there; a folder that is saved anew is its own."""
    folder = tmp_path / "exported"
    assert main(["export", str(run), str(folder)]) == 0
    load = transformers.AutoModelForCausalLM.from_pretrained
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "modeling_lrt.py"):
        raw = (folder / name).read_bytes()
        (folder / name).write_bytes(raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:])
        with pytest.raises(ValueError, match=rf"{name} is missing, truncated or altered \(checksum\)"):
            convert(folder, tmp_path / "back")
        if name in ("model.safetensors", "config.json"):
            with pytest.raises((ValueError, OSError), match="checksum|not a valid JSON"):
                load(folder)
        (folder / name).write_bytes(raw)
    model = load(folder)
    torch.nn.init.zeros_(model.model.core.head.weight)
    model.save_pretrained(folder)
    assert not load(folder).model.core.head.weight.any()
    convert(folder, tmp_path / "back")


def test_the_tokenizer_spells_what_ours_spells(run: Path, exported: Path):
    mine, theirs = load_model(run).tokenizer, transformers.AutoTokenizer.from_pretrained(exported)
    for text in ("", " a  b\r\n\tc", "naïve 漢字 🦊\0", "<|bos"):
        ids = theirs(text).input_ids
        assert ids == [mine.bos, *mine.encode(text)]
        assert theirs.decode(ids, skip_special_tokens=True) == text


def test_folders_are_not_overwritten(run: Path, exported: Path, capsys):
    assert main(["export", str(run), str(exported)]) == 2
    assert "exists; remove it" in capsys.readouterr().err
    assert main(["export", str(run), str(exported) + "-x", "--to", "llama"]) == 2
    assert "uses its memory" in capsys.readouterr().err


def test_pushing_to_a_hub_is_the_librarys(exported: Path, monkeypatch):
    """Nothing of ours is in between; a stand-in of the hub's file API sees what would be uploaded."""
    hub, seen = transformers.utils.hub, {}

    class Hub:
        def create_repo(self, repo_id, **options):
            return type("Url", (), {"repo_id": repo_id})

        def create_commit(self, repo_id, operations, **options):
            seen[repo_id] = {one.path_in_repo: Path(one.path_or_fileobj).read_bytes() for one in operations}

    card = type("Card", (), {"save": lambda self, path: Path(path).write_text("card")})()
    monkeypatch.setattr(hub, "hf_api", Hub)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **options: card)
    transformers.AutoModelForCausalLM.from_pretrained(exported).push_to_hub("somebody/small")
    pushed = seen["somebody/small"]
    assert pushed["model.safetensors"] == (exported / "model.safetensors").read_bytes()
    assert json.loads(pushed["config.json"])["prefill"] == "exact"


@pytest.mark.parametrize("to", ["hf", "run", "back"])
def test_what_does_not_fit_on_the_disk_leaves_nothing(to: str, run: Path, exported: Path, tmp_path: Path):
    """One line with a remedy, and no half of a folder that would be in the way of the next try."""
    new = tmp_path / "new"
    args = ["--traceback", "export", str(run), str(new), "--to", to]
    write = (lambda: convert(exported, new)) if to == "back" else (lambda: main(args))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        with pytest.raises(OSError, match="new could not be written .*; free space, or choose another"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert not new.exists()
