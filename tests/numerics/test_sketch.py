import pytest
import torch

from veneer.errors import UserError
from veneer.numerics.sketch import GradientSketch
from veneer.numerics.svd import excess_error, subspace_error

OUT, IN = 300, 260


def batches(rank, noise, count=4, size=128, seed=0):
    """Pairs (g, x) whose Σ gᵀx has ``rank`` large directions (10, 9, …) and a flat rest of size ``noise``."""
    g = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(OUT, rank, generator=g)).Q
    V = torch.linalg.qr(torch.randn(IN, rank, generator=g)).Q
    S = torch.arange(10, 10 - rank, -1).float()
    low = [(U * S / count).mT, V.mT]
    rest = [
        (torch.randn(size, OUT, generator=g) * noise, torch.randn(size, IN, generator=g) / size) for _ in range(count)
    ]
    return [(torch.cat([low[0], a]), torch.cat([low[1], b])) for a, b in rest]


def dense(pairs):
    return sum(g.mT @ x for g, x in pairs)


def sketched(pairs, rank, seed=1):
    sketch = GradientSketch(OUT, IN, rank, torch.Generator().manual_seed(seed))
    assert sketch.dense is None
    for g, x in pairs:
        sketch.add(g, x)
    return sketch


def test_a_sum_of_low_rank_comes_out_exactly():
    pairs = batches(rank=5, noise=0.0)
    G = dense(pairs)
    U, S, Vh = sketched(pairs, 8).svd()
    assert torch.linalg.matrix_norm((U * S) @ Vh - G) <= 1e-5 * torch.linalg.matrix_norm(G)
    torch.testing.assert_close(S[:5], torch.tensor([10.0, 9, 8, 7, 6]), rtol=1e-5, atol=0)


def test_leading_directions_survive_noise_within_the_stated_error():
    pairs = batches(rank=5, noise=0.02)
    G = dense(pairs)
    U, S, Vh = sketched(pairs, 8).svd(5)
    exact = torch.linalg.svd(G)
    assert excess_error(G, U, S, Vh) < 1.0  # ‖G − Ĝ‖² ≤ 4 Σ σ² over the tail: less than twice the least error
    assert subspace_error(U, exact.U[:, :5]) < 0.1
    assert subspace_error(Vh.mT, exact.Vh[:5].mT) < 0.1
    torch.testing.assert_close(S, exact.S[:5], rtol=0.02, atol=0)


def test_the_sketch_is_linear_so_batches_may_be_split_anyhow():
    pairs = batches(rank=3, noise=0.02)
    whole = sketched([(torch.cat([g for g, _ in pairs]), torch.cat([x for _, x in pairs]))], 4)
    parts = sketched(pairs, 4)
    torch.testing.assert_close(whole.range, parts.range, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole.corange, parts.corange, rtol=1e-4, atol=1e-4)


def test_memory_is_bounded_by_that_of_the_matrix_and_small_ones_are_exact():
    assert sketched(batches(3, 0.0), 4).memory < OUT * IN * 4
    small = GradientSketch(12, 10, 4)
    g, x = torch.randn(30, 12), torch.randn(30, 10)
    small.add(g, x)
    assert small.memory == 12 * 10 * 4
    U, S, Vh = small.svd()
    torch.testing.assert_close(S, torch.linalg.svdvals(g.mT @ x)[:4], rtol=1e-4, atol=0)
    assert U.shape == (12, 4) and Vh.shape == (4, 10)


def test_generators_reproduce_and_half_precision_rows_are_summed_in_fp32():
    pairs = [(g.bfloat16(), x.bfloat16()) for g, x in batches(rank=3, noise=0.02)]
    first, again = sketched(pairs, 4, seed=3), sketched(pairs, 4, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(first.svd(), again.svd()))
    assert first.range.dtype == torch.float32
    full = sketched([(g.float(), x.float()) for g, x in pairs], 4, seed=3)
    assert torch.equal(first.range, full.range)


def test_wrong_shapes_and_ranks_are_refused():
    sketch = GradientSketch(OUT, IN, 4)
    with pytest.raises(UserError, match=f"{OUT}×{IN}"):
        sketch.add(torch.zeros(3, IN), torch.zeros(3, OUT))
    with pytest.raises(UserError, match="1 to 4"):
        sketch.svd(5)
    with pytest.raises(UserError, match="at least 1"):
        GradientSketch(OUT, IN, 0)
