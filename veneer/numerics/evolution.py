"""Searching a product of finite choices under a budget, with a model of the score in place of the score."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value", bound=Hashable)
Choice = dict[str, Value]
Choices = Mapping[str, Sequence[Value]]


def draw(choices: Choices, fits: Callable[[Choice], bool], chance: random.Random, tries: int = 1000) -> Choice:
    """A random point that fits, uniform by gene; where few fit, genes of a point are lowered until it does.

    Each gene's values are given from the largest to the smallest. Raises ValueError when not even the smallest fits.
    """
    for _ in range(tries):
        point = {k: chance.choice(v) for k, v in choices.items()}
        if fits(point):
            return point
        genes = list(choices)
        chance.shuffle(genes)
        for k in genes:
            point[k] = choices[k][-1]
            if fits(point):
                return point
    raise ValueError("no point fits")


def evolve(
    choices: Choices,
    merit: Callable[[Choice], float],
    fits: Callable[[Choice], bool],
    *,
    seed: int = 0,
    population: int = 100,
    generations: int = 500,
    parents: float = 0.25,
    mutation: float = 0.1,
) -> Choice:
    """The best point found by evolution: of each generation the best stay, half the rest mutate, half are crossed.

    A child that does not fit is made again, a hundred times at most, then replaced by its first parent.
    """
    chance = random.Random(seed)
    pool = [draw(choices, fits, chance) for _ in range(population)]
    known: dict[tuple, float] = {}

    def value(point: Choice) -> float:
        key = tuple(point[k] for k in choices)
        if key not in known:
            known[key] = merit(point)
        return known[key]

    for _ in range(generations):
        pool.sort(key=value, reverse=True)
        best = pool[: max(1, round(parents * population))]
        children = []
        for i in range(population - len(best)):
            first, second, child = chance.choice(best), chance.choice(best), None
            for _ in range(100):
                if i % 2:
                    child = {
                        k: chance.choice(v) if chance.random() < mutation else first[k] for k, v in choices.items()
                    }
                else:
                    child = {k: chance.choice((first, second))[k] for k in choices}
                if fits(child):
                    break
            children.append(child if fits(child) else first)
        pool = best + children
    return max(pool, key=value)


def ridge(points: Sequence[Choice], scores: Sequence[float], choices: Choices, penalty: float = 1e-2):
    """A linear model of the score on one-hot genes, fitted to these points; gives a function of a point."""
    at = {(k, v): i for i, (k, v) in enumerate((k, v) for k, vs in choices.items() for v in vs)}

    def row(point: Choice) -> Tensor:
        x = torch.zeros(len(at), dtype=torch.float64)
        x[[at[k, point[k]] for k in choices]] = 1.0
        return x

    X = torch.stack([row(p) for p in points])
    y = torch.tensor(scores, dtype=torch.float64)
    if not all(math.isfinite(s) for s in scores):
        raise ValueError("a score is not finite")
    centre, mean = X.mean(0), y.mean()
    Z = X - centre
    weights = torch.linalg.solve(Z.T @ Z + penalty * torch.eye(len(at), dtype=torch.float64), Z.T @ (y - mean))
    return lambda point: float(mean + (row(point) - centre) @ weights)
