"""The manifest of a folder of token shards: what must be found in it."""

import hashlib
import re
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, final

import numpy as np

from lrt.utils.files import one_line, parse_json, read_bytes, write_sealed
from lrt.utils.seals import SEAL, unsealed

FORMAT = 1
SPLITS = ("train", "val")
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
AGAIN = "delete the folder and prepare the data again"


@final
@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of ids: `tokens` ids that stand for `documents` documents with `bytes` bytes of text."""

    name: str
    tokens: int
    bytes: int
    documents: int
    sha256: str
    mask: str = ""
    """Sha256 of the file that says which ids are learned, a bit each; empty where all are, and there is no file."""

    @property
    def mask_name(self) -> str:
        return self.name.replace(".bin", ".mask")

    @property
    def split(self) -> str:
        return self.name.partition("_")[0]


@final
@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a folder of shards holds. `tokenizer` is the hash of the tokenizer, `dtype` uint16 or uint32."""

    tokenizer: str
    vocab_size: int
    dtype: str
    shards: tuple[Shard, ...]
    format: int = FORMAT
    lost: str = ""
    """What of the text the tokens do not spell, in a line; empty where they spell all of it."""

    @classmethod
    def load(cls, folder: Path | str) -> "Manifest":
        """Read and check `folder/manifest.json`. ValueError: missing, malformed, of another version, unsafe names."""
        file = Path(folder) / "manifest.json"
        if not file.is_file():
            raise ValueError(f"{file}: no such file, so these are no complete token shards: prepare the data again")
        try:
            data = parse_json(read_bytes(file, "manifest"), "this manifest")
            sealed = data if isinstance(data, dict) else {}
            manifest = _checked_manifest({key: value for key, value in sealed.items() if key != SEAL})
            unsealed(sealed, "this manifest")
            return manifest
        except ValueError as error:
            raise ValueError(f"{file}: {one_line(error, 200)}: {AGAIN}") from None

    def save(self, folder: Path | str) -> None:
        write_sealed(Path(folder) / "manifest.json", asdict(self))

    def of(self, split: str) -> tuple[Shard, ...]:
        """The shards of a split."""
        return tuple(shard for shard in self.shards if shard.split == split)

    def tokens(self, split: str) -> int:
        """Number of ids in a split."""
        return sum(shard.tokens for shard in self.of(split))

    def hash(self, split: str) -> str:
        """Sha256 hex of a split's ids; equal hashes mean equal tokens."""
        return hashlib.sha256("".join(shard.sha256 + shard.mask for shard in self.of(split)).encode()).hexdigest()


def _checked_manifest(data: Any) -> Manifest:
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        version = data.get("format") if isinstance(data, dict) else None
        raise ValueError(f"format {version!r} where this version of lrt reads {FORMAT}")
    shards = data.get("shards")
    if not isinstance(shards, list):
        raise ValueError("shards is not a list")
    manifest = Manifest(**{**_checked(Manifest, data), "shards": tuple(_checked_shard(shard) for shard in shards)})
    if manifest.dtype not in DTYPES:
        raise ValueError(f"dtype {manifest.dtype!r} is none of {', '.join(DTYPES)}")
    if len({shard.name for shard in manifest.shards}) < len(shards):
        raise ValueError("a shard is listed twice")
    return manifest


def _checked_shard(data: Any) -> Shard:
    shard = Shard(**_checked(Shard, data))
    # Only names that the writer gives: so none can leave the folder.
    if not re.fullmatch(r"(train|val)_[0-9]{5,9}\.bin", shard.name):
        raise ValueError(f"unsafe or unknown shard name {shard.name!r}")
    return shard


def _checked(kind: type[Manifest] | type[Shard], data: Any) -> dict[str, Any]:
    """The fields of a JSON object, each of its type: counts positive integers, names strings. Newer ones may lack."""
    names = {field.name: field.default is MISSING for field in fields(kind)}
    if not isinstance(data, dict) or not {name for name in names if names[name]} <= set(data) <= set(names):
        raise ValueError(f"a {kind.__name__.lower()} must have exactly the fields {', '.join(names)}")
    for field in fields(kind):
        value = data.get(field.name, field.default)
        if field.type is int and (type(value) is not int or value < 1):
            raise ValueError(f"{field.name} is {value!r}, not a positive integer")
        if field.type is str and not isinstance(value, str):
            raise ValueError(f"{field.name} is {value!r}, not a string")
    return data
