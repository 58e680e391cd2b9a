"""Bits per byte of one model on the same rows in every mode (docs/method.md#measures).

BPB is total nats / (ln 2 x bytes of the target tokens); special tokens stand for no bytes and count neither way.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lrt.config.run import DataConfig
from lrt.data.loader import BatchShape, RowSource
from lrt.data.mixture import Mixture
from lrt.data.synthetic import TaskRows, batches
from lrt.data.tokenizer import Tokenizer
from lrt.evaluation.contraction import SWEEPS, contraction, exact_states, sweep_errors
from lrt.evaluation.score_names import ANSWERS
from lrt.inference.generate import score
from lrt.model.loss import token_nats
from lrt.model.lrt import LRT
from lrt.model.run_passes import run_passes
from lrt.model.shapes import IGNORE, TokensBN
from lrt.passes import columns, no_grad_pass
from lrt.schedule import Curriculum, Schedule
from lrt.utils.distributed import World

COMPARED = 16
"""Rows whose sweeps are compared with exact decoding."""
KEYS_AT_ONCE = 2**27
"""Numbers of keys and values that a comparison holds at a time, twice."""


class Rows(NamedTuple):
    """Validation rows, each [B, T]."""

    tokens: TokensBN
    targets: TokensBN
    starts: Tensor
    bytes: Tensor
    """UTF-8 bytes of the target tokens, 0 for special ones."""


class ScoredText(NamedTuple):
    """What text a score is of."""

    name: str
    """Such as `the validation split of python`."""
    share: float | None
    """Share of it that the rows are, by tokens or bytes; None where its size is unknown, or it has no end."""
    normalised: bool = False
    """Whether its tokens do not spell it: bits per byte are of the normalised text."""


class HeldOut(NamedTuple):
    """Rows, and what text they are of."""

    rows: Rows
    text: ScoredText


@dataclass(frozen=True)
class BPB:
    """Bits per byte in every mode, in the evaluation's float type."""

    zero_memory: float
    """One parallel pass, no memory."""
    passes: tuple[float, ...]
    """Each pass of the schedule that makes logits, over its own positions."""
    merged: float
    """The last writer of each position: parallel BPB."""
    decoded: float
    """Exact recurrence, token by token."""
    by_position: dict[str, float]
    """Decoded, by the target's position in the row: `1`, `2-3`, `4-7`, ..."""
    residuals: tuple[float, ...]
    """Largest relative change of any memory vector in each Jacobi sweep from zero memory."""
    contraction: float
    """Factor by which a sweep shrinks that change (geometric mean); 0 without recurrence."""
    kv_errors: tuple[float, ...]
    """Keys and values of a pass after 0, 1, 2, .. sweeps: root of their summed squared error over their summed squares
    in exact decoding. These and the two below are over at most COMPARED rows; empty without recurrence."""
    argmax_agreement: tuple[float, ...]
    """Share of positions whose most probable token is that of exact decoding, of the same passes."""
    kl: tuple[float, ...]
    """KL divergence of the same passes' distributions from exact decoding's, mean nats per position."""
    rows: int
    """Rows scored."""
    schedule: str
    """Schedule of `passes` and `merged`."""
    text: str
    """What text the rows are of."""
    share: float | None
    """Share of it that they are; None where its size is unknown."""
    normalised: bool
    """Whether the tokens do not spell that text: figures are bits per byte of the normalised text."""

    @property
    def live_gap(self) -> float:
        """Decoded minus merged: how far the training graph's score flatters (or not) the decoder."""
        return self.decoded - self.merged

    def as_dict(self) -> dict[str, Any]:
        """Plain data, the live gap included."""
        return asdict(self) | {"live_gap": self.live_gap}


