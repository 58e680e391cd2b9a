"""Rows of structured files: JSON lines, JSON, CSV, Parquet and Arrow, packed or not; each row a mapping of columns.

A structured file is read by its name, never as raw text: punctuation is no text to train on. ValueError names the file.
"""

import codecs
import csv
import gzip
import importlib
import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from lrt.data.dialogue import COLUMNS, MESSAGES, PAIRS, Dialogue, Document, dialogue_in, listed_in
from lrt.utils.files import MOST_JSON, one_line, parse_json, read_bytes

INSTALL_HF = "pip install 'latent-recurrent-transformer[hf]'"
PACKED = (".gz", ".zst")
NOT_READ = (
    ".zip", ".tar", ".tgz", ".bz2", ".xz", ".lz4", ".7z", ".rar", ".npy", ".npz", ".pt", ".pth", ".bin", ".pkl", ".h5",
    ".safetensors", ".xlsx", ".xls", ".docx", ".pdf", ".sqlite", ".db", ".avro", ".orc", ".msgpack", ".lance",
)  # fmt: skip
"""Endings of files that hold no text to be read as it stands."""
TEXT = "text"
"""The column that holds the text where none is named."""
ARROW_FILE = b"ARROW1"
"""How an Arrow file begins; a stream has no such mark."""
MOST_FREE = 2**24
"""Rows of columns that need no room for them."""
Row = dict[str, Any]
Placed = tuple[str, Row]
"""Where a row stands, and the row."""


def kind_of(file: Path) -> str:
    """The ending that says how a file is read: its last one, or the one before if that is of a packed file."""
    endings = [ending.lower() for ending in file.suffixes[-2:]]
    return (endings[-2] if len(endings) > 1 else "") if endings and endings[-1] in PACKED else "".join(endings[-1:])


def is_packed(file: Path) -> bool:
    """Whether a file is compressed in a way that is read."""
    return file.suffix.lower() in PACKED


def opened(file: Path) -> BinaryIO:
    """A file's bytes, unpacked."""
    if file.suffix.lower() == ".gz":
        return gzip.open(file, "rb")  # pyright: ignore[reportReturnType]
    if file.suffix.lower() == ".zst":
        return io.BufferedReader(_arrow(file).input_stream(str(file), compression="zstd"))  # pyright: ignore
    return file.open("rb")


def rows_of(file: Path, column: str | None) -> Iterator[Placed] | None:
    """The rows of a structured file, with at least `column` of each (None: all columns); None if it is not one."""
    reader = READERS.get(kind_of(file))
    return None if reader is None else reader(file, column)


def document_in(row: Row, column: str, place: str) -> Document:
    """The document of a row: the text or the messages in `column`, or else a dialogue; a null counts as empty."""
    value = row.get(column)
    if value is None:
        filled = [name for name, cell in row.items() if cell is not None]
        dialogue = dialogue_in(row, place) if holds_dialogue(filled, column) else None
        if dialogue is None and column not in row:
            raise _empty(place, row) if holds_dialogue(row, column) else absent(place, column, row)
        return dialogue or ""
    is_list = isinstance(value, list) or (column in MESSAGES and listed_in(value) is not None)
    document = dialogue_in(row, place, column) if is_list else value
    if not isinstance(document, (str, Dialogue, type(None))):
        raise ValueError(f"{place}: column {column!r} holds {type(value).__name__}, not text: name another column")
    return document or ""


def holds_dialogue(names: Iterable[str], column: str) -> bool:
    """Whether rows of these columns are read as dialogues, where `column` is the usual one and holds nothing."""
    columns = set(names)
    return column == TEXT and (bool(columns & set(MESSAGES)) or any(columns >= set(pair) for pair in PAIRS))


def _wanted(names: Sequence[str], column: str | None, file: Path) -> list[str]:
    """The columns of a table that a document is read from; all of them where `column` is None."""
    if column is None:
        return list(names)
    if column not in names and not holds_dialogue(names, column):
        raise absent(str(file), column, names)
    texts = [column] if column in names else []
    wanted = [name for name in names if name in texts or name in COLUMNS]
    _require_once(wanted, file)
    return wanted


