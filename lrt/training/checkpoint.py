"""Checkpoints: safetensors and JSON in a folder that is written aside, synced, renamed and verified on load. No pickle.

A run folder holds

    config.json                       the resolved configuration
    tokenizer/                        what decodes its tokens
    metrics.jsonl                     one JSON object a line
    checkpoints/step_00001000/        model.safetensors, optimizer.safetensors, meta.json, and SHA256SUMS of them
                                      (a folder ending in .tmp was being written; the next save removes it)
    result.json                       the final evaluation
"""

from __future__ import annotations

import contextlib
import difflib
import math
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrt.config.run import RunConfig, from_dict, to_dict
from lrt.data.run_tokens import without_places
from lrt.data.tokenizer import Tokenizer, load_tokenizer
from lrt.inference.loaded import Loaded
from lrt.model.lrt import LRT
from lrt.utils.checksums import SUMS, file_hash, has_hash, sums_text
from lrt.utils.dtensor import fill
from lrt.utils.files import (
    is_there,
    one_line,
    read_json,
    read_text,
    require_fields,
    require_kind,
    sync,
    write_json,
    write_text,
)
from lrt.utils.require import require
from lrt.utils.tensor_files import read_tensors, write_tensors

FORMAT, BEFORE = 2, 1
"""Format 1 had no SHA256SUMS: the hashes of its tensors stand in meta.json, and nothing covers that."""
BRIEF = "bfloat16"
MODEL, OPTIMIZER, META = "model.safetensors", "optimizer.safetensors", "meta.json"
NAME = re.compile(r"step_([0-9]{8}|[1-9][0-9]{8,17})")
"""Folders of this name are checkpoints, one name a step; a copy under any other name is its owner's."""
LEFT = re.compile(NAME.pattern + r"(\.old)?\.tmp")
TOKENIZER = "tokenizer/tokenizer.json"
"""In the run's folder; checkpoints know its SHA-256."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder."""

    folder: Path
    step: int
    config: RunConfig
    extra: dict[str, Any]
    """What the training stored beside it: the BPB at this step, data hash, what was spent so far."""
    tokenizer: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the files in the run's tokenizer folder, by name; empty if there were none, or before it was kept."""
    stored: str = "float32"
    """Number type of the stored weights: `bfloat16` in a folder that `write_weights` made."""

    def model(self, device: str | torch.device = "cpu") -> LRT:
        """The model with its weights, in evaluation mode; a weight that does not fit raises ValueError naming it."""
        model = LRT(self.config.model, device)
        load_weights(model, self.weights())
        return model.eval()

    def weights(self) -> dict[str, Tensor]:
        """The model's tensors by name, on the CPU, as the model holds them."""
        weights = read_tensors(self.folder / MODEL, "weights").tensors
        if self.stored != BRIEF:
            return weights
        for name, value in weights.items():
            require(value.dtype == torch.bfloat16, f"weight {name} is {value.dtype}, not {BRIEF} as {META} says")
        return {name: value.float() for name, value in weights.items()}

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's tensors by name."""
        return read_tensors(self.folder / OPTIMIZER, "optimizer state").tensors


