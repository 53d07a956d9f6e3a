"""The compiled products of a group: against float64, and no further from it than torch's products in bf16."""

from contextlib import contextmanager

import pytest
import torch

from veneer import kernels
from veneer.kernels import linear as compiled
from veneer.numerics import lowrank
from veneer.numerics.dropout import keep_mask
from veneer.numerics.lowrank import Branch, Factors

pytestmark = pytest.mark.skipif(not kernels.usable(), reason=kernels.state())

NEEDS = (True, True, True, True)


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def group(
    widths, inner, rank, *, factors=torch.float32, dropout=0.0, gain=False, bias=False, base=True, stored=False, seed=0
):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0, dtype=torch.float32):
        return (torch.randn(*shape, generator=g) * scale).to(dtype)

    branches = []
    for width in widths:
        W = normal(width, inner, scale=inner**-0.5, dtype=torch.bfloat16) if base else None
        A = normal(rank, inner, scale=inner**-0.5, dtype=factors) if rank else None
        B = normal(width, rank, dtype=factors) if rank else None
        b, d = normal(width) if bias else None, 1 + normal(width, scale=0.1) if gain else None
        W = (lambda W=W: W) if stored else W
        branches.append(Branch(W, b, A, B, 0.75, dropout if rank else 0.0, 11 if dropout else None, d))
    return branches


def exact(rows, branches, grads):
    """Outputs and gradients in float64 by autograd, as the torch products lay them out."""
    x = rows.double().requires_grad_()
    leaves, outputs = [x], []
    for b in branches:
        t = {
            n: getattr(b, n).double().requires_grad_() for n in ("bias", "A", "B", "gain") if getattr(b, n) is not None
        }
        y = 0
        if b.weight is not None:
            y = x @ b.dense(torch.bfloat16).double().t()
        if b.A is not None:
            mask = keep_mask(b.seed, tuple(rows.shape), b.dropout, torch.float64, rows.device) if b.dropout else 1
            y = y + b.factor * ((x * mask) @ t["A"].t()) @ t["B"].t()
        y = y * t["gain"] if "gain" in t else y
        outputs.append(y + t["bias"] if "bias" in t else y)
        leaves += t.values()
    found = torch.autograd.grad(outputs, leaves, [g.double() for g in grads])
    return [y.detach() for y in outputs], found


def computed(rows, branches, grads, needs=NEEDS, need_rows=True):
    factors = Factors.of(branches, rows.dtype)
    outputs, hidden, before = lowrank.run(rows, branches, factors)
    has = [(b.bias is not None, b.A is not None, b.B is not None, b.gain is not None) for b in branches]
    wanted = [tuple(a and b for a, b in zip(needs, have)) for have in has]
    total, found = lowrank.gradients(rows, branches, factors, list(grads), hidden, before, need_rows, wanted)
    order = [getattr(one, n) for one in found for n in ("bias", "A", "B", "gain") if getattr(one, n) is not None]
    return outputs, [t for t in (total, *order) if t is not None]


def far(found, true):
    return [float((f.double() - t).norm() / t.norm()) for f, t in zip(found, true, strict=True)]


CASES = {
    "queries, keys and values": ((48, 16, 16), 48, 4, 40, {}),
    "one layer, a whole number of tiles": ((96,), 64, 16, 64, {}),
    "nothing is a multiple of sixteen": ((50, 18), 70, 3, 37, {}),
    "rank 1": ((34,), 22, 1, 5, {}),
    "more ranks than lanes": ((40, 24), 66, 35, 21, {}),
    "deeper than one packing": ((64, 2500), 2600, 5, 19, {}),
    "more rows than one block": ((50,), 2200, 2, 530, {}),
    "one row": ((32, 32), 32, 8, 1, {}),
    "no change": ((40, 20), 30, 0, 33, {}),
    "no base": ((40, 20), 30, 6, 33, {"base": False}),
    "a base that is made when asked for": ((40,), 30, 6, 33, {"stored": True}),
    "dropout": ((40, 24), 30, 6, 33, {"dropout": 0.25}),
    "gain and bias": ((400, 240), 30, 6, 333, {"gain": True, "bias": True}),
    "all of it": ((400, 240), 30, 5, 333, {"gain": True, "bias": True, "dropout": 0.1}),
}


@pytest.mark.parametrize("case", CASES)
def test_as_near_to_float64_as_torch_in_both_directions(case, monkeypatch):
    widths, inner, rank, count, more = CASES[case]
    branches = group(widths, inner, rank, **more)
    g = torch.Generator().manual_seed(1)
    rows = torch.randn(count, inner, generator=g).bfloat16()
    grads = [torch.randn(count, w, generator=g).bfloat16() for w in widths]
    assert compiled.takes(branches, torch.bfloat16)
    ours = computed(rows, branches, grads)
    monkeypatch.setattr(compiled, "takes", lambda *_: False)
    theirs = computed(rows, branches, grads)
    true = exact(rows, branches, grads)
    for side in (0, 1):
        for mine, other in zip(far(ours[side], true[side]), far(theirs[side], true[side])):
            assert mine <= max(1.1 * other, 2e-3), case  # 2e-3: a rounding to bf16
    assert [t.dtype for t in ours[1]] == [t.dtype for t in theirs[1]]


@pytest.mark.parametrize("asked", ["A", "B", "rows"])
def test_what_is_not_asked_for_is_not_made(asked):
    branches = group((40, 24), 30, 6)
    rows, grads = torch.randn(20, 30).bfloat16(), [torch.randn(20, w).bfloat16() for w in (40, 24)]
    needs = (False, asked == "A", asked == "B", False)
    _, some = computed(rows, branches, grads, needs, asked == "rows")
    _, all_of_them = computed(rows, branches, grads, (False, True, True, False))
    place = {"rows": [0], "A": [1, 3], "B": [2, 4]}[asked]
    assert len(some) == len(place)
    assert all(torch.equal(s, all_of_them[i]) for s, i in zip(some, place))


