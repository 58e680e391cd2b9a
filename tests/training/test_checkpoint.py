"""Checkpoints: bit-exact round trip; damage is refused in one line; the newest valid one is found; no pickle."""

from __future__ import annotations

import ast
import os
import pickle
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import EXTRA, MODEL_NOW, OPTIMIZER_NOW, RUN, edit, names, saved
from helpers import randomised
from safetensors.torch import save_file

import lrt
from lrt.config.model import ModelConfig
from lrt.config.run import RunConfig, TrainConfig
from lrt.data.tokenizer import ByteTokenizer, train_bpe
from lrt.model.lrt import LRT
from lrt.training import checkpoint
from lrt.training.checkpoint import (
    META,
    MODEL,
    OPTIMIZER,
    SUMS,
    load_model,
    load_weights,
    newest_valid,
    open_checkpoint,
    save,
    write_weights,
)
from lrt.training.optimizer import Optimizer
from lrt.training.trainer import train


def test_round_trip_is_bit_exact(tmp_path: Path):
    folder = saved(tmp_path)
    for where in (folder, tmp_path, str(tmp_path)):
        opened = open_checkpoint(where)
        assert (opened.folder, opened.step, opened.config, opened.extra) == (folder, 3, RUN, EXTRA)
    weights, state = opened.model().state_dict(), opened.optimizer_state()
    assert weights.keys() == MODEL_NOW.state_dict().keys()
    assert all(torch.equal(weights[name], p) for name, p in MODEL_NOW.state_dict().items())
    assert state.keys() == OPTIMIZER_NOW.state().keys()
    assert all(
        torch.equal(state[name], x) and state[name].dtype == x.dtype for name, x in OPTIMIZER_NOW.state().items()
    )
    assert not opened.model().training
    Optimizer(opened.model(), RUN.optim).load(state)


def test_another_tokenizer_is_refused(tmp_path: Path):
    """One of another text, of the same size or a smaller one, spells other words by the same ids."""
    own, other, smaller = train_bpe(["to be or not to be " * 9], 262), train_bpe(["a rose is a rose " * 9], 262), 259
    run = replace(RUN, model=replace(RUN.model, vocab_size=own.vocab_size))
    own.save(tmp_path / "tokenizer")
    save(tmp_path, 1, run, LRT(run.model), {}, extra=EXTRA, keep=1)
    assert load_model(tmp_path).tokenizer.hash == own.hash
    for wrong in (other, train_bpe(["to be or not to be " * 9], smaller), ByteTokenizer()):
        wrong.save(tmp_path / "tokenizer")
        with pytest.raises(ValueError, match=r"tokenizer\.json is not the one .* restore the run's own tokenizer"):
            load_model(tmp_path)


def test_a_folder_holds_what_it_says_and_nothing_is_left_aside(tmp_path: Path):
    folder = saved(tmp_path)
    assert {p.name for p in folder.iterdir()} == {MODEL, OPTIMIZER, META, SUMS}
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000003"]


def test_saving_a_step_again_replaces_it(tmp_path: Path):
    saved(tmp_path)
    folder = save(tmp_path, 3, RUN, LRT(RUN.model, seed=9), {}, extra=EXTRA, keep=2)
    weights = open_checkpoint(folder).model().state_dict()
    assert torch.equal(weights["head.weight"], LRT(RUN.model, seed=9).head.weight)
    assert names(tmp_path) == [3]


def test_the_newest_are_kept(tmp_path: Path):
    for step in (1, 20, 300):
        saved(tmp_path, step, keep=2)
    assert names(tmp_path) == [20, 300]
    saved(tmp_path, 4000, keep=1)
    assert names(tmp_path) == [4000]


def test_a_broken_newer_checkpoint_does_not_push_out_the_one_just_written(tmp_path: Path):
    """Resumed from 100 because 200 was damaged: 150 is written, and must stay."""
    for step in (100, 200):
        saved(tmp_path, step)
    (tmp_path / "checkpoints" / "step_00000200" / MODEL).write_bytes(b"")
    folder = saved(tmp_path, 150, keep=1)
    assert folder.is_dir()
    assert newest_valid(tmp_path)[0].step == 150


def test_a_half_written_folder_is_ignored(tmp_path: Path):
    saved(tmp_path, 1)
    aside = tmp_path / "checkpoints" / "step_00000002.tmp"
    shutil.copytree(tmp_path / "checkpoints" / "step_00000001", aside)
    (aside / META).unlink()
    assert names(tmp_path) == [1]
    assert open_checkpoint(tmp_path).step == 1
    saved(tmp_path, 2)
    assert not aside.exists()
    assert names(tmp_path) == [1, 2]


