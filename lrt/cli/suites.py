"""What `lrt eval --suite` does: a suite scored, its record written and shown."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from lrt.evaluation.suite import Suite
    from lrt.inference.loaded import Loaded


class SuiteRequest(NamedTuple):
    """Which suite is scored, how, and where its record goes."""

    name: str
    published: Suite | None
    """It, where it is read from files."""
    data: Path | None
    lengths: tuple[int, ...] = ()
    mode: str | None = None
    limit: int | None = None
    out: Path | None = None
    """Folder of the record; by default RUN/suites."""
    arm: str | None = None
    """What tables call the run; by default its name without the seed."""
    normalised: bool = False
    """Whether tokens may lose text, as they may where the run was trained so."""


def score_suite(loaded: Loaded, request: SuiteRequest, *, as_json: bool) -> str:
    """Score a suite, or go on with it, and write its record; returns it as a table or as JSON. Progress on stderr."""
    from lrt.evaluation.open_suite import default_mode, open_suite
    from lrt.evaluation.suite import Scorer
    from lrt.experiments.groups import RunGroup, of_right_kinds
    from lrt.experiments.suite_run import Place, arm_of, run_suite
    from lrt.experiments.suite_tables import tables_of

    suite = request.published or open_suite(request.name, request.data, request.lengths, loaded)
    scorer = Scorer(
        model=loaded.model, tokenizer=loaded.tokenizer, mode=request.mode or default_mode(request.name),
        limit=request.limit, normalised=request.normalised or loaded.config.data.normalised,
    )  # fmt: skip
    place = Place(request.out or loaded.run / "suites", request.arm or arm_of(loaded.config))
    record = run_suite(loaded, suite, scorer, place, lambda line: print(line, file=sys.stderr, flush=True))
    if as_json:
        return json.dumps({"run": str(loaded.run), "step": loaded.step} | record)
    with of_right_kinds(place.folder):  # it may have been written before
        tables = [table.markdown() for _, table in tables_of([RunGroup(suite.name, "", record["arm"], (record,))])]
    lost = [f"Of the normalised text: {record['lost']}."] if record.get("lost") else []
    return "\n\n".join([*lost, *tables])
