"""Compiled attention against float64 through autograd, packed rows and batches, and no further from it than torch."""

import pytest
import torch

from veneer import kernels
from veneer.kernels import attention as compiled
from veneer.models.fast_attention import Heads, Turn, rotary_attention
from veneer.models.packing import packing

pytestmark = pytest.mark.skipif(not kernels.usable(), reason=kernels.state())


def angles(time, size):
    rates = torch.exp(-torch.arange(size // 2) * 5.0 / (size // 2))
    at = torch.cat([torch.arange(time)[:, None] * rates] * 2, -1)
    return at.cos()[None].bfloat16(), at.sin()[None].bfloat16()


def batch(rows, time, queries, groups, size):
    heads, g = Heads(queries, groups, size, size**-0.5), torch.Generator().manual_seed(0)
    qkv = torch.randn(rows, time, sum(heads.widths), generator=g).bfloat16()
    return qkv, Turn.of(*angles(time, size), queries + groups), heads, None


def packed(rows, time, queries, groups, size):
    """Rows of unlike length of which some begin alike: the third as the second, the fourth as the third for a while."""
    _, _, heads, _ = batch(1, 1, queries, groups, size)
    g = torch.Generator().manual_seed(0)
    ids, lengths = torch.randint(0, 50, (rows, time), generator=g), torch.randint(time // 2, time, (rows,), generator=g)
    ids[2, :9], ids[3, :5] = ids[1, :9], ids[1, :5]
    look = torch.arange(time) < lengths[:, None]
    pack = packing({"input_ids": ids, "attention_mask": look.long()}, look & (torch.arange(time) > time // 2 - 3))
    assert len(pack.agree) >= 2 and pack.fill
    qkv = torch.randn(1, len(pack.place) + pack.fill, sum(heads.widths), generator=g).bfloat16()
    cos, sin = (t[:, pack.positions[0][pack.longest]] for t in angles(time, size))
    return qkv, Turn.of(cos, sin, queries + groups), heads, pack


def both_ways(qkv, turn, heads, pack, dtype=torch.bfloat16):
    """The output and the gradient of qkv, in float64."""
    x = qkv.to(dtype, copy=True).requires_grad_()
    y = rotary_attention(x, Turn(*(t.to(dtype) for t in turn)), None, heads, pack)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(dtype)
    if pack is not None:
        grad[:, len(pack.place) :] = 0
    (found,) = torch.autograd.grad(y, x, grad)
    return y.detach().double(), found.double()


CASES = {
    "one time": (batch, 2, 1, 4, 2, 16),
    "few times": (batch, 2, 7, 4, 2, 16),
    "grouped queries": (batch, 3, 33, 9, 3, 64),
    "every head its own keys": (batch, 1, 65, 3, 3, 32),
    "one group": (batch, 2, 40, 5, 1, 64),
    "several blocks, a head of 80": (batch, 2, 300, 6, 2, 80),
    "a head of 6": (batch, 2, 19, 2, 1, 6),
    "packed rows that share": (packed, 5, 40, 9, 3, 64),
    "packed rows of several blocks": (packed, 6, 150, 4, 4, 32),
}


@pytest.mark.parametrize("case", CASES)
def test_as_near_to_float64_as_torch_in_both_directions(case, monkeypatch):
    make, *sizes = CASES[case]
    given = make(*sizes)
    assert compiled.takes(given[0], None, given[2])
    ours = both_ways(*given)
    monkeypatch.setattr(compiled, "takes", lambda *_: False)
    theirs, true = both_ways(*given), both_ways(*given, dtype=torch.float64)
    for mine, other, right in zip(ours, theirs, true):
        far = [float((t - right).norm() / right.norm().clamp_min(1e-30)) for t in (mine, other)]
        assert far[0] <= max(1.1 * far[1], 2e-3)  # 2e-3: a rounding to bf16


def test_positions_that_fill_a_packed_row_up_get_nothing():
    qkv, turn, heads, pack = packed(5, 40, 4, 2, 32)
    qkv[:, len(pack.place) :] = torch.nan
    out, found = both_ways(qkv, turn, heads, pack)
    assert out.isfinite().all() and found.isfinite().all()
    assert not out[:, len(pack.place) :].any() and not found[:, len(pack.place) :].any()


def test_what_lies_beside_the_projections_is_not_read():
    qkv, turn, heads, _ = batch(2, 37, 4, 2, 32)
    field = torch.full((78, sum(heads.widths) + 40), torch.nan).bfloat16()
    field[2:76, 17:-23] = qkv.flatten(0, 1)
    beside = field[2:76, 17:-23].view(2, 37, -1)
    plain = compiled.attend(qkv, turn.cos, turn.sin, heads, None)
    fenced = compiled.attend(beside, turn.cos, turn.sin, heads, None)
    assert all(torch.equal(a, b) for a, b in zip(plain, fenced))
    grad = torch.randn(plain[0].shape).bfloat16()
    found = [compiled.attend_gradient(grad, x, *plain, *turn, heads, None) for x in (qkv, beside)]
    assert torch.equal(*found)


def test_the_same_bits_every_time_with_any_number_of_threads():
    given, before = packed(6, 150, 9, 3, 64), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = both_ways(*given)
        torch.set_num_threads(3)
        for a, b, c in zip(alone, both_ways(*given), both_ways(*given)):
            assert torch.equal(a, b) and torch.equal(a, c)
    finally:
        torch.set_num_threads(before)


def test_large_scores_stay_numbers():
    qkv, turn, heads, _ = batch(2, 50, 4, 2, 32)
    assert all(t.isfinite().all() for t in both_ways(qkv * 100, turn, heads, None))


def test_turns_of_too_few_times_are_refused():
    qkv, _, heads, _ = batch(1, 8, 2, 1, 16)
    turn = Turn.of(*angles(7, 16), 3)
    with pytest.raises(ValueError, match="attention of 8 times"):
        compiled.attend(qkv, turn.cos, turn.sin, heads, None)


def test_other_kinds_are_left_to_torch():
    qkv, _, heads, _ = batch(1, 8, 2, 1, 16)
    assert compiled.takes(qkv, None, heads)
    assert not compiled.takes(qkv.float(), None, heads)
    assert not compiled.takes(qkv, torch.zeros(1, 1, 8, 8), heads)
    assert not compiled.takes(qkv, None, heads._replace(size=15))