def validation_rows(stream: RowSource | Mixture | TaskRows, tokenizer: Tokenizer, *, rows: int, length: int) -> Rows:
    """`rows` fixed rows spread over the validation split, or as many as there are.

    Each answer of a task counts as one byte: its BPB is bits per answer.
    """
    if isinstance(stream, TaskRows):
        batch = stream.batch(rows, length)
        return Rows(batch.tokens, batch.targets, batch.starts, (batch.targets != IGNORE).long())
    most = stream.most_rows(length) if isinstance(stream, Mixture) else max(1, (len(stream) - 1) // length)
    batch = batches(stream, BatchShape(batch=min(rows, most), length=length, bos=tokenizer.bos, seed=0)).batch(0)
    return Rows(batch.tokens, batch.targets, batch.starts, target_bytes(tokenizer, batch.tokens, batch.targets))


def target_bytes(tokenizer: Tokenizer, tokens: Tensor, targets: Tensor) -> Tensor:
    """Bytes of the text that targets stand for, int64 like them; 0 for special and ignored ones.

    A space that the tokenizer puts in front of a document is no byte of it, and is not counted unless its token spells
    nothing else.
    """
    sizes = torch.from_numpy(tokenizer.token_bytes().astype(np.int64))[targets.clamp(min=0)]
    if tokenizer.space_in_front:
        sizes -= ((tokens == tokenizer.bos) & (sizes > 1)).long()
    return sizes.masked_fill(targets == IGNORE, 0)


def held_out_name(data: DataConfig, changed: bool = False) -> str:
    """What a training holds out, by name; `changed`: the text is no longer what its tokens were made of."""
    name = data.validation_source or f"the validation split of {data.source}"
    return name + (" as it was tokenised" if changed else "")


def of_split(stream: RowSource | Mixture | TaskRows, rows: Rows, name: str, normalised: bool = False) -> HeldOut:
    """Rows of the text called `name`, see `held_out_name`."""
    if isinstance(stream, TaskRows):
        return HeldOut(rows, ScoredText(name, None, normalised))
    return named(rows, name, min(1.0, rows.tokens.numel() / (len(stream) - 1)), normalised)


def named(rows: Rows, name: str, share: float | None, normalised: bool) -> HeldOut:
    """Rows with the name of their text, which says so where answers alone are scored. ValueError: nothing is."""
    if not (rows.bytes > 0).any():
        raise ValueError(f"{len(rows.tokens)} rows of {name} hold no answer to score: give more rows, or more text")
    alone = bool((rows.targets == IGNORE).any())
    return HeldOut(rows, ScoredText(ANSWERS + name if alone else name, share, normalised))


def bits_per_byte(nats: Tensor, sizes: Tensor) -> float:
    """BPB of per-token `nats` whose targets stand for `sizes` bytes; both of one shape."""
    total = int(sizes.sum())
    return float(nats[sizes > 0].double().sum()) / (math.log(2) * total) if total else math.nan


@torch.no_grad()
def evaluate(
    model: LRT, schedule: Schedule | Curriculum, held_out: HeldOut, *, batch: int = 64, world: World | None = None
) -> BPB:
    """Score the same rows in every mode; ranges in the schedule are taken at their upper end.

    Of several processes each scores its share of the rows, and all get the whole result.
    """
    rows, text = held_out
    training, world = model.training, world or World(model.device)
    model.eval()
    own = _share(rows, world)
    parts = [
        _scores(model, schedule.at_largest(), Rows(*(x[i : i + batch] for x in own)))
        for i in range(0, len(own.tokens), batch)
    ]
    model.train(training)

    def gathered(own: list[Tensor]) -> Tensor:
        return world.gather(torch.cat(own))[: len(rows.tokens)]

    zero, merged, decoded = (gathered([getattr(p, name) for p in parts]) for name in ("zero", "merged", "decoded"))
    sizes = rows.bytes
    passes = []
    for i, positions in enumerate(parts[0].slices):
        passes.append(bits_per_byte(gathered([p.passes[i] for p in parts]), sizes[:, columns(positions)]))
    residuals = world.gather(torch.tensor([p.residuals for p in parts])).amax(0).tolist()
    return BPB(
        zero_memory=bits_per_byte(zero, sizes),
        passes=tuple(passes),
        merged=bits_per_byte(merged, sizes),
        decoded=bits_per_byte(decoded, sizes),
        by_position=by_position(decoded, sizes),
        residuals=tuple(residuals),
        contraction=contraction(residuals),
        **_against_exact(model, Rows(*(x[:COMPARED] for x in rows)), world),
        rows=len(sizes),
        schedule=str(schedule.at_largest()),
        text=text.name,
        share=text.share,
        normalised=text.normalised,
    )


def _against_exact(model: LRT, rows: Rows, world: World) -> dict[str, tuple[float, ...]]:
    """Passes after so many sweeps, compared with exact decoding: means over the rows."""
    if not model.config.memory.recurrent:
        return {"kv_errors": (), "argmax_agreement": (), "kl": ()}
    own, c = _share(rows, world), model.config
    at_once = max(1, KEYS_AT_ONCE // (2 * own.tokens.shape[1] * c.layers * c.k * c.e))
    split = zip(*(x.to(model.device).split(at_once) for x in (own.tokens, own.starts)), strict=True)
    parts = [sweep_errors(model, ids, reset, exact_states(model, ids)) for ids, reset in split]
    kv, agreement, kl = (world.gather(torch.cat(x))[: len(rows.tokens)] for x in zip(*parts, strict=True))
    errors = (kv[..., 0].sum(0) / kv[..., 1].sum(0)).sqrt()
    figures = {"kv_errors": errors, "argmax_agreement": agreement.mean(0), "kl": kl.mean(0)}
    return {name: tuple(x.tolist()) for name, x in figures.items()}


def _share(rows: Rows, world: World) -> Rows:
    """This process's rows, equally many on each: the last ones score the first rows again, and that is cut off."""
    count = -(-len(rows.tokens) // world.size)
    own = torch.arange(world.rank * count, (world.rank + 1) * count) % len(rows.tokens)
    return rows if world.size == 1 else Rows(*(x[own] for x in rows))


def by_position(nats: Tensor, sizes: Tensor) -> dict[str, float]:
    """BPB in buckets of doubling position: the loss falls along the row as far as context helps.

    A last position that would stand alone joins the bucket before it: one position is noise.
    """
    length, by_position, low = nats.shape[1], {}, 1
    while low <= length:
        high = 2 * low if 2 * low < length else length + 1
        label = str(low) if high == low + 1 else f"{low}-{high - 1}"
        by_position[label] = bits_per_byte(nats[:, low - 1 : high - 1], sizes[:, low - 1 : high - 1])
        low = high
    return by_position


class _Scores(NamedTuple):
    zero: Tensor
    passes: list[Tensor]
    slices: list[range]
    merged: Tensor
    decoded: Tensor
    residuals: list[float]


def _scores(model: LRT, schedule: Schedule, rows: Rows) -> _Scores:
    device, length = model.device, rows.tokens.shape[1]
    tokens, targets, starts = (x.to(device) for x in rows[:3])
    passes, slices = [], []
    merged = torch.zeros(tokens.shape, dtype=torch.float64)
    for p, written, _ in run_passes(model, tokens, schedule.passes(length), starts):
        if written.hidden is not None:
            own = columns(p.positions)
            passes.append(token_nats(model, written.hidden, targets[:, own]).cpu().double())
            slices.append(p.positions)
            merged[:, own] = passes[-1]
    zero = score(model, tokens, targets, mode="zero_memory").nats.cpu().double()
    decoded = score(model, tokens, targets, mode="exact").nats.cpu().double()
    return _Scores(zero, passes, slices, merged, decoded, sweep_residuals(model, tokens, starts))


@torch.no_grad()
def sweep_residuals(model: LRT, tokens: TokensBN, starts: Tensor | None, sweeps: int = SWEEPS) -> list[float]:
    """Largest relative change of any row's and position's memory in each Jacobi sweep; empty without recurrence."""
    if not model.config.memory.recurrent:
        return []
    full = range(tokens.shape[1])
    changes: list[float] = []
    before = torch.zeros(())
    for _, written, _ in run_passes(model, tokens, [no_grad_pass(full)] * (sweeps + 1), starts):
        change = (written.memory - before).norm(dim=-1) / written.memory.norm(dim=-1)
        before = written.memory
        changes.append(float(change.max()))
    return changes[1:]
