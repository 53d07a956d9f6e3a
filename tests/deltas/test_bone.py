"""Bone, MiniMiSS and BAT against their sheet's oracles (105) and against PEFT."""

import copy

import pytest
import torch
import transformers as tf
from single import gradients, linear, put, single, stirred
from torch import nn

import veneer
from veneer.deltas.bone import changed
from veneer.errors import UserError

W = [[1.0, 2, 3, 4], [5, 6, 7, 8]]
FORMS = {"bone": True, "bat": "bat", "miss-mini(columns=2)": "mini"}  # and PEFT's init_weights


def test_the_sheets_closed_form_of_bone():
    model, adapter, delta = at = single(linear(W), "bone", rank=2)
    put(delta, D=[[1.0, 0], [0, -1]])
    assert model(torch.ones(1, 4)).tolist() == [[12.0, 24.0]]
    adapter.fold()
    assert at.layer.weight.tolist() == [[2, 2, 4, 4], [5, 5, 7, 7]]


def test_the_sheets_closed_form_of_bat():
    model, adapter, delta = at = single(linear(W), "bat", rank=2)
    put(delta, D=[[[0.1, 0], [0.2, -0.1]]])
    expected = torch.tensor([[1.6, 1.8, 4.2, 3.6], [6.9, 5.3, 9.5, 7.1]])
    assert torch.allclose(model(torch.eye(4)).T, expected)
    adapter.fold()
    assert torch.allclose(at.layer.weight, expected)


# bat's r divides both sides
@pytest.mark.parametrize(
    ("recipe", "inn", "out", "r"), [(f, 6, 4, 2) for f in FORMS] + [(f, 7, 4, 3) for f in FORMS if f != "bat"]
)
def test_outputs_gradients_and_merged_weights_are_pefts(recipe, inn, out, r):
    peft = pytest.importorskip("peft")
    layer, x = nn.Linear(inn, out), torch.randn(5, inn)
    config = peft.MissConfig(r=r, target_modules=["0"], init_weights=FORMS[recipe], mini_r=2)
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)), config)
    block = theirs.base_model.model[0].miss_block["default"]
    model, adapter, delta = single(layer, recipe, rank=r)
    assert block.shape == delta.D.shape
    stirred(adapter)
    block.data.copy_(delta.D)
    assert torch.allclose(model(x), theirs(x), atol=1e-6)
    (ours,), (other,) = gradients(model(x), delta.D), gradients(theirs(x), block)
    assert torch.allclose(ours, other, rtol=1e-5, atol=1e-6)
    adapter.fold()
    merged = theirs.merge_and_unload()[0].weight
    assert torch.allclose(layer.weight, merged, atol=1e-6)


def llama():
    config = tf.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=61
    )
    return tf.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("recipe", FORMS)
def test_a_directory_of_pefts_loads(recipe, tmp_path):
    peft = pytest.importorskip("peft")
    model, ids = llama(), torch.arange(12)[None]
    config = peft.MissConfig(
        r=4, target_modules=["q_proj", "down_proj"], init_weights=FORMS[recipe], mini_r=2, miss_dropout=0.1
    )
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    for p in theirs.parameters():
        if p.requires_grad:
            p.data.normal_(0, 0.1)
    with torch.no_grad():
        wanted = theirs.eval()(ids).logits
    theirs.save_pretrained(tmp_path)
    adapter = veneer.load(model, tmp_path)
    assert {d.name for d in adapter.deltas.values()} == {recipe.partition("(")[0]}
    torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", ["bone", "miss-mini(columns=2)"])
def test_peft_loads_what_is_exported(recipe, tmp_path):
    peft = pytest.importorskip("peft")
    model, ids = llama(), torch.arange(12)[None]
    bare = copy.deepcopy(model)
    adapter = veneer.attach(model, recipe, rank=4, sites="mlp")
    stirred(adapter, 0.05)
    adapter.export(tmp_path / "p", format="peft")
    theirs = peft.PeftModel.from_pretrained(bare, str(tmp_path / "p"))
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_miss_is_another_name_of_bone():
    _, adapter, delta = single(nn.Linear(6, 4), "miss", rank=2)
    assert delta.name == "bone" and str(adapter.recipe) == "bone(rank=2)"


