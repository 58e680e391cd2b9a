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
    """ValueError unless these are whole numbers [B, T], at least one: what an embedding would not say."""
    require_ids("tokens", tokens)
    shape = tuple(tokens.shape)
    if tokens.dim() != 2:
        raise ValueError(f"tokens of shape {shape}: give rows of tokens, [B, T]; one row is tokens[None]")
    if tokens.numel() == 0:
        raise ValueError(f"tokens of shape {shape}: a prompt needs at least 1 token (BOS opens a text)")


def check_targets(tokens: TokensBN, targets: TokensBN) -> None:
    """ValueError unless there is a target, a whole number, for each of the tokens."""
    require_ids("targets", targets)
    if targets.shape != tokens.shape:
        shapes = f"targets of shape {tuple(targets.shape)}, tokens of {tuple(tokens.shape)}"
        raise ValueError(f"{shapes}: give one target for each token, {IGNORE} where there is none")


def check_starts(tokens: TokensBN, starts: Tensor | None) -> None:
    """ValueError unless there is a truth value for each of the tokens, or nothing."""
    fine = isinstance(starts, Tensor) and starts.dtype == torch.bool and starts.shape == tokens.shape
    if starts is not None and not fine:
        raise ValueError(f"starts are {_kind(starts)}: give True or False for each token, such as tokens == bos")


def require_ids(name: str, ids: Tensor) -> None:
    """ValueError unless `ids` are a tensor of whole numbers."""
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} {_kind(ids)}: give token ids, a tensor of torch.int64")


def _kind(x: object) -> str:
    """What something is that should be a tensor of another kind."""
    if not isinstance(x, Tensor):
        return f"of type {type(x).__name__}"
    return f"of type {str(x.dtype).removeprefix('torch.')} and shape {tuple(x.shape)}"
