"""What a forward of the transformers classes computes: the schedule's passes, a prefill, or one step on a cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from lrt.config.decoding import PrefillOptions
from lrt.integrations.hf.cache import Gained, Layer, RowState, memory_layer, require_goes_on, state_of, store
from lrt.integrations.hf.config import LRTConfig
from lrt.integrations.hf.documents import DocumentRows, pick, places, require_mask, require_positions, rows_of, unpacked
from lrt.integrations.hf.fold import Folded, PassStates, ScoredPass, Wanted, fold, in_order, recording, settled
from lrt.integrations.hf.objective import least_length, token_weights
from lrt.model.kv_cache import KVCache
from lrt.model.lrt import LRT
from lrt.model.recurrence import prefill_options, solve
from lrt.model.shapes import StreamBND, TokensBN
from lrt.model.state import PassInput
from lrt.passes import Pass, Passes, memory_in_loss
from lrt.schedule import Curriculum
from lrt.utils.require import require

FOLLOWING = "position_ids must go on from the cache's; begin another document without a cache"
PACKED = "rows that hold several documents have no {}; give them as rows of their own"


class Inputs(NamedTuple):
    """A batch as the forward was given it."""

    tokens: TokensBN
    mask: Tensor | None
    """[B, M] of the tokens so far and these; None: no padding."""
    positions: Tensor | None
    """[B, N] or [1, N]; None: as the mask implies."""
    cache: Cache | None
    use_cache: bool
    """Whether to fill one, if none is given."""
    wanted: Wanted


class Outcome(NamedTuple):
    """What it computes."""

    hidden: StreamBND
    """The head's input, [B, N, D]."""
    states: PassStates
    scored: list[tuple[DocumentRows, list[ScoredPass]]]
    """What a loss counts: documents of like length, each with its passes."""
    cache: Cache | None = None


def free_to_look(x: Tensor) -> bool:
    """Whether values may be looked at: not inside a graph, nor where one would wait for the device."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def by_schedule(core: LRT, config: LRTConfig, inputs: Inputs, step: int) -> Outcome:
    """The schedule's passes over every document, with their gradient; each position as the last pass leaves it."""
    schedule = Curriculum.parse(config.schedule).stages[-1][0].draw(config.seed, step)
    require_mask(inputs.mask, inputs.tokens)
    require_positions(inputs.positions, inputs.tokens)
    mask = None if inputs.mask is None else _cut(inputs.mask, inputs.tokens.shape[1])
    groups = rows_of(mask, inputs.positions, inputs.tokens)
    _require_unpacked(inputs, groups)
    hidden, states, scored = None, PassStates(), []
    for rows in groups:
        tokens = rows.take(inputs.tokens)
        n = tokens.shape[1]
        tokens = F.pad(tokens, (0, max(0, least_length(schedule) - n)))
        passes = schedule.passes(tokens.shape[1])
        folded = _reaching(core, passes, fold(core, tokens, passes, wanted=inputs.wanted))
        counts = dict(zip(passes, token_weights(schedule, passes), strict=True))
        scored.append((rows, [ScoredPass(p.positions, counts[p], h) for p, h in folded.passes if p.weight > 0]))
        hidden = rows.put(folded.hidden[:, :n], hidden)
        states = _in_batch(folded.states, rows, n, None)
    assert hidden is not None
    return Outcome(hidden, states.ending(hidden), scored)


def _require_unpacked(inputs: Inputs, groups: list[DocumentRows]) -> bool:
    """Whether every row is one document. ValueError: they are not, and states are wanted."""
    alone = len(groups) == 1 and len(groups[0].length) == len(inputs.tokens)
    require(alone or not inputs.wanted.any, PACKED.format("hidden states or attentions"))
    return alone


def _reaching(core: LRT, passes: Passes, folded: Folded) -> Folded:
    """The same, with zero-valued gradients, not missing ones, for parameters that only memory uses."""
    if memory_in_loss(passes) or not torch.is_grad_enabled():
        return folded
    zero = folded.hidden.new_zeros(()) + sum(0.0 * p.sum() for p in core.memory_parameters())
    zero = zero.to(folded.hidden.dtype)
    return folded._replace(hidden=folded.hidden + zero, passes=[(p, h + zero) for p, h in folded.passes])


