"""Where compiled code is kept: in a folder that nobody else can write to, of bounded size, for the next process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lrt.utils import compiling

posix = pytest.mark.skipif(not hasattr(os, "getuid"), reason="owners of files are a matter of POSIX")

root = pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root gives files away")


@pytest.fixture
def kept(tmp_path: Path, monkeypatch):
    """What a new process would choose, the user's cache lying in `tmp_path`."""
    monkeypatch.delenv(compiling.FOLDER, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return compiling._kept.__wrapped__


def test_compiled_code_is_kept_with_the_user(kept, tmp_path: Path):
    folder = kept()
    assert folder == tmp_path / "cache" / "lrt" / "compiled"
    assert not hasattr(os, "getuid") or folder.stat().st_mode & 0o777 == 0o700


def test_the_variable_of_torch_names_another_folder(kept, tmp_path: Path, monkeypatch):
    """It may hold other programs' code, so nothing is dropped there."""
    monkeypatch.setenv(compiling.FOLDER, str(tmp_path / "mine"))
    monkeypatch.setattr(compiling, "MOST_KEPT", 0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "code.so").write_bytes(b"x")
    assert kept() == tmp_path / "mine" and (tmp_path / "mine" / "code.so").exists()


def test_a_variable_that_torch_itself_has_set_names_none(kept, tmp_path: Path, monkeypatch):
    """It sets it where nobody has, as soon as its compiler is imported."""
    code = "import os, torch._dynamo.utils, lrt.utils.compiling as c; print(os.environ[c.FOLDER], c._kept())"
    settings = {name: value for name, value in os.environ.items() if name != compiling.FOLDER}
    done = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True, check=True)
    by_torch, ours = done.stdout.split()
    assert Path(ours) == tmp_path / "cache" / "lrt" / "compiled"
    monkeypatch.setenv(compiling.FOLDER, by_torch)
    assert kept() == Path(ours)


def alone(folder: Path, trap: Path, caplog) -> None:
    """`folder` is this process's own, not `trap`, and one line says why."""
    assert folder != trap and folder.resolve() != trap.resolve()
    assert not any(folder.iterdir()) and folder.stat().st_mode & 0o777 == 0o700
    assert f"{trap} keeps nothing that is compiled" in caplog.text and len(caplog.messages) == 1
    folder.rmdir()


@posix
@pytest.mark.parametrize("mode", [0o777, 0o702])
def test_a_folder_that_others_may_write_to_is_not_executed(mode: int, kept, tmp_path: Path, caplog):
    trap = tmp_path / "cache" / "lrt" / "compiled"
    trap.mkdir(parents=True)
    trap.chmod(mode)
    (trap / "code.so").touch()
    alone(kept(), trap, caplog)


@posix
def test_a_folder_that_others_may_replace_is_not_executed(kept, tmp_path: Path, caplog):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    alone(kept(), tmp_path / "cache" / "lrt" / "compiled", caplog)


@root
@pytest.mark.parametrize("given", [".", ".."])
def test_a_folder_of_somebody_else_is_not_executed(given: str, kept, tmp_path: Path, caplog):
    trap = tmp_path / "cache" / "lrt" / "compiled"
    trap.mkdir(mode=0o700, parents=True)
    os.chown(trap / given, 12345, 12345)
    alone(kept(), trap, caplog)


@root
def test_a_group_may_write_only_if_it_is_the_users_own(kept, tmp_path: Path, caplog):
    trap = tmp_path / "cache" / "lrt" / "compiled"
    trap.mkdir(parents=True)
    trap.chmod(0o770)
    assert kept() == trap
    os.chown(trap, os.getuid(), 12345)
    alone(kept(), trap, caplog)


@posix
def test_without_a_home_nothing_is_kept(kept, monkeypatch, tmp_path: Path, caplog):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(compiling, "expand_home", lambda path: Path(path))
    monkeypatch.chdir(tmp_path)
    alone(kept(), Path("~/.cache/lrt/compiled"), caplog)
    assert list(tmp_path.iterdir()) == []


@posix
def test_a_link_is_judged_by_where_it_leads(kept, tmp_path: Path, caplog):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "cache" / "lrt").mkdir(parents=True)
    trap = tmp_path / "cache" / "lrt" / "compiled"
    trap.symlink_to(tmp_path / "open")
    alone(kept(), trap, caplog)


def test_a_file_in_its_place_is_no_folder(kept, tmp_path: Path, caplog):
    (tmp_path / "cache" / "lrt").mkdir(parents=True)
    trap = tmp_path / "cache" / "lrt" / "compiled"
    trap.touch()
    alone(kept(), trap, caplog)


def test_what_is_kept_is_bounded(tmp_path: Path):
    for name in ("a/b", "c"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "code.so").write_bytes(b"x" * 100)
    compiling.keep_below(tmp_path, 200)
    assert len(list(tmp_path.rglob("code.so"))) == 2
    compiling.keep_below(tmp_path, 199)
    assert list(tmp_path.iterdir()) == []


NEXT_PROCESS = """
import torch
from helpers import config, randomised, tokens
from lrt.inference.prefill import compiled, next_logits
from lrt.model.kv_cache import KVCache
from lrt.model.recurrence import advance
from torch._dynamo.utils import counters

cfg = config()
model, ids, outs = randomised(cfg, scale=0.2).float(), tokens(cfg, 1, 6), []
for run in (compiled(), next_logits):
    cache = KVCache.empty(model, 1, 8)
    for t in range(6):
        with torch.no_grad():
            out, cache = advance(model, ids[:, t], cache, None, run)
    outs.append(out)
torch.testing.assert_close(*outs, rtol=0, atol=1e-5)
counted = counters["aot_autograd"]
print(counted["autograd_cache_miss"], counted["autograd_cache_hit"])
"""


@pytest.mark.slow
def test_the_next_process_compiles_nothing(tmp_path: Path):
    """And its step computes what the uncompiled one does."""
    settings = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    settings.pop(compiling.FOLDER, None)
    said = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", NEXT_PROCESS], env=settings, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said.append([int(n) for n in done.stdout.split()])
    assert said[0][0] > 0
    assert said[1] == [0, sum(said[0])]
    assert list((tmp_path / "lrt" / "compiled").rglob("*.so"))
