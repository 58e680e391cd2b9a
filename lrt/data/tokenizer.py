"""Tokenizers: text to ids and back, with the bytes of text each id stands for.

Two kinds behind one interface: raw bytes, and anything saved in the `tokenizers` format (our own byte-level BPE, or a
foreign one). Both promise what honest bits per byte needs: an id spells a known number of bytes of text, and text can
never smuggle in a special token, so a BOS in the stream always means that a document starts.
"""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from lrt.data.token_bytes import byte_of_character, spellings
from lrt.data.tokenizer_config import CONFIG, TokenizerConfig, read_tokenizer_config, token_text
from lrt.data.tokenizer_trial import try_tokenizer
from lrt.utils.files import expand_home, is_there, one_line, read_json, write_json

BOS = "<|bos|>"
MOST_IDS = 2**22  # of a tokenizer: more than any has, and few enough for a table of them
MOST_BYTES = 2**28  # of a tokenizer file
PAUSE = "<|pause|>"
# Foreign tokenizers are searched in this order: a token that opens documents, else one that separates them.
BOS_NAMES = (BOS, "<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "<|startoftext|>", "<｜begin▁of▁sentence｜>")
SEPARATOR_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<｜end▁of▁sentence｜>")
# Of several scripts, since a tokenizer may know few: one comes back with a space in front where it puts one there.
PROBES = ("Hello world\n", "a", "1", ".", "\n", "é", "я", "中", "か", "가", "ا", "न", "😀")
LONG_WORD = re.compile(r"(\S{1000})(?=\S)")
"""Training a BPE takes the square of a word's length: a megabyte without a space, hours. So such words are cut."""


class Tokenizer(ABC):
    """Text to ids and back.

    Attributes:
        positions: positions of a row that a token of text takes.
        space_in_front: whether a document's first token spells a space that the document does not have.
        lossless: whether every text comes back from its ids, whatever it is; otherwise `Spelling` compares.
        vocab_size: number of ids V; every id is in [0, V).
        bos: the id put in front of each document; text alone never encodes to it.
        hash: sha256 hex of the canonical content; equal hashes mean equal encodings.
        specials: the special tokens' names and ids; no text encodes to them, so who wants one puts its id.
        config: the other special tokens' roles, and chat templates; kept when it is saved, no part of the hash.
    """

    positions = 1
    space_in_front = False
    lossless = False

    def __init__(self, *, spellings: list[bytes], bos: int, canonical: str) -> None:
        self.vocab_size = len(spellings)
        self.bos = bos
        self.hash = hashlib.sha256(canonical.encode()).hexdigest()
        self._spellings = spellings
        self.specials: dict[str, int] = {}
        self.config = TokenizerConfig()

    @property
    def eos(self) -> int:
        """The id that ends a document; BOS, which opens the next one, where there is none."""
        return self.bos if self.config.eos is None else self._id(self.config.eos)

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids that end an answer: of a document, of a turn, and BOS."""
        return tuple(dict.fromkeys([self.eos, *map(self._id, self.config.stops), self.bos]))

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode documents without BOS; special tokens written out in a text are text. ValueError: lone surrogates."""

    @abstractmethod
    def content(self) -> dict[str, Any]:
        """What its tokenizer.json holds."""

    @abstractmethod
    def fast(self) -> tokenizers.Tokenizer:
        """The same in the tokenizers format, putting BOS in front of what it encodes."""

    def save(self, folder: Path | str) -> None:
        """Write the tokenizer into `folder` (made if need be), so that `load_tokenizer(folder)` gives its equal."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_json(Path(folder) / "tokenizer.json", self.filed())
        self.config.write(Path(folder), self._bos_name())

    def filed(self) -> dict[str, Any]:
        """What tokenizer.json holds: where the library can say it, its own form, which other tools read too."""
        return self.content()

    def encode(self, text: str) -> list[int]:
        """Encode one document without BOS; special tokens written out in the text are text."""
        return self.encode_batch([text])[0]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Spell ids as UTF-8 bytes, for streaming: a character may end in a later id. Special tokens spell nothing."""
        return b"".join(self._spell(int(token)) for token in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Spell ids as text; invalid UTF-8 becomes U+FFFD. ValueError: an id outside the vocabulary."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        """Bytes of text each id stands for, int32 [V]; 0 for special tokens. The denominator of bits per byte."""
        return np.array([len(spelling) for spelling in self._spellings], dtype=np.int32)

    def spellings(self) -> list[bytes]:
        """The bytes that each id spells [V]; none for special tokens."""
        return list(self._spellings)

    def widen(self, size: int) -> None:
        """Take ids up to `size` for known, and spell nothing by them: other families' models have more than words."""
        self._spellings += [b""] * (size - self.vocab_size)
        self.vocab_size = size

    def vocabulary(self) -> dict[str, int]:
        """Tokens that have a name, special ones among them, to their ids."""
        return dict(self.specials)

    def _id(self, name: str) -> int:
        return self.specials[name]

    def _bos_name(self) -> str | None:
        """BOS by its text, where tokenizer.json does not imply it."""
        return None

    def _spell(self, token: int) -> bytes:
        if not 0 <= token < self.vocab_size:
            raise ValueError(
                f"token id {token} is outside the vocabulary of {self.vocab_size} ids: "
                "decode with the tokenizer the ids were made with"
            )
        return self._spellings[token]


def _require_texts(texts: Sequence[str]) -> None:
    """ValueError unless these are texts: the library would take two texts as a pair, and one as many characters."""
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"no text to encode: {repr(texts)[:60]}; give a str to encode, a list of them to encode_batch")


@final
class ByteTokenizer(Tokenizer):
    """Ids 0..255 are the bytes of UTF-8 text and 256 is BOS: nothing to train, nothing to lose."""

    lossless = True

    def __init__(self) -> None:
        self._content = {"type": "bytes", "version": 1, "vocab_size": 257, "bos": 256}
        spellings = [bytes([byte]) for byte in range(256)] + [b""]
        super().__init__(spellings=spellings, bos=256, canonical=json.dumps(self._content, sort_keys=True))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        _require_texts(texts)
        return [list(text.encode("utf-8")) for text in texts]

    def content(self) -> dict[str, Any]:
        return self._content

    def filed(self) -> dict[str, Any]:
        return json.loads(self.fast().to_str())

    def fast(self) -> tokenizers.Tokenizer:
        core = tokenizers.Tokenizer(models.BPE(byte_of_character(), []))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.decoder = decoders.ByteLevel()
        core.add_special_tokens([BOS])
        return _opening(core, BOS)


@final
class BPETokenizer(Tokenizer):
    """A `tokenizers.Tokenizer`, ours or foreign, with `bos` (the token's text) in front of documents.

    A SentencePiece tokenizer puts a space in front of each document: `decode` takes it off again, `decode_bytes` and
    `token_bytes` count it. What its tokens spell may differ from a text (unknown words, lower-casing): see `Spelling`.
    ValueError: `bos` is no token, or the library fails at a text.
    """

    def __init__(self, core: tokenizers.Tokenizer, bos: str = BOS) -> None:
        require_ids(core)
        self._core = _core_of(core.to_str())  # a copy: the settings below are ours alone
        self._core.no_truncation()
        self._core.no_padding()
        self._core.encode_special_tokens = True
        self._bos_text = bos
        token = self._core.token_to_id(bos)
        if token is None:
            raise ValueError(f"the tokenizer has no token {bos!r} to open documents with: name one that it has")
        content = json.loads(self._core.to_str())
        spelled = spellings(self._core, content)
        spelled[token] = b""
        super().__init__(spellings=spelled, bos=token, canonical=json.dumps([bos, content], sort_keys=True))
        specials = {i: t.content for i, t in self._core.get_added_tokens_decoder().items() if t.special} | {token: bos}
        self._specials = frozenset(specials)
        self.specials = {text: i for i, text in specials.items()}
        # Matches nothing but the place inside a written-out special token, after its first character.
        inside = (f"(?<={re.escape(text[0])})(?={re.escape(text[1:])})" for text in specials.values() if len(text) > 1)
        self._inside_special = re.compile("|".join(inside))
        self.space_in_front = any(self.decode_bytes(ids).startswith(b" ") for ids in self.encode_batch(PROBES))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        batch = self._core_ids(texts)
        for i, ids in enumerate(batch):
            # Some models (Unigram above all) hold special tokens as plain pieces and match them in text.
            if not self._specials.isdisjoint(ids):
                parts = self._inside_special.split(texts[i])
                batch[i] = [token for part in self._core_ids(parts) for token in part]
        return batch

    def decode(self, ids: Iterable[int]) -> str:
        text = super().decode(ids)
        return text.removeprefix(" ") if self.space_in_front else text

    def content(self) -> dict[str, Any]:
        return json.loads(self._core.to_str())

    def _bos_name(self) -> str:
        return self._bos_text

    def vocabulary(self) -> dict[str, int]:
        return self._core.get_vocab(with_added_tokens=True)

    def _id(self, name: str) -> int:
        token = self._core.token_to_id(name)
        assert token is not None
        return token

    def fast(self) -> tokenizers.Tokenizer:
        return _opening(tokenizers.Tokenizer.from_str(self._core.to_str()), self._bos_text)

    def _core_ids(self, texts: Sequence[str]) -> list[list[int]]:
        _require_texts(texts)
        try:
            encodings = self._core.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:  # how the library reports text that has no UTF-8 form
            raise ValueError("the text holds lone surrogates: replace them before encoding") from None
        except BaseException as error:  # the library's own failures are no Exceptions
            if type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"the tokenizer fails at a text ({one_line(error)}): its file is broken") from None
        return [encoding.ids for encoding in encodings]