def test_no_rows_give_gradients_of_zero():
    branches = group((40, 24), 30, 6)
    torch.full((4, 40), torch.nan)  # what memory held before
    outputs, (rows, *found) = computed(
        torch.empty(0, 30).bfloat16(), branches, [torch.empty(0, w).bfloat16() for w in (40, 24)]
    )
    assert [tuple(y.shape) for y in outputs] == [(0, 40), (0, 24)] and rows.shape == (0, 30)
    assert len(found) == 4 and not any(f.any() for f in found)


@pytest.mark.parametrize("wrong", ["rows", "B"])
def test_what_does_not_fit_is_refused_and_not_read(wrong):
    (branch,) = group((40,), 30, 6)
    branch = branch._replace(B=torch.zeros(38, 6)) if wrong == "B" else branch
    rows = torch.zeros(5, 28 if wrong == "rows" else 30).bfloat16()
    with pytest.raises(ValueError, match="got W, A and B of the shapes"):
        lowrank.run(rows, [branch], Factors.of([branch], torch.bfloat16))


def test_outputs_go_where_they_are_to_and_nowhere_else():
    branches = group((40, 18), 30, 5)
    rows = torch.randn(23, 64).bfloat16()[:, 7:37]  # rows that lie apart
    field = torch.full((25, 80), 7.0).bfloat16()
    into = field[1:24, 3:61].split((40, 18), 1)
    factors = Factors.of(branches, torch.bfloat16)
    lowrank.run(rows, branches, factors, into)
    plain, *_ = lowrank.run(rows.contiguous(), branches, factors)
    assert all(torch.equal(a, b) for a, b in zip(into, plain))
    outside = torch.ones_like(field, dtype=torch.bool)
    outside[1:24, 3:61] = False
    assert (field[outside] == 7).all()


def test_what_follows_a_matrix_in_memory_is_not_read():
    """Not-a-number beside every operand: an element read beyond its row would spoil a sum."""

    def fenced(t):
        field = torch.full((t.shape[0] + 2, t.shape[1] + 40), torch.nan, dtype=t.dtype)
        field[1:-1, 20:-20] = t
        return field[1:-1, 20:-20]

    branches = group((34, 20), 38, 3)
    around = [b._replace(weight=fenced(b.weight), A=fenced(b.A), B=fenced(b.B)) for b in branches]
    rows, grads = torch.randn(21, 38).bfloat16(), [torch.randn(21, w).bfloat16() for w in (34, 20)]
    inside = computed(rows, branches, grads)
    beside = computed(fenced(rows), around, [fenced(g) for g in grads])
    for a, b in zip(inside, beside):
        assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_not_a_number_and_infinity_come_through():
    branches = group((32,), 32, 4)
    rows = torch.randn(16, 32).bfloat16()
    rows[3, 5], rows[7, 1] = torch.nan, torch.inf
    (y,), *_ = lowrank.run(rows, branches, Factors.of(branches, torch.bfloat16))
    assert y[3].isnan().all() and not y[7].isfinite().any()
    assert y[[i for i in range(16) if i not in (3, 7)]].isfinite().all()


@pytest.mark.parametrize("by", ["compiled code", "torch"])
def test_a_change_below_the_last_digit_of_the_base_is_not_lost(by, monkeypatch):
    """It moves the mean of many outputs by its own mean, though it moves few of them by a digit."""
    if by == "torch":
        monkeypatch.setattr(compiled, "takes", lambda *_: False)
    (base,) = group((64,), 64, 0)
    rows = (1 + torch.rand(8192, 64, generator=torch.Generator().manual_seed(0))).bfloat16()
    moved = base._replace(A=torch.ones(1, 64), B=torch.full((64, 1), 2**-16))
    (before,), *_ = lowrank.run(rows, [base], Factors.of([base], torch.bfloat16))
    (after,), *_ = lowrank.run(rows, [moved], Factors.of([moved], torch.bfloat16))
    wanted = float(rows.double().sum() / len(rows) * 2**-16) * moved.scale
    assert float((after.double() - before.double()).mean()) == pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize(
    ("branches", "dtype"),
    [
        (group((32,), 32, 4), torch.float32),
        (group((33,), 32, 4), torch.bfloat16),
        (group((32,), 31, 4), torch.bfloat16),
        ([group((32,), 32, 4)[0]._replace(weight=torch.randn(32, 32).bfloat16().t())], torch.bfloat16),
        ([*group((32,), 32, 4, dropout=0.1), *group((32,), 32, 4)], torch.bfloat16),
        (group((32,), 32, 4, factors=torch.bfloat16), torch.bfloat16),
        (group((8,) * 9, 32, 4), torch.bfloat16),
    ],
    ids=["fp32", "odd outputs", "odd inputs", "stored by columns", "two dropouts", "bf16 factors", "nine layers"],
)
def test_other_groups_are_left_to_torch(branches, dtype):
    assert not compiled.takes(branches, dtype)


def test_the_same_bits_every_time_with_any_number_of_threads():
    branches = group((400, 112), 576, 16)
    rows, grads = torch.randn(288, 576).bfloat16(), [torch.randn(288, w).bfloat16() for w in (400, 112)]
    with threads(1):
        alone = computed(rows, branches, grads)
    with threads(3):
        for found in (computed(rows, branches, grads), computed(rows, branches, grads)):
            for a, b in zip(alone, found):
                assert all(torch.equal(x, y) for x, y in zip(a, b))
