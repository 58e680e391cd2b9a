"""The one legend of dimension letters. The aliases below name layouts in signatures: `HeadsBKNE` is [B, K, N, E].

    B  rows of a batch (sequences)
    T  positions of a row
    N  positions of one pass (a slice of the row; N = T for a full pass, 1 for a decoding step)
    M  key positions a pass may see: its own and the buffer's
    D  model width
    L  layers (blocks), numbered 1..L in prose and configs, 0..L-1 in code
    H  query heads
    K  key/value heads; H is a multiple of K
    E  head width
    G  channels the memory gates read
    V  vocabulary size
    P  passes of a schedule
    S  stride of interleaved passes

Everything else in the package refers to these letters.
"""

from typing import TypeAlias

import torch
from torch import Tensor

TokensBN: TypeAlias = Tensor
"""Token ids, int64 [B, N]."""
StreamBND: TypeAlias = Tensor
"""Residual stream, memory or hidden states, float [B, N, D]."""
HeadsBKNE: TypeAlias = Tensor
"""Keys, values (K heads) or queries (H heads), float [B, K, N, E]."""
PositionsN: TypeAlias = Tensor
"""Absolute positions, int64 [N] shared by the rows, or [B, N] where rows differ."""
IGNORE = -100
"""Target that no loss counts."""


def next_tokens(tokens: TokensBN) -> TokensBN:
    """What each position is to predict: the token after it, IGNORE at the end of a row."""
    return torch.cat((tokens[:, 1:], torch.full_like(tokens[:, :1], IGNORE)), dim=1)


def check_rows(tokens: TokensBN) -> None:
    """ValueError unless these are whole numbers [B, T]: what an embedding would not say."""
    shape, kind = tuple(tokens.shape), str(tokens.dtype).removeprefix("torch.")
    if tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"tokens of type {kind}: give token ids, as torch.int64")
    if tokens.dim() != 2:
        raise ValueError(f"tokens of shape {shape}: give rows of tokens, [B, T]; one row is tokens[None]")
