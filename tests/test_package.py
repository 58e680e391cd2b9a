"""The package as people install it: what importing costs, what the wheel holds, and that the documentation builds."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from helpers import config, randomised
from serving import Server

import lrt
from lrt.config.run import DataConfig, RunConfig, TrainConfig
from lrt.data.tokenizer import ByteTokenizer
from lrt.training import checkpoint

ROOT = Path(__file__).parent.parent
ADDRESS = "http://127.0.0.1:8000"
"""Where the pages say that `lrt serve` listens."""
HEAVY = ("tokenizers", "safetensors", "tyro", "rich", "matplotlib", "datasets", "pyarrow", "transformers", "lm_eval")
IMPORT = f"""
import json, sys, time
for name in {HEAVY!r}:
    sys.modules[name] = None  # importing it fails
import torch
start = time.perf_counter()
import lrt
print(json.dumps([time.perf_counter() - start, lrt.__file__, lrt.LRT(lrt.ModelConfig(depth=1)).config.d]))
"""


def imported(path: Path, folder: Path) -> tuple[float, str, int]:
    """Seconds beyond torch's own, the file and a built model's width, where `path` comes first."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT], capture_output=True, text=True, cwd=folder, env={"PYTHONPATH": str(path)}
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_importing_needs_torch_alone(tmp_path: Path):
    _, file, width = imported(ROOT, tmp_path)
    assert (Path(file).parent, width) == (ROOT / "lrt", 64)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["help"], ["trian"], []])
def test_the_overview_needs_the_standard_library_alone(arguments: list[str]):
    """In an interpreter where importing torch, numpy and the rest fails."""
    code = f"""
import sys
for name in ("torch", "numpy", *{HEAVY!r}):
    sys.modules[name] = None
import lrt
assert set(lrt.__all__) <= set(dir(lrt)) and "LRT" not in vars(lrt)
from lrt.cli.main import main
sys.exit(main({arguments!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, "Traceback" in done.stderr) == (2 if arguments == ["trian"] else 0, False), done.stderr


def test_public_names_are_what_their_modules_define():
    assert sorted(name for names in lrt._MODULES.values() for name in names) == sorted(lrt.__all__)
    for module, names in lrt._MODULES.items():
        for name in names:
            assert getattr(lrt, name) is getattr(importlib.import_module(module), name)
    with pytest.raises(AttributeError, match="no attribute 'LTR'"):
        lrt.LTR  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.slow
def test_the_overview_starts_in_a_fifth_of_a_cpu_second():
    code = "import resource, subprocess, sys; subprocess.run([sys.executable, '-m', 'lrt', '--help'], check=True);"
    code += "used = resource.getrusage(resource.RUSAGE_CHILDREN); print(used.ru_utime + used.ru_stime)"
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout.split()[-1])
        for _ in range(3)
    ]
    assert min(times) < 0.2


def files(root: Path) -> set[Path]:
    """What the package holds there, byte code left out."""
    found = (p for p in (root / "lrt").rglob("*") if p.is_file() and p.suffix != ".pyc")
    return {p.relative_to(root) for p in found}


@pytest.mark.slow
def test_the_wheel_installs_and_imports(tmp_path: Path):
    """Typed, with every module and every file that is no module; under two seconds beyond torch, best of three."""
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(wheel, check=True)
    (found,) = tmp_path.glob("*.whl")
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(found)]
    subprocess.run(install, check=True)
    mine, theirs = files(ROOT), files(target)
    assert mine == theirs
    assert Path("lrt/py.typed") in theirs
    runs = [imported(target, tmp_path) for _ in range(3)]
    assert all(Path(file).is_relative_to(target) for _, file, _ in runs)
    assert min(seconds for seconds, _, _ in runs) < 2


def test_extras_are_named_as_documented():
    if sys.version_info < (3, 11):
        pytest.skip("needs tomllib")
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"hf", "eval", "dev"} <= set(extras)
    inside = [name for line in extras["dev"] for name in re.findall(r"\[([\w,-]+)\]", line)]
    assert {"hf", "eval"} <= {name for part in inside for name in part.split(",")}


# Documentation.


@pytest.mark.filterwarnings("ignore")
def test_the_documentation_builds_strictly(tmp_path: Path):
    pytest.importorskip("mkdocs")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(build, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    pages = {p.stem for p in (ROOT / "docs").glob("*.md")}
    assert pages <= {p.parent.name for p in (tmp_path / "site").rglob("index.html")} | {"index"}


def snippets() -> dict[str, list[str]]:
    """Python blocks by page; `<!-- not run -->` above one leaves it out."""
    found = {}
    for page in sorted((ROOT / "docs").glob("*.md")):
        text = re.sub(r"<!-- not run -->\s*```python\n.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
        if blocks := re.findall(r"```python\n(.*?)```", text, re.S):
            found[page.name] = blocks
    return found


@pytest.fixture
def demo_run(tmp_path: Path, monkeypatch) -> None:
    """A small random model where the pages look for a run: runs/demo/lrt, in a folder of this test."""
    words = ByteTokenizer()
    model = config(vocab_size=257, bos=256, context=512)
    folder = tmp_path / "runs" / "demo" / "lrt"
    words.save(folder / "tokenizer")
    train = TrainConfig(length=32, schedule="settled-1..3", horizon="steps=2", batch=2, eval_rows=2)
    settings = RunConfig(name="lrt", model=model, data=DataConfig(folder=str(tmp_path / "data")), train=train)
    checkpoint.save(folder, 1, settings, randomised(model, scale=0.2).float(), {}, extra={}, keep=1)
    (tmp_path / "book.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    monkeypatch.chdir(tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", snippets())
def test_snippets_run(page: str, demo_run):
    names: dict = {}
    torch.manual_seed(0)
    blocks = snippets()[page]
    with Server(Path("runs/demo/lrt")) if any(ADDRESS in block for block in blocks) else nullcontext() as server:
        for block in blocks:
            block = block if server is None else block.replace(ADDRESS, server.url)
            exec(compile(block, page, "exec"), names)
        if server is not None:
            names["client"].close()  # else the socket is found open in a later test


# How tests and CI are arranged.


def test_tests_stand_in_the_rooms_of_the_package():
    rooms = {p.name for p in (ROOT / "lrt").iterdir() if p.is_dir()}
    tested = {p.parent.name for p in (ROOT / "tests").rglob("test_*.py")} - {"tests"}
    assert tested <= rooms | {"attack"}, f"no such room in lrt/: {tested - rooms}"


def test_public_ci_runs_what_a_submission_must_pass():
    import yaml

    (job,) = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


def test_memory_that_nobody_has_written_is_nan_in_tests():
    assert torch.empty(64).isnan().all()
