"""Speculative decoding: drafts and the token before them are solved together, and kept as far as they are drawn.

Nothing is undone where a draft fails: its keys, values and memory never enter the state. Tokens are drawn as ever, from
the model's own logits and the row's own random numbers, so they are those that steps give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor

from lrt.config.decoding import PrefillOptions
from lrt.inference.drafts import PromptLookup
from lrt.model.kv_cache import KVCache
from lrt.model.lrt import LRT
from lrt.model.recurrence import ROUNDING, SettledRows, settle

EXACT = 8
"""Relative change of the memory, in units of the type's rounding, that counts as none."""


class Ahead(NamedTuple):
    """Tokens that the model has looked at beyond the state."""

    tokens: dict[int, list[int]]
    """By row: the token that was drawn, then the drafts."""
    solved: list[SettledRows]
    logits: Tensor
    """After each of them, [B, n, V]."""
    done: int = 0
    """How many of them the state holds."""


@final
class Lookahead:
    """Drafts for the rows of a running batch; `advance` stands in for a step wherever there is one."""

    def __init__(self, model: LRT, most: int):
        """`most`: tokens of the longest draft."""
        self.model, self.most = model, most
        self.solves = self.accepted = 0
        self._lookups: dict[int, PromptLookup] = {}
        self._ahead: Ahead | None = None

    def join(self, row: int, tokens: Sequence[int]) -> None:
        """Begin a row anew, after these tokens."""
        self._lookups[row], self._ahead = PromptLookup(tokens, self.most), None

    def advance(
        self, cache: KVCache, drawn: Mapping[int, int], room: Mapping[int, int]
    ) -> tuple[Tensor, KVCache] | None:
        """Take in the token that each row has drawn: the logits after it [B, V], and the state.

        `room` is how many drafts each row may use. None: there are no drafts, and a step has to take the tokens.
        """
        for row, token in drawn.items():
            self._lookups[row].take(token)
        if not self._expected(drawn):
            self._ahead = self._solve_drafts(cache, drawn, room)
        else:
            self.accepted += len(drawn)
        if self._ahead is None:
            return None
        ahead = self._ahead
        for group in ahead.solved:
            ones = torch.ones_like(group.taken)
            cache = cache.commit(group.buffer.position(ahead.done), group.rows, ones)
        self._ahead = ahead._replace(done=ahead.done + 1)
        return ahead.logits[:, ahead.done], cache

    def _expected(self, drawn: Mapping[int, int]) -> bool:
        """Whether every row has drawn the next token that was looked at; else it is over with these drafts."""
        if self._ahead is None:
            return False
        tokens, done = self._ahead.tokens, self._ahead.done
        if tokens.keys() == drawn.keys() and all(tokens[row][done : done + 1] == [t] for row, t in drawn.items()):
            return True
        for row in tokens.keys() & drawn.keys():
            self._lookups[row].judge(done - 1)
        return False

    def _solve_drafts(self, cache: KVCache, drawn: Mapping[int, int], room: Mapping[int, int]) -> Ahead | None:
        """Solve the drafts of all rows; None if there are none."""
        drafts = {row: self._lookups[row].draft(room[row]) for row in drawn}
        count = 1 + max(map(len, drafts.values()), default=0)
        if count == 1:
            return None
        rows = {row: [token, *drafts[row], *[token] * count][:count] for row, token in drawn.items()}
        tokens = torch.zeros(cache.rows, count, dtype=torch.int64, device=cache.length.device)
        wanted = torch.zeros_like(cache.length)
        for row, ids in rows.items():
            tokens[row], wanted[row] = torch.tensor(ids, device=tokens.device), count
        dtype = self.model.stream_dtype
        plan = PrefillOptions(1, min(EXACT * torch.finfo(dtype).eps, ROUNDING.get(dtype, 1.0)), count, count)
        solved = list(settle(self.model, tokens, wanted, cache, plan))
        hidden = cache.memory.new_zeros(*tokens.shape, cache.memory.shape[1])
        for group in solved:
            hidden[group.rows] = group.hidden.to(hidden.dtype)
        self.solves += 1
        return Ahead(rows, solved, self.model.logits(hidden))
