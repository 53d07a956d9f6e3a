import pytest
import torch

from veneer.errors import UserError
from veneer.numerics.pca import IncrementalPCA


def rows(n=240, d=24, seed=0):
    g = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, d + 1, dtype=torch.float32).flip(0)
    return torch.randn(n, d, generator=g) * scale + 5 * torch.randn(d, generator=g)


def test_four_points_give_axes_ratios_and_variances_known_by_hand():
    # sheet 064, oracle 4
    pca = IncrementalPCA(2)
    pca.update(torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
    torch.testing.assert_close(pca.components, torch.eye(2))
    torch.testing.assert_close(pca.explained_variance_ratio, torch.tensor([0.9, 0.1], dtype=torch.float64))
    torch.testing.assert_close(pca.variance, torch.tensor([6.0, 2 / 3], dtype=torch.float64))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("sizes", [[240], [80, 80, 80], [30, 5, 100, 1, 104]])
def test_batches_with_all_components_kept_equal_sklearn_on_the_whole(sizes, exact):
    from sklearn.decomposition import PCA

    X = rows()
    pca = IncrementalPCA(24, exact=exact)
    for part in X.split(sizes):
        pca.update(part)
    oracle = PCA(svd_solver="full").fit(X.double().numpy())
    cosines = (pca.components.double() @ torch.from_numpy(oracle.components_).mT).diagonal().abs()
    torch.testing.assert_close(cosines, torch.ones(24, dtype=torch.float64), atol=1e-4, rtol=0)
    expected = torch.from_numpy(oracle.explained_variance_ratio_)
    torch.testing.assert_close(pca.explained_variance_ratio, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(pca.mean, X.double().mean(0), atol=1e-6, rtol=0)
    torch.testing.assert_close(pca.variance, X.double().var(0), rtol=1e-6, atol=0)
    assert pca.count == 240


def test_batches_with_few_components_equal_sklearns_incremental_analysis():
    from sklearn.decomposition import IncrementalPCA as Oracle

    X = rows()
    pca, oracle = IncrementalPCA(5, exact=True), Oracle(n_components=5)
    for part in X.split(60):
        pca.update(part)
        oracle.partial_fit(part.double().numpy())
    cosines = (pca.components.double() @ torch.from_numpy(oracle.components_).mT).diagonal().abs()
    torch.testing.assert_close(cosines, torch.ones(5, dtype=torch.float64), atol=1e-5, rtol=0)
    expected = torch.from_numpy(oracle.explained_variance_ratio_)
    torch.testing.assert_close(pca.explained_variance_ratio, expected, atol=1e-5, rtol=0)
    variances = torch.from_numpy(oracle.explained_variance_)
    torch.testing.assert_close(pca.explained_variance, variances, rtol=1e-5, atol=0)


def test_the_fast_path_agrees_with_the_exact_one_on_wide_inputs():
    g = torch.Generator().manual_seed(3)
    X = torch.randn(400, 300, generator=g) * (torch.arange(1, 301) ** -1.0)
    fast, exact = IncrementalPCA(8), IncrementalPCA(8, exact=True)
    for part in X.split(200):
        fast.update(part)
        exact.update(part)
    cosines = (fast.components * exact.components).sum(1)  # signs agree too
    torch.testing.assert_close(cosines, torch.ones(8), atol=1e-3, rtol=0)
    torch.testing.assert_close(fast.singular_values, exact.singular_values, rtol=1e-4, atol=0)


def test_the_kept_components_reconstruct_better_than_random_ones_and_lose_what_the_spectrum_says():
    # sheet 064, oracle 7
    X = rows()
    pca = IncrementalPCA(6)
    pca.update(X)
    centred = X - X.mean(0)
    lost = (centred - centred @ pca.components.mT @ pca.components).square().sum()
    torch.testing.assert_close(lost, torch.linalg.svdvals(centred)[6:].square().sum(), rtol=1e-4, atol=0)
    other = torch.linalg.qr(torch.randn(24, 6, generator=torch.Generator().manual_seed(0))).Q
    assert lost < (centred - centred @ other @ other.mT).square().sum()


def test_rows_are_held_back_until_there_are_as_many_as_components():
    X = rows(n=40)
    short, whole = IncrementalPCA(8), IncrementalPCA(8)
    for part in X[:9].split(3):
        short.update(part)
        if part is not X[:9].split(3)[-1]:
            short.update(X[:0])
    whole.update(X[:9])
    torch.testing.assert_close(short.components, whole.components)
    assert short.count == 9
    waiting = IncrementalPCA(8)
    waiting.update(X[:7])
    assert waiting.count == 0
    with pytest.raises(UserError, match="only 7 rows"):
        _ = waiting.explained_variance_ratio


def test_change_tells_how_far_each_component_turned():
    X = rows()
    pca = IncrementalPCA(3)
    pca.update(X)
    assert not pca.change.any()
    before = pca.components
    pca.update(rows(seed=1))
    expected = torch.nn.functional.cosine_similarity(before, pca.components).abs()
    torch.testing.assert_close(pca.change, expected)


def test_constant_rows_have_ratio_zero_and_bad_shapes_are_refused():
    pca = IncrementalPCA(2)
    pca.update(torch.ones(5, 4))
    assert not pca.explained_variance_ratio.any()
    with pytest.raises(UserError, match=r"\(N, 4\)"):
        pca.update(torch.ones(5, 3))
    with pytest.raises(UserError, match="at least 1"):
        IncrementalPCA(0)


def test_bf16_rows_are_taken_in_full_precision():
    X = rows().bfloat16()
    half, full = IncrementalPCA(4), IncrementalPCA(4)
    half.update(X)
    full.update(X.float())
    assert torch.equal(half.components, full.components)