def test_bones_change_repeats_along_the_input_and_has_rank_r():
    _, adapter, delta = single(nn.Linear(11, 8), "bone", rank=3, alpha=6.0)
    stirred(adapter)
    change = delta.weight()
    assert torch.equal(change[:, :8], change[:, 3:])
    assert torch.linalg.matrix_rank(change) == 3
    assert torch.equal(change[:, :3], 2.0 * delta.D.T)


def test_with_as_many_blocks_as_inputs_bone_is_full_fine_tuning():
    layer = nn.Linear(5, 4)
    plain = copy.deepcopy(layer)
    model, _, delta = single(layer, "bone", rank=5)
    x = torch.randn(7, 5)
    (ours,), (full,) = gradients(model(x), delta.D), gradients(plain(x), plain.weight)
    assert torch.allclose(ours, full.T, atol=1e-5)


def test_bat_has_full_rank_and_is_undone_bit_for_bit():
    _, adapter, delta = at = single(nn.Linear(6, 4), "bat", rank=2)
    stirred(adapter)
    W0 = at.layer.weight.clone()
    assert torch.linalg.matrix_rank(delta.weight()) == 4
    adapter.fold()
    folded = at.layer.weight.clone()
    adapter.unfold()
    assert torch.equal(at.layer.weight, W0)
    blocks = folded.view(2, 2, 3, 2).transpose(1, 2) - delta.D[:, None].detach()  # (W′_ij − D_i)(I + D_i)⁻¹ = W_ij
    again = blocks @ torch.linalg.inv(torch.eye(2) + delta.D)[:, None]
    assert torch.allclose(again.transpose(1, 2).reshape(4, 6), W0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("below", [False, True])
def test_bats_gradients_are_those_of_the_expression(below, dtype):
    layer = nn.Linear(6, 4)
    model, x = nn.Sequential(layer), torch.randn(3, 5, 6, requires_grad=True)
    if below:
        stirred(veneer.attach(model, "lora", rank=2, sites="all", name="below"))
    adapter = veneer.attach(model, "bat", rank=2, sites="all")
    delta = adapter.deltas["0"]
    stirred(adapter)
    W = (layer.weight + (model[0].veneer["below"].weight() if below else 0)).detach()
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        y = model(x)
    expected = x @ (W + changed(W, delta.D)).T + layer.bias
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 6e-2}[dtype]
    assert torch.allclose(y.float(), expected, atol=tolerance, rtol=tolerance)
    blocks = W.view(2, 2, 3, 2).transpose(1, 2)
    dense = (blocks @ delta.D[:, None] + delta.D[:, None]).transpose(1, 2).reshape(4, 6)
    for g, h in zip(gradients(y.float(), x, delta.D), gradients(x @ (W + dense).T + layer.bias, x, delta.D)):
        assert torch.allclose(g, h, atol=10 * tolerance, rtol=tolerance)


@pytest.mark.parametrize(("recipe", "most"), [("bone", 128 * 8 + 8 * 512 + 8 * 48 + 1), ("bat", 128 * 512 + 6 * 64)])
def test_bone_keeps_the_sums_and_bat_no_matrix_of_w_size(recipe, most):
    model, adapter, _ = at = single(nn.Linear(512, 48), recipe, rank=8)
    stirred(adapter)
    kept, x = [], torch.randn(128, 512, requires_grad=True) * 1.0
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    own = {at.layer.weight.data_ptr(), at.layer.bias.data_ptr()}
    assert sum(t.untyped_storage().nbytes() // 4 for t in kept if t.data_ptr() not in own) <= most


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="more than 0 has inputs, 6"):
        single(nn.Linear(6, 4), "bone", rank=7)
    with pytest.raises(UserError, match="must divide both sides of 0, 4 × 6"):
        single(nn.Linear(6, 4), "bat", rank=3)
    with pytest.raises(UserError, match="does not divide the 4 outputs"):
        single(nn.Linear(6, 4), "miss-mini(columns=3)", rank=2)
