"""The compiled RMSNorm and gated activation: against float64, and no further from it than torch in bf16."""

import pytest
import torch
import torch.nn.functional as F

from veneer import kernels
from veneer.kernels import elementwise
from veneer.models import fast_mlp, fast_norm

pytestmark = pytest.mark.skipif(not kernels.usable(), reason=kernels.state())

BF16 = torch.bfloat16
SHAPES = [(1, 1), (3, 7), (5, 16), (2, 31), (7, 33), (1, 100), (65, 576), (288, 576)]
GUARD = 64  # numbers before and after an array, and between its rows, that nobody may write
MARK = 7.0
EPS = 1e-5


def normal(*shape, seed=0, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(BF16)


def guarded(x):
    """The same rows with marks around each, and the whole array with them."""
    rows, n = x.shape
    whole = torch.full((rows + 2, n + 2 * GUARD), MARK, dtype=BF16)
    inside = whole[1:-1, GUARD : GUARD + n]
    inside.copy_(x)
    return inside, whole


def untouched(whole, n):
    kept = whole.clone()
    kept[1:-1, GUARD : GUARD + n] = MARK
    return bool((kept == MARK).all())


def error(found, true):
    return (found.double() - true).norm().item()


def norm_exactly(x, weight, grad):
    x, weight = (t.double().requires_grad_() for t in (x, weight))
    y = F.rms_norm(x, weight.shape, weight, EPS)
    return y.detach(), *torch.autograd.grad(y, (x, weight), grad.double())


def gated_exactly(gate, up, grad):
    gate, up = (t.double().requires_grad_() for t in (gate, up))
    y = F.silu(gate) * up
    return y.detach(), *torch.autograd.grad(y, (gate, up), grad.double())


def passed(function, inputs, grad):
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, grad)


def norm(x, weight):
    return fast_norm.rms_norm(x, weight, EPS)


def without(monkeypatch):
    monkeypatch.setattr(elementwise, "takes", lambda *tensors: False)


def test_the_compiled_code_is_what_the_models_call(monkeypatch):
    called = []
    found = elementwise._function
    monkeypatch.setattr(elementwise, "_function", lambda name: called.append(name) or found(name))
    passed(norm, (normal(2, 3, 32), normal(32)), normal(2, 3, 32))
    passed(fast_mlp.swiglu, (normal(2, 3, 32), normal(2, 3, 32)), normal(2, 3, 32))
    names = ("rms_norm", "rms_norm_gradient", "swiglu", "swiglu_gradients")
    assert called == [f"veneer_{name}" for name in names]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_norm_is_as_near_to_the_truth_as_torch_is(shape, monkeypatch):
    x, weight, grad = normal(*shape, scale=3.0), 1 + normal(shape[1], seed=1), normal(*shape, seed=2)
    true = norm_exactly(x, weight, grad)
    mine = passed(norm, (x, weight), grad)
    without(monkeypatch)
    for found, torchs, exact in zip(mine, passed(norm, (x, weight), grad), true, strict=True):
        assert error(found, exact) <= 1.1 * error(torchs, exact) + 1e-30


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gated_activation_is_as_near_to_the_truth_as_torch_is(shape, monkeypatch):
    gate, up, grad = normal(*shape, scale=3.0), normal(*shape, seed=1), normal(*shape, seed=2)
    true = gated_exactly(gate, up, grad)
    mine = passed(fast_mlp.swiglu, (gate, up), grad)
    without(monkeypatch)
    for found, torchs, exact in zip(mine, passed(fast_mlp.swiglu, (gate, up), grad), true, strict=True):
        assert error(found, exact) <= 1.1 * error(torchs, exact) + 1e-30


