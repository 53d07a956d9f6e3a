"""The compiled cross entropy of the head: against float64, and no further from it than torch's pieces in fp32."""

import pytest
import torch
import torch.nn.functional as F

from veneer import kernels
from veneer.kernels import softmax
from veneer.train import loss

pytestmark = pytest.mark.skipif(not kernels.usable(), reason=kernels.state())

BF16 = torch.bfloat16
SHAPES = [(1, 1), (3, 2), (4, 17), (5, 31), (2, 2048), (3, 2049), (7, 5003), (2, 49152)]
GUARD, MARK = 64, 7.0


def drawn(rows, n, scale=4.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, n, generator=g) * scale).to(BF16), torch.randint(n, (rows,), generator=g)


def exact(logits, targets):
    x = logits.double().requires_grad_()
    total = F.cross_entropy(x, targets, reduction="sum")
    return total.detach(), torch.autograd.grad(total, x)[0]


def by_torch(monkeypatch, logits, targets):
    with monkeypatch.context() as m:
        m.setattr(softmax, "takes", lambda logits: False)
        return loss._to_gradient(logits, targets, torch.float32)


@pytest.mark.parametrize("scale", [0.1, 4.0, 30.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradient_are_as_near_to_the_truth_as_torch(shape, scale, monkeypatch):
    logits, targets = drawn(*shape, scale)
    total, gradient = exact(logits, targets)
    mine, other = logits.clone(), logits.clone()
    found, torchs = loss._to_gradient(mine, targets, torch.float32), by_torch(monkeypatch, other, targets)
    assert found.dtype == torch.float32 and found.shape == ()
    assert abs(found - total) <= 1.1 * abs(torchs - total) + 2e-7 * shape[0] * max(1.0, total / shape[0])
    assert (mine.double() - gradient).norm() <= 1.1 * (other.double() - gradient).norm() + 1e-30


def test_the_compiled_code_is_what_the_loss_calls(monkeypatch):
    logits, targets = drawn(3, 40)
    monkeypatch.setattr(softmax, "to_gradient", lambda *given: "compiled")
    assert loss._to_gradient(logits, targets, torch.float32) == "compiled"
    assert loss._to_gradient(logits.double(), targets, torch.float64) != "compiled"


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_beside_the_rows_is_read_or_written(shape):
    logits, targets = drawn(*shape)
    plain = logits.clone()
    total = softmax.to_gradient(plain, targets)
    whole = torch.full((shape[0] + 2, shape[1] + 2 * GUARD), float("nan"), dtype=BF16)
    inside = whole[1:-1, GUARD:-GUARD]
    inside.copy_(logits)
    assert torch.equal(softmax.to_gradient(inside, targets), total) and torch.equal(inside, plain)
    inside.fill_(float("nan"))
    assert whole.isnan().all()


@pytest.mark.parametrize("column", [0, 16, 2047, 2048, 4999])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_comes_out_as_from_torch(value, column, monkeypatch):
    logits, targets = drawn(3, 5003)
    logits[1, column] = value
    mine, other = logits.clone(), logits.clone()
    found, torchs = softmax.to_gradient(mine, targets), by_torch(monkeypatch, other, targets)
    assert torch.equal(found.isnan(), torchs.isnan())
    assert torch.equal(mine.isnan(), other.isnan()) and torch.allclose(mine[0].float(), other[0].float(), atol=1e-2)


def test_a_row_may_begin_with_many_that_are_minus_infinity():
    logits, targets = drawn(2, 5003)
    logits[:, :4100], targets[:] = float("-inf"), 4500
    total, gradient = exact(logits, targets)
    found = softmax.to_gradient(logits, targets)
    assert torch.allclose(found.double(), total, rtol=1e-6)
    assert torch.allclose(logits.double(), gradient, rtol=2**-8, atol=1e-30)


def test_a_target_outside_of_the_vocabulary_is_refused_before_anything_is_written():
    for wrong in (-1, 40):
        logits, targets = drawn(3, 40)
        kept, targets[1] = logits.clone(), wrong
        with pytest.raises(IndexError, match=f"target {wrong} "):
            softmax.to_gradient(logits, targets)
        assert torch.equal(logits, kept)


def test_the_number_of_threads_changes_nothing():
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            logits, targets = drawn(19, 5003)
            found.append((softmax.to_gradient(logits, targets), logits))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_no_rows_give_a_loss_of_zero():
    assert softmax.to_gradient(torch.empty(0, 40, dtype=BF16), torch.empty(0, dtype=torch.int64)) == 0
