"""Scoring a run by a suite, part by part, and its record: one line of JSON, as `lrt report` reads it."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lrt.config.run import RunConfig
from lrt.evaluation.open_suite import FROM_FILES
from lrt.evaluation.suite import Scorer, Scores, Suite
from lrt.experiments.record import origin
from lrt.inference.loaded import Loaded
from lrt.model.recurrence import mode_name
from lrt.utils.files import is_there, read_jsonl, require_fields, sealed, write_jsonl
from lrt.utils.require import require

Tell = Callable[[str], None]
PART: dict[str, type] = {"part": str, "scores": dict, "cpu_seconds": float, "lost": str}
"""Fields of a line of scored parts."""
EVERY_SECONDS = 10.0
"""Between two lines about a part that takes long."""


class Place(NamedTuple):
    """Where a suite's record goes, and under what name."""

    folder: Path
    arm: str
    """What the run is called in tables."""


def arm_of(config: RunConfig) -> str:
    """A run's name without its seed."""
    return re.sub(r"-seed\d+$", "", config.name)


def run_suite(loaded: Loaded, suite: Suite, scorer: Scorer, place: Place, tell: Tell) -> dict[str, Any]:
    """Score what is not scored yet, write FOLDER/SUITE-MODE.jsonl, and return the record in it.

    Parts are kept in SUITE-MODE.parts.jsonl as they come: what was interrupted goes on after the last one. A record
    that is there already is returned. ValueError: the folder holds figures of something else.
    """
    subject = _subject(loaded, suite, scorer)
    place.folder.mkdir(parents=True, exist_ok=True)
    file = place.folder / f"{suite.name}-{scorer.mode}.jsonl"
    before = _record_of(file, subject)
    if before is not None:
        tell(f"{file} holds these figures already")
        return before
    parts_file = file.with_suffix(".parts.jsonl")
    lines = _kept_parts(parts_file, subject, suite)
    tell(f"{suite.name}: {len(suite.parts)} parts" + (f", {len(lines)} scored before" if lines else ""))
    for number, (part, score) in enumerate(suite.parts.items(), 1):
        if part not in lines:
            label = f"{suite.name} {number}/{len(suite.parts)} {part}"
            lines[part] = _timed(part, score, scorer, lambda text, label=label: tell(f"{label}: {text}"))
            write_jsonl(parts_file, map(sealed, [{"of": subject}, *lines.values()]))
    record = _record(loaded, suite, scorer, place.arm, lines) | {"of": subject}
    write_jsonl(file, [sealed(record)])
    parts_file.unlink()
    return record


def _subject(loaded: Loaded, suite: Suite, scorer: Scorer) -> dict[str, Any]:
    """What figures are of: other ones are not gone on with."""
    digest = hashlib.sha256()
    for name, weight in sorted(loaded.model.state_dict().items()):
        digest.update(name.encode() + weight.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    mode = mode_name(loaded.model, scorer.mode)
    facts = {"suite": suite.name, "mode": mode, "limit": scorer.limit, "step": loaded.step}
    return facts | {"weights": digest.hexdigest()[:16], "data": suite.data, "parts": list(suite.parts)}


def _record_of(file: Path, subject: dict[str, Any]) -> dict[str, Any] | None:
    if not is_there(file):
        return None
    records = [record for _, record in read_jsonl(file, "record", loose=True)]
    require(len(records) == 1, f"{file} holds {len(records)} records, not one; move it, or choose another --out")
    _require_same(file, records[0], subject)
    return records[0]


def _kept_parts(file: Path, subject: dict[str, Any], suite: Suite) -> dict[str, dict[str, Any]]:
    """The lines of the parts that are scored, by their part."""
    if not is_there(file):
        return {}
    lines = list(read_jsonl(file, "scored parts", loose=True))
    require(bool(lines), f"{file} is empty; remove it")
    _require_same(file, lines[0][1], subject)
    for number, line in lines[1:]:
        require_fields(line, PART, f"{file}:{number}")
        require(line["part"] in suite.parts, f"{file}:{number} is of no part of {suite.name}; remove the file")
    return {line["part"]: line for _, line in lines[1:]}


def _require_same(file: Path, line: dict[str, Any], subject: dict[str, Any]) -> None:
    require_fields(line, {"of": dict}, str(file))
    other = [name for name, value in subject.items() if line["of"].get(name) != value]
    require(not other, f"{file} is of another {', '.join(other)}; choose another --out, or remove it")


def _timed(part: str, score: Callable[[Scorer], Scores], scorer: Scorer, tell: Tell) -> dict[str, Any]:
    """Score one part and tell about it, now and then while it is scored too."""
    started, said_at = time.process_time(), time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal said_at
        if done < total and time.monotonic() - said_at > EVERY_SECONDS:
            said_at = time.monotonic()
            tell(f"{done:,} of {total:,} items")

    scorer.progress = progress
    try:
        scores = score(scorer)
    except ValueError as error:
        raise ValueError(f"{part}: {error}") from None
    figures = ", ".join(f"{name} {value:.4f}" for name, value in scores.items() if isinstance(value, float))
    tell(f"{figures}, {scores['items']:,} items")
    lost = str(scorer.spelling) if scorer.spelling.changed else ""
    return {"part": part, "scores": scores, "cpu_seconds": time.process_time() - started, "lost": lost}


def _record(loaded: Loaded, suite: Suite, scorer: Scorer, arm: str, lines: dict[str, dict[str, Any]]) -> dict[str, Any]:
    parts = {part: lines[part]["scores"] for part in suite.parts}
    mode, horizon = mode_name(loaded.model, scorer.mode), loaded.config.train.horizon
    limit = {} if scorer.limit is None else {"limit": scorer.limit}
    return {
        "arm": arm,
        "grid": {"suite": suite.name, "mode": mode, "train.horizon": horizon} | limit,
        "seed": loaded.config.train.seed,
        "name": loaded.config.name,
        **({"suite": suite.name, "parts": parts} if suite.name in FROM_FILES else {"accuracy": parts}),
        "whole": suite.summarise(parts),
        "score_cpu_seconds": sum(line["cpu_seconds"] for line in lines.values()),
        "lost": next((line["lost"] for line in lines.values() if line["lost"]), ""),
        **origin(loaded.config),
    }