def test_every_result_is_the_truth_rounded_once():
    """The exponential, over the whole range of bf16: the nearest bf16 or, where fp32 falls on the other side of a tie,
    its neighbour."""
    gate = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(BF16)
    gate = gate[gate.isfinite() & (gate.abs() > 1e-30) & (gate > -80)][None]
    up = torch.ones_like(gate)
    true = F.silu(gate.double())
    assert ((elementwise.swiglu(gate, up).double() - true).abs() <= true.abs() * (2**-8 + 2**-20)).all()
    s = torch.sigmoid(gate.double())
    slope = s * (1 + gate.double() * (1 - s))
    of_gate, of_up = elementwise.swiglu_gradients(up, gate, up)
    assert ((of_gate.double() - slope).abs() <= slope.abs() * 2**-8 + 2**-22).all()
    assert ((of_up.double() - true).abs() <= true.abs() * (2**-8 + 2**-20)).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_beside_the_rows_is_read_or_written(shape, monkeypatch):
    n = shape[1]
    outputs = []

    def empty(*shape, dtype=torch.float32):
        if dtype != BF16:
            return torch.full(shape, MARK, dtype=dtype)
        inside, whole = guarded(torch.zeros(*shape, dtype=dtype))
        outputs.append(whole)
        return inside

    x, gate, up, grad = (normal(*shape, seed=seed) for seed in range(4))
    weight = normal(n, seed=4)

    def all_of(x, gate, up, grad):
        y, roots = elementwise.rms_norm(x, weight, EPS)
        back = elementwise.rms_norm_gradient(grad, x, weight, roots)
        gated = elementwise.swiglu(gate, up), *elementwise.swiglu_gradients(grad, gate, up)
        return [t.clone() for t in (y, roots, back, *gated)]

    plain = all_of(x, gate, up, grad)
    given = [guarded(t) for t in (x, gate, up, grad)]
    for _, whole in given:  # what is read beside a row would make NaN of it
        whole[whole == MARK] = float("nan")
    monkeypatch.setattr(torch, "empty", empty)
    strided = all_of(*(inside for inside, _ in given))
    assert all(torch.equal(a, b) for a, b in zip(plain, strided, strict=True))
    assert len(outputs) == 5 and all(untouched(whole, n) for whole in outputs)


def test_the_gate_and_up_may_be_halves_of_one_array():
    both, grad = normal(4, 5, 66), normal(4, 5, 33, seed=1)
    gate, up = both[..., :33], both[..., 33:]
    mine = passed(fast_mlp.swiglu, (gate, up), grad)
    apart = passed(fast_mlp.swiglu, (gate.contiguous(), up.contiguous()), grad)
    assert all(torch.equal(a, b) for a, b in zip(mine, apart, strict=True))


def test_the_gradient_of_gate_may_be_written_over_what_it_is_made_of():
    gate, up, grad = (normal(9, 45, seed=seed) for seed in range(3))
    apart = elementwise.swiglu_gradients(grad, gate, up)
    of_gate, of_up = elementwise.swiglu_gradients(grad, gate, up, over=True)
    assert of_gate.data_ptr() == grad.data_ptr()
    assert torch.equal(of_gate, apart[0]) and torch.equal(of_up, apart[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_what_is_not_finite_comes_out_as_from_torch(value, where, monkeypatch):
    rows, gated = [normal(3, 40, seed=seed) for seed in range(3)], [normal(3, 40, seed=seed) for seed in range(3)]
    rows[1] = rows[1][0]
    for inputs in (rows, gated):
        inputs[where].view(-1)[17] = value

    mine = passed(norm, rows[:2], rows[2])[:2] + passed(fast_mlp.swiglu, gated[:2], gated[2])
    without(monkeypatch)
    torchs = passed(norm, rows[:2], rows[2])[:2] + passed(fast_mlp.swiglu, gated[:2], gated[2])
    for number, (found, other) in enumerate(zip(mine, torchs, strict=True)):
        assert torch.equal(found.isfinite(), other.isfinite())
        # torch's way to the norm's gradient adds and takes off a mean, which makes NaN of inf.
        assert number == 1 or torch.equal(found.isnan(), other.isnan())


def test_a_sum_of_gradients_without_strides_of_its_own_is_taken(monkeypatch):
    x, weight = normal(2, 3, 20).requires_grad_(), normal(20)
    (mine,) = torch.autograd.grad(norm(x, weight).sum(), x)
    without(monkeypatch)
    (torchs,) = torch.autograd.grad(norm(x, weight).sum(), x)
    assert torch.allclose(mine.float(), torchs.float(), atol=0.05, rtol=0.05)


def test_the_number_of_threads_changes_nothing(monkeypatch):
    monkeypatch.setattr(elementwise, "LITTLE", 0)
    threads = torch.get_num_threads()
    x, weight = normal(37, 576), normal(576)
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(passed(norm, (x, weight), x) + passed(fast_mlp.swiglu, (x, x), x))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("shape", [(0, 16), (0, 3)])
def test_no_rows_give_no_rows(shape):
    empty = normal(*shape)
    assert (
        elementwise.swiglu(empty, empty).shape == elementwise.rms_norm(empty, normal(shape[1]), EPS)[0].shape == shape
    )


def test_arrays_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match="must be the same"):
        elementwise.swiglu(normal(3, 8), normal(2, 8))
    with pytest.raises(ValueError, match="rows of 8 numbers"):
        elementwise.rms_norm(normal(3, 8), normal(7), EPS)
