"""The affinity distance against the numbers of sheet 008 and finite differences."""

import pytest
import torch
from torch import Tensor

from veneer.numerics import affinity
from veneer.numerics.affinity import affinity_distance


def columns(*places: tuple[float, ...]) -> Tensor:
    """A map (1, C, 1, places) with these columns."""
    return torch.tensor(places).T[None, :, None, :]


def maps(channels: int, seed: int = 0) -> Tensor:
    """Random features of two images, 3 × 4 places."""
    return torch.randn(2, channels, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def test_the_sheets_oracle_7():
    student = columns((1.0, 0.0), (0.0, 1.0), (1.0, 1.0))
    teacher = columns((1.0, 0.0), (1.0, 0.0), (0.0, 1.0))
    assert affinity_distance(student, teacher).item() == pytest.approx(0.53649, abs=1e-5)


def test_channel_counts_may_differ_and_scale_and_rotation_do_not_count():
    student, teacher = maps(5), maps(3, seed=1)
    assert affinity_distance(student, student) == 0
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.double))[0]
    same = torch.einsum("dc,bchw->bdhw", rotation, student) * torch.rand(2, 1, 3, 4, dtype=torch.double).add(0.1)
    assert affinity_distance(student, same) < 1e-12
    assert torch.isclose(affinity_distance(same, teacher), affinity_distance(student, teacher))


def test_the_gradient_is_finite_differences():
    teacher = maps(3, seed=1)
    torch.autograd.gradcheck(lambda s: affinity_distance(s, teacher), maps(5).requires_grad_())


def test_working_in_pieces_changes_nothing(monkeypatch):
    student, teacher = maps(5).requires_grad_(), maps(3, seed=1)
    whole = affinity_distance(student, teacher)
    (expected,) = torch.autograd.grad(whole, student)
    monkeypatch.setattr(affinity, "ENTRIES", 100)  # four rows at a time
    pieces = affinity_distance(student, teacher)
    (found,) = torch.autograd.grad(pieces, student)
    assert torch.allclose(pieces, whole) and torch.allclose(found, expected)


def test_half_precision_is_taken_in_fp32_and_dead_places_stay_finite():
    student = maps(5).to(torch.bfloat16)
    student[:, :, 0, 0] = 0
    student.requires_grad_()
    distance = affinity_distance(student, maps(3, seed=1).to(torch.bfloat16))
    distance.backward()
    assert distance.dtype == torch.float32 and torch.isfinite(student.grad).all()


def test_nothing_of_the_size_of_an_affinity_is_kept():
    kept: list[int] = []
    student = torch.randn(1, 4, 32, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        affinity_distance(student, torch.randn(1, 8, 32, 32))
    assert max(kept) <= student.numel()