def test_a_crash_while_writing_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    saved(tmp_path, 1)

    def crash(*_: object) -> None:
        raise OSError("disk full")

    for part in ("write_tensors", "write_json"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, part, crash)
            with pytest.raises(OSError, match="disk full"):
                saved(tmp_path, 2)
        assert names(tmp_path) == [1]
        assert newest_valid(tmp_path)[0].step == 1


@pytest.mark.parametrize("where", ["nowhere", "empty", "file"])
def test_what_is_no_checkpoint_says_so(where: str, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="checkpoint") as error:
        open_checkpoint(tmp_path / where)
    assert where in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (
            lambda w: {k: v for k, v in w.items() if k != "head.weight"},
            ["the model, not the checkpoint", "head.weight"],
        ),
        (lambda w: w | {"extra.weight": w["head.weight"]}, ["the checkpoint, not the model", "extra.weight"]),
        (lambda w: w | {"head.weight": w["head.weight"][:5]}, ["head.weight", "(5, 24)", "(19, 24)"]),
        (lambda w: w | {"head.weight": w["head.weight"].log()}, ["head.weight holds values that are not finite"]),
    ],
)
def test_weights_that_do_not_fit_are_named(change, names: list[str]):
    model = LRT(RUN.model)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_weights(model, change(dict(MODEL_NOW.state_dict())))
    assert all(name in str(error.value) for name in names)
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())  # nothing was half loaded


def test_a_checkpoint_of_another_shape_with_a_valid_checksum(tmp_path: Path):
    other = replace(RUN, model=replace(RUN.model, width=48))
    folder = save(tmp_path, 1, other, LRT(RUN.model), {}, extra=EXTRA, keep=1)
    with pytest.raises(ValueError, match=r"in the checkpoint.*in the model"):
        open_checkpoint(folder).model()


