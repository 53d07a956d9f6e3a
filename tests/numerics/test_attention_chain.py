"""The chained gradient: the sheet's numbers, autograd, and what theory says of its error and its cost."""

import pytest
import torch
from torch import tensor
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from veneer.errors import UserError
from veneer.numerics import attention_chain as chain

CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["open", "causal"])


def drawn(L, h, size=1.0, heads=(), seed=0):
    """(q, k, v, G), fp64, with the largest |score| at ``size`` for β = h^-½."""
    g = torch.Generator().manual_seed(seed)
    q, k, v, G = (torch.randn(*heads, L, h, generator=g, dtype=torch.float64) for _ in range(4))
    grow = (size / (h**-0.5 * q @ k.mT).abs().max()) ** 0.5
    return q * grow, k * grow, v, G


def by_autograd(q, k, v, G, beta, causal):
    q, k, v = (t.clone().requires_grad_() for t in (q, k, v))
    O = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=beta)
    return torch.autograd.grad(O, (q, k, v), G)


def close(found, expected, tolerance=1e-9):
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, rtol=tolerance, atol=tolerance)


def whole(P, rows=64):
    """A map in factors that is exactly P: from its full SVD."""
    U, s, Vh = torch.linalg.svd(P)
    return chain.Map(U * s[..., None, :], Vh.mT, (), rows)


def test_the_sheets_two_tokens():
    q, k, v, G = (tensor(x, dtype=torch.float64)[:, None] for x in ([1, 0], [1, -1], [1, 2], [1, 1]))
    P = chain.softmax_map(q, k, 1.0)
    assert_close(P, tensor([[0.880797, 0.119203], [0.5, 0.5]], dtype=P.dtype), atol=1e-6, rtol=0)
    expected = [[-0.209987, -0.5], [-0.104994, 0.104994], [1.380797, 0.619203]]
    for found in (chain.exact(q, k, v, G, 1.0), chain.chained(whole(P), q, k, v, G, 1.0)):
        assert_close(torch.cat(found, 1).T, tensor(expected, dtype=P.dtype), atol=1e-6, rtol=0)


@CAUSAL
def test_exact_gradients_are_autograds(causal):
    q, k, v, G = drawn(37, 8, size=3.0, heads=(2, 3))
    close(chain.exact(q, k, v, G, 0.3, causal), by_autograd(q, k, v, G, 0.3, causal), 1e-12)


@CAUSAL
def test_gradients_of_the_factors_are_autograds(causal):
    g = torch.Generator().manual_seed(1)
    X = torch.randn(20, 12, generator=g, dtype=torch.float64)
    W, A, B = (torch.randn(3, *s, generator=g, dtype=torch.float64) for s in ((6, 12), (2, 12), (6, 2)))
    A.requires_grad_(), B.requires_grad_()
    q, k, v = X @ (W + 0.5 * B @ A).mT
    G = torch.randn(20, 6, generator=g, dtype=torch.float64)
    O = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.4)
    dA, dB = torch.autograd.grad(O, (A, B), G)
    for i, dZ in enumerate(chain.exact(q, k, v, G, 0.4, causal)):
        close(chain.of_factors(dZ, X, A[i], B[i], 0.5), (dA[i], dB[i]), 1e-10)


def test_rows_of_ds_sum_to_zero_so_that_a_common_key_gets_no_gradient_through_the_scores():
    q, k, v, G = drawn(24, 6, size=2.0)
    dq = chain.chained(whole(chain.softmax_map(q, k, 0.4)), q, k, v, G, 0.4).q
    shifted = chain.chained(whole(chain.softmax_map(q, k, 0.4)), q, k + 5.0, v, G, 0.4).q
    close([shifted], [dq])


def test_the_chain_is_exact_for_an_exact_map():
    q, k, v, G = drawn(50, 6, size=5.0, heads=(2,))
    P = chain.softmax_map(q, k, 0.4)
    close(chain.chained(whole(P, rows=16), q, k, v, G, 0.4), chain.exact(q, k, v, G, 0.4))


def test_the_chain_is_the_dense_form_of_its_map():
    q, k, v, G = drawn(40, 5)
    P = chain.approximate(q, k, 0.4, chain.random_features(5, 7, torch.Generator().manual_seed(2), torch.float64))
    dense = P.U @ P.F.mT
    dS = dense * (G @ v.mT - (G * (dense @ v)).sum(-1, keepdim=True))
    close(chain.chained(P, q, k, v, G, 0.4), (0.4 * dS @ k, 0.4 * dS.mT @ q, dense.mT @ G))


@CAUSAL
def test_taylor_features_converge_to_the_exact_gradient(causal):
    q, k, v, G = drawn(45, 3, size=1.0, heads=(2,))
    beta, expected, errors = 3**-0.5, chain.exact(*drawn(45, 3, size=1.0, heads=(2,)), 3**-0.5, causal), []
    for degree in (2, 4, 12):
        P = chain.approximate(q, k, beta, chain.taylor_features(3, degree), causal, rows=16)
        found = chain.chained(P, q, k, v, G, beta)
        errors.append(max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected)))
    assert errors[0] > 10 * errors[1] and errors[2] < 1e-8


@CAUSAL
def test_nystrom_features_are_exact_where_every_row_is_a_landmark(causal):
    q, k, v, G = drawn(30, 6, size=2.0, heads=(2,))
    P = chain.approximate(q, k, 0.4, chain.nystrom_features(q, k, 0.4, 60, ridge=1e-13), causal, rows=8)
    close(chain.chained(P, q, k, v, G, 0.4), chain.exact(q, k, v, G, 0.4, causal), 1e-6)


