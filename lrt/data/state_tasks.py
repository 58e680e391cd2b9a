"""State tracking: group word problems, running sums, and the regular tasks of the Chomsky-hierarchy suite.

Sources: swaps and word problems, Merrill, Petty and Sabharwal 2024 (arXiv 2404.08819); parity_check, even_pairs,
cycle_navigation and modular_arithmetic, Delétang et al. 2023 (arXiv 2207.02098). Answers are made step by step here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache

import numpy as np

from lrt.model.shapes import IGNORE

Ids = np.ndarray
Pair = tuple[Ids, Ids]
"""Tokens and targets, int64 [B, T] each."""
QUERY, PAD = 255, 254
"""Symbols of the tasks that ask once: where the answer is due, and what follows it."""


def parity(random: np.random.Generator, rows: int, length: int) -> Pair:
    """Bits; the answer at every position is the parity of those so far."""
    bits = random.integers(0, 2, (rows, length))
    return bits, np.cumsum(bits, axis=1) % 2


def sums(random: np.random.Generator, rows: int, length: int) -> Pair:
    """Numbers 0..6; the answer is the sum so far modulo 7."""
    numbers = random.integers(0, 7, (rows, length))
    return numbers, np.cumsum(numbers, axis=1) % 7


# --- word problems of groups ---------------------------------------------------------------------------------------

PERMUTATIONS = list(itertools.permutations(range(5)))
SWAPS = list(itertools.combinations(range(5), 2))


def is_even(permutation: tuple[int, ...]) -> bool:
    """Whether a permutation has an even number of inversions."""
    return sum(a > b for a, b in itertools.combinations(permutation, 2)) % 2 == 0


def _products(elements: list[tuple[int, ...]]) -> Ids:
    """Number of the permutation that elements i and then j make, [G, G]: its place x holds place j[x] of i."""
    number = {p: i for i, p in enumerate(elements)}
    table = [[number[tuple(p[x] for x in q)] for q in elements] for p in elements]
    return np.array(table, dtype=np.int64)


@cache
def products(group: str) -> Ids:
    """Multiplication table of `s5`, `a5`, `a4z5` (A4 x Z5) or `z60`, [G, G]; G is 120, 60, 60 and 60."""
    if group == "z60":
        return np.add.outer(np.arange(60), np.arange(60)) % 60
    if group == "a4z5":
        four, five = _products([p for p in itertools.permutations(range(4)) if is_even(p)]), np.arange(5)
        both = 5 * four[:, None, :, None] + (np.add.outer(five, five) % 5)[None, :, None, :]
        return both.reshape(60, 60)
    return _products(PERMUTATIONS if group == "s5" else [p for p in PERMUTATIONS if is_even(p)])


def word_problem(group: str) -> Callable[[np.random.Generator, int, int], Pair]:
    """Elements of a group, any of them equally often; the answer at every position is the product so far."""

    def draw(random: np.random.Generator, rows: int, length: int) -> Pair:
        table = products(group)
        symbols = random.integers(0, len(table), (rows, length))
        return symbols, np.stack(list(itertools.accumulate(symbols.T, lambda state, x: table[state, x])), axis=1)

    return draw


def swaps(random: np.random.Generator, rows: int, length: int) -> Pair:
    """Swaps of two of five places; the answer is the permutation so far, one of 120: S5 by ten of its elements."""
    places = [list(range(5)) for _ in SWAPS]
    for order, (a, b) in zip(places, SWAPS, strict=True):
        order[a], order[b] = b, a
    elements = np.array([PERMUTATIONS.index(tuple(order)) for order in places])
    table, symbols = products("s5"), random.integers(0, len(SWAPS), (rows, length))
    states = itertools.accumulate(elements[symbols].T, lambda state, x: table[state, x])
    return symbols, np.stack(list(states), axis=1)


# --- tasks that ask once, at the end of a string -------------------------------------------------------------------


def _pairs(random: np.random.Generator, rows: int, length: int) -> Pair:
    """Whether `01` and `10` together occur an even number of times: 0 if so, that is if both ends are equal."""
    bits = random.integers(0, 2, (rows, length))
    return bits, (bits != bits[:, :1]).astype(np.int64)


def _positions(random: np.random.Generator, rows: int, length: int) -> Pair:
    """Steps back, none, forwards (0, 1, 2) on a cycle of 5 places, from place 0."""
    steps = random.integers(0, 3, (rows, length))
    return steps, np.cumsum(steps - 1, axis=1) % 5


def _values(random: np.random.Generator, rows: int, length: int) -> Pair:
    """Numbers 0..4 joined by +, - and x (5, 6, 7), product before sum: the value modulo 5 at every number."""
    symbols = random.integers(0, 5, (rows, length))
    symbols[:, 1::2] = random.integers(5, 8, symbols[:, 1::2].shape)
    values, closed, term = np.zeros_like(symbols), np.zeros(rows, dtype=np.int64), symbols[:, 0]
    values[:, 0] = term
    for t in range(2, length, 2):
        operator, number = symbols[:, t - 1], symbols[:, t]
        times = operator == 7
        closed = np.where(times, closed, closed + term) % 5
        term = np.where(times, term * number, np.where(operator == 5, number, -number)) % 5
        values[:, t] = (closed + term) % 5
    return symbols, values


def asked_once(
    running: Callable[[np.random.Generator, int, int], Pair], odd: bool = False
) -> Callable[[np.random.Generator, int, int], Pair]:
    """Strings of 1 to T - 1 symbols, every length equally often, then QUERY, whose answer alone counts, then PAD.

    odd: even lengths lose their last symbol.
    """

    def draw(random: np.random.Generator, rows: int, length: int) -> Pair:
        return _closed(running(random, rows, length - 1), random.integers(1, length, rows), odd)

    return draw


def full_strings(
    running: Callable[[np.random.Generator, int, int], Pair], odd: bool = False
) -> Callable[[np.random.Generator, int, int], Pair]:
    """The same, all strings T - 1 symbols long: how a length is tested."""

    def draw(random: np.random.Generator, rows: int, length: int) -> Pair:
        return _closed(running(random, rows, length - 1), np.full(rows, length - 1), odd)

    return draw


def _closed(strings: Pair, sizes: Ids, odd: bool) -> Pair:
    symbols, answers = strings
    sizes = sizes - (odd & (sizes % 2 == 0))
    rows, length = symbols.shape[0], symbols.shape[1] + 1
    tokens, targets = np.full((rows, length), PAD, dtype=np.int64), np.full((rows, length), IGNORE, dtype=np.int64)
    tokens[:, :-1] = np.where(np.arange(length - 1) < sizes[:, None], symbols, PAD)
    tokens[np.arange(rows), sizes] = QUERY
    targets[np.arange(rows), sizes] = answers[np.arange(rows), sizes - 1]
    return tokens, targets


STRINGS: dict[str, tuple[Callable[[np.random.Generator, int, int], Pair], bool]] = {
    "parity_check": (parity, False),
    "even_pairs": (_pairs, False),
    "cycle_navigation": (_positions, False),
    "modular_arithmetic": (_values, True),
}
"""Tasks of the Chomsky-hierarchy suite: their running answers, and whether strings have odd lengths only."""