def test_nothing_is_ever_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Opening reads tensors and JSON only; and no file of the package so much as names a pickle or torch.load."""
    folder = saved(tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(owner, name, refuse)
    opened = open_checkpoint(folder)
    opened.model()
    opened.optimizer_state()
    for file in Path(lrt.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            imported = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not {"pickle", "shelve", "marshal", "dill", "joblib"} & set(imported), file
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("torch", "load"), ("torch", "save")}, file


def test_tensors_on_views_are_saved_whole(tmp_path: Path):
    """Optimizer state that is not contiguous must not be refused or scrambled."""
    state = {"a/exp_avg": torch.arange(6.0).view(2, 3).T}
    folder = save(tmp_path, 1, RUN, MODEL_NOW, state, extra=EXTRA, keep=1)
    assert torch.equal(open_checkpoint(folder).optimizer_state()["a/exp_avg"], state["a/exp_avg"])
    save_file({"x": torch.zeros(1)}, folder / MODEL)
    with pytest.raises(ValueError, match="checksum"):
        open_checkpoint(folder)


SMALL = RunConfig(
    model=ModelConfig(depth=1, width=2, heads=1, context=8, vocab_size=2),
    train=TrainConfig(length=8, schedule="parallel"),
)


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 61])
def test_no_flipped_bit_is_accepted(every: int, tmp_path: Path):
    """Each byte of a whole checkpoint with one bit flipped, or replaced by a space or a digit: none opens."""
    folder = save(tmp_path, 3, SMALL, LRT(SMALL.model), {"a/step": torch.ones(())}, extra=EXTRA, keep=1)
    open_checkpoint(folder)
    accepted = []
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        for i, byte in list(enumerate(whole))[::every]:
            for changed in {byte ^ (1 << i % 8), ord(" "), ord("1")} - {byte}:
                file.write_bytes(whole[:i] + bytes([changed]) + whole[i + 1 :])
                try:
                    open_checkpoint(folder)
                except ValueError as error:
                    assert "\n" not in str(error)  # noqa: PT017
                else:
                    accepted.append((file.name, i, changed))
        file.write_bytes(whole)
    assert accepted == []
    assert {p.name for p in folder.iterdir()} == {MODEL, OPTIMIZER, META, SUMS}
    assert open_checkpoint(folder).step == 3


def test_a_folder_that_says_another_step_than_it_holds(tmp_path: Path):
    saved(tmp_path, 8).rename(tmp_path / "checkpoints" / "step_00000012")
    with pytest.raises(ValueError, match=r"step_00000012 holds step 8"):
        open_checkpoint(tmp_path)
    shutil.copytree(tmp_path / "checkpoints" / "step_00000012", tmp_path / "best")  # a name that says no step
    assert open_checkpoint(tmp_path / "best").step == 8


@pytest.mark.parametrize(
    "name",
    [
        "step_00000012_backup",
        "step_00000099.bak",
        "step_99",
        "step_0000x001",
        "step_00000007.mine.tmp",
        "step_000000012",
    ],
)
def test_a_copy_of_the_users_is_neither_opened_nor_deleted(name: str, tmp_path: Path):
    copy = tmp_path / "checkpoints" / name
    shutil.copytree(saved(tmp_path, 12), copy)
    for step in (13, 14, 15):
        saved(tmp_path, step, keep=1)
    assert copy.is_dir() and names(tmp_path) == [15]
    assert open_checkpoint(tmp_path).step == 15


def test_checkpoints_are_ordered_by_number(tmp_path: Path):
    for step in (99_999_999, 100_000_000):
        saved(tmp_path, step, keep=1)
    assert names(tmp_path) == [100_000_000]


def test_a_symlinked_checkpoint_is_left_alone(tmp_path: Path):
    """Somebody moved it to a larger disk; pruning must neither end the training nor remove it."""
    folder = saved(tmp_path, 1)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    saved(tmp_path, 2, keep=1)
    saved(tmp_path, 3, keep=1)
    assert names(tmp_path) == [1, 3] and open_checkpoint(tmp_path / "elsewhere").step == 1


def test_all_files_are_written_with_the_mode_that_the_umask_gives(tmp_path: Path):
    before = os.umask(0o022)
    try:
        folder = saved(tmp_path)
    finally:
        os.umask(before)
    assert {p.name: stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir()} == dict.fromkeys(
        (MODEL, OPTIMIZER, META, SUMS), 0o644
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.bfloat16, torch.float64])
def test_tensors_of_another_number_type_are_refused(dtype: torch.dtype, tmp_path: Path):
    weights = {k: v.to(dtype) if k == "head.weight" else v for k, v in MODEL_NOW.state_dict().items()}
    state = {k: v.to(dtype) if k == "head.weight/exp_avg" else v for k, v in OPTIMIZER_NOW.state().items()}
    opened = open_checkpoint(save(tmp_path, 1, RUN, weights, state, extra=EXTRA, keep=1))
    with pytest.raises(ValueError, match=r"head\.weight is .* in the checkpoint"):
        opened.model()
    with pytest.raises(ValueError, match=r"head\.weight/exp_avg is"):
        Optimizer(LRT(RUN.model), RUN.optim).load(opened.optimizer_state())


def test_a_checkpoint_of_the_first_format_opens(tmp_path: Path):
    """As versions before wrote it: no SHA256SUMS, and the hash of tokenizer.json alone."""
    folder = saved(tmp_path)
    (folder / SUMS).unlink()
    edit(folder / META, format=1, tokenizer="0" * 64)
    assert open_checkpoint(folder).tokenizer == {"tokenizer.json": "0" * 64}
    edit(folder / META, format=2)
    with pytest.raises(ValueError, match="SHA256SUMS does not exist"):
        open_checkpoint(folder)


def test_weights_alone_are_half_as_large_and_the_nearest_in_bfloat16(tmp_path: Path):
    run = tmp_path / "run"
    train_bpe(["a few words to learn from, a few"], 270).save(run / "tokenizer")
    config = replace(RUN, model=replace(RUN.model, vocab_size=300))
    model = randomised(config.model).float()
    lay = {"data": "1" * 64, "shards": {"val": "2" * 64, "places": ["../mine", "/home/me/mine"], "text": None}}
    save(run, 7, config, model, {"x": torch.ones(1)}, extra=EXTRA | lay, keep=1)
    write_weights(load_model(run), tmp_path / "small")
    small = load_model(tmp_path / "small")
    assert small.extra == EXTRA | lay | {"shards": lay["shards"] | {"places": []}}
    for name, value in model.state_dict().items():
        assert torch.equal(small.model.state_dict()[name], value.bfloat16().float())
    assert (small.step, small.config, small.tokenizer.hash) == (7, config, load_model(run).tokenizer.hash)
    sizes = [(load_model(f).folder / MODEL).stat().st_size for f in (tmp_path / "small", run)]
    assert sizes[0] < 0.75 * sizes[1]


def test_weights_alone_are_not_resumed(tmp_path: Path):
    weights = {name: x.bfloat16() for name, x in MODEL_NOW.state_dict().items()}
    save(tmp_path, 3, RUN, weights, {}, extra=EXTRA, keep=1)
    with pytest.raises(ValueError, match="weights alone.*--init-from"):
        train(RUN, tmp_path, resume=True)


def test_weights_are_of_the_number_type_that_their_description_names(tmp_path: Path):
    folder = saved(tmp_path)
    edit(folder / META, stored="bfloat16")
    with pytest.raises(ValueError, match="is torch.float32, not bfloat16"):
        open_checkpoint(folder).model()
    edit(folder / META, stored=["float16"])
    with pytest.raises(ValueError, match="stored is .*float16"):
        open_checkpoint(folder)


def test_a_checkpoint_without_its_description_says_so(tmp_path: Path):
    folder = saved(tmp_path)
    (folder / META).unlink()
    with pytest.raises(ValueError, match="step_00000003 lacks meta.json; restore it, or use another checkpoint"):
        open_checkpoint(folder)