def decoded(core: LRT, config: LRTConfig, inputs: Inputs) -> Outcome:
    """The decoded model: one step on a cache that holds memory, or several tokens by the configured prefill."""
    cache = inputs.cache
    if cache is not None and is_step(config, inputs.tokens, cache):
        return _step(core, config, inputs, cache)
    return _several(core, config, inputs)


def is_step(config: LRTConfig, tokens: Tensor, cache: Cache) -> bool:
    """Whether `tokens` [B, N, ..] are one a row, on top of a cache that holds memory."""
    return memory_layer(cache, config.num_hidden_layers).kept is not None and tokens.shape[1] == 1


def _several(core: LRT, config: LRTConfig, inputs: Inputs) -> Outcome:
    """Several tokens a row, or the first one: documents by the configured prefill."""
    tokens, cache = inputs.tokens, inputs.cache
    n = tokens.shape[1]
    used = 0 if cache is None else int(cache.get_seq_length())
    require_mask(inputs.mask, tokens)
    require_positions(inputs.positions, tokens)
    mask = inputs.mask if inputs.mask is None else _cut(inputs.mask, used + n)
    if cache is not None and used:
        seen = tokens.new_ones(len(tokens), used + n) if mask is None else mask
        require_goes_on(cache, core.config.layers, seen, n)
        _require_following(inputs.positions, seen, n)
        return _prefill(core, config, inputs, unpacked(seen[:, used:], tokens), seen[:, :used].bool())
    groups = rows_of(mask, inputs.positions, tokens)
    if _require_unpacked(inputs, groups):
        if inputs.use_cache and cache is None:
            inputs = inputs._replace(cache=DynamicCache(config=config))
        return _prefill(core, config, inputs, groups[0], tokens.new_zeros(len(tokens), 0).bool())
    require(cache is None, PACKED.format("cache"))
    hidden, scored = None, []
    for rows in groups:
        part = _prefill(core, config, inputs, rows, tokens.new_zeros(len(rows.length), 0).bool())
        hidden, scored = rows.put(part.scored[0][1][0].hidden, hidden), [*scored, *part.scored]
    assert hidden is not None
    return Outcome(hidden, PassStates(), scored)


def _cut(mask: Tensor, width: int) -> Tensor:
    narrow = f"the attention_mask has {mask.shape[1]} columns for {width} tokens so far; give one a token"
    require(mask.shape[1] >= width, narrow)
    beyond = f"the attention_mask has {mask.shape[1]} columns, of which only {width} may be 1: there are so many tokens"
    require(mask.shape[1] == width or not bool(mask[:, width:].any()), beyond)  # a static cache is wider
    return mask[:, :width]


def _require_following(positions: Tensor | None, seen: Tensor, n: int) -> None:
    """ValueError: positions that do not go on from what a cache holds."""
    if positions is not None:
        implied, real = places(seen)[:, -n:], seen[:, -n:].bool()
        same = (positions.expand_as(implied) == implied) | ~real
        require(bool(same.all()), FOLLOWING)


