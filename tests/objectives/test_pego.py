"""PEGO's penalties against the numbered oracles of its sheet (116)."""

import pytest
import torch
from models import make
from recipes import moved

import veneer
from veneer.errors import UserError
from veneer.objectives import pego
from veneer.objectives.pego import ProductL1, penalties


def group(count: int, out: int = 5, width: int = 7, rank: int = 2) -> tuple[torch.Tensor, list, list]:
    """W and the factors of ``count`` LoRAs, in fp64."""
    g = torch.Generator().manual_seed(0)
    draw = [torch.randn(*s, generator=g, dtype=torch.double) for s in [(out, width)] + count * [(rank, width)]]
    return draw[0], draw[1:], [torch.randn(out, rank, generator=g, dtype=torch.double) for _ in range(count)]


def explicit(W, A, B, size) -> tuple[torch.Tensor, torch.Tensor]:
    """The two sums from the dense products."""
    D = [b @ a for a, b in zip(A, B)]
    pairs = [(k, j) for j in range(len(D)) for k in range(j)]
    return sum(size(W @ d.T) for d in D), sum((size(D[k] @ D[j].T) for k, j in pairs), W.new_zeros(()))


def test_the_numbers_of_oracle_4():
    W = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    A, B = [torch.tensor([[0.0, 1.0]]), torch.ones(1, 2)], [torch.tensor([[1.0], [0.0]]), torch.ones(2, 1)]
    assert penalties(W, A[:1], B[:1])[0] == 2 and penalties(W, A[1:], B[1:])[0] == 6
    assert penalties(W, A, B)[1] == 2


@pytest.mark.parametrize("norm, size", [("l1", lambda M: M.abs().sum()), ("fro2", lambda M: M.square().sum())])
@pytest.mark.parametrize("count", [1, 3])
def test_factored_equals_explicit_with_its_gradients(norm, size, count, monkeypatch):
    monkeypatch.setattr(pego, "CHUNK", 10)  # two rows of the product at a time
    W, A, B = group(count)
    tensors = [t.requires_grad_() for t in (*A, *B)]
    grads = []
    for found in (penalties(W, A, B, norm), explicit(W, A, B, size)):
        grads.append(torch.autograd.grad(sum(found), tensors))
    assert all(torch.allclose(a, b) for a, b in zip(penalties(W, A, B, norm), explicit(W, A, B, size)))
    assert all(torch.allclose(a, b) for a, b in zip(*grads))


def test_the_gradient_of_the_l1_norm_is_finite_differences():
    _, (A,), (B,) = group(1)
    assert torch.autograd.gradcheck(ProductL1.apply, (B.requires_grad_(), A.requires_grad_()))


def test_nothing_of_the_size_of_the_product_is_kept_for_backward():
    W, A, B = group(2, out=40)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        penalties(W, [a.requires_grad_() for a in A], [b.requires_grad_() for b in B])
    assert kept and not any(t.shape == (40, 40) for t in kept)


def test_preserve_is_zero_outside_the_row_space_of_the_weight():
    _, A, B = group(2)
    W = torch.eye(5, 7, dtype=torch.double)
    for a in A:
        a[:, :5] = 0
    assert penalties(W, A, B)[0] == 0 and penalties(W.roll(2, 1), A, B)[0] > 0


def test_diversify_is_zero_for_orthogonal_row_spaces_and_alone():
    W, A, B = group(3)
    rows = torch.linalg.qr(W.new_empty(7, 6).normal_(generator=torch.Generator().manual_seed(1))).Q.T
    assert penalties(W, list(rows.split(2)), B)[1] < 1e-12 < penalties(W, A, B)[1]
    assert penalties(W, A[:1], B[:1])[1] == 0


def test_homogeneity():
    W, A, B = group(3)
    preserve, diversify = penalties(W, A, B)
    other = penalties(W, A, [-3 * b for b in B])
    assert torch.allclose(other[0], 3 * preserve) and torch.allclose(other[1], 9 * diversify)


def attached(recipe: str = "pego", **fields):
    """A small model with the method, its factors moved."""
    case = make("llama")
    adapter = veneer.attach(case.model, recipe, rank=8, alpha=24.0, **fields)
    moved(adapter)
    return case, adapter


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_loss_is_over_all_weights_and_holds_the_scale(reduction):
    _, adapter = attached(f"pego(slices=2, weight=0.5, reduction='{reduction}')")
    expected = 0.0
    for site, A, B, scale in adapter.pairs():
        assert scale == 3
        D = [3 * B[:, i : i + 4] @ A[i : i + 4] for i in (0, 4)]
        found = sum((site.weight() @ d.T).abs().sum() for d in D) + (D[0] @ D[1].T).abs().sum()
        expected += 0.5 * found / (1 if reduction == "sum" else len(B) ** 2)
    (hook,) = adapter.hooks
    assert hook.loss(None, None, None).item() == pytest.approx(expected.item(), rel=1e-5)


def test_at_the_start_penalties_and_gradients_are_zero():
    case = make("llama")
    adapter = veneer.attach(case.model, "pego", rank=4)
    loss = adapter.hooks[0].loss(None, None, None)
    loss.backward()
    assert loss == 0 and not any(p.grad.any() for p in adapter.parameters())


def fitted(recipe: str):
    case = make("llama")
    adapter = veneer.attach(case.model, recipe, rank=8)
    settings = {"steps": 4, "lr": 1e-2, "precision": "fp32", "display": False}
    return adapter, veneer.fit(adapter, [case.batch], **settings)


def test_without_weight_it_is_lora_and_with_it_the_penalties_end_lower():
    (plain, run), (_, zero), (held, _) = fitted("lora"), fitted("pego(weight=0.0)"), fitted("pego(weight=0.1)")
    assert run.losses == zero.losses
    ends = []
    for adapter in (plain, held):
        hook = held.hooks[0]
        hook.adapter = adapter
        ends.append(hook.loss(None, None, None).item())
    assert ends[1] < 0.5 * ends[0]


@pytest.mark.parametrize(
    "recipe, says",
    [
        ("bitfit+pego", "wants one plain pair"),
        ("lora+sora+pego", "has none"),
        ("lora(rank=8)+pego(slices=9)", "no 9 slices"),
    ],
)
def test_what_has_no_slices_is_refused(recipe, says):
    with pytest.raises(UserError, match=says):
        veneer.attach(make("llama").model, recipe)
