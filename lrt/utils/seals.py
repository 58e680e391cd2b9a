"""Seals: a JSON object says what its own content hashes to, so that a changed digit is noticed wherever it is read.

A sealed object has one more field, `"seal": "sha256:..."`, the SHA-256 of the rest. Key and value each tell that there
is a seal, so no single change hides it. An object without one is read as before: others write such files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

SEAL = "seal"
DIGEST = re.compile("sha256:[0-9a-f]{64}")


def seal_of(data: Mapping[str, Any]) -> str:
    """What plain data, as JSON holds it, hashes to; the order of keys and the spelling of numbers do not matter."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def unsealed(data: dict[str, Any], where: str) -> dict[str, Any]:
    """The object without its seal. ValueError naming `where`: it is not what its seal says."""
    marks = [key for key, value in data.items() if key == SEAL or (isinstance(value, str) and DIGEST.fullmatch(value))]
    if not marks:
        return data
    content = {key: value for key, value in data.items() if key != SEAL}
    if marks != [SEAL] or data[SEAL] != seal_of(content):
        raise ValueError(
            f"{where} has changed since it was written (its seal does not fit); restore it, or take out its field "
            f"{SEAL} if that was meant"
        )
    return content