def _empty(place: str, row: Row) -> ValueError:
    names = one_line(", ".join(name for name, cell in row.items() if cell is None and name in COLUMNS), 120)
    return ValueError(f"{place}: nothing stands in {names}: give messages, or a prompt and its answer, or leave it out")


def absent(place: str, column: str, columns: Iterable[str]) -> ValueError:
    """That there is no such column."""
    shown = (name if name == name.strip() and name else repr(name) for name in columns)
    names = one_line(", ".join(shown) or "none", 120)
    without = ", and no messages or prompt with its answer" if column == TEXT else ""
    return ValueError(f"{place}: no column {column!r}{without}: set text_column to one of {names}")


def _json_lines(file: Path, column: str | None) -> Iterator[Placed]:
    with opened(file) as stream:
        for number, line in enumerate(_bounded(stream, file, b""), 1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip():
                place = f"{file}:{number}"
                yield place, _object(parse_json(line, place, loose=True), place)


def _bounded(stream: Any, file: Path, end: Any) -> Iterator[Any]:
    """The lines of a stream, which `end` ends; a packed file of a few bytes may hold one without end."""
    for number in itertools.count(1):
        line = stream.readline(MOST_JSON + 1)
        if line == end:
            return
        if len(line) > MOST_JSON:
            raise ValueError(
                f"{file}:{number}: a line of more than {MOST_JSON:,} bytes: break its text into several rows"
            )
        yield line


def _json(file: Path, column: str | None) -> Iterator[Placed]:
    """A list of objects, or one object."""
    if is_packed(file):
        with opened(file) as stream:
            content = stream.read(MOST_JSON + 1)
        if len(content) > MOST_JSON:
            raise ValueError(f"{file}: holds more than {MOST_JSON:,} bytes of JSON: write one object a line, as .jsonl")
    else:
        content = read_bytes(file, "the source")
    try:
        data = parse_json(content.removeprefix(codecs.BOM_UTF8), str(file), loose=True)
    except ValueError:
        if b"}\n{" in content.replace(b"\r", b""):
            raise ValueError(f"{file}: holds one JSON object a line: name it {file.stem}.jsonl") from None
        raise
    for number, row in enumerate(data if isinstance(data, list) else [data], 1):
        yield f"{file}, row {number}", _object(row, f"{file}, row {number}")


def _object(row: Any, place: str) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f'{place}: holds no JSON object: each must be one, like {{"text": "..."}}')
    return row


def _table(delimiter: str) -> Callable[[Path, str | None], Iterator[Placed]]:
    def read(file: Path, column: str | None) -> Iterator[Placed]:
        csv.field_size_limit(MOST_JSON)  # a quotation mark that nothing closes takes in all that follows
        with opened(file) as raw, io.TextIOWrapper(raw, "utf-8-sig", newline="") as text:
            rows = csv.DictReader(_bounded(text, file, ""), delimiter=delimiter, strict=True)
            try:
                _require_header(rows.fieldnames or (), file)
                _wanted(rows.fieldnames or (), column, file)
                for row in rows:
                    if None in row or None in row.values():  # what is too much stands under no name
                        few = "more" if None in row else "fewer"
                        raise ValueError(f"{file}:{rows.line_num}: has {few} cells than the header: mend the line")
                    yield f"{file}:{rows.line_num}", row
            except UnicodeDecodeError as error:  # of a block that is read ahead: its line is not known
                raise ValueError(f"{file}: not readable as CSV in UTF-8 ({error}): save it as UTF-8") from None
            except csv.Error as error:
                raise ValueError(f"{file}:{rows.line_num}: not readable as CSV in UTF-8 ({error})") from None

    return read


def _require_once(names: Sequence[str], file: Path) -> None:
    if len(set(names)) < len(names):
        raise ValueError(f"{file}: the header names a column twice ({one_line(', '.join(names), 120)}): rename one")


