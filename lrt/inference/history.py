"""What sampling needs to know of the tokens of a running batch's rows; kept only where some row asks for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from lrt.config.decoding import SamplingParams
from lrt.inference.sampling import TokenHistory


@final
class HistoryState:
    """`TokenHistory` of B rows as they join and draw; each of its tensors [B, V] is made when a row first needs it."""

    def __init__(self, rows: int, vocabulary: int, device: torch.device):
        self.shape, self.device = (rows, vocabulary), device
        self._seen: Tensor | None = None
        self._counts: Tensor | None = None
        self._bias: Tensor | None = None

    def join(self, row: int, params: SamplingParams, tokens: Sequence[int]) -> None:
        """Begin a row anew: `tokens` are those of its prompt. ValueError: a token outside the vocabulary."""
        for name, ids in (("logit_bias", [i for i, _ in params.logit_bias]), ("stop_tokens", params.stop_tokens or ())):
            if outside := [i for i in ids if i >= self.shape[1]]:
                raise ValueError(f"{name} names token {outside[0]}, but the vocabulary has {self.shape[1]}")
        if params.repetition_penalty != 1 and self._seen is None:
            self._seen = torch.zeros(self.shape, dtype=torch.bool, device=self.device)
        if (params.presence_penalty or params.frequency_penalty) and self._counts is None:
            self._counts = torch.zeros(self.shape, device=self.device)
        if params.logit_bias and self._bias is None:
            self._bias = torch.zeros(self.shape, device=self.device)
        for x in (self._seen, self._counts, self._bias):
            if x is not None:
                x[row] = 0
        if params.repetition_penalty != 1 and self._seen is not None:
            self._seen[row, list(tokens)] = True
        for token, bias in params.logit_bias:
            assert self._bias is not None
            self._bias[row, token] += bias

    def take(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Take in the tokens that these rows have drawn."""
        if self._seen is not None:
            self._seen[list(rows), list(tokens)] = True
        if self._counts is not None:
            self._counts[list(rows), list(tokens)] += 1

    def rows(self, n: int, forbidden: Mapping[int, Tensor]) -> TokenHistory:
        """That of the first n rows; `forbidden` are boolean [V], by row."""
        mask = None
        if forbidden:
            mask = torch.zeros((n, self.shape[1]), dtype=torch.bool)
            for row, one in forbidden.items():
                mask[row] = one
            mask = mask.to(self.device)
        tensors = (None if x is None else x[:n] for x in (self._seen, self._counts, self._bias))
        return TokenHistory(*tensors, forbidden=mask)
