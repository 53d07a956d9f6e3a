"""Inverse Fisher products against dense solves and the numbers of sheet 071."""

import pytest
import torch

from veneer.errors import UserError
from veneer.numerics import fisher
from veneer.numerics.fisher import BlockFisherInverse, FisherInverse, obs_prune, recursion

TWO = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.double)


def drawn(*shape, seed=0, dtype=torch.double):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dense(G, damping, count=None):
    return damping * torch.eye(G.shape[1], dtype=torch.double) + G.double().T @ G.double() / (count or len(G))


@pytest.fixture(params=["window", "one block", "small chunks"])
def inverse(request, monkeypatch):
    """Both ways to an inverse."""
    if request.param == "small chunks":
        monkeypatch.setattr(fisher, "CHUNK", 140)
    return (lambda G, lam: BlockFisherInverse(G, lam, None)) if request.param == "one block" else FisherInverse


def test_products_diagonal_and_definiteness_are_the_dense_solves_oracles_1_7_8(inverse):
    G, x = drawn(20, 50), drawn(50, seed=1)
    F, found = dense(G, 1e-2), inverse(G.clone(), 1e-2)
    assert torch.allclose(found.mul(x), torch.linalg.solve(F, x), rtol=1e-8, atol=1e-8)
    assert torch.allclose(found.diag(), torch.linalg.inv(F).diagonal(), rtol=1e-8)
    assert x @ found.mul(x) > 0 and G[3] @ found.mul(G[3]) > 0
    assert torch.allclose(torch.stack([found.mul(e) for e in torch.eye(50).double()]).diagonal(), found.diag())


def test_the_numbers_of_oracle_2(inverse):
    found = inverse(TWO.clone(), 1.0)
    expected = torch.tensor([[0.545455, -0.181818], [-0.181818, 0.727273]]).double()
    assert torch.allclose(torch.stack([found.mul(e) for e in torch.eye(2).double()]), expected, atol=1e-6)
    assert torch.allclose(found.mul(torch.ones(2).double()), torch.tensor([0.363636, 0.545455]).double(), atol=1e-6)


def test_the_recursion_is_oracle_2_and_entries_agree():
    H, d = recursion(TWO, 1.0)
    assert torch.allclose(H, torch.tensor([[1.0, 0.0], [2 / 3, 1.0]]).double())
    assert torch.allclose(d, torch.tensor([3.0, 11 / 3]).double())
    found = FisherInverse(TWO.clone(), 1.0)
    assert [found.entry(0, 1), found.entry(1, 1)] == pytest.approx([-0.181818, 0.727273], abs=1e-6)


def test_surgery_is_oracle_3():
    w, kept = obs_prune(torch.ones(2).double(), FisherInverse(TWO.clone(), 1.0), 1)
    assert w.tolist() == pytest.approx([1.25, 0.0]) and kept.tolist() == [True, False] and w[1] == 0


def test_one_dropped_weight_moves_the_others_to_the_constrained_minimum():
    G, w = drawn(40, 8), drawn(8, seed=1)
    F = dense(G, 0.1)
    moved, kept = obs_prune(w, FisherInverse(G.clone(), 0.1), 1)
    (q,) = (~kept).nonzero()[:, 0].tolist()
    losses = []  # ½δᵀFδ with wᵢ gone and the rest free, for each i
    for i in range(8):
        rest = [j for j in range(8) if j != i]
        delta = torch.zeros(8).double()
        delta[i] = -w[i]
        delta[rest] = torch.linalg.solve(F[rest][:, rest], F[rest, i] * w[i])
        losses.append(float(delta @ F @ delta / 2))
        if i == q:
            assert torch.allclose(moved - w, delta)
    assert q == min(range(8), key=losses.__getitem__)


def test_limits_are_oracle_4():
    x = drawn(50)
    assert torch.allclose(1e9 * FisherInverse(drawn(20, 50), 1e9).mul(x), x, rtol=1e-6)
    assert torch.equal(FisherInverse(torch.zeros(20, 50).double(), 0.5).mul(x), x / 0.5)


def test_pushing_is_the_static_construction_of_the_last_rows_oracles_5_6():
    G, x = drawn(9, 30), drawn(30, seed=1)
    found = FisherInverse.empty(6, 30, 1e-2, x)
    for g in G:
        found.push(g)
    assert torch.allclose(found.mul(x), BlockFisherInverse(G[3:].flip(0), 1e-2, None).mul(x), rtol=1e-9)
    assert torch.allclose(found.newest(), torch.linalg.solve(dense(G[3:], 1e-2), G[-1]), rtol=1e-9)


@pytest.mark.parametrize("count_rows, n", [(False, 6), (True, 2)])
def test_a_window_that_is_not_full_divides_by_its_length_or_by_what_it_holds(count_rows, n):
    G = drawn(2, 30)
    found = FisherInverse.empty(6, 30, 1e-2, G, count_rows)
    for g in G:
        found.push(g)
    expected = torch.linalg.solve(dense(G, 1e-2, n), G[-1])
    assert torch.allclose(found.newest(), expected) and torch.allclose(found.mul(G[-1]), expected)


def test_a_single_gradient_is_oracle_9():
    g = drawn(30)
    assert torch.allclose(FisherInverse(g[None].clone(), 0.3).mul(g), g / (0.3 + g @ g))


def test_the_newest_keeps_its_digits_in_fp32_where_a_plain_product_loses_them():
    G = drawn(16, 400)
    expected = torch.linalg.solve(dense(G.float(), 1e-6), G[-1].float().double())
    found = FisherInverse(G.float(), 1e-6)
    error = [float((v - expected).norm() / expected.norm()) for v in (found.newest(), found.mul(G[-1].float()))]
    assert error[0] < 1e-5 < error[1]


def test_a_bf16_window_is_that_of_its_rounded_rows():
    G = drawn(8, 300, dtype=torch.float32).bfloat16()
    found = FisherInverse.empty(8, 300, 1e-2, G[0])
    for g in G.float():
        found.push(g)
    assert found.window.dtype == torch.bfloat16 and found.newest().dtype == torch.float32
    assert torch.allclose(found.newest().double(), torch.linalg.solve(dense(G, 1e-2), G[-1].double()), rtol=1e-4)


def test_blocks_are_inverses_of_their_own():
    G, x = drawn(20, 50), drawn(50, seed=1)
    found = BlockFisherInverse(G, 1e-2, 16)
    parts = [FisherInverse(part.clone(), 1e-2) for part in G.split(16, 1)]
    assert torch.allclose(found.mul(x), torch.cat([f.mul(v) for f, v in zip(parts, x.split(16))]), rtol=1e-8)
    assert torch.allclose(found.diag(), torch.cat([f.diag() for f in parts]), rtol=1e-8)


def test_damping_must_be_positive():
    with pytest.raises(UserError, match="positive"):
        FisherInverse(TWO.clone(), 0.0)
