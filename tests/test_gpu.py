"""Ready for a GPU: every place that asks for the device has its test, and half an hour of a GPU is rehearsed."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._guards import TracingContext

from lrt.cli.bench import FLAGS
from lrt.cli.parse import parse
from lrt.config.run import require_sense
from lrt.experiments.sweep import read_sweep
from lrt.utils import compiling
from lrt.utils.hardware import data_sheet, resolve_device, widest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
DEVICE = re.compile(r"(cuda|mps|nccl|triton)(:\d*)?|reduce-overhead|max-autotune.*")
"""A constant that names a device, what runs on one alone, or a way of compiling that means CUDA graphs there."""
OF_A_DEVICE = {"cuda", "mps", "is_cuda", "is_mps", "accelerator", "pin_memory", "device_type", "flex_attention"}


def asks(node: ast.AST) -> bool:
    """Whether a piece of code depends on which device there is."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str) and DEVICE.fullmatch(node.value) is not None
    if isinstance(node, ast.Compare):  # of what was taken from a device before
        return any(isinstance(x, ast.Constant) and x.value == "cpu" for x in (node.left, *node.comparators))
    if isinstance(node, ast.Name):
        return node.id == "flex_attention"
    if not isinstance(node, ast.Attribute):
        return False
    return node.attr in OF_A_DEVICE or (node.attr == "type" and ast.unparse(node.value).endswith("device"))


def places(tree: ast.AST, inside: str = "module") -> Iterator[str]:
    """The functions (or `module`) with code that asks."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Compare) and "'meta'" in ast.unparse(node):
            continue  # whether there are weights at all
        if asks(node):
            yield inside
        named = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        yield from places(node, node.name if named else inside)


def branches() -> set[tuple[str, str]]:
    files = sorted((ROOT / "lrt").rglob("*.py"))
    return {(str(f.relative_to(ROOT)), name) for f in files for name in places(ast.parse(f.read_text("utf-8")))}


def listed() -> dict[tuple[str, str], list[str]]:
    """The page's table: the tests of each place."""
    rows = re.findall(r"^\| `(lrt/[\w/]+\.py)`: `(\w+)` \| [^|]+ \| ([^|]+) \|$", PAGE, re.M)
    return {(path, name): re.findall(r"`(test_\w+)`", tests) for path, name, tests in rows}


def test_every_branch_on_the_device_is_listed_with_its_test():
    assert set(listed()) == branches()
    files = sorted((ROOT / "tests" / "on_device").glob("*.py"))
    parts = [node for file in files for node in ast.parse(file.read_text("utf-8")).body]
    tests = {node.name for node in parts if isinstance(node, ast.FunctionDef)}
    for place, names in listed().items():
        assert names, f"{place} has no test"
        assert set(names) <= tests, f"{place} names tests that tests/on_device has not"


def test_branches_are_found_where_they_are():
    code = """
A = 'cuda:0'
def f(x):
    'On cuda.'
    return x.is_cuda
def g(d):
    return d.device.type
def h(kind):
    return kind == 'cpu', 'on cuda'
def i(x):
    return x.pin_memory()
def j(x):
    return compile(x, mode='reduce-overhead')
"""
    assert list(places(ast.parse(code))) == ["module", "f", "g", "h", "i", "j"]


def test_a_device_that_is_not_there_is_refused_in_one_line():
    for name in ("cuda", "mps", "tpu"):
        if name in ("tpu",) or resolve_or_none(name) is None:
            with pytest.raises(ValueError, match=f"device '{name}' is not available here; use cpu"):
                resolve_device(name)
    assert widest(torch.device("cpu")) == torch.float64 and widest(torch.device("mps")) == torch.float32


@pytest.mark.parametrize(
    ("card", "sheet"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA L40", "L40"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Tesla T4", None),
    ],
)
def test_a_card_has_the_peak_of_its_own_data_sheet(card: str, sheet: str | None):
    assert data_sheet(card) == sheet


def resolve_or_none(name: str) -> torch.device | None:
    try:
        return resolve_device(name)
    except ValueError:
        return None


# Half an hour of a GPU.


def launched(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "tools/gpu.sh"), *arguments]
    settings = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
