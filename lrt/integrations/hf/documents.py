"""How a transformers batch stands as the core wants it: one document a row, padded on the right."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lrt.model.kv_cache import FUTURE
from lrt.model.shapes import IGNORE, PositionsN, TokensBN, next_tokens
from lrt.utils.hardware import widest
from lrt.utils.require import require


class DocumentRows(NamedTuple):
    """Documents of a batch of B rows and T columns, as R rows of N places, padded on the right."""

    origin: Tensor | None
    """The place in the flattened batch of each token, int64 [R, N]; B T beyond `length`. None: the batch as it is."""
    length: Tensor
    """Tokens of each row, int64 [R]."""
    batch: int
    columns: int

    def take(self, x: Tensor) -> Tensor:
        """Of `x` [B, T, ..] what belongs to each row, [R, N, ..]; anything where a row is padded."""
        if self.origin is None:
            return x
        return x.flatten(0, 1)[self.origin.clamp(max=self.batch * self.columns - 1)]

    def put(self, x: Tensor, into: Tensor | None = None) -> Tensor:
        """`x` [R, N, ..] in the columns of the batch, [B, T, ..]; elsewhere what `into` holds, or zeros."""
        if self.origin is None:
            return x
        places, features = self.batch * self.columns, x.shape[2:]
        base = x.new_zeros(places, *features) if into is None else into.flatten(0, 1)
        base = torch.cat((base, x.new_zeros(1, *features)))  # what is no place goes there
        return base.index_copy(0, self.origin.flatten(), x.flatten(0, 1))[:places].unflatten(0, (-1, self.columns))

    def targets(self, labels: TokensBN, shifted: bool) -> TokensBN:
        """What each place is to predict, [R, N]: its document's next label, or IGNORE; `shifted` labels are targets."""
        following = self.take(labels)
        places = torch.arange(following.shape[1], device=following.device)
        following = following if shifted else next_tokens(following)
        return following.masked_fill(places >= self.length[:, None] - (0 if shifted else 1), IGNORE)


def rows_of(mask: Tensor | None, positions: PositionsN | None, like: TokensBN) -> list[DocumentRows]:
    """The documents of a batch, those of like length together.

    Args:
        mask: [B, T], 0 where there is padding; None: there is none.
        positions: [B, T] or [1, T]; where they begin again at 0 inside a row, a document begins.
        like: the tokens [B, T].

    Raises:
        ValueError: positions that do not count a document's tokens one by one.
    """
    if positions is not None:
        packed = _documents(torch.ones_like(like).bool() if mask is None else mask.bool(), positions.expand_as(like))
        if packed is not None:
            return packed
    return [unpacked(mask, like)]


def require_mask(mask: Tensor | None, like: TokensBN) -> None:
    """ValueError: a padding mask that is not one of `like` [B, N] and what came before, or holds more than 0 and 1."""
    if mask is None:
        return
    rows = f"the attention_mask has {len(mask)} rows for {len(like)} of tokens; give one for each"
    require(len(mask) == len(like), rows)
    odd = mask[(mask != 0) & (mask != 1)]
    require(
        odd.numel() == 0,
        f"the attention_mask holds {odd[:1].tolist()}; put 1 for a token and 0 for padding (documents that share a row "
        "are told by position_ids)",
    )


def require_positions(positions: Tensor | None, like: TokensBN) -> None:
    """ValueError: position_ids that are not one whole number a token of `like` [B, N], or a column of it."""
    if positions is None:
        return
    rows, columns = like.shape
    shape = tuple(positions.shape)
    fits = shape in ((rows, columns), (1, columns), (columns,))
    require(fits, f"position_ids of shape {shape} for tokens of {(rows, columns)}; give one a token")
    integral = not positions.is_floating_point() and positions.dtype is not torch.bool
    require(integral, f"position_ids are {positions.dtype}; give whole numbers, as int64")


def require_open_end(mask: Tensor) -> None:
    """ValueError: a row of a padding mask [B, M] that ends in padding, where its text is to go on."""
    for row in ((mask[:, -1] == 0) & mask.any(1)).nonzero()[:1].flatten().tolist():
        raise ValueError(f"row {row} ends in padding: pad prompts on the left (tokenizer.padding_side = 'left')")


def unpacked(mask: Tensor | None, like: TokensBN) -> DocumentRows:
    """Every row of a batch [B, T] as one document, its tokens brought to the left."""
    rows, columns = like.shape
    if mask is None:
        return DocumentRows(None, torch.full_like(like[:, 0], columns), rows, columns)
    count = mask.long().sum(1)
    if not torch.compiler.is_compiling() and bool((mask[:, 1:] <= mask[:, :-1]).all()):
        return DocumentRows(None, count, rows, columns)  # padded on the right already
    return DocumentRows(order(mask) + columns * torch.arange(rows, device=like.device)[:, None], count, rows, columns)


def _documents(mask: Tensor, positions: PositionsN) -> list[DocumentRows] | None:
    """DocumentRows that hold several documents each as rows of their own; None where no row does."""
    row, column = mask.nonzero(as_tuple=True)
    position = positions[row, column]
    begins = torch.ones_like(row, dtype=torch.bool)
    begins[1:] = (row[1:] != row[:-1]) | (position[1:] != position[:-1] + 1)
    inside = begins.clone()
    inside[1:] &= row[1:] == row[:-1]
    inside[:1] = False
    steady = "position_ids must count each document's tokens one by one, and begin the next document at 0"
    require(not bool((inside & (position != 0)).any()), steady)
    if not bool(inside.any()):
        return None
    (first,) = begins.nonzero(as_tuple=True)
    count = torch.diff(first, append=first.new_tensor([len(row)]))
    place, size = row * mask.shape[1] + column, torch.ceil(count.to(widest(count.device)).log2()).long()
    return [_group(place, first[size == n], count[size == n], mask) for n in size.unique().tolist()]


def _group(place: Tensor, first: Tensor, count: Tensor, mask: Tensor) -> DocumentRows:
    """Documents that begin at `first` of the tokens whose places are given, with `count` tokens each."""
    batch, columns = mask.shape
    offset = torch.arange(int(count.max()), device=place.device)
    token = (first[:, None] + offset).clamp(max=len(place) - 1)
    return DocumentRows(place[token].masked_fill(offset >= count[:, None], batch * columns), count, batch, columns)


def places(mask: Tensor) -> PositionsN:
    """Positions of tokens by a padding mask [B, M]; FUTURE, which nobody sees, where there is padding."""
    mask = mask.bool()
    return torch.where(mask, mask.long().cumsum(1) - 1, FUTURE)


def order(mask: Tensor) -> Tensor:
    """Indices [B, N] that bring each row's tokens to the left, in order, and its padding to the right."""
    return (~mask.bool()).long().argsort(dim=1, stable=True)


def pick(x: Tensor, index: Tensor, axis: int) -> Tensor:
    """`x` with its rows' entries along `axis` taken by `index` [B, N]; other axes are kept."""
    shape = [1] * x.dim()
    shape[0], shape[axis] = index.shape
    wide = [n if i not in (0, axis) else index.shape[0 if i == 0 else 1] for i, n in enumerate(x.shape)]
    return x.gather(axis, index.view(shape).expand(wide))