@final
class PausingTokenizer(Tokenizer):
    """Another tokenizer's ids, each but BOS followed by a pause, the last id: a latent position after every token.

    Without memory these are pause tokens (Goyal et al. 2023, arXiv 2310.02226). With it a pause reads the hidden state
    of the token before and hands on its own: one latent thought a token, as in PonderLM-2. To the model a pause is a
    token like any other, which it emits itself when it decodes; it spells no bytes, so bits per byte leave it out.
    """

    positions = 2

    def __init__(self, inner: ByteTokenizer | BPETokenizer) -> None:
        self._inner, self.pause, self.lossless = inner, inner.vocab_size, inner.lossless
        self.space_in_front = inner.space_in_front
        self._content = {"type": "pausing", "version": 1, "inner": inner.content(), "bos": inner._bos_name()}
        spellings = [*inner.spellings(), b""]
        super().__init__(spellings=spellings, bos=inner.bos, canonical=json.dumps(self._content, sort_keys=True))
        self.specials = inner.specials | {PAUSE: self.pause}
        self.config = inner.config

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[i for token in ids for i in (token, self.pause)] for ids in self._inner.encode_batch(texts)]

    def decode(self, ids: Iterable[int]) -> str:
        return self._inner.decode(token for token in ids if token < self.pause)

    def content(self) -> dict[str, Any]:
        return self._content

    def vocabulary(self) -> dict[str, int]:
        return self._inner.vocabulary() | self.specials

    def _id(self, name: str) -> int:
        return self._inner._id(name)

    def fast(self) -> tokenizers.Tokenizer:
        raise ValueError("a tokenizer with pauses has no form in the tokenizers library: train without +pauses")


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Train a byte-level BPE with the special token `<|bos|>`; the same texts always give the same tokenizer.

    The vocabulary is smaller than `vocab_size` where the texts hold too few pairs: read it from the result.
    ValueError: vocab_size < 257 (256 bytes and BOS).
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size is {vocab_size} but 256 bytes and {BOS} need 257: raise it, or use 'bytes'")
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator((LONG_WORD.sub(r"\1 ", text) for text in texts), trainer)
    return BPETokenizer(core)


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Load a tokenizer folder or `tokenizer.json`, ours or foreign. ValueError: missing, malformed, or without BOS.

    A foreign tokenizer opens documents with its BOS token, or else with its document separator.
    """
    file = expand_home(path)
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.is_file():
        raise ValueError(f"{file}: no such tokenizer: name a folder with tokenizer.json in it, or such a file")
    content = read_json(file, "tokenizer", most=MOST_BYTES)
    tokenizer = _load(file, content)
    tokenizer.config = read_tokenizer_config(file.parent, tokenizer.vocabulary(), tokenizer.specials)
    return tokenizer


def _load(file: Path, content: dict[str, Any]) -> Tokenizer:
    if content.get("type") == "bytes":  # as earlier versions wrote it
        return _load_bytes(file, content)
    if content == ByteTokenizer().filed():
        return ByteTokenizer()
    if content.get("type") == "pausing":
        return PausingTokenizer(_load_inner(file, content))
    return _load_core(file, content, None)


def _load_inner(file: Path, content: dict[str, Any]) -> ByteTokenizer | BPETokenizer:
    inner, bos = content.get("inner"), content.get("bos")
    if content.get("version") != 1 or not isinstance(inner, dict) or not isinstance(bos, (str, type(None))):
        raise ValueError(f"{file}: a tokenizer with pauses of another version: save it again with this version of lrt")
    return _load_bytes(file, inner) if bos is None else _load_core(file, inner, bos)


def _load_core(file: Path, content: dict[str, Any], bos: str | None) -> BPETokenizer:
    try:
        try_tokenizer(content)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    try:
        core = _core_of(json.dumps(content))
        return BPETokenizer(core, bos or _find_bos(core, file))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def require_ids(core: tokenizers.Tokenizer) -> None:
    """ValueError: an id so large that a table of all ids would fill the memory, as the library's own when it writes."""
    most = max(core.get_vocab(with_added_tokens=True).values(), default=-1)
    if most >= MOST_IDS:
        raise ValueError(f"a token has the id {most:,}; ids below {MOST_IDS:,} are taken: choose another tokenizer")


