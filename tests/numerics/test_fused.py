"""The fused low-rank product against the plain expression, finite differences and what autograd keeps."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from veneer.numerics.dropout import keep_mask
from veneer.numerics.fused import lowrank_linear

SEED = 7


def parts(dtype=torch.float64, rows=5, n_in=6, n_out=4, r=2):
    g = torch.Generator().manual_seed(0)

    def draw(*shape, dtype=dtype):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    x, W, b = draw(2, rows, n_in), draw(n_out, n_in), draw(n_out)
    A, B, gain = draw(r, n_in), draw(n_out, r), 1 + 0.1 * draw(n_out)
    return x, W, b, A, B, gain


def reference(x, W, b, A, B, s, p=0.0, gain=None):
    kept = x if not p else x * keep_mask(SEED, (x[..., 0].numel(), x.shape[-1]), p, x.dtype, x.device).view_as(x)
    y = x @ W.T + s / (1 - p) * (kept @ A.T) @ B.T
    y = y if gain is None else gain * y
    return y if b is None else y + b


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("with_gain", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradients_are_those_of_finite_differences(p, with_gain, with_bias):
    x, W, b, A, B, gain = parts()
    inputs = [x, b if with_bias else None, A, B, gain if with_gain else None]
    for t in inputs:
        if t is not None:
            t.requires_grad_()
    call = lambda x, b, A, B, g: lowrank_linear(x, W, b, A, B, 0.7, p, SEED if p else None, g)  # noqa: E731
    assert torch.autograd.gradcheck(call, inputs)
    torch.testing.assert_close(call(*inputs), reference(x, W, inputs[1], A, B, 0.7, p, inputs[4]))


def gradients(call, x, W, b, A, B):
    leaves = [t.detach().clone().requires_grad_() for t in (x, A, B)]
    y = call(leaves[0], W, b, leaves[1], leaves[2])
    y.float().square().sum().backward()
    return [y.detach(), *(t.grad for t in leaves)]


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_equals_the_plain_expression_in_each_precision(dtype, tolerance):
    x, W, b, _, _, _ = parts(dtype, rows=64, n_in=48, n_out=40)
    _, _, _, A, B, _ = parts(torch.float32, rows=64, n_in=48, n_out=40)
    exact = gradients(lambda *a: reference(*a, 0.5), *(t.double() for t in (x, W, b, A, B)))
    ours = gradients(lambda *a: lowrank_linear(*a, 0.5), x, W, b, A, B)
    for mine, true in zip(ours, exact):
        assert (mine.double() - true).norm() < tolerance * true.norm()
    assert [t.dtype for t in ours] == [dtype, dtype, torch.float32, torch.float32]


def test_a_weight_that_trains_gets_its_gradient():
    x, W, b, A, B, gain = parts()
    W.requires_grad_()
    call = lambda W: lowrank_linear(x, W, b, A, B, 0.7, 0.4, SEED, gain)  # noqa: E731
    assert torch.autograd.gradcheck(call, [W])
    torch.testing.assert_close(call(W), call(W.detach()))


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_without_a_weight_the_low_rank_part_stands_alone(p):
    x, W, b, A, B, gain = parts()
    seed = SEED if p else None
    call = lambda x, b, A, B, g: lowrank_linear(x, None, b, A, B, 0.7, p, seed, g)  # noqa: E731
    inputs = [t.requires_grad_() for t in (x, b, A, B, gain)]
    assert torch.autograd.gradcheck(call, inputs)
    torch.testing.assert_close(call(*inputs), reference(x, torch.zeros_like(W), b, A, B, 0.7, p, gain))


def test_a_stored_weight_is_asked_for_again_in_backward():
    x, W, b, A, B, _ = parts()
    calls = []

    def stored():
        calls.append(1)
        return W

    ours = gradients(lambda x, _, *rest: lowrank_linear(x, stored, *rest, 0.5), x, W, b, A, B)
    for mine, true in zip(ours, gradients(lambda *a: reference(*a, 0.5), x, W, b, A, B)):
        torch.testing.assert_close(mine, true)
    assert len(calls) == 2


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_keeps_the_input_as_it_came_and_nothing_else_of_its_size(p):
    x, W, b, _, _, _ = parts(torch.bfloat16, rows=64, n_in=48, n_out=40)
    A, B = (t.float().requires_grad_() for t in parts(torch.float32, n_in=48, n_out=40)[3:5])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = lowrank_linear(x.requires_grad_(), W, b, A, B, 0.5, p, SEED)
    weights = {t.data_ptr() for t in (W, b, A, B)}
    active = [t for t in kept if t.data_ptr() not in weights]
    assert [t.data_ptr() for t in active if t.numel() >= x.numel()] == [x.data_ptr()]
    assert sum(t.numel() for t in active) == x.numel() + 128 * 2  # x and h = x Aᵀ (N × r)
    y.sum().backward()


def test_dropout_is_the_same_when_run_again_and_under_checkpointing():
    x, W, b, A, B, _ = parts()
    call = lambda *a: lowrank_linear(*a, 0.5, 0.4, SEED)  # noqa: E731
    first, again = gradients(call, x, W, b, A, B), gradients(call, x, W, b, A, B)
    recomputed = gradients(lambda *a: checkpoint(call, *a, use_reentrant=False), x, W, b, A, B)
    for a, b_, c in zip(first, again, recomputed):
        assert torch.equal(a, b_) and torch.equal(a, c)
    state = torch.get_rng_state()
    call(x, W, b, A, B)
    assert torch.equal(state, torch.get_rng_state())


def test_mask_drops_the_asked_share_everywhere_and_differs_with_the_seed():
    masks = torch.stack([keep_mask(s, (400, 64), 0.3, torch.float32, torch.device("cpu")) for s in range(8)])
    assert abs(masks.mean().item() - 0.7) < 4 * (0.21 / masks.numel()) ** 0.5
    per_column = masks.mean((0, 1))
    assert (per_column - 0.7).abs().max() < 5 * (0.21 / 3200) ** 0.5
    centred = (masks - 0.7).flatten(1)
    correlation = centred @ centred.T / centred.shape[1] / 0.21
    assert (correlation - torch.eye(8)).abs().max() < 5 / centred.shape[1] ** 0.5
    assert torch.equal(masks[0], keep_mask(0, (400, 64), 0.3, torch.float32, torch.device("cpu")))


def test_under_autocast_it_computes_as_nn_linear_does():
    x, W, b, A, B, _ = (t.float() for t in parts(rows=64, n_in=48, n_out=40))
    with torch.autocast("cpu", torch.bfloat16):
        ours = gradients(lambda *a: lowrank_linear(*a, 0.5), x, W, b, A, B)
        assert F.linear(x, W, b).dtype == ours[0].dtype == torch.bfloat16
    assert [t.dtype for t in ours[1:]] == [torch.float32] * 3
    for mine, true in zip(ours, gradients(lambda *a: reference(*a, 0.5), x, W, b, A, B)):
        assert (mine.float() - true).norm() < 2e-2 * true.norm()


def test_used_twice_in_one_graph_its_gradients_add():
    x, W, _, A, B, _ = parts()
    W = W[:, :4]
    A, x = A[:, :4], x[..., :4]
    twice = gradients(
        lambda x, W, b, A, B: lowrank_linear(lowrank_linear(x, W, b, A, B, 0.5), W, b, A, B, 0.5), x, W, None, A, B
    )
    plain = gradients(lambda *a: reference(reference(*a, 0.5), *a[1:], 0.5), x, W, None, A, B)
    for mine, true in zip(twice, plain):
        torch.testing.assert_close(mine, true)


def test_no_gradient_is_made_that_nobody_asked_for():
    x, W, b, A, B, _ = parts()
    B.requires_grad_()
    y = lowrank_linear(x, W, b, A, B, 0.5)
    y.sum().backward()
    assert x.grad is None and A.grad is None and B.grad is not None


def test_differentiating_twice_is_refused():
    x, W, b, A, B, _ = parts()
    loss = lowrank_linear(x, W, b, A.requires_grad_(), B, 0.5).square().sum()
    (grad,) = torch.autograd.grad(loss, A, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_dropout_without_a_seed_is_refused():
    x, W, b, A, B, _ = parts()
    with pytest.raises(ValueError, match="seed"):
        lowrank_linear(x, W, b, A, B, 0.5, 0.1)


def test_works_inside_a_compiled_block():
    x, W, b, A, B, _ = parts(torch.float32)
    for p in (0.0, 0.4):
        block = lambda *a: torch.tanh(lowrank_linear(torch.tanh(a[0]), *a[1:], 0.5, p, SEED))  # noqa: B023, E731
        compiled = gradients(torch.compile(block, backend="aot_eager"), x, W, b, A, B)
        for mine, true in zip(compiled, gradients(block, x, W, b, A, B)):
            torch.testing.assert_close(mine, true)
