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
