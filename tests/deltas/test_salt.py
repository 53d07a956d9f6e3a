"""SALT against its sheet's oracles (019)."""

import pytest
import torch
from single import linear, put, single, stirred
from torch import nn

import veneer
from veneer.core.context import Context, using

LAYERS = {
    "wide": (lambda: nn.Linear(9, 7), lambda: torch.randn(4, 9)),
    "tall": (lambda: nn.Linear(6, 8), lambda: torch.randn(4, 6)),
    "conv": (lambda: nn.Conv2d(3, 8, 3), lambda: torch.randn(4, 3, 5, 5)),
    "grouped": (lambda: nn.Conv2d(4, 8, 3, groups=2), lambda: torch.randn(4, 4, 5, 5)),
    "embedding": (lambda: nn.Embedding(11, 6), lambda: torch.randint(0, 11, (4,))),
}
CLIPS = ("none", "diag", "matrix")


def changed(d):
    """W′ by the formula."""
    k = len(d.a)
    top = (1 + d.a) * d.S[:k] + d.b
    C = torch.block_diag(torch.diag(top.relu() if d.clip == "diag" else top), torch.diag(d.S[k:]) + d.X @ d.Y)
    return d.U @ (C.relu() if d.clip == "matrix" else C) @ d.Vh


@pytest.mark.parametrize("clip", CLIPS)
def test_the_sheets_closed_form(clip):
    layer = linear(torch.diag(torch.tensor([3.0, 2.0, 1.0])))
    model, adapter, d = single(layer, f"salt(k=1, clip={clip!r})", rank=2)
    put(d, a=[0.5], b=[0.5], X=torch.eye(2), Y=[[1.0, -1.0], [2.0, 0.0]])
    low = 0.0 if clip == "matrix" else -1.0
    expected = torch.tensor([[5.0, 0.0, 0.0], [0.0, 3.0, low], [0.0, 2.0, 1.0]])
    assert torch.allclose(model(torch.eye(3)).T, expected, atol=1e-6)
    adapter.fold()
    assert torch.allclose(layer.weight, expected, atol=1e-6)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("kind", LAYERS)
