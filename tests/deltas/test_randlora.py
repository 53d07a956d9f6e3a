"""RandLoRA against its sheet's oracles (039) and against PEFT."""

import copy

import pytest
import torch
from single import gradients, single, stirred
from torch import nn

import veneer
from veneer.deltas.randlora import Bases, _Factored, _scaled

SHAPES = [(6, 4), (4, 6), (6, 5), (5, 5)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [{}, {"sparse": True}, {"very_sparse": True}], ids=str)
def test_bases_outputs_and_gradients_agree_with_peft(shape, kind):
    peft = pytest.importorskip("peft")
    layer, x = nn.Linear(*shape), torch.randn(3, 2, shape[0])
    config = peft.RandLoraConfig(r=2, randlora_alpha=6, target_modules=["0"], projection_prng_key=1, **kind)
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)), config)
    inner = theirs.base_model.model[0]
    model, adapter, delta = single(layer, recipe("randlora", key=1, **kind), rank=2, alpha=6.0)
    assert torch.equal(delta.pool.A.float(), inner.randlora_A["default"].float())
    assert torch.equal(delta.pool.B.float(), inner.randlora_B["default"].float())
    stirred(adapter)
    lam, gamma = inner.randlora_lambda["default"], inner.randlora_gamma["default"]
    with torch.no_grad():
        lam.copy_(delta.lam), gamma.copy_(delta.gamma)
    assert torch.allclose(delta.weight(), inner.get_delta_weight("default"), atol=2e-5)
    y, expected = model(x), theirs(x)
    assert torch.allclose(y, expected, atol=2e-5)
    for g, h in zip(gradients(y, delta.lam, delta.gamma), gradients(expected, lam, gamma)):
        assert torch.allclose(g, h, atol=1e-4)


def recipe(name, **fields):
    return f"{name}({', '.join(f'{k}={v!r}' for k, v in fields.items())})"


def test_a_peft_directory_with_a_key_in_place_of_bases_is_read(tmp_path):
    peft = pytest.importorskip("peft")
    model, x = nn.Sequential(nn.Linear(6, 40), nn.Linear(40, 9)), torch.randn(3, 6)
    config = peft.RandLoraConfig(
        r=4, randlora_alpha=8, target_modules=["0", "1"], projection_prng_key=5, save_projection=False
    )
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn(p.shape) * p.requires_grad)
    theirs.save_pretrained(tmp_path / "peft")
    veneer.load(model, tmp_path / "peft")
    assert torch.allclose(model(x), theirs(x), atol=1e-5)


@pytest.mark.parametrize("wide", [True, False])
def test_the_backward_pass_is_that_of_the_plain_expression(wide):
    r, n, m, large = 2, 3, 5, 7
    make = {"dtype": torch.float64, "requires_grad": True}
    x = torch.randn(4, m if wide else large, **make)
    lam, gamma = torch.randn(r, n, **make), torch.randn(n, m, **make)
    A, B = torch.randn(r, m, dtype=torch.float64), torch.randn(large, n * r, dtype=torch.float64)

    def run(*tensors):
        return _Factored.apply(*tensors, A, B, 1.5, wide, torch.float64)

    S = _scaled(A, lam, gamma)
    plain = 1.5 * (x @ S.T @ B.T if wide else x @ B @ S)
    assert torch.allclose(run(x, lam, gamma), plain)
    assert torch.autograd.gradcheck(run, (x, lam, gamma))


@pytest.mark.parametrize("shape", SHAPES)
def test_it_starts_at_the_base_and_folds(shape):
    layer, x = nn.Linear(*shape), torch.randn(3, shape[0])
    y0 = layer(x)
    model, adapter, delta = single(layer, "randlora", rank=2)
    assert torch.equal(model(x), y0)
    lam, gamma = gradients(model(x), delta.lam, delta.gamma)
    assert lam.any() and not gamma.any()
    assert torch.equal(delta.gamma, torch.full_like(delta.gamma, 1 / max(delta.gamma.shape)))
    stirred(adapter, 0.05)
    y = model(x)
    adapter.fold()
    assert torch.allclose(model(x), y, atol=1e-4)


