"""Text sources: a name, path, glob or dataset to a stream of documents, in a fixed order, never all in memory.

Bad input raises ValueError with one line: what is wrong with which file, and the remedy.
"""

import codecs
import collections
import glob
import hashlib
import itertools
import json
import logging
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lrt.data.dialogue import Dialogue, Document, text_of, valid_text
from lrt.data.file_states import FileStates, states_of
from lrt.data.rows import INSTALL_HF, NOT_READ, PACKED, document_in, is_packed, kind_of, opened, rows_of
from lrt.utils.files import expand_home, one_line, read_json

WHOLE = 1_000_000  # bytes: a text file up to this size is one document
PIECE = 64 * 1024  # characters: a larger one becomes documents of about this size
BLOCK = 256 * 1024  # bytes read at a time
PYTHON_SOURCES = ("python", "python+site-packages")

SHOWN = 5  # skipped files that are named

logger = logging.getLogger(__name__)


class _NotText(ValueError):
    """A binary file: an error where it was named, skipped where a folder or glob merely holds it."""


def documents(
    source: str,
    *,
    text_column: str = "text",
    subset: str | None = None,
    split: str = "train",
    max_bytes: int | None = None,
) -> Iterator[Document]:
    """Stream the documents of a source, none of them empty, cut off after `max_bytes` bytes of UTF-8 text.

    source: `python` (the standard library of this interpreter), `python+site-packages`, a file, folder or glob (text,
        and structured files, see `rows`; also .gz and .zst of them), a folder of `Dataset.save_to_disk`, or
        `hf:owner/name` / `hf:folder` for anything `datasets.load_dataset` reads; several, with commas between them.
    text_column: where the text is in structured files and datasets; messages there are a dialogue, and so are rows
        without that column that hold messages, or a prompt and its answer. subset, split: of a dataset.

    A text file is one document; a large one is cut into several at blank lines. ValueError: bad input.
    """
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"max_bytes is {max_bytes}: give at least 1, or leave it out to read everything")
    each = (_valid(name, _texts_in(name, text_column, subset, split)) for name in listed(source))
    return _cut_off(itertools.chain.from_iterable(each), max_bytes)


def _texts_in(source: str, text_column: str, subset: str | None, split: str) -> Iterator[Document]:
    if source.startswith("hf:"):
        return (document_in(row, text_column, source) for row in _dataset_rows(source, subset, split))
    files, named = _files(source)
    return _file_texts(source, files, named, text_column)


def listed(source: str) -> list[str]:
    """The sources of a list with commas; a path that has commas itself is one."""
    if "," not in source or os.path.exists(expand_home(source)):
        return [source]
    return [part.strip() for part in source.split(",")]


def require_apart(source: str, validation_source: str) -> None:
    """ValueError: a file, or a dataset, that is both trained on and held out."""
    if twice := both(source, validation_source):
        raise ValueError(
            f"{twice[0]}: is in data.source and in data.validation_source, so that its score would be of text that was "
            "trained on: take it out of one of them"
        )


def both(source: str, other: str) -> list[str]:
    """Files, or datasets, that two sources share."""
    own, others = ({name for one in listed(s) for name in _names(one)} for s in (source, other))
    return sorted(own & others)


def is_one_text(source: str) -> bool:
    """Whether a source is one file that is its text: its size is that of the text."""
    files, named = ([], False) if source.startswith("hf:") or len(listed(source)) > 1 else _files(source)
    return named and not is_packed(files[0]) and rows_of(files[0], None) is None


def holds_rows(source: str) -> bool:
    """Whether a source has rows with columns, in some of its files at least."""
    return any(
        one.startswith("hf:") or any(rows_of(file, None) is not None for file in _files(one)[0])
        for one in listed(source)
    )


def _names(source: str) -> list[str]:
    """What tells a source's files apart, or the dataset."""
    return [source] if source.startswith("hf:") else [str(file.resolve()) for file in _files(source)[0]]


