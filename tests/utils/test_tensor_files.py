"""Stored tensors: what the library writes, read bit for bit into memory of our own; damage in one line."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lrt.utils.tensor_files import TYPES, read_tensors


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1).view(torch.uint8)


def written(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_what_the_library_writes_comes_back_bit_for_bit(tmp_path: Path):
    stored = {f"x.{name}": torch.arange(6).reshape(2, 3).to(dtype) for name, dtype in TYPES.items()}
    stored |= {"none": torch.zeros(3, 0, 2), "scalar": torch.tensor(3.5), "é": torch.full((70, 70), torch.nan)}
    save_file(stored, tmp_path / "t", {"made": "here"})
    tensors, about = read_tensors(tmp_path / "t", "weights")
    assert about == {"made": "here"} and tensors.keys() == stored.keys()
    for name, x in stored.items():
        assert (tensors[name].dtype, tensors[name].shape) == (x.dtype, x.shape)
        assert torch.equal(bits(tensors[name]), bits(x))
    save_file({}, tmp_path / "nothing")
    assert read_tensors(tmp_path / "nothing", "weights") == ({}, {})


def test_an_empty_tensor_may_stand_where_another_begins(tmp_path: Path):
    path = written(tmp_path / "t", {"a": entry(), "z": entry(shape=(0,), offsets=(0, 0))}, bytes(8))
    tensors = read_tensors(path, "weights").tensors
    assert torch.equal(tensors["a"], torch.zeros(2)) and tensors["z"].shape == (0,)


def test_what_was_read_stays_when_the_file_is_overwritten_in_place(tmp_path: Path):
    """A mapped file's pages would now be other numbers, and past its new end no pages at all: SIGBUS."""
    x = torch.randn(300, 300)
    save_file({"x": x}, tmp_path / "t")
    tensors = read_tensors(tmp_path / "t", "weights").tensors
    with (tmp_path / "t").open("r+b") as file:
        file.write(bytes(file.seek(0, os.SEEK_END)))
        file.truncate(1000)
    assert torch.equal(tensors["x"], x)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_a_file_that_is_written_to_meanwhile_is_refused(tmp_path: Path, monkeypatch):
    save_file({"x": torch.ones(9999), "y": torch.ones(9999)}, tmp_path / "t")
    empty = torch.empty

    def slow(*args: Any, **kwargs: Any) -> torch.Tensor:
        os.utime(tmp_path / "t", ns=(1, 1))
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", slow)
    with pytest.raises(ValueError, match="weights .* was written to while it was read"):
        read_tensors(tmp_path / "t", "weights")

    def shorter(*args: Any, **kwargs: Any) -> torch.Tensor:
        os.truncate(tmp_path / "t", 20000)
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", shorter)
    for size in (999, 9999, 99999):  # read ahead in part and in whole: Python 3.14 reads 128 KiB ahead, older ones 8
        save_file({"x": torch.ones(size), "y": torch.ones(9999)}, tmp_path / "t")
        with pytest.raises(ValueError, match="was shortened while it was read|bytes, of which [0-9,]+ are there"):
            read_tensors(tmp_path / "t", "weights")


BAD = {
    "ends inside its header": b"\x01",
    "its header is longer than the file": (2**62).to_bytes(8, "little") + b"{}",
    "not valid JSON": (2).to_bytes(8, "little") + b"{{",
    "must be an object": (2).to_bytes(8, "little") + b"[]",
}
LIES = {
    "lacks 'shape'": {"x": {"dtype": "F32", "data_offsets": [0, 8]}},
    "does not fit its shape": {"x": entry(shape=[3])},
    "-2 is negative": {"x": entry(shape=[-2, -1])},
    "type F31": {"x": entry("F31")},
    "place is unknown": {"x": entry(offsets=[0, 4, 8])},
    "9,999 bytes, of which 8 are there": {"x": entry("U8", [9999], [0, 9999])},
    "need .* bytes, it has": {"x": entry("F32", [1], [0, 4])},
    "stands twice": b'{"x": 1, "x": 2}',
    "__metadata__: a is 1": {"__metadata__": {"a": 1}, "x": entry()},
    "whole number": {"x": entry(shape=[2.0])},
}
LIES["does not fit its shape "] = {"x": entry("U8", [4], [0, 4]), "y": entry("U8", [6], [2, 8])}


@pytest.mark.parametrize("words", [*BAD, *LIES])
def test_files_that_lie_end_in_one_line(words: str, tmp_path: Path):
    if words in BAD:
        (tmp_path / "t").write_bytes(BAD[words])
    else:
        written(tmp_path / "t", LIES[words], bytes(8))
    with pytest.raises(ValueError, match=f"^weights .*/t cannot be read as safetensors .*{words.strip()}") as error:
        read_tensors(tmp_path / "t", "weights")
    assert len(re.sub(r"/\S+/", "", str(error.value))) < 250


def test_what_is_no_regular_file(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for name, words in {"pipe": "no regular file", "none": "does not exist", ".": "is a folder"}.items():
        with pytest.raises(ValueError, match=words):
            read_tensors(tmp_path / name, "weights")


LEAVES = st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=4))
JSON = st.recursive(LEAVES, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=9), x, max_size=3))
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*TYPES, "x"]) | JSON,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | JSON,
    }
)


@settings(max_examples=150)
@given(st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), ENTRY | JSON, max_size=3), st.binary(max_size=40))
def test_any_header_is_tensors_or_a_value_error(tmp_path_factory, header: dict[str, Any], data: bytes):
    path = written(tmp_path_factory.getbasetemp() / "any", header, data)
    try:
        tensors, _ = read_tensors(path, "weights")
    except ValueError:  # and nothing else
        return
    assert sum(x.nbytes for x in tensors.values()) == len(data)
