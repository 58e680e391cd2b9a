"""Prepare: from the name of a source to two token streams, made once and found again by what they depend on."""

import contextlib
import hashlib
import itertools
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from lrt.config.run import PAUSES, TASK, DataConfig
from lrt.data.dialogue import Document, text_of
from lrt.data.file_states import FileStates, require_unchanged
from lrt.data.manifest import Manifest
from lrt.data.mixture import Mixture, Weighted, read_mixture
from lrt.data.normalised import lost_text
from lrt.data.shards import TokenStream, open_split, split_documents, write_shards
from lrt.data.sources import documents, file_states, holds_rows, require_apart, source_bytes, source_fingerprint
from lrt.data.synthetic import TaskRows, task_rows, task_tokenizer
from lrt.data.tokenizer import BPETokenizer, ByteTokenizer, PausingTokenizer, Tokenizer, load_tokenizer, train_bpe
from lrt.utils.files import expand_home
from lrt.utils.new_folder import folder_aside, put_in_place, require_makable
from lrt.utils.told_once import each_told_once

logger = logging.getLogger(__name__)
CHECKED = 3  # of what a preparation checks: data prepared with less is prepared again
SAMPLE_BYTES = 20_000_000  # text a BPE is trained on: more changes the merges little and costs minutes

ReportProgress = Callable[[int, int | None, str], None]


@final
@dataclass(frozen=True)
class Prepared:
    """Data ready for training: the folder it lies in, its tokenizer, and both splits."""

    folder: Path
    tokenizer: Tokenizer
    train: TokenStream | Mixture | TaskRows
    val: TokenStream | Mixture | TaskRows
    normalised: bool = False
    """Whether the tokens do not spell the text: bits per byte are of the normalised text."""
    text: str | None = None
    """Fingerprint of the source as it was read, see `source_fingerprint`; None where it was not looked at."""


@final
@dataclass(frozen=True)
class _Text:
    """The documents of a source, which is read twice: for the BPE and for the shards."""

    data: DataConfig

    def documents(self) -> Iterator[Document]:
        """All of it, up to `max_bytes`."""
        d = self.data
        return documents(d.source, text_column=d.text_column, subset=d.subset, split=d.split, max_bytes=d.max_bytes)

    def states(self) -> FileStates:
        """What its files are now."""
        other = self.data.validation_source
        return file_states(self.data.source) | ({} if other is None else file_states(other))

    def unchanged(self, states: FileStates) -> Iterator[Document]:
        """All of it. ValueError at its end: a file is not as it was, so that the tokens would go by a wrong name."""
        yield from self.documents()
        require_unchanged(states)

    def held_out(self) -> float | Iterator[Document]:
        """The share that is held out, or the documents of another source."""
        d = self.data
        other = d.validation_source
        if other is None:
            return d.validation
        return documents(other, text_column=d.text_column, subset=d.subset, split=d.split)

    def facts(self) -> list[object]:
        """What the splits depend on."""
        d = self.data
        other = [] if d.validation_source is None else [_fingerprint(d, d.validation_source)]
        return [CHECKED, _fingerprint(d, d.source), d.max_bytes, d.validation, *other]

    def total(self) -> int | None:
        """About how many bytes of text will be read; None where unknown."""
        bounds = [size for size in (source_bytes(self.data.source), self.data.max_bytes) if size is not None]
        return min(bounds, default=None)

    def sample(self, budget: float) -> Iterator[str]:
        """Training documents, evenly spread over the source so that about `budget` bytes come together at its end.

        Where the size of the source is unknown, simply the first ones.
        """
        keep = min(1.0, budget / (self.total() or budget))
        due, done = 1.0, 0  # the first document is always taken
        for split, doc in split_documents(self.documents(), self.held_out()):
            if split == "train":
                if due >= 1:
                    due -= 1
                    yield text_of(doc)
                    done += len(text_of(doc).encode())
                    if done >= budget:
                        return
                due += keep


def data_fingerprint(data: DataConfig) -> str:
    """What tells that the text of a run is as it was: that of its source, or of several and the one it holds out."""
    prints = [_fingerprint(data, name) for name in _names(data)]
    return prints[0] if len(prints) == 1 else hashlib.sha256("".join(prints).encode()).hexdigest()


def has_columns(data: DataConfig) -> bool:
    """Whether rows with columns are read, in whose place a plain text has none. ValueError: a source is not there."""
    return any(holds_rows(name) for name in _names(data))


