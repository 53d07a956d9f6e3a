"""LaMDA++ against its sheet's oracle (027, 10)."""

import pytest
import torch
from torch import nn

import veneer
from veneer.errors import UserError
from veneer.ranks.lamda_ranks import energy


def layer(values):
    """A square layer with these singular values."""
    made, draw = nn.Linear(len(values), len(values), bias=False), torch.Generator().manual_seed(1)
    Q, R = (torch.linalg.qr(torch.randn(len(values), len(values), generator=draw)).Q for _ in range(2))
    made.weight.data = Q @ torch.diag(torch.tensor(values)) @ R
    return made


def test_the_energies_are_the_sheets_oracle_10_and_the_flat_spectrum_gets_more():
    steep, flat = layer([4.0, 1.0, 1.0, 1.0]), layer([2.0, 2.0, 2.0, 2.0])
    assert energy(steep.weight, 2) == pytest.approx(17 / 19, abs=1e-5)
    assert energy(flat.weight, 2) == pytest.approx(0.5, abs=1e-5)
    assert energy(torch.zeros(4, 4), 2) == 0.0
    adapter = veneer.attach(nn.Sequential(steep, flat), "lamda-plus", rank=2, alpha=2.0)
    assert {p: d.rank for p, d in adapter.deltas.items()} == {"0": 1, "1": 3}
    assert all(d.scale == 1.0 and d.S.shape == (d.rank, d.rank) for d in adapter.deltas.values())


@pytest.mark.parametrize("count, rank", [(1, 4), (3, 5), (4, 7), (5, 1), (7, 6)])
def test_the_budget_is_kept_and_thirds_are_told_apart(count, rank):
    torch.manual_seed(0)
    model = nn.Sequential(*(layer((torch.linspace(1, 0.1, 12) ** i).tolist()) for i in range(count)))
    ranks = [d.rank for d in veneer.attach(model, "lora+lamda-ranks", rank=rank).deltas.values()]
    assert sum(ranks) == rank * count and ranks == sorted(ranks, reverse=True)
    assert set(ranks) <= {rank - rank // 2, rank, rank + rank // 2}


def test_equal_energies_go_by_name():
    model = nn.Sequential(*(layer([1.0] * 8) for _ in range(3)))
    with torch.no_grad():
        for m in model:
            m.weight.copy_(torch.eye(8))
    assert [d.rank for d in veneer.attach(model, "lora+lamda-ranks", rank=4).deltas.values()] == [6, 4, 2]


def test_a_small_matrix_gets_no_more_than_it_has():
    model = nn.Sequential(layer([1.0] * 5), layer([1.0] + [0.1] * 7))
    assert [d.rank for d in veneer.attach(model, "lamda-plus", rank=4).deltas.values()] == [5, 2]


@pytest.mark.parametrize("name", ["lamda++", "LaMDA++", "lamda-plus"])
def test_the_papers_name_stands_for_it(name):
    adapter = veneer.attach(nn.Sequential(layer([1.0] * 4)), name, rank=2)
    assert str(adapter.recipe) == "lamda(rank=2)+lamda-ranks+lamda-freezing"


def test_a_form_without_a_rank_is_refused():
    with pytest.raises(UserError, match="no field 'rank'"):
        veneer.attach(nn.Sequential(layer([1.0] * 4)), "ia3+lamda-ranks")
