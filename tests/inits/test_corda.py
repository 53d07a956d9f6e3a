"""CorDA against its sheet's oracles (093) and against PEFT."""

import copy

import pytest
import torch
import transformers as tf
from single import linear, stirred
from torch import nn

import veneer
from veneer.errors import UserError
from veneer.inits.corda import Moment, last_directions


def started(W, rows, recipe="corda(exact=True, damping=1e-9)", bias=None, **options):
    """(model, adapter, delta) of a layer that saw these batches of rows."""
    model = nn.Sequential(linear(W, bias))
    adapter = veneer.attach(model, recipe, sites="all", calibration=[(x,) for x in rows], **options)
    return model, adapter, adapter.deltas["0"]


def inputs_of(C):
    """One batch of rows whose second moment is C."""
    return [torch.linalg.cholesky(torch.as_tensor(C, dtype=torch.float64)).T.float()]


def case(out=7, inn=9, n=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(n, inn, generator=g) @ torch.diag(0.6 ** torch.arange(inn)) @ torch.randn(inn, inn, generator=g)
    return torch.randn(out, inn, generator=g), X


def context(X, damping):
    C = X.double().T @ X.double()
    return C + damping * C.diagonal().mean() * torch.eye(len(C))


def test_the_sheets_diagonal_example():
    _, _, d = started(torch.eye(2), inputs_of([[4.0, 0.0], [0.0, 1.0]]), rank=1)
    assert torch.allclose(d.B.abs(), torch.tensor([[1.0], [0.0]]) * d.B.abs().max(), atol=1e-6)
    assert torch.allclose(d.weight(), torch.tensor([[1.0, 0.0], [0.0, 0.0]]), atol=1e-6)


def test_the_sheets_full_example():
    C = torch.tensor([[4.0, 1.0], [1.0, 1.0]])
    _, _, d = started(torch.eye(2), inputs_of(C), rank=1)
    assert torch.allclose(d.weight(), torch.tensor([[0.916025, 0.277350], [0.277350, 0.083975]]), atol=1e-5)
    assert torch.linalg.matrix_norm((torch.eye(2) - d.weight()) @ C).item() == pytest.approx(0.697224, abs=1e-5)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("shape", [(7, 9), (9, 7)])
def test_what_moves_is_the_most_or_the_least_of_w_in_its_context(mode, shape):
    W, X = case(*shape)
    C = context(X, 0.01)
    _, _, d = started(W, [X], f"corda(mode={mode!r}, exact=True)", rank=3, alpha=6.0)
    values = torch.linalg.svdvals(W.double() @ C)
    moved = d.weight().double()
    left, taken = torch.linalg.matrix_norm((W - moved) @ C) ** 2, torch.linalg.matrix_norm(moved @ C) ** 2
    inside = values[:3] if mode == "ipm" else values[-3:]
    assert taken.item() == pytest.approx(inside.square().sum().item(), rel=1e-4)
    assert left.item() == pytest.approx((values.square().sum() - inside.square().sum()).item(), rel=1e-4)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_the_factors_are_those_of_the_definition(mode):
    W, X = case()
    C = context(X, 0.01)
    U, S, Vh = torch.linalg.svd(W.double() @ C, full_matrices=False)
    at = slice(0, 2) if mode == "ipm" else slice(-2, None)
    C, S = C / X.abs().max() ** 2, S / X.abs().max() ** 2  # each sample by its largest entry
    size = (S[at] / 3.0).sqrt()
    A, B = size[:, None] * (Vh[at] @ torch.linalg.inv(C)), U[:, at] * size
    _, _, d = started(W, [X], f"corda(mode={mode!r}, exact=True)", rank=2, alpha=6.0)
    sign = torch.sign((d.B * B).sum(0))
    assert torch.allclose(d.B.double(), B * sign, rtol=1e-4, atol=1e-5)
    assert torch.allclose(d.A.double(), A * sign[:, None], rtol=1e-4, atol=1e-4)


def test_inputs_alike_in_all_directions_give_pissa():
    W, _ = case()
    _, _, d = started(W, [torch.eye(9)], rank=3)
    _, _, pissa = started(W, [torch.eye(9)], "pissa(exact=True)", rank=3)
    assert torch.allclose(d.weight(), pissa.weight(), atol=1e-5)


def test_neither_alpha_nor_the_size_of_inputs_changes_what_moves():
    W, X = case()
    first = started(W, [X], rank=2, alpha=1.0)[2].weight()
    assert torch.allclose(started(W, [7 * X], rank=2, alpha=9.0)[2].weight(), first, atol=1e-5)


def test_the_krylov_method_finds_the_first_components():
    W, X = case(96, 120, 300)
    first, second = (started(W, [X], f"corda(exact={e})", rank=3)[2].weight().detach() for e in (True, False))
    assert torch.allclose(first, second, atol=1e-3 * float(first.abs().max()))


def test_the_moment_of_batches_is_that_of_all_rows_but_for_the_samples_sizes():
    X, site = torch.randn(3, 4, 6), veneer.core.site.find_sites(nn.Sequential(nn.Linear(6, 2)), "all")[0]
    together, apart, scaled = Moment(False), Moment(False), Moment(True)
    together.inputs(site, X, None)
    scaled.inputs(site, X, None)
    for x in X:
        apart.inputs(site, x, None)
    assert torch.allclose(together.total, apart.total, atol=1e-5)
    unit = X / X.abs().amax((1, 2), keepdim=True)
    assert torch.allclose(scaled.total, sum(x.T @ x for x in unit), atol=1e-5)


def test_an_embedding_counts_its_tokens():
    model = nn.Sequential(nn.Embedding(11, 6))
    ids = torch.tensor([[1, 1, 1, 2, 2, 5]])
    adapter = veneer.attach(model, "corda(exact=True)", rank=2, sites="all", calibration=[(ids,)])
    counts = torch.bincount(ids[0], minlength=11).double()
    W = model[0].weight.double().T
    U, _, _ = torch.linalg.svd(W * (counts + 0.01 * counts.mean()), full_matrices=False)
    assert torch.allclose(adapter.deltas["0"].weight().double(), U[:, :2] @ U[:, :2].T @ W, atol=1e-5)


@pytest.mark.parametrize("split", ["both", "B", "A"])
def test_the_split_changes_the_balance_and_not_the_product(split):
    W, X = case()
    _, _, d = started(W, [X], f"corda(exact=True, split={split!r})", rank=2)
    assert torch.allclose(d.weight(), started(W, [X], "corda(exact=True)", rank=2)[2].weight(), atol=1e-5)
    assert (d.B.norm(dim=0) - 1).abs().max() < 1e-5 or split != "A"


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=61, **sizes)).eval()


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_starts_agree_with_peft_on_a_model(mode):
    peft, corda = pytest.importorskip("peft"), pytest.importorskip("peft.tuners.lora.corda")
    model, ids = llama(), torch.randint(3, 61, (1, 60), generator=torch.Generator().manual_seed(2))
    for layer in model.modules():  # a spectrum that fp32 tells apart
        if isinstance(layer, nn.Linear):
            U, S, Vh = torch.linalg.svd(layer.weight.data, full_matrices=False)
            layer.weight.data = U * 0.95 ** torch.arange(len(S)) @ Vh
    theirs = copy.deepcopy(model)
    from peft.tuners.lora.config import CordaConfig

    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "up_proj", "down_proj"], init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=mode),
    )  # fmt: skip
    corda.preprocess_corda(theirs, config, run_model=lambda: theirs(ids))
    theirs = peft.get_peft_model(theirs, config)
    recipe = f"corda(mode={mode!r}, exact=True)"
    adapter = veneer.attach(
        model, recipe, rank=4, alpha=8.0, sites=["q_proj", "up_proj", "down_proj"], calibration=[{"input_ids": ids}]
    )
    for path, d in adapter.deltas.items():
        layer = theirs.get_submodule(f"base_model.model.{path}")
        product = 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        size = product.abs().max().item()
        limit = 5e-4 * size  # PEFT decomposes and inverts in fp32, and singular values lie close
        assert torch.allclose(d.weight(), product, rtol=0, atol=limit), path
        assert torch.allclose(d.site.weight() + d.offset.weight(), layer.base_layer.weight, rtol=0, atol=limit), path


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_the_weights_of_samples_agree_with_peft(mode):
    peft, corda = pytest.importorskip("peft"), pytest.importorskip("peft.tuners.lora.corda")
    W, _ = case()
    samples = [torch.randn(1, 30, 9, generator=torch.Generator().manual_seed(i)) * 3**i for i in range(3)]
    samples = [torch.cat([x, 4 * x.abs().amax() * torch.ones(1, 1, 9)], 1) for x in samples]  # its largest is positive
    model = nn.Sequential(linear(W))
    theirs = copy.deepcopy(model)
    from peft.tuners.lora.config import CordaConfig

    config = peft.LoraConfig(
        r=2, lora_alpha=2, target_modules=["0"], init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=mode),
    )  # fmt: skip
    corda.preprocess_corda(theirs, config, run_model=lambda: [theirs(x) for x in samples])
    inner = peft.get_peft_model(theirs, config).base_model.model[0]
    adapter = veneer.attach(
        model, f"corda(mode={mode!r}, exact=True)", rank=2, sites="all", calibration=[(x,) for x in samples]
    )
    A, B, d = inner.lora_A["default"].weight, inner.lora_B["default"].weight, adapter.deltas["0"]
    sign = torch.sign((d.B * B).sum(0))
    assert torch.allclose(d.B, B * sign, rtol=1e-4, atol=1e-5)
    assert torch.allclose(d.A, A * sign[:, None], rtol=1e-4, atol=1e-4)