def _names(data: DataConfig) -> list[str]:
    """The sources that are read, without their weights: to train on, and then to hold out."""
    names = [part.name for part in read_mixture(data.source)]
    return names if data.validation_source is None else [*names, data.validation_source]


def _fingerprint(data: DataConfig, name: str) -> str:
    return source_fingerprint(name, text_column=data.text_column, subset=data.subset, split=data.split)


@each_told_once("lrt.data.sources")
def prepare(data: DataConfig, *, progress: ReportProgress | None = None, verify: str = "size") -> Prepared:
    """Make, or find again, the token shards of a source: in `data.folder/<readable name>-<key>/`.

    progress: called with (bytes of text done, total or None, what is going on). verify: how shards found again are
    checked, see `open_split`. Of several sources with weights each has a folder of its own, and all have one tokenizer.
    A synthetic task, `task:NAME`, needs no folder.
    ValueError: bad input, or an altered cache. The key covers files' sizes and times, so changed text is prepared anew.
    """
    if data.source.startswith(TASK):
        train, val = task_rows(data.source, data.tokenizer)
        return Prepared(Path(data.folder), task_tokenizer(train), train, val)
    report, parts = progress if progress is not None else _silent, read_mixture(data.source)
    if data.validation_source is not None:
        for part in parts:
            require_apart(part.name, data.validation_source)
    if len(parts) > 1:
        return _mixed(data, parts, report, verify)
    return _prepared(replace(data, source=parts[0].name), report, verify)


def _mixed(data: DataConfig, parts: list[Weighted], report: ReportProgress, verify: str) -> Prepared:
    """Every source prepared with one tokenizer, a BPE of them all if it has to be trained."""
    limit = data.max_bytes
    limits = [None if limit is None else max(1, round(limit * part.weight)) for part in parts]
    each = [replace(data, source=p.name, max_bytes=most) for p, most in zip(parts, limits, strict=True)]
    base, pauses = _base_and_pauses(data.tokenizer)
    words = str(_common_bpe(each, parts, report)) + pauses if base == "bpe" else data.tokenizer
    prepared = [_prepared(replace(one, tokenizer=words), report, verify) for one in each]
    weights = [part.weight for part in parts]
    train, val = (
        Mixture(list(streams), weights) for streams in zip(*((m.train, m.val) for m in prepared), strict=True)
    )
    lost = any(m.normalised for m in prepared)
    validation = val if data.validation_source is None else prepared[0].val
    return Prepared(prepared[0].folder.parent, prepared[0].tokenizer, train, validation, lost, data_fingerprint(data))


def _common_bpe(each: list[DataConfig], parts: list[Weighted], report: ReportProgress) -> Path:
    """The folder of a BPE that is trained on a sample of every source, as much of each as its weight says."""
    texts, size = [_Text(one) for one in each], each[0].vocab_size
    facts = [*(text.facts() for text in texts), [part.weight for part in parts], size]
    home = expand_home(each[0].folder) / f"bpe{size}-{_key(facts)}"
    if not home.is_dir():
        budgets = [part.weight * SAMPLE_BYTES for part in parts]
        tokenizer = _train(texts, budgets, size, report)
        with folder_aside(home) as aside, contextlib.suppress(FileExistsError):
            tokenizer.save(aside)
            put_in_place(aside, home)
    return home


def _roles(tokenizer: Tokenizer) -> list[Any]:
    """What else of a tokenizer decides how dialogues are written; nothing without a chat template."""
    settings = tokenizer.config
    if not settings.chat_templates:
        return []
    return [dict(settings.chat_templates), settings.eos, settings.pad, settings.unknown, list(settings.stops)]


def _prepared(data: DataConfig, report: ReportProgress, verify: str) -> Prepared:
    """One source, or several that are read one after the other."""
    text, (base, pauses) = _Text(data), _base_and_pauses(data.tokenizer)
    brought = _brought_tokenizer(base)
    kind = (f"bpe{data.vocab_size}" if brought is None else brought.hash) + pauses
    states = text.states()
    key = _key([*text.facts(), kind, *([] if brought is None else _roles(brought))])
    name = _slug(kind if brought is None else data.tokenizer)
    home = expand_home(data.folder) / f"{_slug(data.source)}-{name}-{key}"
    if not home.exists():
        require_makable(home)
        tokenizer = brought or _train([text], [SAMPLE_BYTES], data.vocab_size, report)
        docs = text.unchanged(states)
        _tokenize(text, docs, _with_pauses(tokenizer) if pauses else tokenizer, home, report)
    prepared = _open(home, verify, data.normalised)
    if brought is not None:  # the shards may have been made with the same tokens and other roles of them
        prepared.tokenizer.config = brought.config
    return replace(prepared, text=data_fingerprint(data))