def _require_header(names: Sequence[str], file: Path) -> None:
    """ValueError: a header that names a column twice, or whose cells other signs part."""
    _require_once(names, file)
    if len(names) == 1 and (sign := next((sign for sign in ";\t|" if sign in names[0]), None)):
        remedy = "name it .tsv" if sign == "\t" else "save it with commas"
        raise ValueError(f"{file}: its cells are parted by {sign!r}, not by commas: {remedy}")


def _parquet(file: Path, column: str | None) -> Iterator[Placed]:
    pyarrow = _arrow(file)
    parquet = importlib.import_module("pyarrow.parquet")

    def batches() -> Iterator[Any]:
        with parquet.ParquetFile(file) as table:
            schema, known = table.schema_arrow, table.metadata
        names = _wanted(schema.names, column, file)
        size = sum(known.row_group(i).total_byte_size for i in range(known.num_row_groups))
        rows = min(256, max(1, MOST_JSON * max(1, known.num_rows) // max(1, size)))
        # A column's dictionary is kept as it is: a text that is there a million times is held once.
        texts = [name for name in names if str(schema.field(name).type) in ("string", "large_string")]
        with parquet.ParquetFile(file, read_dictionary=texts) as table:
            yield from table.iter_batches(batch_size=rows, columns=names)

    return _arrow_rows(file, column, batches, pyarrow.ArrowException)


def _arrow_file(file: Path, column: str | None) -> Iterator[Placed]:
    pyarrow = _arrow(file)

    def batches() -> Iterator[Any]:
        with pyarrow.OSFile(str(file)) as raw:  # a memory map that is truncated meanwhile would kill
            if raw.read(len(ARROW_FILE)) == ARROW_FILE:  # which as a stream's first length would be 1.3 GB
                table = pyarrow.ipc.open_file(raw)
                yield from (table.get_batch(i) for i in range(table.num_record_batches))
            else:
                raw.seek(0)
                yield from pyarrow.ipc.open_stream(raw)

    return _arrow_rows(file, column, batches, pyarrow.ArrowException)


def _arrow_rows(
    file: Path, column: str | None, batches: Callable[[], Iterator[Any]], failure: type[Exception]
) -> Iterator[Placed]:
    try:
        for batch in batches():
            batch.validate(full=True)
            names = _wanted(batch.schema.names, column, file)
            columns = [batch.column(batch.schema.get_field_index(name)) for name in names]
            _require_held(columns, file)
            for i in range(batch.num_rows):
                yield str(file), {name: cells[i].as_py() for name, cells in zip(names, columns, strict=True)}
    except ValueError as error:
        if not isinstance(error, failure):
            raise
        raise _unreadable(file, error) from None
    except Exception as error:  # what broken files make the library raise is of many kinds
        raise _unreadable(file, error) from None


def _require_held(columns: Sequence[Any], file: Path) -> None:
    """ValueError: more rows than anything could be read of, from columns that take no room in a file."""
    free = all(str(cells.type) == "null" or str(cells.type).startswith("run_end_encoded") for cells in columns)
    rows = len(columns[0]) if columns else 0
    if free and rows > MOST_FREE:
        raise ValueError(f"{file}: {rows:,} rows that repeat one another, or hold nothing: write them as plain text")


def _unreadable(file: Path, error: Exception) -> ValueError:
    return ValueError(f"{file}: not a readable {kind_of(file)[1:]} file ({one_line(error, 120)}): write it again")


def _arrow(file: Path) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise ValueError(f"{file}: reading it needs the package pyarrow: {INSTALL_HF}") from None
    return pyarrow


READERS: dict[str, Callable[[Path, str | None], Iterator[Placed]]] = {
    ".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".csv": _table(","), ".tsv": _table("\t"),
    ".parquet": _parquet, ".arrow": _arrow_file, ".feather": _arrow_file,
}  # fmt: skip
