"""The bytes of text that each token of a `tokenizers` tokenizer stands for, read off its decoder."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import tokenizers


def spellings(core: tokenizers.Tokenizer, content: dict[str, Any]) -> list[bytes]:
    """The bytes of each id [V], from how the decoder reads tokens; empty for special tokens and unused ids.

    content: the tokenizer's file. Where the decoder puts spaces between tokens, a token spells the one in front of it.
    """
    spell = _speller(list(_decoders(content.get("decoder"))))
    vocabulary = core.get_vocab(with_added_tokens=True)
    spelled = [b""] * (max(vocabulary.values(), default=-1) + 1)
    added = core.get_added_tokens_decoder()
    for token, i in vocabulary.items():
        if i in added:
            spelled[i] = b"" if added[i].special else token.encode()
        else:
            spelled[i] = spell(token)
    return spelled


def byte_of_character() -> dict[str, int]:
    """Byte-level tokens write printable Latin-1 bytes as themselves and the others, in order, from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _decoders(decoder: Any) -> Iterator[dict[str, Any]]:
    """A decoder, or those of a sequence, one after the other."""
    if isinstance(decoder, dict) and decoder.get("type") == "Sequence":
        for part in decoder.get("decoders", []):
            yield from _decoders(part)
    elif isinstance(decoder, dict):
        yield decoder


def _speller(decoders: list[dict[str, Any]]) -> Callable[[str], bytes]:
    kinds = {decoder["type"]: decoder for decoder in decoders}
    if "ByteLevel" in kinds:
        byte_of = byte_of_character()
        return lambda token: b"".join(bytes([byte_of[c]]) if c in byte_of else c.encode() for c in token)
    if "WordPiece" in kinds:
        inside = kinds["WordPiece"].get("prefix", "##")
        return lambda token: (token[len(inside) :] if token.startswith(inside) else " " + token).encode()
    if "BPEDecoder" in kinds:
        end = kinds["BPEDecoder"].get("suffix", "</w>")
        return lambda token: token.replace(end, " ").encode()
    if not kinds:
        return lambda token: (" " + token).encode()
    written = [pair for decoder in decoders for pair in _replaced(decoder)]

    def spell(token: str) -> bytes:
        if "ByteFallback" in kinds and re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        for mark, text in written:
            token = token.replace(mark, text)
        return token.encode()

    return spell


def _replaced(decoder: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What a decoder writes for a mark inside tokens, if it does."""
    if decoder["type"] == "Metaspace":
        yield decoder.get("replacement", "▁"), " "
    elif decoder["type"] == "Replace" and (mark := decoder["pattern"].get("String")):
        yield mark, decoder["content"]
