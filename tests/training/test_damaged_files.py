"""Whatever stands in a manifest, a checkpoint's description or a tokenizer file: one line or a result, never more.

No traceback, no unpickling, and no path outside the folder that was named.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from breaking import places
from helpers import config
from hypothesis import given, settings
from hypothesis import strategies as st

from lrt.config.run import RunConfig, TrainConfig
from lrt.data.shards import open_split, write_shards
from lrt.data.tokenizer import load_tokenizer, train_bpe
from lrt.model.lrt import LRT
from lrt.training.checkpoint import META, newest_valid, open_checkpoint, save
from lrt.utils.seals import SEAL

DOCS = [f"def f{i}(x):\n    return x + {i}\n" for i in range(20)]
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=6),
    st.sampled_from(["../../etc/passwd", "/etc/passwd", "..", "train_00000.bin/../../x", "\x00", "uint64", "BPE", ""]),
)  # fmt: skip
JSON = st.recursive(LEAVES, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3))


def changed(data: Any, place: tuple, how: Callable[[Any], Any]) -> Any:
    """A copy of the document with one value replaced (or, given DROP, left out)."""
    if not place:
        return how(data)
    copy = dict(data) if isinstance(data, dict) else list(data)
    copy[place[0]] = changed(data[place[0]], place[1:], how)
    if copy[place[0]] is DROP:
        del copy[place[0]]
    return copy


DROP = object()


@st.composite
def damaged(draw, original: Any) -> bytes:
    """The file with one or two values replaced or dropped, or its bytes cut or overwritten."""
    data = original
    for _ in range(draw(st.integers(1, 2))):
        value = draw(st.just(DROP) | JSON)
        data = changed(data, draw(st.sampled_from(places(data)[:400])), lambda _, value=value: value)
        data = None if data is DROP else data
    raw = json.dumps(data).encode()
    kind = draw(st.sampled_from(["whole", "whole", "whole", "cut", "overwritten"]))
    if kind == "cut":
        return raw[: draw(st.integers(0, len(raw)))]
    if kind == "overwritten":
        at = draw(st.integers(0, len(raw)))
        return raw[:at] + draw(st.binary(max_size=4)) + raw[at + 4 :]
    return raw


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Within it, nothing is unpickled and no file outside `folder` is opened by the code under test."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
            patch.setattr(owner, name, refuse)
        opened = Path.open

        def inside(self: Path, *args, **kwargs):
            assert folder.resolve() in self.resolve().parents, self
            return opened(self, *args, **kwargs)

        patch.setattr(Path, "open", inside)
        yield


def one_line_or_fine(work: Callable[[], object]) -> None:
    try:
        work()
        return
    except ValueError as error:
        said = str(error)
    assert "\n" not in said and len(said) > 20


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    """A run's checkpoint, shards and a BPE tokenizer."""
    folder = tmp_path_factory.mktemp("fuzz")
    run = RunConfig(model=config(), train=TrainConfig(length=8))
    checkpoint = save(
        folder / "run", 3, run, LRT(run.model), {}, extra={"progress": {}, "data": "", "bpb": None}, keep=1
    )
    tokenizer = train_bpe(DOCS, 270)
    write_shards(DOCS, tokenizer, folder / "shards", validation=0.2)
    tokenizer.save(folder / "tokenizer")
    return {"checkpoint": checkpoint, "shards": folder / "shards", "tokenizer": folder / "tokenizer", "home": folder}


@settings(max_examples=60)
@given(st.data())
def test_checkpoint_descriptions(made: dict[str, Path], data):
    folder = made["checkpoint"]
    original = (folder / META).read_bytes()
    (folder / META).write_bytes(data.draw(damaged(json.loads(original))))
    try:
        with watched(made["home"]):
            one_line_or_fine(lambda: open_checkpoint(folder).weights())
            found, problems = newest_valid(folder.parent.parent)
            assert (found is None) == bool(problems)
    finally:
        (folder / META).write_bytes(original)


@settings(max_examples=60)
@given(st.data())
def test_manifests(made: dict[str, Path], data):
    folder = made["shards"]
    file = folder / "manifest.json"
    original = file.read_bytes()
    content = {key: value for key, value in json.loads(original).items() if key != SEAL}  # or nothing behind it is seen
    file.write_bytes(data.draw(damaged(content)))
    try:
        with watched(made["home"]):
            one_line_or_fine(lambda: open_split(folder, "train", "checksum").read(0, 5))
    finally:
        file.write_bytes(original)


@settings(max_examples=60)
@given(st.data())
def test_tokenizer_files(made: dict[str, Path], data):
    folder = made["tokenizer"]
    file = folder / data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
    original = file.read_bytes()
    file.write_bytes(data.draw(damaged(json.loads(original))))
    try:
        with watched(made["home"]):
            one_line_or_fine(lambda: load_tokenizer(folder).encode("def f(x):\n"))
    finally:
        file.write_bytes(original)


def test_a_checkpoint_folder_that_is_a_link_elsewhere_is_followed_only_by_name(made: dict[str, Path], tmp_path: Path):
    """Checkpoints are found by listing the run's own folder: a description cannot point anywhere."""
    copy = tmp_path / "run"
    shutil.copytree(made["home"] / "run", copy)
    meta = next(copy.rglob(META))
    data = json.loads(meta.read_text())
    for name in ("../../../model.safetensors", os.path.join(os.sep, "etc", "passwd")):
        meta.write_text(json.dumps(data | {"sha256": data["sha256"] | {name: "0"}}))
        with pytest.raises(ValueError, match="use another checkpoint"):
            open_checkpoint(copy)