def source_fingerprint(
    source: str, *, text_column: str = "text", subset: str | None = None, split: str = "train"
) -> str:
    """Sha256 hex of what the source reads: names, sizes and modification times of its files, or the dataset's name."""
    if len(listed(source)) > 1:
        prints = [source_fingerprint(s, text_column=text_column, subset=subset, split=split) for s in listed(source)]
        return hashlib.sha256("".join(prints).encode()).hexdigest()
    facts: list[Any] = [source if source.startswith("hf:") else "files", text_column, subset, split]
    facts += [[str(file.resolve()), *state] for file, state in file_states(source).items()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def file_states(source: str) -> FileStates:
    """Size and modification time of every file that a source reads; none of a dataset's of the hub."""
    if len(listed(source)) > 1:
        return {file: state for one in listed(source) for file, state in file_states(one).items()}
    name = source.removeprefix("hf:")
    if source.startswith("hf:") and not os.path.exists(expand_home(name)):
        return {}
    return states_of(_files(name)[0])


def source_bytes(source: str) -> int | None:
    """About how many bytes of text a source holds, for progress; None where only reading it all would tell."""
    if len(listed(source)) > 1:
        sizes = [source_bytes(one) for one in listed(source)]
        numbers = [size for size in sizes if size is not None]
        return sum(numbers) if len(numbers) == len(sizes) else None
    if source.startswith("hf:"):
        return None
    files, _ = _files(source)
    return (
        None
        if any(file.suffix.lower() in (".parquet", ".arrow", ".feather", *PACKED) for file in files)
        else sum(file.stat().st_size for file in files)
    )


def cut_pieces(blocks: Iterable[str], piece: int = PIECE) -> Iterator[str]:
    """Cut a stream of text into pieces of at most `piece` characters: at a blank line, else a newline, else anywhere.

    The pieces joined are the text. A cut at a newline leaves at least half a piece, so none but the last is tiny.
    """
    buffered = ""
    for block in blocks:
        buffered += block
        while len(buffered) > piece:
            cut = _cut(buffered, piece)
            yield buffered[:cut]
            buffered = buffered[cut:]
    if buffered:
        yield buffered


def _cut(text: str, piece: int) -> int:
    for gap in ("\n\n", "\n\r\n", "\n"):
        gap_start = text.rfind(gap, piece // 2, piece)
        if gap_start >= 0:
            return gap_start + len(gap)
    return piece


def _valid(source: str, texts: Iterator[Document]) -> Iterator[Document]:
    """Leave out empty documents, aloud, and make each valid UTF-8; a source without any text is an error."""
    held, empty, mended = 0, 0, 0
    for text in texts:
        if text.messages if isinstance(text, Dialogue) else text:
            held += 1
            valid = text if isinstance(text, Dialogue) else valid_text(text)
            mended += valid is not text and "\ufffd" in text_of(valid)
            yield valid
        else:
            empty += 1
    if mended:
        logger.warning("%s: %d texts held half characters (lone surrogates); each is read as U+FFFD", source, mended)
    if empty and held and source not in PYTHON_SOURCES:
        logger.warning("%s: %d of %d documents or rows are empty and were left out", source, empty, empty + held)
    if not held:
        raise ValueError(f"{source}: holds no text (every file or row is empty or binary): name a source of UTF-8 text")


def _cut_off(texts: Iterator[Document], max_bytes: int | None) -> Iterator[Document]:
    """Stop after `max_bytes`, within a text where need be."""
    bytes_left = max_bytes
    for text in texts:
        raw = text_of(text).encode()
        if bytes_left is not None and len(raw) >= bytes_left:
            last = raw[:bytes_left].decode("utf-8", errors="ignore")  # ignores the half character at the cut
            if last and isinstance(text, str):
                yield last
            return
        bytes_left = None if bytes_left is None else bytes_left - len(raw)
        yield text


# --- which files ---------------------------------------------------------------------------------------------------


def _files(source: str) -> tuple[list[Path], bool]:
    """The files of a source in a fixed order, and whether the source names one file itself."""
    path = expand_home(source)
    if source in PYTHON_SOURCES:
        files = _python_files(with_packages=source != "python")
    elif not source:
        raise ValueError("the source is empty: give a path, 'python', or hf:owner/name")
    elif os.path.isfile(path):
        if path.stat().st_size == 0:
            raise ValueError(f"{source}: the file is empty: name one that holds text")
        return [path], True
    elif os.path.isdir(path):
        files = _saved_dataset(path) or list(_walk(path))
    elif any(mark in source for mark in "*?["):
        files = _not_outputs(sorted(Path(m) for m in glob.glob(str(path), recursive=True) if os.path.isfile(m)), path)
    else:
        kind = "neither a file nor a folder" if os.path.exists(path) else "no such file or folder"
        raise ValueError(f"{source}: {kind}: give a path, a glob, 'python', or hf:owner/name for a dataset")
    if not files:
        raise ValueError(f"{source}: no files there: name a file, or a folder or glob that holds some")
    return files, False


def _saved_dataset(folder: Path) -> list[Path]:
    """The tables of a folder that `Dataset.save_to_disk` has written; none if it is not one."""
    if (folder / "dataset_dict.json").is_file():
        raise ValueError(f"{folder}: holds several splits, each in a folder: name one of them")
    if not ((folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()):
        return []
    listed_files = read_json(folder / "state.json", "the list of its files", loose=True).get("_data_files")
    entries = listed_files if isinstance(listed_files, list) else []
    names = {Path(str(one["filename"])).name for one in entries if isinstance(one, dict) and "filename" in one}
    if lost := sorted(name for name in names if not (folder / name).is_file()):
        raise ValueError(f"{folder}: {one_line(lost[0], 80)} is missing, which its state.json names: save it again")
    return sorted(folder / name for name in names) or sorted(folder.glob("*.arrow"))


def _python_files(*, with_packages: bool) -> list[Path]:
    paths = sysconfig.get_paths()
    files = list(_walk(Path(paths["stdlib"]), "site-packages", "dist-packages"))
    if with_packages:
        files += _walk(Path(paths["purelib"]))
    return [file for file in files if file.suffix == ".py"]


def _walk(folder: Path, *left_out: str) -> Iterator[Path]:
    """Every file under a folder, sorted, without hidden ones and byte code.

    Links to folders are not followed, what this package has written there is no text, and pipes, devices and links that
    lead nowhere hold none: all are told. ValueError: a folder that cannot be read.
    """
    left_out_for: dict[str, list[str]] = {}
    for parent, folders, names in os.walk(folder, onerror=_unreadable):
        folders[:] = sorted(name for name in folders if name[0] != "." and name not in ("__pycache__", *left_out))
        for name in list(folders):
            inner = Path(parent, name)
            why = "a link to a folder" if inner.is_symlink() else "written by lrt" if _is_output(inner) else ""
            if why:
                folders.remove(name)
                left_out_for.setdefault(why, []).append(str(inner))
        for name in sorted(names):
            file = Path(parent, name)
            if name[0] == ".":
                continue
            if file.is_file():
                yield file
            else:
                left_out_for.setdefault("no regular file, or leads to none", []).append(str(file))
    for why, paths in left_out_for.items():
        for path in paths if len(paths) <= SHOWN else ():
            logger.warning("%s: left out, since it is %s", path, why)
        if len(paths) > SHOWN:
            shown = ", ".join(paths[:SHOWN])
            logger.warning("%s: left out %d, each of which is %s: %s, ..", folder, len(paths), why, shown)


def _not_outputs(files: list[Path], pattern: Path) -> list[Path]:
    """The matches of a pattern, without those in folders that this package wrote and the pattern does not name."""
    named = list(itertools.takewhile(lambda part: not any(mark in part for mark in "*?["), pattern.parts))
    written: dict[Path, bool] = {}

    def is_written(folder: Path) -> bool:
        if len(folder.parts) <= len(named):
            return False
        if folder not in written:
            written[folder] = is_written(folder.parent) or _is_output(folder)
        return written[folder]

    kept = [file for file in files if not is_written(file.parent)]
    if len(kept) < len(files):
        logger.warning("%s: left out %d files in folders that were written by lrt", pattern, len(files) - len(kept))
    return kept


def _unreadable(error: OSError) -> None:
    raise ValueError(f"{error.filename}: cannot be read ({error.strerror}): check the folder and its permissions")


def _is_output(folder: Path) -> bool:
    """Whether a folder is a run, or token shards."""
    run = (folder / "config.json").is_file() and (folder / "tokenizer").is_dir()
    return run or ((folder / "manifest.json").is_file() and (folder / "tokenizer.json").is_file())


# --- what is in them -----------------------------------------------------------------------------------------------


def _file_texts(source: str, files: list[Path], named: bool, text_column: str) -> Iterator[Document]:
    """The documents of files one after the other. A binary file is an error if `named`, else skipped and told."""
    skipped: list[str] = []
    for file in files:
        try:
            yield from _texts_of(file, text_column)
        except _NotText:
            if named:
                raise
            skipped.append(file.name)
        except (OSError, EOFError, zlib.error) as error:
            why = one_line(error.strerror if isinstance(error, OSError) and error.strerror else error, 120)
            raise ValueError(f"{file}: cannot be read ({why}): check the file and its permissions") from None
    if skipped:
        # The standard library is known to hold such files, for its own tests; elsewhere it is news.
        level = logging.INFO if source in PYTHON_SOURCES else logging.WARNING
        shown = ", ".join(skipped[:SHOWN]) + (", .." if len(skipped) > SHOWN else "")
        about = "%s: skipped %d of %d files: binary, not UTF-8 or of a kind that is not read: %s"
        logger.log(level, about, source, len(skipped), len(files), shown)


def _texts_of(file: Path, text_column: str) -> Iterator[Document]:
    kind = kind_of(file)
    if file.suffix.lower() in NOT_READ or kind in NOT_READ:
        ending = file.suffix if file.suffix.lower() in NOT_READ else kind
        raise _NotText(f"{file}: {ending} files are not read: unpack or convert it to UTF-8 text")
    rows = rows_of(file, text_column)
    if rows is not None:
        return (document_in(row, text_column, place) for place, row in rows)
    if is_packed(file) or file.stat().st_size > WHOLE:
        collections.deque(_decoded(file), maxlen=0)  # text to the end, or none of it is taken
        return cut_pieces(_decoded(file))
    return iter(["".join(_decoded(file))])


def _decoded(file: Path) -> Iterator[str]:
    """The text of a UTF-8 file block by block, without its byte order mark; newlines are left as they are."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with opened(file) as stream:
        offset, block = 0, b""
        while True:
            offset += len(block)
            block = stream.read(BLOCK)
            if not offset and block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise _NotText(f"{file}: UTF-16 text: convert it to UTF-8")
            if b"\0" in block:
                raise _NotText(
                    f"{file}: a binary file (NUL byte at {offset + block.index(0)}): convert it to UTF-8 text"
                )
            try:
                yield decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                near = offset + error.start
                raise _NotText(f"{file}: not UTF-8 (near byte {near}): convert it to UTF-8 text") from None
            if not block:
                return


def _dataset_rows(source: str, subset: str | None, split: str) -> Iterator[dict[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{source}: reading a dataset needs the package datasets: {INSTALL_HF}") from None
    name = source.removeprefix("hf:")
    name = str(expand_home(name)) if name.startswith("~") else name
    try:
        yield from datasets.load_dataset(name, subset, split=split, streaming=True)
    except Exception as error:  # the library and its network stack raise many kinds
        remedy = "check name, subset and split, and that the dataset can be reached"
        remedy = "leave out hf: before the folder" if "load_from_disk" in str(error) else remedy
        raise ValueError(f"{source} (subset {subset}, split {split}): {_first_line(error)}: {remedy}") from None


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".: ") or type(error).__name__
