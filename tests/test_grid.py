"""The pairwise grids hold what they promise, and the table of losses is whole."""

from itertools import combinations, product

import pytest
from cases import CASES, LOSSES, OPERATORS, USUAL
from grid import covering, pairwise

import kdkernels
from kdkernels import ops


@pytest.mark.parametrize(
    "sizes", [(2, 2), (3, 1, 2), (7, 5, 5, 3, 2), (2, 2, 2, 2, 2, 9), (4,) * 6]
)
def test_every_two_values_meet(sizes: tuple[int, ...]) -> None:
    rows = covering(sizes)
    for i, j in combinations(range(len(sizes)), 2):
        met = {(row[i], row[j]) for row in rows}
        assert met == set(product(range(sizes[i]), range(sizes[j])))
    widest = sorted(sizes)[-2:]
    assert len(set(rows)) == len(rows) <= 1.5 * widest[0] * widest[1] + len(sizes)


def test_every_two_values_of_the_usual_cases_meet_among_themselves() -> None:
    """Or `make test` would run some of the rows of a grid, and no grid."""
    factors = {"case": CASES, "size": range(30), "kind": "abcde"}
    (rows,) = pairwise(**factors).args[1:]
    assert {row[0] for row in rows} == set(CASES)
    usual = [row for row in rows if row[0].usual]
    for i, j in combinations(factors, 2):
        at = [[*factors].index(x) for x in (i, j)]
        met = {tuple(row[k] for k in at) for row in usual}
        values = [[x for x in factors[k] if getattr(x, "usual", True)] for k in (i, j)]
        assert met == set(product(*values))


def test_a_grid_without_a_usual_case_is_one_of_the_others() -> None:
    others = [case for case in CASES if not case.usual][:3]
    (rows,) = pairwise(case=others, size=range(2), kind="ab").args[1:]
    assert {row[0] for row in rows} == set(others)


@pytest.mark.parametrize("factors", [{}, {"a": [1, 2]}, {"a": [], "b": [1, 2]}], ids=str)
def test_a_grid_of_nothing_is_refused(factors: dict) -> None:
    with pytest.raises(ValueError, match="two factors or more"):
        pairwise(**factors)


def test_every_loss_is_in_the_table() -> None:
    public = {name for name in kdkernels.__all__ if name.endswith("_loss")}
    assert {f"{name}_loss" for name, loss in LOSSES.items() if loss.outputs == 1} == public
    assert OPERATORS.keys() == ops.LOSSES.keys(), "every operator is reached by a loss"
    assert USUAL.keys() == LOSSES.keys()
    assert len(set(map(str, CASES))) == len(CASES), "names of tests"
    for case in CASES:
        assert case.all_options.keys() >= case.facts.defaults.keys() >= case.facts.drawn.keys()
        assert case.teacher == ops.LOSSES[case.operator[0]].teacher