def test_landmarks_do_with_fewer_than_random_features_where_tokens_are_alike():
    q, k, v, G = drawn(256, 16, size=1.2)
    for kind in (q, k):  # eight kinds of tokens, as good as
        kind.copy_(kind[:8].repeat(32, 1) + 0.01 * kind)
    expected, errors = chain.exact(q, k, v, G, 0.25).q, {}
    for name, features in (
        ("nystrom", chain.nystrom_features(q, k, 0.25, 32)),
        ("random", chain.random_features(16, 32, torch.Generator().manual_seed(0), torch.float64)),
    ):
        found = chain.chained(chain.approximate(q, k, 0.25, features), q, k, v, G, 0.25).q
        errors[name] = float((found - expected).norm() / expected.norm())
    assert errors["nystrom"] < errors["random"] / 5
    with pytest.raises(UserError, match="2 to 512"):
        chain.nystrom_features(q, k, 0.25, 513)


@CAUSAL
def test_maps_in_factors_have_rows_that_sum_to_one_whatever_the_scores(causal):
    q, k, v, G = (t.float() for t in drawn(70, 8, size=200.0))
    P = chain.approximate(q, k, 8**-0.5, chain.random_features(8, 32, torch.Generator().manual_seed(0)), causal, 16)
    ones = chain.output(P, torch.ones(70, 1))
    assert_close(ones, torch.ones(70, 1), atol=1e-4, rtol=0)
    assert all(torch.isfinite(t).all() for t in chain.chained(P, q, k, v, G, 8**-0.5))


def test_tokens_do_not_see_later_ones():
    q, k, v, _ = drawn(40, 4)
    features = chain.random_features(4, 16, torch.Generator().manual_seed(0), torch.float64)
    before = chain.linear_time_attention(q, k, v, features, causal=True, rows=8)
    k[30:], v[30:] = 3.0, -3.0
    after = chain.linear_time_attention(q, k, v, features, causal=True, rows=8)
    close([after[:30]], [before[:30]])
    assert not torch.allclose(after[30:], before[30:])


def test_one_chunk_is_exact_attention():
    q, k, v, G = drawn(30, 4, size=6.0)
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    features = chain.random_features(4, 4, torch.Generator().manual_seed(0), torch.float64)
    O = chain.linear_time_attention(q, k, v, features, causal=True, rows=32)
    close([O], [torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)])
    close(torch.autograd.grad(O, (q, k, v), G), by_autograd(q, k, v, G, 0.5, True))


def test_an_exact_output_has_the_chains_gradient():
    q, k, v, G = drawn(30, 4, size=2.0)
    features = chain.random_features(4, 64, torch.Generator().manual_seed(0), torch.float64)
    q.requires_grad_()
    plain, studied = (chain.linear_time_attention(q, k, v, features, exact_output=e) for e in (False, True))
    close([studied], [chain.softmax_map(q, k, 0.5) @ v])
    close(torch.autograd.grad(studied, q, G), torch.autograd.grad(plain, q, G))


def query_errors(size, counts, L=64, h=16, draws=4):
    """Relative errors of dB_Q with random features, for each count."""
    q, k, v, G = drawn(L, h, size)
    XA = torch.randn(L, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    expected, found = chain.exact(q, k, v, G, h**-0.5).q.mT @ XA, []
    for m in counts:
        errors = []
        for seed in range(draws):
            features = chain.random_features(h, m, torch.Generator().manual_seed(seed), torch.float64)
            dq = chain.chained(chain.approximate(q, k, h**-0.5, features), q, k, v, G, h**-0.5).q
            errors.append(float((dq.mT @ XA - expected).norm() / expected.norm()))
        found.append(sum(errors) / draws)
    return found


def test_more_features_help_below_the_threshold_and_hardly_above():
    mild, wild = (query_errors(size, (64, 1024)) for size in (0.3, 4.87))
    assert mild[0] < 0.2 and mild[1] < mild[0] / 2.5  # m^-½ would give a quarter
    assert wild[1] > wild[0] / 1.5 and wild[1] > 10 * mild[1]


def test_the_best_map_of_rank_k_is_near_where_scores_are_mild():
    errors = {}
    for size in (4.87, 1.22, 0.30):
        q, k, v, G = drawn(64, 16, size)
        expected = chain.exact(q, k, v, G, 0.25).q
        for rank in (8, 32):
            U, s, Vh = torch.linalg.svd(chain.softmax_map(q, k, 0.25))
            P = chain.Map(U[:, :rank] * s[:rank], Vh[:rank].mT)
            errors[size, rank] = float((chain.chained(P, q, k, v, G, 0.25).q - expected).norm() / expected.norm())
    assert errors[4.87, 8] > errors[1.22, 8] > errors[0.30, 8]
    assert all(errors[size, 32] < errors[size, 8] / 2 for size in (4.87, 1.22, 0.30))
    assert errors[0.30, 32] < 2e-3 and errors[4.87, 32] < 0.2


def operations(L, of):
    q, k, v, G = (t.float() for t in drawn(L, 16))
    features = chain.random_features(16, 32, torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        if of == "exact":
            chain.exact(q, k, v, G, 0.25)
        else:
            chain.chained(chain.approximate(q, k, 0.25, features, of == "causal"), q, k, v, G, 0.25)
    return counter.get_total_flops()


@pytest.mark.parametrize("of, growth", [("open", 4), ("causal", 4), ("exact", 16)])
def test_operations_grow_with_the_length_alone(of, growth):
    assert operations(2048, of) / operations(512, of) == pytest.approx(growth, rel=0.02)


def test_too_many_monomials_are_refused():
    with pytest.raises(UserError, match="735,471 monomials"):
        chain.taylor_features(16, 8)
