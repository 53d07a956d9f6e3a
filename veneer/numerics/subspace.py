"""Subspaces of a gradient: frames of singular vectors, and going down into them and back."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.numerics.svd import truncated_svd

Frame = dict[str, Tensor]  # "left" (m, r) and/or "right" (n, r), columns orthonormal


def frame_of(G: Tensor, rank: int, side: str, exact: bool = True, generator: torch.Generator | None = None) -> Frame:
    """The leading singular vectors of G (m, n) on the side that is projected: the shorter one for ``std``."""
    U, _, Vh = truncated_svd(G.float(), min(rank, *G.shape), exact=exact, generator=generator)
    vectors = {"left": U, "right": Vh.mT}
    return {name: vectors[name].contiguous() for name in sides(G.shape, side)}


def sides(shape: torch.Size | tuple[int, ...], side: str) -> tuple[str, ...]:
    """Which of ``left`` and ``right`` a rule projects for a matrix (m, n): ``std`` the shorter, right when square."""
    short, long = ("right", "left") if shape[0] >= shape[1] else ("left", "right")
    return {"std": (short,), "reverse_std": (long,), "full": ("left", "right")}.get(side, (side,))


def project(G: Tensor, frame: Frame) -> Tensor:
    """R = (LᵀG or G)·(V or 1): (m, r), (r, n) or (r, r)."""
    G = frame["left"].mT @ G if "left" in frame else G
    return G @ frame["right"] if "right" in frame else G


def project_back(R: Tensor, frame: Frame) -> Tensor:
    """The matrix (m, n) that R stands for."""
    R = frame["left"] @ R if "left" in frame else R
    return R @ frame["right"].mT if "right" in frame else R
