"""Evolution under a budget, and the linear model of a score."""

import itertools

import pytest

from veneer.numerics.evolution import evolve, ridge

CHOICES = dict.fromkeys("abcd", (8, 4, 2, 1))


def test_it_finds_the_best_point_that_fits_and_none_that_does_not():
    worth = {"a": 1.0, "b": 3.0, "c": 0.5, "d": 2.0}

    def merit(p):
        return sum(worth[k] * v**0.5 for k, v in p.items())

    every = [dict(zip(CHOICES, vs)) for vs in itertools.product(*CHOICES.values())]
    for budget in (4, 9, 17):
        found = evolve(CHOICES, merit, lambda p, most=budget: sum(p.values()) <= most, population=30, generations=40)
        assert sum(found.values()) <= budget
        assert merit(found) == max(merit(p) for p in every if sum(p.values()) <= budget)


def test_no_point_that_fits_is_an_error():
    with pytest.raises(ValueError, match="no point"):
        evolve(CHOICES, lambda p: 0.0, lambda p: False, population=2, generations=1)


def test_the_linear_model_recovers_an_additive_score():
    every = [dict(zip(CHOICES, vs)) for vs in itertools.product(*CHOICES.values())]

    def score(p):
        return 3 + p["a"] ** 0.5 - 2 * p["c"]

    model = ridge(every[::3], [score(p) for p in every[::3]], CHOICES, penalty=1e-8)
    assert all(model(p) == pytest.approx(score(p), abs=1e-4) for p in every)