def _step(core: LRT, config: LRTConfig, inputs: Inputs, cache: Cache) -> Outcome:
    """One token per row on top of the cache: tensors in and out, so that it can be compiled."""
    tokens, layer, past = inputs.tokens, memory_layer(cache, core.config.layers), cache.get_seq_length()
    before = layer.kept
    assert before is not None
    queries, keys, real = _places_of_step(inputs, cache, past)
    require_positions(inputs.positions, tokens)
    if free_to_look(tokens):
        followed = inputs.positions is None or bool(((inputs.positions == queries) | ~real).all())
        require(followed, FOLLOWING)
        counted = torch.ones(len(tokens), int(past), dtype=torch.int64) if inputs.mask is None else inputs.mask
        require_goes_on(cache, core.config.layers, counted, 1)
    layers = [Layer(one, keys, queries) for one in cache.layers]
    reading = PassInput(queries, layers, before.m[:, None], before.last_token[:, None], before.document_start[:, None])
    with recording(core, inputs.wanted) as recorder:
        written = core.forward_pass(tokens, reading, core.starts(tokens))
    assert written.hidden is not None
    memory = torch.zeros_like(written.memory) if config.prefill == "zero_memory" else written.memory
    begins = before.document_start[:, None]
    begins = begins if written.starts is None else torch.where(written.starts, queries, begins)
    after = RowState(memory, tokens, begins, (queries + 1).expand_as(begins))
    layer.keep(after if inputs.mask is None else _where(real, after, before.map(lambda x: x[:, None])))
    rows = DocumentRows(None, torch.ones_like(tokens[:, 0]), *tokens.shape)
    scored = [ScoredPass(range(1), 1.0, written.hidden)]
    return Outcome(written.hidden, recorder.take().ending(written.hidden), [(rows, scored)], cache)


