"""Seals and checksums: no changed byte of a small file is taken for what was written; files of others still open."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lrt.utils.checksums import SUMS, require_sums, write_sums
from lrt.utils.files import parse_json, read_json, read_jsonl, sealed, to_json, write_json, write_jsonl, write_sealed
from lrt.utils.seals import unsealed

RECORD = {"arm": "a", "seed": 3, "bpb": {"decoded": 1.2345678901234567, "by": [1e-7, -0.0, math.nan]}, "text": "ü"}


def altered(raw: bytes) -> list[bytes]:
    """Each byte with one bit flipped (the bits in turn), or replaced by a space, a digit or a bracket in turn."""
    changes = [(i, raw[i] ^ (1 << (i % 8))) for i in range(len(raw))]
    changes += [(i, new) for i in range(len(raw)) if (new := b" 09}"[i % 4]) != raw[i]]
    return [raw[:i] + bytes([new]) + raw[i + 1 :] for i, new in changes]


def taken(file: Path, read: Callable[[Path], Any]) -> list[bytes]:
    """The alterations of a file after which it is read as something else than before."""
    raw, whole, wrong = file.read_bytes(), read(file), []
    for other in altered(raw):
        file.write_bytes(other)
        try:
            if repr(read(file)) != repr(whole):
                wrong.append(other)
        except ValueError:
            continue
    file.write_bytes(raw)
    return wrong


def test_no_changed_byte_of_a_sealed_file_gives_other_figures(tmp_path: Path):
    write_sealed(tmp_path / "record.json", RECORD)
    assert read_json(tmp_path / "record.json", "record")["bpb"]["by"] == [1e-7, -0.0, None]
    assert not taken(tmp_path / "record.json", lambda f: read_json(f, "record"))
    write_jsonl(tmp_path / "lines.jsonl", map(sealed, [{"a": 1.5}, {"b": [2]}]))
    assert not taken(tmp_path / "lines.jsonl", lambda f: [line for _, line in read_jsonl(f, "lines")])


def test_a_file_without_a_seal_is_read_and_one_with_another_key_for_it_is_not(tmp_path: Path):
    file = tmp_path / "record.json"
    write_json(file, RECORD)
    assert read_json(file, "record")["seed"] == 3
    write_json(file, {("sealed" if key == "seal" else key): value for key, value in sealed(RECORD).items()})
    with pytest.raises(ValueError, match="its seal does not fit"):
        read_json(file, "record")


@given(st.dictionaries(st.text(max_size=4), st.recursive(
    st.none() | st.booleans() | st.integers(-(2**100), 2**100) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=8,
)))  # fmt: skip
def test_what_is_sealed_is_read_back(data: dict):
    content = json.loads(to_json(data))
    content.pop("seal", None)
    assert unsealed(parse_json(to_json(sealed(data)), "file", loose=True), "file") == content


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "inner").mkdir()
    for name in ("weights.safetensors", "inner/words.json", "README.md"):
        (tmp_path / name).write_bytes(name.encode())
    write_sums(tmp_path)
    return tmp_path


def test_no_changed_byte_of_a_folder_with_checksums_passes(folder: Path):
    require_sums(folder)
    for name in (SUMS, "weights.safetensors", "inner/words.json"):
        raw = (folder / name).read_bytes()
        for other in altered(raw):
            (folder / name).write_bytes(other)
            with pytest.raises(ValueError, match="delete SHA256SUMS|SHA256SUMS is not UTF-8"):
                require_sums(folder)
        (folder / name).write_bytes(raw)
    require_sums(folder)


def test_what_checksums_do_not_cover(folder: Path, tmp_path: Path):
    (folder / "README.md").write_text("another card")
    (folder / "more.txt").write_text("of somebody's own")
    require_sums(folder)
    (folder / "weights.safetensors").unlink()
    require_sums(folder, lambda name: name.startswith("inner"))
    with pytest.raises(ValueError, match="weights.safetensors is missing"):
        require_sums(folder)
    (folder / SUMS).unlink()
    require_sums(folder)
    (folder / SUMS).write_text(f"{'0' * 64}  ../outside\n")
    with pytest.raises(ValueError, match="outside is missing, truncated or altered"):
        require_sums(folder)


def test_no_changed_byte_of_a_kept_state_is_accepted(tmp_path: Path):
    from lrt.model.kv_cache import KVCache

    ones = torch.ones(1, 1, 2, 2)
    count, file = torch.ones(1, dtype=torch.int64), tmp_path / "state.safetensors"
    KVCache((ones,), (ones * 2,), torch.ones(1, 2), count, count * 3, count * 0, capacity=1, longest=1).save(file)
    assert not taken(file, lambda f: repr(KVCache.load(f)))