@pytest.mark.parametrize(
    "layer, x",
    [
        (nn.Conv2d(3, 5, 3, padding=1), torch.linspace(-1, 1, 150).view(2, 3, 5, 5)),
        (nn.Conv2d(4, 6, 3, groups=2), torch.linspace(-1, 1, 200).view(2, 4, 5, 5)),
        (nn.Embedding(9, 4), torch.arange(6)),
    ],
    ids=["conv", "grouped", "embedding"],
)
def test_other_layers_fold_too(layer, x):
    model, adapter, _ = single(layer, "randlora", rank=2, alpha=2.0)
    stirred(adapter)
    y = model(x)
    adapter.fold()
    assert torch.allclose(model(x), y, atol=1e-5)


def test_the_rank_grows_from_r_to_full():
    model, adapter, delta = single(nn.Linear(16, 16), "randlora", rank=2)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    ranks = [0]
    for _ in range(5):
        optimizer.zero_grad()
        (model(torch.randn(32, 16)) - torch.randn(32, 16)).square().mean().backward()
        optimizer.step()
        ranks.append(int(torch.linalg.matrix_rank(delta.weight())))
    assert ranks[1] == 2 and ranks[-1] == 16


def test_one_pool_serves_all_layers_by_leading_slices_and_stays_out_of_the_file(tmp_path):
    model = nn.Sequential(nn.Linear(6, 40), nn.Linear(40, 9))
    adapter = veneer.attach(model, "randlora", rank=4, sites="all")
    pool = adapter.shared
    assert pool.A.shape == (4, 1, 40) and pool.B.shape == (40, 10, 4)
    first, _ = adapter.deltas.values()
    A, B = first._bases(torch.float32)
    assert torch.equal(A, pool.A[:, 0, :6])
    assert torch.equal(B, pool.B[:, :2].flatten(1).float())
    stirred(adapter, 0.05)
    x = torch.randn(3, 6)
    y = model(x)
    assert all("lam" in k or "gamma" in k for k in adapter.state())
    adapter.save(tmp_path / "kept")
    adapter.detach()
    veneer.load(model, tmp_path / "kept")
    assert torch.equal(model(x), y)


def test_bases_have_unit_deviation_and_belong_to_their_key():
    pool, again, other = (Bases(8, 128, 200, key) for key in (3, 3, 4))
    assert abs(pool.A.float().std() - 1) < 0.01 and abs(pool.B.float().std() - 1) < 0.01
    assert torch.equal(pool.B, again.B) and not torch.equal(pool.B, other.B)
    assert pool.to(torch.float16).A.dtype == torch.bfloat16


def test_the_count_on_smollm2():
    shapes = {"q": (576, 576), "k": (576, 192), "v": (576, 192), "o": (576, 576)}
    shapes |= {"gate": (576, 1536), "up": (576, 1536), "down": (1536, 576)}
    model = nn.ModuleDict({k: nn.Linear(*v, bias=False) for k, v in shapes.items()})
    adapter = veneer.attach(model, "randlora", sites="all")
    assert 30 * adapter.parameter_count() == 1_722_240
    assert 30 * sum(adapter.deltas[k].parameter_count() for k in "qv") == 368_640
    assert adapter.shared.A.shape[-1] == 1536  # the largest out and the largest in, taken apart


def test_the_scaled_factor_is_not_kept_for_the_backward_pass():
    model, _, delta = at = single(nn.Linear(256, 256, bias=False), "randlora", rank=8)
    kept = []
    x = torch.randn(4, 256, requires_grad=True) * 1.0
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    pool = {at.layer.weight.data_ptr(), delta.pool.A.data_ptr()} | {t.data_ptr() for t in delta.pool._flat.values()}
    assert max(t.numel() for t in kept if t.data_ptr() not in pool) < 256 * 256 // 4
