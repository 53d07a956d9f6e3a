"""Pages, layout and the mixed product (sheet 143, oracles 2 to 5)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.serve.layout import Groups, Layout, Piece, Place
from veneer.serve.pool import OutOfPages, PagePool
from veneer.serve.product import Plan, Run


def resident(pool, groups, pieces):
    """The tables of pieces laid into scattered pages of the pool."""
    layout = Layout.of(pieces, groups)
    spread = pool.alloc(2 * layout.pages(pool.size))
    pages = spread[::2]
    pool.release(spread[1::2])
    for layer, numbers in zip(pool.data, layout.pack(pieces, pool.size, pool.data[0].dtype)):
        layer[pages] = numbers
    return layout.tables(pages, pool.size)


def test_two_adapters_and_the_base_get_the_sheets_numbers():
    groups = Groups({"g": (2, 2)}, 2)
    pool = PagePool(1, 20, cell=4, tokens=2)
    first = resident(pool, groups, {Place("g", 0, 2): Piece(torch.tensor([[[1.0, 0]]]), torch.tensor([[[1.0], [1]]]))})
    second = resident(
        pool, groups, {Place("g", 0, 2): Piece(torch.tensor([[[0.0, 1]]]), 2 * torch.tensor([[[0.0], [3]]]))}
    )
    x, y = torch.tensor([[1.0, 2]]).repeat(3, 1), torch.zeros(3, 2)
    Plan(pool, 2, [((first, 1.0),), ((second, 1.0),), ()]).add(0, "g", x, y)
    assert y.tolist() == [[1, 1], [0, 12], [0, 0]]


def drawn(rank, seed, rich=True):
    """Pieces on two places of a group of 32 → 24 + 8 outputs and on a group of 40 → 16, in three layers."""
    g = torch.Generator().manual_seed(seed)
    found = {}
    for place, inputs in ((Place("a", 0, 24), 32), (Place("a", 24, 32), 32), (Place("b", 0, 16), 40)):
        rows = place.stop - place.start
        found[place] = Piece(
            torch.randn(3, rank, inputs, generator=g),
            torch.randn(3, rows, rank, generator=g),
            torch.rand(3, rows, generator=g) + 0.5 if rich else None,
            torch.randn(3, rows, generator=g) if rich else None,
        )
    return found


GROUPS = Groups({"a": (32, 32), "b": (40, 16)}, 8)


def reference(pieces, weight, layer, group, x, y):
    """What an adapter adds to the rows x at the base's output y, written out."""
    out = torch.zeros_like(y)
    for place, p in pieces.items():
        if place.group == group:
            piece = x @ p.A[layer].T @ p.B[layer].T
            piece += 0 if p.bias is None else p.bias[layer]
            piece += 0 if p.gain is None else (p.gain[layer] - 1) * y[:, place.start : place.stop]
            out[:, place.start : place.stop] += weight * piece
    return out


@pytest.mark.parametrize("rich", [False, True])
def test_sums_of_rows_and_products_of_runs_are_the_written_out_change(rich):
    pool = PagePool(3, 600, cell=16, tokens=4)
    pieces = [drawn(rank, rank, rich and rank != 5) for rank in (4, 5, 64, 1)]
    tables = [resident(pool, GROUPS, p) for p in pieces]
    mixes = [[(0, 1.0)], [], [(2, 1.0)], [(1, 0.7), (2, -0.3)], [(0, 1.0)], [(3, 1.0)], [(0, 0.5)]]
    rows = [tuple((tables[n], w) for n, w in mix) for mix in mixes]
    runs = [Run(7, 27, rows[3]), Run(27, 47, ()), Run(47, 64, rows[2])]
    owners = [mixes[i] for i in range(7)] + [mixes[3]] * 20 + [[]] * 20 + [mixes[2]] * 17
    plan = Plan(pool, GROUPS.chunk, rows, runs)
    for layer in range(3):
        for group, (inputs, outputs) in GROUPS.sizes.items():
            x, y = torch.randn(64, inputs), torch.randn(64, outputs)
            want = y.clone()
            for i, mix in enumerate(owners):
                for n, w in mix:
                    want[i] += reference(pieces[n], w, layer, group, x[i : i + 1], y[i : i + 1])[0]
            plan.add(layer, group, x, y)
            torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)


def test_prompts_with_adapters_that_lie_alike_are_one_product_and_right():
    pool = PagePool(3, 600, cell=16, tokens=4)
    pieces = [drawn(rank, seed, rich) for seed, (rank, rich) in enumerate([(4, 0), (4, 0), (4, 0), (8, 0), (4, 1)])]
    mixes = [((resident(pool, GROUPS, p), 1.0),) for p in pieces]
    spans = [(2, 20, 0), (20, 40, 1), (40, 60, 2), (60, 80, 3), (80, 100, 4), (100, 116, 0), (116, 160, 1)]
    plan = Plan(pool, GROUPS.chunk, [mixes[3], ()], [Run(a, b, mixes[n]) for a, b, n in spans])
    assert [s.count for s in plan.stacks] == [3] and len(plan.runs) == 4  # 44 rows are too many to fill 16 up to
    owners = [3, None] + [n for a, b, n in spans for _ in range(b - a)]
    for layer in range(3):
        for group, (inputs, outputs) in GROUPS.sizes.items():
            x, y = torch.randn(160, inputs), torch.randn(160, outputs)
            want = y.clone()
            for i, n in enumerate(owners):
                if n is not None:
                    want[i] += reference(pieces[n], 1.0, layer, group, x[i : i + 1], y[i : i + 1])[0]
            plan.add(layer, group, x, y)
            torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 4, 5, 8, 64])
def test_what_is_packed_comes_back_bit_for_bit(rank):
    pieces = drawn(rank, 0)
    layout = Layout.of(pieces, GROUPS)
    back = layout.unpack(layout.pack(pieces, 128, torch.float32))
    for place, p in pieces.items():
        assert torch.equal(back[place].A, p.A) and torch.equal(back[place].B, p.B)
        assert torch.equal(back[place].bias, p.bias)
        torch.testing.assert_close(back[place].gain, p.gain, rtol=0, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9)), max_size=40))
def test_no_page_is_handed_out_twice_and_none_is_lost(moves):
    pool = PagePool(1, 30, cell=2, tokens=2)
    held: list[list[int]] = []
    for take, count in moves:
        if take:
            if count > pool.free:
                with pytest.raises(OutOfPages):
                    pool.alloc(count)
            else:
                held.append(pool.alloc(count))
        elif held:
            pool.release(held.pop(count % len(held)))
        flat = [p for pages in held for p in pages]
        assert len(set(flat)) == len(flat) == pool.used
    for pages in held:
        pool.release(pages)
    assert pool.free == 30
