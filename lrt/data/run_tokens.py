"""The token shards of a run, known by what they hold: neither its text nor its old place is needed again."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from lrt.config.run import TASK, DataConfig
from lrt.data.prepare import Prepared, ReportProgress, data_fingerprint, prepare, reopen, shards_of
from lrt.data.synthetic import TaskRows
from lrt.data.tokenizer import Tokenizer
from lrt.utils.require import require

RECORDED = ("data", "shards")
"""What `recorded` names."""
OWN = "data"
"""Folder within a run where its token shards may lie too."""


@final
@dataclass(frozen=True)
class RunTokens:
    """What a checkpoint says of the tokens that its run was trained and scored on."""

    train: str
    """Hash of the training split."""
    val: str | None
    """Hash of the validation split; None where an older checkpoint does not say."""
    places: tuple[str, ...]
    """Where the shards lay: beside the run, and in full."""
    text: str | None
    """Fingerprint of the source that they were made of; None where an older checkpoint does not say."""

    @staticmethod
    def of(extra: dict[str, Any]) -> RunTokens | None:
        """From what a checkpoint holds; None where that names no tokens, as in a converted model."""
        train, shards = extra.get("data"), extra.get("shards")
        if not isinstance(train, str):
            return None
        shards = shards if isinstance(shards, dict) else {}
        val, text = (x if isinstance(x, str) else None for x in (shards.get("val"), shards.get("text")))
        places = shards.get("places")
        places = places if isinstance(places, list) and all(isinstance(p, str) for p in places) else []
        return RunTokens(train, val, tuple(places), text)

    def find(
        self,
        run: Path,
        data: DataConfig,
        tokenizer: Tokenizer,
        verify: str = "size",
        progress: ReportProgress | None = None,
    ) -> Prepared:
        """The run's data: its shards, wherever they are found, or else made again from its source.

        ValueError: neither is there, or the source no longer gives these tokens.
        """
        if data.source.startswith(TASK):
            return self._same(prepare(data), run, data)
        places = self._places(run, data)
        reopened = reopen(places, self.train, tokenizer, data.normalised, verify)
        if reopened is not None:
            return self._same(replace(reopened, text=self.text), run, data)
        try:
            return self._same(prepare(data, progress=progress, verify=verify), run, data)
        except ValueError as error:
            raise ValueError(
                f"no token shards of {run} in {run / OWN} or where they were (--source TEXT scores another text), "
                f"and {error}"
            ) from None

    def _places(self, run: Path, data: DataConfig) -> list[Path]:
        """Folders where its shards may lie, or that may hold them."""
        return [*(run / p for p in self.places), run / OWN, run.parent / Path(data.folder).name, Path(data.folder)]

    def changed(self, data: DataConfig) -> bool:
        """Whether the source is gone, or not what the shards were made of."""
        if data.source.startswith(TASK) or self.text is None:
            return False
        try:
            return data_fingerprint(data) != self.text
        except (ValueError, OSError):
            return True

    def _same(self, prepared: Prepared, run: Path, data: DataConfig) -> Prepared:
        same = prepared.train.hash == self.train and self.val in (None, prepared.val.hash)
        require(
            same,
            f"the text of {data.source} has changed since {run} was trained, so nothing of it is known to be held out; "
            f"restore it or the token shards, or score it as another text with --source {data.source}",
        )
        return prepared


def recorded(prepared: Prepared, run: Path) -> dict[str, Any]:
    """What a checkpoint says of its data, see `RunTokens.of`."""
    if isinstance(prepared.train, TaskRows):
        return {"data": prepared.train.hash}
    home = prepared.folder.absolute()
    places = [os.path.relpath(home, run.absolute()), str(home)]
    return {"data": prepared.train.hash, "shards": {"val": prepared.val.hash, "places": places, "text": prepared.text}}


def of_another(extra: dict[str, Any], run: Path, data: DataConfig, made: tuple[Path, Path]) -> dict[str, Any]:
    """What a checkpoint of `run` says of its tokens, as a run made from it has to say it.

    made: where that run is written, and where it will lie. Places are named from there, and in full. Shards that lie
    within `run` are linked or copied, since it may be moved.
    """
    aside, out = made
    tokens, recorded = RunTokens.of(extra), {name: extra[name] for name in RECORDED if name in extra}
    if tokens is None or "shards" not in recorded:
        return recorded
    home = shards_of(tokens._places(run, data), tokens.train)
    if home is None:
        return recorded
    if home.resolve().is_relative_to(run.resolve()):
        shutil.copytree(home, aside / OWN, copy_function=_linked)
        home = out / OWN
    places = [os.path.relpath(home.resolve(), out.resolve()), str(home.resolve())]
    return recorded | {"shards": recorded["shards"] | {"places": places}}


def _linked(source: str, target: str) -> None:
    """One file under two names where the disk allows it, else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def without_places(extra: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds, without the folders in which its shards lay."""
    shards = extra.get("shards")
    return extra | {"shards": shards | {"places": []}} if isinstance(shards, dict) else extra