@pytest.mark.skipif((ROOT / "wheels").exists(), reason="tools/gpu.sh would install what was collected")
def test_rehearsal_leaves_what_half_an_hour_would(tmp_path: Path):
    done = launched("60", "--rehearse", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    machine, *stages = noted(tmp_path)
    assert machine["device"] == "cpu"
    timed = [f"bench_train_{schedule}" for schedule in ("interleaved-2", "settled-1", "settled-2")]
    assert [s["stage"] for s in stages] == ["tests", *timed, "bench_decode", "sweep", "collect", "prefill"]
    assert all(s["ended"] == "by itself" and s["code"] == 0 for s in stages), stages
    records = [json.loads(line) for line in (tmp_path / "runs/results.jsonl").read_text().splitlines()]
    assert [r["arm"] for r in records] == ["plain", "default", "shift", "paper"]
    for name in timed:
        assert json.loads((tmp_path / f"{name}.log").read_text().splitlines()[-1])["rows"][0]["mfu"] > 0
    assert "passed" in (tmp_path / "tests.log").read_text()
    assert "x exact" in (tmp_path / "prefill.log").read_text()
    assert launched("60", "--rehearse", "--out", str(tmp_path)).returncode == 0
    assert [s["stage"] for s in noted(tmp_path)[len(stages) + 2 :]] == ["collect", "prefill"]


def noted(out: Path) -> list[dict]:
    """The lines of stages.jsonl."""
    return [json.loads(line) for line in (out / "stages.jsonl").read_text().splitlines()]


DEAF = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('begun', flush=True); time.sleep(900)"


def test_a_stage_is_ended_at_its_time_and_what_it_wrote_stays(tmp_path: Path, monkeypatch):
    gpu = loaded_tool()
    monkeypatch.setattr(gpu, "GRACE", 0.2)
    process = gpu.started([sys.executable, "-c", DEAF], subprocess.PIPE)
    assert process.stdout.readline() == b"begun\n"
    assert gpu.stopped(process, "at its time") == "at its time"
    assert process.returncode < 0
    process.stdout.close()
    assert gpu.run(gpu.Stage("late", ["true"]), tmp_path, 0.0) == {"stage": "late", "ended": "no time was left"}
    done = gpu.run(gpu.Stage("short", [sys.executable, "-c", "print(7)"]), tmp_path, float("inf"))
    assert (done["ended"], done["code"]) == ("by itself", 0)
    assert (tmp_path / "short.log").read_text() == "7\n"


def given_again(gpu, out: Path) -> tuple[int, list[dict]]:
    """A call of three stages; its code, and its lines."""
    before = len(noted(out)) if (out / "stages.jsonl").exists() else 0
    flags = gpu.parsed(["5", "--rehearse", "--out", str(out)])
    return gpu.carried_out(flags, {"device": "cpu"}, float("inf")), noted(out)[before + 1 :]


def three_stages(gpu, monkeypatch) -> None:
    says = [sys.executable, "-c", "print('said')"]
    faulty = [sys.executable, "-c", "raise SystemExit(3)"]
    stages = [gpu.Stage("good", says), gpu.Stage("faulty", faulty), gpu.Stage("last", says, again=True)]
    monkeypatch.setattr(gpu, "stages", lambda flags, sweep: stages)


def test_given_again_it_goes_on_and_keeps_what_was_written(tmp_path: Path, monkeypatch):
    gpu = loaded_tool()
    three_stages(gpu, monkeypatch)
    assert [(s["stage"], s["code"]) for s in given_again(gpu, tmp_path)[1]] == [("good", 0), ("faulty", 3), ("last", 0)]
    code, stages = given_again(gpu, tmp_path)
    assert code == 1 and [(s["stage"], s["code"]) for s in stages] == [("faulty", 3), ("last", 0)]
    assert [(tmp_path / f"{name}.log").read_text() for name in ("good", "last")] == ["said\n", "said\nsaid\n"]


def test_an_interruption_ends_the_stage_and_is_noted(tmp_path: Path, monkeypatch):
    gpu = loaded_tool()
    three_stages(gpu, monkeypatch)
    waits = iter([KeyboardInterrupt, None])

    def waited(process: subprocess.Popen, seconds: float) -> bool:
        process.wait()
        if next(waits) is not None:
            raise KeyboardInterrupt
        return True

    monkeypatch.setattr(gpu, "waited", waited)
    code, (stage,) = given_again(gpu, tmp_path)
    assert code == 130 and (stage["stage"], stage["ended"]) == ("good", "interrupted")


@pytest.mark.slow
@pytest.mark.skipif((ROOT / "wheels").exists(), reason="tools/gpu.sh would install what was collected")
def test_a_closed_connection_ends_it_as_ctrl_c_does(tmp_path: Path):
    command = ["bash", str(ROOT / "tools/gpu.sh"), "60", "--rehearse", "--out", str(tmp_path)]
    settings = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=settings, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None and b"cpu" in process.stdout.readline()
        log = tmp_path / "tests.log"
        while not (log.exists() and log.stat().st_size):  # the stage runs, and is waited for
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGHUP)
        process.communicate()
    assert process.returncode == 130
    assert [(s["stage"], s["ended"]) for s in noted(tmp_path)[1:]] == [("tests", "interrupted")]