def test_running_is_the_formula_from_the_base_on(kind, clip):
    make, example = LAYERS[kind]
    layer, x = make(), example()
    y0 = layer(x)
    model, adapter, d = single(layer, f"salt(ratio=0.4, clip={clip!r})", rank=2)
    assert torch.equal(model(x), y0)
    stirred(adapter, 2.0)
    y = model(x)
    expected = d.site.run(x, changed(d), d.site.bias())
    assert torch.allclose(y, expected, atol=1e-4) and not torch.allclose(y, y0, atol=1e-2)
    weights = torch.randn_like(y)
    for g, h in zip(*(torch.autograd.grad((t * weights).sum(), list(d.parameters())) for t in (y, expected))):
        assert torch.allclose(g, h, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("clip", CLIPS)
def test_leading_and_other_directions_are_never_mixed(clip):
    W = torch.randn(7, 9)
    _, adapter, d = single(linear(W), f"salt(k=3, clip={clip!r})", rank=2)
    stirred(adapter)
    W1 = W + d.weight()
    assert torch.allclose(d.U[:, :3].T @ W1 @ d.Vh[3:].T, torch.zeros(3, 4), atol=1e-5)
    assert torch.allclose(d.U[:, 3:].T @ W1 @ d.Vh[:3].T, torch.zeros(4, 3), atol=1e-5)


def test_the_plain_pair_has_rank_k_plus_q_unless_the_matrix_is_clipped():
    _, adapter, d = single(nn.Linear(9, 8), "salt(k=2)", rank=3)
    stirred(adapter)
    A, B, scale, _ = d.as_lora(d.site.weight(), None)
    assert A.shape == (5, 9) and torch.allclose(scale * B @ A, changed(d) - d.site.weight(), atol=1e-5)
    assert torch.linalg.matrix_rank(d.weight()) == 5
    d.clip = "matrix"
    assert d.as_lora(d.site.weight(), None) is None
    assert torch.linalg.matrix_rank(changed(d) - d.site.weight(), atol=1e-4) > 5


def test_clipping_the_matrix_deletes_the_gradient_of_mixing_at_the_start():
    for clip, seen in (("matrix", False), ("diag", True)):
        model, _, d = single(nn.Linear(9, 8), f"salt(k=2, clip={clip!r})", rank=6)
        put(d, X=torch.eye(6))  # XY = Y
        model(torch.randn(4, 9)).square().sum().backward()
        off = d.Y.grad - torch.diag(d.Y.grad.diagonal())
        assert d.Y.grad.diagonal().abs().min() > 0 and bool(off.any()) == seen


def test_one_part_alone():
    _, _, d = single(nn.Linear(9, 8), "salt(k=3)", rank=0)
    assert [n for n, _ in d.named_parameters()] == ["a", "b"] and d.parameter_count() == 6
    put(d, a=[0.5, 0.0, 0.0], b=[0.0, 0.1, 0.0])
    expected = d.S.clone()
    expected[0] *= 1.5
    expected[1] += 0.1
    W1 = d.site.weight() + d.weight()
    assert torch.allclose(torch.linalg.svdvals(W1), expected.sort(descending=True).values, atol=1e-5)
    _, _, d = single(nn.Linear(9, 8), "salt(ratio=1.0)", rank=4)
    assert d.parameter_count() == 16 == sum(p.numel() for p in d.parameters())


def test_the_count_of_smollm2s_query():
    _, adapter, d = single(nn.Linear(576, 576, bias=False), "salt")
    assert adapter.parameter_count() == d.parameter_count() == 8418


def test_the_regulariser_is_in_the_loss_and_flat_at_the_start():
    model, adapter, d = single(nn.Linear(9, 8), "salt(k=2, penalty=0.5)", rank=2)
    found = d.regulariser()
    found.backward()
    assert found == 0 and all(torch.equal(p.grad, torch.zeros_like(p)) for p in adapter.parameters())
    stirred(adapter)
    expected = (d.a * d.S[:2] + d.b).norm() + torch.linalg.matrix_norm(d.X @ d.Y)
    for training, terms in ((True, 1), (False, 0)):
        model.train(training)
        with using(Context(training=training)) as ctx:
            model(torch.randn(4, 9))
        assert len(ctx.losses) == terms
    model.train()
    with using(Context(training=True)) as ctx:
        model(torch.randn(4, 9))
    assert torch.allclose(ctx.total_loss(), 0.5 * expected)


def test_values_are_held_above_zero():
    W = torch.randn(7, 9)
    _, _, d = single(linear(W), "salt(k=2)", rank=2)
    put(d, a=[-3.0, 0.0], b=[0.0, -99.0])
    expected = torch.cat([d.S[2:], torch.zeros(2)])
    assert torch.allclose(torch.linalg.svdvals(W + d.weight()), expected, atol=1e-5)


def test_every_layer_has_its_own_block():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    first, second = veneer.attach(model, "salt", sites="all").deltas.values()
    assert first.X.shape == second.X.shape and not torch.allclose(first.X, second.X)
    assert 0 < first.X.abs().max() <= (6 / 8) ** 0.5


@pytest.mark.parametrize("determined", [True, False])
def test_the_file_holds_the_vectors_only_where_w_does_not_determine_them(determined, tmp_path):
    layer, x = linear(torch.randn(5, 5) if determined else torch.eye(5)), torch.randn(4, 5)
    model, adapter, _ = single(layer, "salt", rank=2)
    stirred(adapter)
    y = model(x)
    assert ("0.U" in adapter.state()) != determined
    adapter.save(tmp_path / "kept")
    adapter.detach()
    veneer.load(model, tmp_path / "kept")
    assert torch.equal(model(x), y)
