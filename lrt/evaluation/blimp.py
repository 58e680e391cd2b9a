"""BLiMP: 67 sets of minimal pairs of English sentences, of which a model should find the good one more probable.

The pairs are read as published: `blimp.parquet`, or a folder of JSON-lines files (arXiv 1912.00582).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lrt.data.rows import rows_of
from lrt.evaluation.likelihood import Candidate
from lrt.evaluation.suite import Scorer, Scores, Suite, fingerprint, mean_of, share
from lrt.utils.files import read_jsonl, require_fields
from lrt.utils.require import require

FIELDS: dict[str, type] = dict.fromkeys(("UID", "field", "linguistics_term", "sentence_good", "sentence_bad"), str)
MOST_PAIRS = 1_000_000
SETS_OF_BLIMP = 67


class PairSet(NamedTuple):
    """The minimal pairs of one phenomenon's variety."""

    phenomenon: str
    """Such as island_effects."""
    field: str
    """Such as syntax."""
    pairs: list[tuple[str, str]]
    """Good and bad sentence."""


def read_blimp(place: Path) -> dict[str, PairSet]:
    """The sets by their UID, from a parquet file, a folder that holds `blimp.parquet`, or one of JSON-lines files.

    ValueError: neither of them, or what is wrong with a row.
    """
    sets: dict[str, PairSet] = {}
    for number, (where, row) in enumerate(_rows(place), 1):
        require(number <= MOST_PAIRS, f"{place} holds more than {MOST_PAIRS:,} pairs; give BLiMP's own files")
        uid, kind = row["UID"], (row["linguistics_term"], row["field"].replace("/", "_"))
        pair_set = sets.setdefault(uid, PairSet(*kind, []))
        first = pair_set[:2]
        require(first == kind, f"{where}: {uid} is of {kind[0]}, {kind[1]} here and of {first[0]}, {first[1]} before")
        pair_set.pairs.append((row["sentence_good"], row["sentence_bad"]))
    require(bool(sets), f"{place} holds no pair; give BLiMP's own files")
    return sets


def _rows(place: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pair with where it stands, checked."""
    for file in _files(place):
        lines = ((f"{file}:{n}", row) for n, row in read_jsonl(file, "pairs"))
        rows = lines if file.suffix == ".jsonl" else rows_of(file, None) or iter(())
        for where, row in rows:
            require_fields(row, FIELDS, where)
            filled = all(row[name].strip() for name in FIELDS)
            require(filled, f"{where}: a pair of {row['UID']!r} has an empty field; restore the file, or give another")
            yield where, row


def _files(place: Path) -> list[Path]:
    file = place / "blimp.parquet" if place.is_dir() else place
    if file.is_file():
        require(file.suffix in (".parquet", ".jsonl"), f"{file} is no .parquet or .jsonl file of minimal pairs")
        return [file]
    folder = place / "blimp" if (place / "blimp").is_dir() else place
    files = sorted(folder.glob("*.jsonl"))
    require(bool(files), f"{place} holds neither blimp.parquet nor BLiMP's .jsonl files; give the folder that does")
    return files


def score_pairs(pair_set: PairSet, scorer: Scorer) -> Scores:
    """Share of pairs whose good sentence is the more probable one as a whole, after BOS.

    A tie counts as right, as in lm-eval; `ties` says how many (BLiMP has seven pairs of the same sentence twice).
    """
    pairs = pair_set.pairs[: scorer.limit]
    ids = [scorer.encode(sentence) for pair in pairs for sentence in pair]
    answers = scorer.likelihoods([Candidate([scorer.tokenizer.bos, *sentence], len(sentence)) for sentence in ids])
    gains = [good.logprob - bad.logprob for good, bad in zip(answers[::2], answers[1::2], strict=True)]
    facts = {"ties": gains.count(0.0), "phenomenon": pair_set.phenomenon, "field": pair_set.field}
    return share(sum(gain >= 0 for gain in gains), len(pairs)) | facts


def blimp_suite(place: Path) -> Suite:
    """BLiMP. ValueError: see `read_blimp`."""
    sets = read_blimp(place)
    parts = {uid: functools.partial(score_pairs, pair_set) for uid, pair_set in sets.items()}
    texts = (text for uid, s in sets.items() for pair in s.pairs for text in (uid, s.phenomenon, s.field, *pair))
    return Suite("blimp", parts, _summary, fingerprint(texts))


def _summary(parts: Mapping[str, Scores]) -> Scores:
    """Accuracy over all sets, by phenomenon and by field; every set counts once."""
    groups = {
        name: {
            key: mean_of(p for p in parts.values() if p[kind] == key)
            for key in sorted({p[kind] for p in parts.values()})
        }
        for name, kind in (("phenomena", "phenomenon"), ("fields", "field"))
    }
    return mean_of(parts.values()) | groups | {"whole": len(parts) == SETS_OF_BLIMP}