def _places_of_step(inputs: Inputs, cache: Cache, past: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Of a step after `past` slots: each row's position, [1] or [B, 1], those of the keys, and whether it is a token.

    A row's column may be padding, where a prompt is taken in by chunks of one: it is computed, and leaves nothing.
    """
    device = inputs.tokens.device
    column = torch.zeros(1, dtype=torch.int64, device=device) + past
    if inputs.mask is None:
        keys = torch.arange(cache.get_max_length() if cache.is_compileable else past + 1, device=device)
        return column, keys, torch.ones_like(column, dtype=torch.bool)
    queries = (inputs.mask.long().sum(1, keepdim=True) - 1).clamp(min=0)
    columns = torch.arange(inputs.mask.shape[1], device=device)
    keys = torch.where(columns == column, queries, places(inputs.mask))  # it sees itself at least
    return queries, keys, inputs.mask.index_select(1, column).bool()


def _where(real: Tensor, new: RowState, old: RowState) -> RowState:
    """States [B, 1, ..] of the rows for which `real` [B, 1] holds, others as they were."""
    return RowState(
        *(torch.where(real.unflatten(1, (1,) * (x.dim() - 1)), x, y) for x, y in zip(new, old, strict=True))
    )


def _prefill(core: LRT, config: LRTConfig, inputs: Inputs, rows: DocumentRows, seen: Tensor) -> Outcome:
    """Several tokens per row, by the configured mode, after the slots of the cache that are taken, `seen` [B, M]."""
    tokens = rows.take(inputs.tokens)
    n = tokens.shape[1]
    state = state_of(inputs.cache, core, seen, n)
    if config.prefill == "zero_memory":
        state = state._replace(memory=torch.zeros_like(state.memory))
    if config.prefill == "zero_memory" or inputs.wanted.any or differentiable(core, inputs):
        hidden, states, gained = _traced(core, config, inputs, rows, state)
    else:
        hidden, states, gained = _solved(core, config, tokens, rows.length, state)
    if inputs.cache is not None:
        store(inputs.cache, rows, gained)
    out = rows.put(hidden)
    states = _in_batch(states, rows, n, seen).ending(out)
    return Outcome(out, states, [(rows, [ScoredPass(range(n), 1.0, hidden)])], inputs.cache)


def differentiable(core: LRT, inputs: Inputs) -> bool:
    """Whether the result is to carry a gradient."""
    if not torch.is_grad_enabled():
        return False
    return any(p.requires_grad for p in core.parameters()) or core.embedding(inputs.tokens[:1, :1]).requires_grad


@torch.no_grad()
def _solved(
    core: LRT, config: LRTConfig, tokens: TokensBN, count: Tensor, state: KVCache
) -> tuple[StreamBND, PassStates, Gained]:
    hidden, memory, before = [], [], state
    for _, solved in solve(core, tokens, count, state, configured_options(core, config)):
        hidden, memory, state = [*hidden, solved.hidden], [*memory, solved.memory], solved.cache
    after = _states_after(core, tokens, torch.cat(memory, dim=1), before)
    return torch.cat(hidden, dim=1), PassStates(), Gained(state.keys, state.values, before.length, after)


def _traced(
    core: LRT, config: LRTConfig, inputs: Inputs, rows: DocumentRows, state: KVCache
) -> tuple[StreamBND, PassStates, Gained]:
    """The same by passes that carry a gradient and can be watched: sweeps without, then one pass over everything."""
    tokens = rows.take(inputs.tokens)
    n, buffer = tokens.shape[1], state.buffer()
    passes = [Pass(range(n), detach=True)]
    if config.prefill == "exact" and core.config.memory.recurrent:
        passes = [Pass(range(t, t + 1)) for t in range(n)]
    elif config.prefill == "sweeps" and core.config.memory.recurrent:
        buffer = settled(core, tokens, rows.length, state, configured_options(core, config))
    folded = fold(core, tokens, passes, buffer, inputs.wanted)
    slices = [segment.positions for segment in folded.buffer.segments]
    written = [segment.written for segment in folded.buffer.segments]
    keys, values = (
        tuple(in_order(slices, parts, n, 2) for parts in zip(*(kind(w) for w in written), strict=True))
        for kind in (lambda w: w.keys, lambda w: w.values)
    )
    memory = in_order(slices, [w.memory for w in written], n, 1)
    memory = torch.zeros_like(memory) if config.prefill == "zero_memory" else memory
    after = _states_after(core, tokens, memory, state)
    return folded.hidden, folded.states, Gained(keys, values, torch.zeros_like(state.length), after)


def _states_after(core: LRT, tokens: TokensBN, memory: StreamBND, before: KVCache) -> RowState:
    """What each row holds after 0, 1, .. of `tokens` [B, N], which wrote `memory` [B, N, D]; [B, N + 1, ..]."""
    taken = before.length[:, None] + torch.arange(tokens.shape[1] + 1, device=tokens.device)
    starts, begins = core.starts(tokens), before.document_start[:, None].expand_as(taken)
    if starts is not None:
        begun = torch.where(starts, taken[:, :-1], 0).cummax(1).values
        begins = torch.maximum(begins, F.pad(begun, (1, 0)))
    m = torch.cat((before.memory[:, None].to(memory.dtype), memory), dim=1)
    return RowState(m, torch.cat((before.last_token[:, None], tokens), dim=1), begins, taken)


def _in_batch(states: PassStates, rows: DocumentRows, n: int, seen: Tensor | None) -> PassStates:
    """PassStates of rows, of their first `n` places, in the columns of the batch; `seen` is the cache's mask, [B, M].

    What needs no moving stays the tensor it is, so that its gradient can be asked for.
    """
    past = 0 if seen is None else seen.shape[1]

    def queries(x: Tensor) -> Tensor:
        return rows.put(x if x.shape[1] == n else x[:, :n])

    def weights(x: Tensor) -> Tensor:
        x = x if rows.origin is None and x.shape[2] == n else queries(x.transpose(1, 2)).transpose(1, 2)
        if rows.origin is None and not past and x.shape[3] == n:
            return x
        before = x.shape[3] - (n if past else x.shape[3])
        columns = x[..., before : before + n]
        columns = columns if rows.origin is None else pick(columns, (rows.origin % rows.columns).argsort(dim=1), 3)
        if seen is None or not past:
            return columns
        position = (seen.long().cumsum(1) - 1).clamp(0, before - 1)
        return torch.cat((pick(x[..., :before], position, 3) * seen[:, None, None], columns), dim=3)

    return PassStates(tuple(queries(x) for x in states.streams), tuple(weights(x) for x in states.attentions))


def configured_options(core: LRT, config: LRTConfig) -> PrefillOptions:
    """How the configuration has the memory solved."""
    mode = "exact" if config.prefill == "exact" else config.prefill_mode
    return prefill_options(core, PrefillOptions.parse(mode, config.prefill_tolerance))