def save(
    run: Path,
    step: int,
    config: RunConfig,
    weights: LRT | dict[str, Tensor],
    optimizer: dict[str, Tensor],
    *,
    extra: dict[str, Any],
    keep: int,
) -> Path:
    """Write the checkpoint of `step`; keep it, the `keep` - 1 before it, and the best of all by decoded BPB.

    OSError: it cannot be written; then nothing of it stays, and the earlier ones are as they were.
    """
    folder = run / "checkpoints" / f"step_{step:08d}"
    aside = folder.with_name(folder.name + ".tmp")
    for left in folder.parent.glob("*.tmp"):  # of writes that were killed
        if LEFT.fullmatch(left.name):
            shutil.rmtree(left, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        weights = weights.state_dict() if isinstance(weights, LRT) else weights
        for name, tensors in ((MODEL, weights), (OPTIMIZER, optimizer)):
            write_tensors({k: v.detach().contiguous() for k, v in tensors.items()}, aside / name)
            (aside / name).chmod(aside.stat().st_mode & 0o666)  # as the umask has it; the library lets nobody read
            sync(aside / name)
        checksums = {name: file_hash(aside / name) for name in (MODEL, OPTIMIZER)}
        meta = {"format": FORMAT, "step": step, "sha256": checksums, "config": to_dict(config), "extra": extra}
        meta |= {"stored": BRIEF} if all(x.dtype == torch.bfloat16 for x in weights.values()) else {}
        write_json(aside / META, meta | {"tokenizer": tokenizer_sums(run)})
        write_text(aside / SUMS, sums_text(checksums | {META: file_hash(aside / META)}))
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        reason = error.strerror or str(error)[:60]
        raise OSError(
            f"{folder.name} could not be written ({reason}); free space or choose another disk, then use --resume {run}"
        ) from error
    replaced = folder.with_name(folder.name + ".old.tmp")
    if folder.exists():  # resumed past a checkpoint that did not verify
        os.replace(folder, replaced)
    os.replace(aside, folder)
    _sync_folder(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    _prune(run, step, keep)
    return folder


def _prune(run: Path, step: int, keep: int) -> None:
    """Remove what lies before the `keep` newest up to `step`, but the best; never what a link leads to."""
    older = [p for p in checkpoints(run) if _step(p) <= step]  # a newer one did not verify: it was resumed past
    best = min(older, key=_score)
    for old in older[:-keep]:
        if not old.is_symlink() and (old != best or _score(old) == math.inf):
            shutil.rmtree(old, ignore_errors=True)


def _step(folder: Path) -> int:
    """The step that a checkpoint's name says; -1 for any other name."""
    match = NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1


def tokenizer_sums(run: Path) -> dict[str, str]:
    """SHA-256 of every file in the run's tokenizer folder, by its name there."""
    folder = (run / TOKENIZER).parent
    files = sorted(p for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else []
    return {str(p.relative_to(folder)): file_hash(p) for p in files}


def _score(folder: Path) -> float:
    """The decoded BPB that a checkpoint was evaluated with; infinite where it was not, or cannot be read."""
    try:
        return float(read_json(folder / META, "checkpoint description")["extra"]["bpb"]["decoded"])
    except (ValueError, KeyError, TypeError, OSError):
        return math.inf


class Writer:
    """Writes one thing after the other; with `background`, in a thread of its own while training goes on."""

    def __init__(self, background: bool):
        self.background = background
        self._pool = ThreadPoolExecutor(1, "lrt-checkpoint") if background else None
        self._running: Future[None] | None = None

    def submit(self, work: Callable[[], None]) -> None:
        """Do `work`, or begin it once what was begun before is done; an error of that is raised here."""
        self.wait()
        if self._pool is None:
            work()
        else:
            self._running = self._pool.submit(work)

    def wait(self) -> None:
        """Until nothing is being written; raises what went wrong meanwhile."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def settle(self) -> str:
        """Wait where something else has gone wrong already; what went wrong here too, in one line."""
        try:
            self.wait()
        except Exception as error:
            return one_line(error)
        return ""


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoint folders of a run, by their steps."""
    return sorted((p for p in (run / "checkpoints").glob("step_*") if _step(p) >= 0 and p.is_dir()), key=_step)


def open_checkpoint(folder: Path, verify: bool = True) -> Checkpoint:
    """Verify and open a checkpoint folder, or the newest checkpoint of a run folder.

    verify: whether checksums are compared; another process may have done so.
    """
    folder = Path(folder)
    if not folder.is_dir():
        near = _near(folder)
        fault = "is not a folder" if folder.exists() else "does not exist"
        raise ValueError(f"{folder} {fault}; {near}give the folder of a run or of one of its checkpoints")
    if not (folder / META).exists():
        saved = checkpoints(folder)
        if not saved:
            raise ValueError(f"{folder} {_instead(folder)}")
        folder = saved[-1]
    meta, sums = _described(folder)
    for name in (MODEL, OPTIMIZER):
        if not (folder / name).is_file() or (verify and not has_hash(folder / name, sums[name])):
            raise ValueError(f"{folder / name} is missing, truncated or altered (checksum); use another checkpoint")
    config = from_dict(RunConfig, meta.get("config"), str(folder / META))
    stored = meta.get("stored", "float32")
    require(stored in ("float32", BRIEF), f"{folder / META}: stored is {one_line(stored, 40)}, not float32 or {BRIEF}")
    tokenizer = _tokenizer(meta.get("tokenizer"), folder / META)
    return Checkpoint(folder, meta["step"], config, meta["extra"], tokenizer, stored)


def _near(folder: Path) -> str:
    """Where a folder of about that name lies instead, as the middle of a message: in runs/, or spelled otherwise."""
    beside = "runs" / folder
    if folder.is_absolute() or not beside.is_dir():
        spelled = [p.name for p in folder.parent.glob("*") if p.is_dir()]
        close = difflib.get_close_matches(folder.name, spelled, 1)
        beside = folder.parent / close[0] if close else folder
    return f"did you mean {beside}? Else " if beside != folder else ""


def _instead(folder: Path) -> str:
    """What a folder without checkpoints holds, as the end of a message: runs in it, or a folder below."""
    if NAME.fullmatch(folder.name):
        return f"lacks {META}; restore it, or use another checkpoint"
    below = [p for pattern in ("*", "*/*") for p in folder.glob(pattern) if p.is_dir() and checkpoints(p)]
    runs = sorted(map(str, below))
    if not runs:
        return "holds no checkpoint; train first, or give the folder of a run"
    return f"holds the run{'s' * (len(runs) > 1)} {', '.join(runs[:8])}{', ...' * (len(runs) > 8)}; choose one"


def _described(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """A checkpoint's description, covered by SHA256SUMS, and the hashes that its files must have."""
    meta = read_json(folder / META, "checkpoint description")
    if meta.get("format") not in (FORMAT, BEFORE):
        raise ValueError(f"{folder / META} has format {meta.get('format')!r}, this version reads {FORMAT}; upgrade lrt")
    require_fields(meta, {"step": int, "sha256": dict, "extra": dict}, str(folder / META))
    step, sums = meta["step"], meta["sha256"]
    if set(sums) != {MODEL, OPTIMIZER}:
        raise ValueError(f"{folder / META} does not say what {MODEL} and {OPTIMIZER} hash to; use another checkpoint")
    if meta["format"] == FORMAT or is_there(folder / SUMS):
        written = read_text(folder / SUMS, "checksums")
        if written != sums_text(sums | {META: file_hash(folder / META)}):
            raise ValueError(f"{folder / META} is not what {SUMS} says (checksum); use another checkpoint")
    if _step(folder) not in (-1, step):
        raise ValueError(f"{folder} holds step {step} ({META}), not what its name says; rename it, or use another")
    return meta, sums


def _tokenizer(recorded: Any, where: Path) -> dict[str, str]:
    """Hashes of the tokenizer's files by name; the first format named that of tokenizer.json alone."""
    sums = {"tokenizer.json": recorded} if isinstance(recorded, str) else recorded or {}
    for value in require_kind(sums, dict, f"{where}: tokenizer").values():
        require_kind(value, str, f"{where}: tokenizer")
    return sums


def newest_valid(run: Path, verify: bool = True) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint of a run that verifies (see `open_checkpoint`); a line for each newer one that did not."""
    problems: list[str] = []
    for folder in reversed(checkpoints(run)):
        try:
            return open_checkpoint(folder, verify), problems
        except ValueError as error:
            problems.append(str(error))
    return None, problems


def require_same(config: RunConfig, started: Checkpoint) -> None:
    """ValueError naming a field, unless the checkpoint was trained as `config` says in all that decides the outcome."""
    name, had = config.name, started.config.name
    require(
        name == had, f"--name is {name}, but {started.folder} is of the run {had}; give that, or choose another --out"
    )
    for part, names in {
        "model": None, "optim": None, "data": None,
        "train": ("schedule", "consistency", "batch", "length", "horizon", "seed", "dtype"),
    }.items():  # fmt: skip
        requested, had = to_dict(getattr(config, part)), to_dict(getattr(started.config, part))
        for name in names or requested.keys() - {"folder"}:  # where token shards lie decides nothing
            same = requested[name] == had[name]
            require(
                same,
                f"--{part}.{name} is {requested[name]}, but {started.folder} was trained with {had[name]}; give that, "
                "or choose another --out",
            )


def load_model(folder: str | Path, device: str | torch.device = "cpu") -> Loaded:
    """The model and tokenizer of a run folder (its newest checkpoint) or of one checkpoint folder."""
    checkpoint = open_checkpoint(Path(folder))
    tokenizer, run = run_tokenizer(checkpoint), checkpoint.folder.parent.parent
    if tokenizer.vocab_size > checkpoint.config.model.vocab_size:  # a smaller one: other families pad theirs
        raise ValueError(
            f"{run / 'tokenizer'} has {tokenizer.vocab_size} tokens, the model {checkpoint.config.model.vocab_size}; "
            "they do not belong together: restore the run's own tokenizer"
        )
    tokenizer.widen(checkpoint.config.model.vocab_size)
    return Loaded(
        checkpoint.model(device), tokenizer, checkpoint.config, checkpoint.step, checkpoint.folder, run,
        checkpoint.extra, checkpoint.stored,
    )  # fmt: skip


def write_weights(loaded: Loaded, folder: Path) -> None:
    """Write a run folder of weights in bfloat16 and the tokenizer, without the optimizer's state.

    Every command takes it but `--resume`; `--init-from` trains on from it. Where the token shards lay stays out:
    folders of this machine are nobody's business elsewhere. OSError: it cannot be written.
    """
    stored = open_checkpoint(loaded.folder, verify=False)
    weights = {name: x.to(torch.bfloat16) for name, x in loaded.model.state_dict().items()}
    shutil.copytree(loaded.run / "tokenizer", folder / "tokenizer")
    write_json(folder / "config.json", to_dict(loaded.config))
    save(folder, loaded.step, loaded.config, weights, {}, extra=without_places(stored.extra), keep=1)


def run_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer in a checkpoint's run. ValueError: it is not the one that the checkpoint was saved with."""
    run = checkpoint.folder.parent.parent
    tokenizer, sums = load_tokenizer(run / "tokenizer"), tokenizer_sums(run)
    for name, saved in checkpoint.tokenizer.items():
        if sums.get(name) != saved:
            raise ValueError(
                f"{run / 'tokenizer' / name} is not the one that {checkpoint.folder} was saved with (checksum): "
                "restore the run's own tokenizer"
            )
    return tokenizer


def load_weights(model: LRT, weights: dict[str, Tensor]) -> None:
    """Copy weights into the model. ValueError: missing, extra, not finite, of another shape or number type."""
    own = model.state_dict()
    for name in sorted(own.keys() ^ weights.keys()):
        where = "the model, not the checkpoint," if name in own else "the checkpoint, not the model,"
        raise ValueError(f"{where} has the weight {name}; the checkpoint is of another model: use its own config")
    for name, value in weights.items():
        if value.shape != own[name].shape or value.dtype != own[name].dtype:
            kinds = [f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in (value, own[name])]
            difference = f"{kinds[0]} in the checkpoint, {kinds[1]} in the model"
            raise ValueError(f"weight {name} is {difference}; the checkpoint is of another model: use its own config")
        require(bool(value.isfinite().all()), f"weight {name} holds values that are not finite; use another checkpoint")
    for name, value in weights.items():
        fill(own[name], value)


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, where folders can be synced."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
