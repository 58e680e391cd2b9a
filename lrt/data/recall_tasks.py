"""Recall and copying: what a row has told comes again, perhaps over several hops.

Sources: multi-query associative recall, Arora et al. 2023 (arXiv 2312.04927); k-hop induction heads, Sanford, Hsu and
Telgarsky 2024 (arXiv 2402.09268).
"""

from __future__ import annotations

import numpy as np

from lrt.data.state_tasks import Ids, Pair
from lrt.model.shapes import IGNORE

POWER = 0.01
"""Exponent a of the gaps between a key and its query in `mqar`: gap g has a probability proportional to g^(a - 1)."""


def recall(random: np.random.Generator, rows: int, length: int) -> Pair:
    """Associative recall: key, value, key, value, ..; in the second half keys come again; the answer is their value."""
    pairs = length // 4
    if not 1 <= pairs <= 128:
        raise ValueError(f"task recall takes rows of 4 to 515 positions, not {length}; there are 128 keys")
    order = _distinct(random, rows, 128, pairs)
    values = 128 + random.integers(0, 16, (rows, pairs))
    again = _distinct(random, rows, pairs, pairs)
    halves = [order, values], [np.take_along_axis(x, again, 1) for x in (order, values)]
    tokens, targets = _blank(rows, length)
    for start, (keys, paired) in zip((0, 2 * pairs), halves, strict=True):
        tokens[:, start : start + 2 * pairs : 2], tokens[:, start + 1 : start + 2 * pairs : 2] = keys, paired
    targets[:, 2 * pairs : 4 * pairs : 2] = halves[1][1]
    return tokens, targets


def copying(random: np.random.Generator, rows: int, length: int) -> Pair:
    """A string twice; the answers are the next symbols of its second half."""
    half = length // 2
    string = random.integers(0, 64, (rows, half))
    tokens, targets = _blank(rows, length)
    tokens[:, :half], tokens[:, half : 2 * half] = string, string
    targets[:, half : 2 * half - 1] = string[:, 1:]
    return tokens, targets


def mapping(random: np.random.Generator, rows: int, length: int) -> Pair:
    """x, f(x), x', f(x'), .. with a new f on 8 symbols in each row; scored where x was shown before."""
    shown = length // 2
    x, f = random.integers(0, 8, (rows, shown)), 8 + _distinct(random, rows, 8, 8)
    y = np.take_along_axis(f, x, 1)
    shown_before = np.stack([(x[:, :t] == x[:, t : t + 1]).any(1) for t in range(shown)], axis=1)
    tokens, targets = _blank(rows, length)
    tokens[:, 0 : 2 * shown : 2], tokens[:, 1 : 2 * shown : 2] = x, y
    targets[:, 0 : 2 * shown : 2] = np.where(shown_before, y, IGNORE)
    return tokens, targets


def mqar(random: np.random.Generator, rows: int, length: int, pairs: int, vocabulary: int) -> Pair:
    """Multi-query associative recall: `pairs` keys with their values, then each key once more among random symbols.

    Queries stand at every other position of what is left, at gaps by the power law POWER; the answer at a query is its
    key's value. Keys are symbols of the lower half of the vocabulary (0 left out), values of the upper half.
    """
    half, slots = vocabulary // 2, (length - 2 * pairs) // 2
    if slots < pairs or half <= pairs:
        raise ValueError(
            f"task mqar-{pairs}-{vocabulary} takes rows of at least {4 * pairs} positions, not {length}, and a "
            f"vocabulary of more than {2 * pairs}"
        )
    keys, values = 1 + _distinct(random, rows, half - 1, pairs), half + _distinct(random, rows, half, pairs)
    odds = np.arange(1, slots + 1) ** (POWER - 1.0)
    # The largest of log p plus Gumbel noise, in order, are drawn as if one after the other without replacement.
    gaps = np.argsort(-(np.log(odds) + random.gumbel(size=(rows, slots))), axis=1)[:, :pairs]
    tokens, targets = random.integers(0, vocabulary, (rows, length)), _blank(rows, length)[1]
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    np.put_along_axis(tokens, 2 * pairs + 2 * gaps, keys, axis=1)
    np.put_along_axis(targets, 2 * pairs + 2 * gaps, values, axis=1)
    return tokens, targets


def pointers(random: np.random.Generator, rows: int, length: int, hops: int) -> Pair:
    """Pointer chasing: node, successor, .. of one random cycle in random order, then every node once as a question.

    The answer at a question is the node that lies `hops` pointers further. The cycle has a third of the row's length.
    """
    nodes = length // 3
    if not hops < nodes <= 128:
        raise ValueError(f"task pointers-{hops} takes rows of {3 * (hops + 1)} to 386 positions, not {length}")
    cycle = _distinct(random, rows, 128, nodes)
    shown, queried = (_distinct(random, rows, nodes, nodes) for _ in range(2))
    tokens, targets = _blank(rows, length)
    tokens[:, 0 : 2 * nodes : 2] = np.take_along_axis(cycle, shown, 1)
    tokens[:, 1 : 2 * nodes : 2] = np.take_along_axis(cycle, (shown + 1) % nodes, 1)
    tokens[:, 2 * nodes : 3 * nodes] = np.take_along_axis(cycle, queried, 1)
    targets[:, 2 * nodes : 3 * nodes] = np.take_along_axis(cycle, (queried + hops) % nodes, 1)
    return tokens, targets


def induction(random: np.random.Generator, rows: int, length: int, hops: int) -> Pair:
    """k-hop induction heads: a string over 4 symbols; the answer is the symbol found after `hops` hops back.

    One hop from position i leads to the position after the newest earlier occurrence of symbol i. Scored where all hops
    lead somewhere.
    """
    string = random.integers(0, 4, (rows, length))
    back = np.full((rows, length), -1)
    newest = np.full((rows, 4), -1)
    for t in range(length):
        before = newest[np.arange(rows), string[:, t]]
        back[:, t] = np.where(before < 0, -1, before + 1)
        newest[np.arange(rows), string[:, t]] = t
    place = np.broadcast_to(np.arange(length), (rows, length)).copy()
    for _ in range(hops):
        place = np.where(place < 0, -1, np.take_along_axis(back, np.maximum(place, 0), 1))
    return string, np.where(place < 0, IGNORE, np.take_along_axis(string, np.maximum(place, 0), 1))


def _distinct(random: np.random.Generator, rows: int, of: int, count: int) -> Ids:
    """`count` different numbers below `of` in each row, in random order."""
    return random.random((rows, of)).argsort(1)[:, :count]


def _blank(rows: int, length: int) -> Pair:
    return np.zeros((rows, length), dtype=np.int64), np.full((rows, length), IGNORE, dtype=np.int64)
