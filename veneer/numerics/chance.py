"""Random numbers as a function of a seed and what they are for; the global generators are left alone."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def derived_seed(seed: int, *purpose: object) -> int:
    """A 63-bit seed from a seed and words or numbers that name the purpose."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator for one purpose: the same everywhere and in every order of calls."""
    return torch.Generator().manual_seed(derived_seed(seed, *purpose))


def zeros(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """The start 0."""
    return torch.zeros(shape)


def ones(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """The start 1."""
    return torch.ones(shape)


def kaiming_uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """U(−1/√in, 1/√in) with in the last dimension: kaiming-uniform with a = √5, the usual start of A."""
    bound = shape[-1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def normal(std: float):
    """The start N(0, std²)."""

    def start(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.empty(shape).normal_(0.0, std, generator=generator)

    return start