def test_the_commands_of_half_an_hour_are_ones_that_lrt_takes(tmp_path: Path):
    """The rehearsal has commands of its own, so those for a GPU would first be read on one."""
    gpu = loaded_tool()
    flags = gpu.parsed(["30", "--out", str(tmp_path)])
    benches = [s.command[4:] for s in gpu.stages(flags, tmp_path) if s.command[3:4] == ["bench"]]
    for kind, *arguments in benches:
        assert parse(FLAGS[kind], arguments, f"bench {kind}").settings.device == "cuda"
    assert [kind for kind, *_ in benches] == [*["train"] * 3, "decode", "train"]


def loaded_tool():
    spec = importlib.util.spec_from_file_location("gpu_tool", ROOT / "tools/gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_tool"] = module
    spec.loader.exec_module(module)
    return module


def test_the_rehearsal_has_the_arms_of_the_sweep(tmp_path: Path):
    files = [ROOT / "sweeps" / name for name in ("gpu.toml", "gpu_rehearsal.toml")]
    arms = [{run.arm: run.config.model.memory for run in read_sweep(f)} for f in files]
    assert arms[0] == arms[1] and list(arms[0]) == ["plain", "default", "shift", "paper"]
    schedules = [{run.arm: run.config.train.schedule for run in read_sweep(f)} for f in files]
    assert schedules[0] == schedules[1]
    for run in read_sweep(files[0]):
        require_sense(run.config)
        assert run.config.model.d == 64 * run.config.model.depth
        assert run.arm != "paper" or run.config.model.source == run.config.model.depth
    flags = loaded_tool().parsed(["5", "--books", str(files[0]), "--out", str(tmp_path), "--rehearse"])
    assert {run.config.data.source for run in read_sweep(loaded_tool().sweep_file(flags))} == {str(files[0])}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["0"], "minutes are 0; give a number between 0 and 1440"),
        (["5", "--books", "/nowhere/no.parquet"], "--books /nowhere/no.parquet is no file"),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments: list[str], text: str, capsys):
    with pytest.raises(SystemExit):
        loaded_tool().parsed(arguments)
    assert text in capsys.readouterr().err


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="torch sees no CUDA device; try it with --rehearse"):
        loaded_tool().check("cuda")


# Wheels to carry along.


def test_the_wheels_are_what_the_metadata_asks_for():
    """No requirement of the image's packages is lower than the package's own, and torch is not among them."""
    lines = (ROOT / "tools/gpu_requirements.txt").read_text("utf-8").splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    metadata = (ROOT / "pyproject.toml").read_text("utf-8")
    missing = [line for line in wanted if f'"{line}"' not in metadata.replace("uvicorn[standard]", "uvicorn")]
    assert not missing, "as pyproject.toml has them"
    needed = re.search(r"^dependencies = \[(.*?)^\]", metadata, re.M | re.S)
    assert needed is not None
    names = set(re.findall(r'"([\w-]+)', needed[1])) - {"torch", "tomli"}  # Python 3.12 has a TOML reader
    assert names <= {re.split(r"[>=]", line)[0] for line in wanted}


# Calls into torch that are private to it.


def test_private_calls_of_torch_stand_in_one_module():
    private = re.compile(r"\btorch(?:\.\w+)*\._(?!_)|from torch\b.* import .*\b_(?!_)\w")
    found = {str(f.relative_to(ROOT)) for f in (ROOT / "lrt").rglob("*.py") if private.search(f.read_text("utf-8"))}
    assert found == {"lrt/utils/compiling.py"}


def test_a_marked_axis_stays_symbolic():
    """Two sizes, one graph: the mark does what compiled decoding needs of it."""
    shapes = []

    def seen(graph, inputs):
        shapes.append([tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor)])
        return graph.forward

    torch._dynamo.reset()
    run = torch.compile(lambda x: x * 2, backend=seen, fullgraph=True)
    for n in (3, 5, 9):
        x = torch.ones(n, 2)
        compiling.mark_dynamic(x, 0)
        assert torch.equal(run(x), 2 * x)
    assert len(shapes) == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("marked", [True, False])
def test_a_tensor_marked_in_place_is_told_to_stay(marked: bool):
    staying = []

    def seen(graph, _):
        context = TracingContext.get()
        staying.extend(context.fw_metadata.static_input_indices)
        return graph

    x = torch.zeros(3)
    if marked:
        compiling.mark_in_place(x)
    torch._dynamo.reset()
    torch.compile(lambda y: y.add_(1), backend=aot_autograd(fw_compiler=seen), fullgraph=True)(x)
    torch._dynamo.reset()
    assert x.tolist() == [1, 1, 1] and staying == ([0] if marked else [])