def test_the_start_is_the_base_and_padding_does_not_count():
    model, plain = llama(), llama()
    ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    moved = ids.clone()
    moved[1, 6:] = 7
    adapters = [
        veneer.attach(m, "corda", rank=4, calibration=[{"input_ids": x, "attention_mask": mask}])
        for m, x in ((model, ids), (plain, moved))
    ]
    for a, b in zip(*(x.deltas.values() for x in adapters)):
        assert torch.allclose(a.weight(), b.weight(), atol=1e-6)
    y = model(input_ids=ids).logits
    stirred(adapters[0])
    with adapters[0].disabled():
        assert torch.allclose(model(input_ids=ids).logits, y, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 60), (60, 5)])
def test_last_directions_are_those_of_a_full_decomposition(shape):
    M = torch.randn(*shape)
    U, S = last_directions(M, 2)
    full = torch.linalg.svd(M, full_matrices=False)
    assert torch.allclose(S, full.S[-2:], atol=1e-5)
    assert torch.allclose((U * full.U[:, -2:]).sum(0).abs(), torch.ones(2), atol=1e-4)


def test_what_cannot_start_is_refused():
    W, X = case()
    with pytest.raises(UserError, match="drop parts of W"):
        started(W, [X], rank=2, dropout=0.1)
    with pytest.raises(UserError, match="rank=8 is more than"):
        started(W, [X], rank=8)
    with pytest.raises(UserError, match="not finite"):
        started(W, [X / 0], rank=2)
    with pytest.raises(UserError, match="calibration"):
        veneer.attach(nn.Sequential(nn.Linear(3, 3)), "corda", rank=2, sites="all")
