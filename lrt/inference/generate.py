"""Decoding: prefill, one exact step, generation, and the score of the decoded model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor

from lrt.config.decoding import DEFAULT_MODE, PrefillOptions, SamplingParams
from lrt.inference.batch import Emission, Request, RunningBatch
from lrt.inference.prefill import Prefill, next_logits, prefill
from lrt.inference.streaming import DecodeBytes, TextStream
from lrt.model.kv_cache import KVCache
from lrt.model.loss import token_nats
from lrt.model.lrt import LRT
from lrt.model.recurrence import Effort, OneToken, check_tokens, mode_name, states, total
from lrt.model.shapes import StreamBND, TokensBN, check_targets
from lrt.utils.require import require

SHARED_FROM = 16
"""Tokens from which a shared beginning has a prefill of its own."""
LOGITS_AT_ONCE = 2**25
"""Logits that scores and comparisons compute at a time, which bounds their memory."""


class Scored(NamedTuple):
    """Per-token scores."""

    nats: Tensor
    """Negative log-likelihood of each target, [B, T], float32 at least; 0 where the target is IGNORE."""
    mode: str
    """`exact`, `zero_memory`, or such as `sweeps(interleaved-8, 0.0001)`."""
    effort: Effort


@torch.no_grad()
def score(model: LRT, tokens: TokensBN, targets: TokensBN, *, mode: str | PrefillOptions = DEFAULT_MODE) -> Scored:
    """Negative log-likelihood of every target under the decoded model, in nats.

    `tokens` and `targets` are int64 [B, T]; targets may be IGNORE. The mode is one of `prefill`'s, or `zero_memory`:
    one parallel pass without memory. There is no limit to T but memory.
    ValueError: tokens or targets that the model does not have, or not one target for each token.
    """
    check_tokens(model, tokens)
    check_targets(tokens, targets)
    targets = targets.long()
    nats, parts = [], []
    for first, hidden, effort in states(model, tokens, mode):
        n = hidden.shape[1]
        nats.append(_nats(model, hidden, targets[:, first : first + n]))
        parts.append((n, effort))
    return Scored(torch.cat(nats, dim=1), mode_name(model, mode), total(parts))


class Generated(NamedTuple):
    """One step of a batch."""

    emissions: list[Emission]
    """One per row that was still running."""
    cache: KVCache
    """The state, which has taken in everything but this step's tokens."""


