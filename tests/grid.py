"""Few combinations of a test's parameters, in which every two values meet."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import pytest


def covering(sizes: Sequence[int], begun: Sequence[tuple[int, ...]] = ()) -> list[tuple[int, ...]]:
    """Rows of indices in which every two indices of two columns stand together at least once.

    After the rows in `begun`, each begins with a pair that is still missing, and gives every other
    column the index that brings most of the missing pairs; where several bring as many, they take
    turns.
    """
    missing = {
        ((i, a), (j, b)): None  # a set that keeps its order
        for i, j in combinations(range(len(sizes)), 2)
        for a in range(sizes[i])
        for b in range(sizes[j])
    }
    rows = list(begun)
    for whole in rows:
        for pair in combinations(enumerate(whole), 2):
            missing.pop(pair, None)
    while missing:
        row = dict(next(iter(missing)))
        for column, size in enumerate(sizes):
            if column in row:
                continue
            brought = {
                index: sum(tuple(sorted(((column, index), x))) in missing for x in row.items())
                for index in range(size)
            }
            row[column] = max(brought, key=lambda x: (brought[x], -((x - len(rows)) % size)))
        for pair in combinations(sorted(row.items()), 2):
            missing.pop(pair, None)
        rows.append(tuple(row[column] for column in range(len(sizes))))
    return rows


def pairwise(**factors: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrizes a test with a covering choice among the combinations of its factors.

    The combinations of the usual cases, which are those that `make test` runs, are one by
    themselves.
    """
    if len(factors) < 2 or not all(factors.values()):
        raise ValueError(f"pairwise: two factors or more, with values; got {factors}")
    # The usual cases first.
    values = [
        sorted(x, key=lambda value: not getattr(value, "usual", True)) for x in factors.values()
    ]
    usual = [sum(getattr(value, "usual", True) for value in x) for x in values]
    rows = covering([len(x) for x in values], covering(usual) if all(usual) else ())
    chosen = [tuple(x[index] for x, index in zip(values, row, strict=True)) for row in rows]
    return pytest.mark.parametrize(tuple(factors), chosen, ids=str)
