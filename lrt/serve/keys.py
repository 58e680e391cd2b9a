"""Who may ask: API keys, and the names that a browser may call the server by."""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Sequence
from typing import final

LOOPBACK = ("localhost", "127.0.0.1", "::1")
ANY_ADDRESS = ("0.0.0.0", "::", "")
PORT = re.compile("[0-9]*")


@final
class ApiKeys:
    """The keys that open the server; without any it is open."""

    def __init__(self, keys: Sequence[str] = ()):
        """ValueError: a key is empty or holds white space, which no header carries."""
        for key in keys:
            if not key or any(c.isspace() or not c.isprintable() for c in key):
                fault = "is empty" if not key.strip() else "holds white space or control characters"
                raise ValueError(f"an API key {fault}: give one of printable characters, or none at all")
        self._spellings: list[tuple[int, bytes]] = []
        for i, key in enumerate(keys):
            self._spellings += [(i, f"Bearer {key}".encode(coding)) for coding in _codings(key)]

    def owner(self, authorization: bytes) -> int | None:
        """Which key an Authorization header holds, as UTF-8 or Latin-1; 0 where none is needed, None if it holds none.

        It takes equally long whatever the header shares with a key.
        """
        if not self._spellings:
            return 0
        scheme, _, credentials = authorization.partition(b" ")
        spoken = b"Bearer " + credentials.strip() if scheme.lower() == b"bearer" else b""
        fitting = [i for i, spelling in self._spellings if hmac.compare_digest(spoken, spelling)]
        return fitting[0] if fitting else None


def _codings(key: str) -> list[str]:
    return ["utf-8", "latin-1"] if all(ord(c) < 256 for c in key) else ["utf-8"]


@final
class HostNames:
    """The names that the server answers to: a page of another name, that resolves to this machine, learns nothing."""

    def __init__(self, host: str, more: Sequence[str] = ()):
        """`host` is the address listened at; `more` are other names, `*` all of them."""
        self._any = "*" in more
        self._names = {_without_root(name.lower().strip("[]")) for name in (*LOOPBACK, host, *more)}
        self._addresses = host in ANY_ADDRESS

    def serves(self, header: str) -> bool:
        """Whether a Host header is one of them; where all addresses are listened at, any numeric one is."""
        name = _without_port(header.lower().strip())
        return self._any or name in self._names or (self._addresses and _is_address(name))


def _without_port(header: str) -> str:
    name, colon, port = header.rpartition(":")
    outside = name.endswith("]") or not name.startswith("[")  # a colon within brackets begins no port
    name = name if colon and PORT.fullmatch(port) and outside else header
    return name[1:-1] if name.startswith("[") and name.endswith("]") else _without_root(name)


def _without_root(name: str) -> str:
    """A name without the dot of DNS's root, which says that the name is whole: `localhost.` is `localhost`."""
    return name[:-1] if name.endswith(".") and len(name) > 1 else name


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