@torch.no_grad()
def generate(
    model: LRT,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    samples: int = 1,
    decode_bytes: DecodeBytes | None = None,
    cache: KVCache | None = None,
    capacity: int | None = None,
    mode: str | PrefillOptions = DEFAULT_MODE,
    run: OneToken = next_logits,
    drafts: int = 0,
) -> Iterator[Generated]:
    """Continue prompts together, a token per step, until every row has stopped.

    Args:
        prompts: token ids, one list per row, of any lengths. A beginning that all share is taken in once.
        sampling: for all rows, or one per prompt.
        samples: answers per prompt; the prompt is taken in once, row `i * samples + j` is answer j to prompt i.
        decode_bytes: a tokenizer's, to stream text and to find stop texts.
        cache: a state to continue, one row per prompt. It has not taken in the last token it emitted: begin the
            prompt with that. Otherwise an empty one of `capacity` tokens; by default what prompts and answers need,
            at most the model's context, and answers end where it is full.
        mode: how the prompts are taken in, see `prefill`.
        run: `next_logits`, or what `compiled` returns.
        drafts: most tokens that are guessed ahead from what the text has repeated, and checked together; none by
            default, since it pays on repetitive text alone (docs/decoding.md). The tokens are the same.

    Raises:
        ValueError: as `prefill`; stop texts without `decode_bytes`; not one sampling per prompt; a row whose logits
            are not finite.
    """
    all_params = [sampling or SamplingParams()] * len(prompts) if not isinstance(sampling, Sequence) else list(sampling)
    _check_requests(prompts, all_params, samples, decode_bytes)
    require(drafts >= 0, f"drafts is {drafts}; give the most tokens to guess ahead, or 0 for none")
    if cache is None and capacity is None:
        needed = max(len(p) + s.max_new_tokens for p, s in zip(prompts, all_params, strict=True))
        capacity = min(model.config.context, needed)
    start = _taken_in(model, prompts, mode, cache, capacity)
    rows = torch.arange(len(prompts), device=model.device).repeat_interleave(samples)
    cache, logits = start.cache if samples == 1 else start.cache.take(rows), start.logits[rows]
    shapes = [2**i for i in range(1, len(rows).bit_length())]  # rows that have all stopped leave the step
    batch = RunningBatch(model, cache, logits=logits, run=run, shapes=shapes, drafts=drafts)
    for request in _requests(model, all_params, samples, cache, decode_bytes):
        batch.join(request, prompts[request.row // samples])
    while True:
        emissions = batch.draw()
        if faults := [e for e in emissions if e.fault]:
            raise ValueError(f"row {faults[0].row}: {faults[0].fault}; are the weights those of a finished training?")
        yield Generated(emissions, batch.cache)
        if not batch.running:
            return
        batch.advance()


def _taken_in(
    model: LRT,
    prompts: Sequence[Sequence[int]],
    mode: str | PrefillOptions,
    cache: KVCache | None,
    capacity: int | None,
) -> Prefill:
    """Prefill; without a state to continue, what all prompts begin with is taken in by one row for all."""
    tokens, lengths = _padded(prompts, model.device)
    check_tokens(model, tokens)
    n = _shared(prompts) if cache is None and len(prompts) > 1 else 0
    if n >= SHARED_FROM and int(lengths.max()) <= (capacity or 0):
        one = prefill(model, tokens[:1, :n], mode=mode, capacity=capacity).cache
        cache = one.take(torch.zeros_like(lengths))
        tokens, lengths = tokens[:, n:], lengths - n
    return prefill(model, tokens, mode=mode, lengths=lengths, cache=cache, capacity=capacity)


def _shared(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens at the beginning that are the same in all prompts; at least the last of the shortest is left out."""
    same = takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False))
    return min(sum(1 for _ in same), min(map(len, prompts)) - 1)


def _requests(
    model: LRT, all_params: list[SamplingParams], samples: int, cache: KVCache, decode_bytes: DecodeBytes | None
) -> list[Request]:
    bos = () if model.config.bos is None else (model.config.bos,)
    requests = []
    for row, length in enumerate(cache.length.tolist()):
        params = all_params[row // samples]
        stop = bos if params.stop_tokens is None else params.stop_tokens
        stream = None if decode_bytes is None else TextStream(decode_bytes, params.stop)
        left = min(params.max_new_tokens, cache.capacity - length + 1)
        requests.append(Request(row, params, stop, left, stream, row % samples, length))
    return requests


def _padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[TokensBN, Tensor]:
    """Prompts as a right-padded tensor [B, T], and their lengths [B]."""
    empty = [i for i, prompt in enumerate(prompts) if len(prompt) == 0]
    if empty:
        raise ValueError(f"prompt {empty[0]} is empty: give at least 1 token (BOS opens a text)")
    lengths = [len(prompt) for prompt in prompts]
    rows = [[*prompt, *[prompt[0]] * (max(lengths) - len(prompt))] for prompt in prompts]
    return torch.tensor(rows, device=device), torch.tensor(lengths, device=device)


def _is_list(prompt: object) -> bool:
    """Whether it may be a list of tokens: no token, no text, no table."""
    flat = not isinstance(prompt, Tensor) or prompt.dim() == 1
    return isinstance(prompt, Sized) and not isinstance(prompt, str) and flat


def _check_requests(
    prompts: Sequence[Sequence[int]], all_params: list[SamplingParams], samples: int, decode_bytes: DecodeBytes | None
) -> None:
    require(all(map(_is_list, prompts)), "prompts are lists of token ids, one a row: [[1, 2, 3]] is one prompt")
    if len(prompts) == 0:
        raise ValueError("there are no prompts: give at least one list of token ids")
    if len(all_params) != len(prompts) or samples < 1:
        raise ValueError(
            f"{len(all_params)} samplings, {samples} samples for {len(prompts)} prompts: give one sampling a prompt"
        )
    if decode_bytes is None and any(params.stop for params in all_params):
        raise ValueError("stop texts need decode_bytes: pass the tokenizer's, or stop at stop_tokens")


def positions_at_once(model: LRT, rows: int) -> int:
    """Positions of `rows` rows whose logits are computed together, at least 1: about LOGITS_AT_ONCE numbers."""
    return max(1, LOGITS_AT_ONCE // (rows * model.config.vocab_size))


def _nats(model: LRT, hidden: StreamBND, targets: TokensBN) -> Tensor:
    at_once = positions_at_once(model, len(hidden))
    parts = zip(hidden.split(at_once, dim=1), targets.split(at_once, dim=1), strict=True)
    return torch.cat([token_nats(model, h, t) for h, t in parts], dim=1)