def _tokenize(text: _Text, docs: Iterable[Document], tokenizer: Tokenizer, home: Path, report: ReportProgress) -> None:
    """Write the shards; the last report says that all was read, for totals are estimates."""
    total, bytes_read = text.total(), 0

    def tokenized(done: int) -> None:
        nonlocal bytes_read
        bytes_read = done
        report(done, total, "tokenizing")

    write_shards(
        docs, tokenizer, home, validation=text.held_out(), normalised=text.data.normalised,
        progress=tokenized,
    )  # fmt: skip
    report(bytes_read, bytes_read, "tokenizing")


def reopen(places: Iterable[Path], tokens: str, tokenizer: Tokenizer, normalised: bool, verify: str) -> Prepared | None:
    """The token shards of a run, known by the hash of their training tokens; None if they are in none of the places.

    places: folders of shards, or folders that hold some. tokenizer: the run's own. verify, normalised: see `prepare`.
    ValueError: the shards with these tokens are damaged, or made with another tokenizer.
    """
    home = shards_of(places, tokens)
    return None if home is None else _open(home, verify, normalised, tokenizer)


def shards_of(places: Iterable[Path], tokens: str) -> Path | None:
    """The first folder of shards in one of the places whose training tokens have this hash."""
    for home in itertools.chain.from_iterable(map(_shard_folders, places)):
        with contextlib.suppress(ValueError):
            if Manifest.load(home).hash("train") == tokens:
                return home
    return None


def _shard_folders(place: Path) -> list[Path]:
    """The folders of token shards that a place is or holds; what cannot be looked at holds none."""
    try:
        inner = sorted(place.iterdir()) if place.is_dir() else []
        return [folder for folder in (place, *inner) if (folder / "manifest.json").is_file()]
    except OSError:
        return []


def _open(home: Path, verify: str, normalised: bool, tokenizer: Tokenizer | None = None) -> Prepared:
    tokenizer, lost = tokenizer or load_tokenizer(home), Manifest.load(home).lost
    if lost and not normalised:
        raise ValueError(f"{home}: {lost_text(lost)}")
    train, val = (open_split(home, split, verify, tokenizer=tokenizer) for split in ("train", "val"))
    return Prepared(home, tokenizer, train, val, bool(lost))


def _base_and_pauses(tokenizer: str) -> tuple[str, str]:
    base = tokenizer.removesuffix(PAUSES)
    return base, tokenizer[len(base) :]


def _brought_tokenizer(name: str) -> Tokenizer | None:
    """The tokenizer a name stands for; None where it has to be trained first."""
    if name == "bpe":
        return None
    return ByteTokenizer() if name == "bytes" else load_tokenizer(name)


def _with_pauses(tokenizer: Tokenizer) -> Tokenizer:
    if not isinstance(tokenizer, (ByteTokenizer, BPETokenizer)):
        raise ValueError("the tokenizer has pauses already: leave +pauses out")
    return PausingTokenizer(tokenizer)


def _train(texts: list[_Text], budgets: list[float], vocab_size: int, report: ReportProgress) -> Tokenizer:
    """A BPE of so many bytes of each text."""
    sizes = [size for text in texts if (size := text.total()) is not None]
    total = min(SAMPLE_BYTES, sum(sizes)) if len(sizes) == len(texts) else SAMPLE_BYTES

    def sample() -> Iterator[str]:
        done = 0
        for text, budget in zip(texts, budgets, strict=True):
            for doc in text.sample(budget):
                yield doc
                done += len(doc.encode())
                report(done, total, "training the tokenizer")

    tokenizer = train_bpe(sample(), vocab_size)
    if tokenizer.vocab_size < vocab_size:
        about = "the text gives a BPE of %d tokens, where data.vocab_size asks for %d: it holds too few pairs"
        logger.warning(about, tokenizer.vocab_size, vocab_size)
    return tokenizer


def _key(facts: list[object]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


def _slug(name: str) -> str:
    """A short file name that recalls a source: letters, digits, dots and dashes."""
    last = [part for part in re.split(r"[/\\:]", name) if part][-1:] or ["data"]
    return re.sub(r"[^A-Za-z0-9.]+", "-", last[0]).strip("-.")[:40] or "data"


def _silent(done: int, total: int | None, note: str) -> None:
    pass