def _core_of(text: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"not in the tokenizers format ({one_line(error, 120)}): save it as such") from None


def _load_bytes(file: Path, content: dict[str, Any]) -> ByteTokenizer:
    tokenizer = ByteTokenizer()
    if content != tokenizer._content:
        raise ValueError(f"{file}: a byte tokenizer of another version: save it again with this version of lrt")
    return tokenizer


def _find_bos(core: tokenizers.Tokenizer, file: Path) -> str:
    """The token that opens documents: the configured BOS, else a well-known name, else the configured EOS."""
    config_file = file.with_name(CONFIG)
    config = read_json(config_file, "tokenizer's settings") if is_there(config_file) else {}
    candidates = (token_text(config, "bos_token"), *BOS_NAMES, *SEPARATOR_NAMES, token_text(config, "eos_token"))
    for text in candidates:
        if text and core.token_to_id(text) is not None:
            return text
    raise ValueError(
        f"no BOS token and no document separator (looked for bos_token and eos_token in {config_file.name}, then "
        f"{BOS_NAMES[1]}, <s>, <|endoftext|>, </s>, ...): name one as bos_token in {config_file.name}"
    )


def _opening(core: tokenizers.Tokenizer, bos: str) -> tokenizers.Tokenizer:
    """The tokenizer with `bos` in front of every text."""
    token = core.token_to_id(bos)
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, token)]
    )
    return core
