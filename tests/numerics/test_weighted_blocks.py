"""Blocks put together at once, against the plain expressions layer by layer."""

import pytest
import torch

from veneer.numerics.orthogonality import orthogonality
from veneer.numerics.weighted_blocks import Blocks, assemble

SHAPES = [((1, 2), 5, 7, 2.0), ((1, 2), 5, 7, 2.0), ((1, 2), 5, 7, 0.5), ((1,), 5, 7, 2.0), ((1, 2, 2), 4, 9, 1.0)]


@pytest.fixture
def layers():
    made = []
    for widths, out, inn, scale in SHAPES:
        A, e, B = ([torch.randn(*shape(n)).double() for n in widths] for shape in shapes(out, inn))
        made.append(Blocks(A, e, B, scale))
        for t in (*A, *B, *e[:-1]):
            t.requires_grad_()
    return made


def shapes(out, inn):
    return lambda n: (n, inn), lambda n: (n,), lambda n: (out, n)


def plain(layer):
    A, e, B = torch.cat(layer.A), torch.cat(layer.e), torch.cat(layer.B, dim=1)
    return layer.scale * e[:, None] * A, B


def trained(layers):
    return [t for x in layers for t in (*x.A, *x.e, *x.B) if t.requires_grad]


def penalty(layers):
    return orthogonality([M for x in layers for M in (torch.cat(x.A), torch.cat(x.B, dim=1).T)])


def loss(pairs, layers):
    g = torch.Generator().manual_seed(3)
    parts = [(A * torch.randn(A.shape, generator=g)).sum() + (B**2).sum() for A, B in pairs]
    return sum(part * (i + 1) for i, part in enumerate(parts))


def test_pairs_and_their_gradients_are_those_of_each_layer_by_itself(layers):
    pairs, spread = assemble(layers)
    assert spread is None
    for found, layer in zip(pairs, layers):
        assert all(torch.equal(a, b) for a, b in zip(found, plain(layer)))
    wanted = torch.autograd.grad(loss([plain(x) for x in layers], layers), trained(layers))
    found = torch.autograd.grad(loss(pairs, layers), trained(layers))
    assert all(torch.allclose(a, b) for a, b in zip(found, wanted))


def test_the_penalty_joins_the_gradients_of_the_pairs(layers):
    pairs, spread = assemble(layers, penalise=True)
    assert torch.allclose(spread, penalty(layers))
    wanted = torch.autograd.grad(loss([plain(x) for x in layers], layers) + 3 * penalty(layers), trained(layers))
    found = torch.autograd.grad(loss(pairs, layers) + 3 * spread, trained(layers))
    assert all(torch.allclose(a, b) for a, b in zip(found, wanted))


def test_a_layer_that_took_no_part_has_the_penaltys_gradient_alone(layers):
    pairs, spread = assemble(layers, penalise=True)
    (pairs[0][0].sum() + spread).backward()
    wanted = torch.autograd.grad(penalty(layers), [*layers[1].A, *layers[1].B])
    assert all(torch.allclose(t.grad, g) for t, g in zip([*layers[1].A, *layers[1].B], wanted))
    assert not layers[1].e[0].grad.any()


def test_orthonormal_factors_have_no_gradient():
    A, e, B = torch.eye(2, 5).requires_grad_(), torch.zeros(2), torch.eye(4, 2).requires_grad_()
    _, spread = assemble([Blocks([A], [e], [B], 1.0)], penalise=True)
    spread.backward()
    assert spread == 0 and not A.grad.any() and not B.grad.any()
