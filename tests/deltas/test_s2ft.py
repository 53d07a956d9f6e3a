"""S²FT against its sheet's oracles (113)."""

import copy

import pytest
import torch
import transformers as tf
from single import gradients, put, stirred
from torch import nn

import veneer
from veneer.errors import UserError

ALL = "s2ft(v=0.5, o=0.25, u=0.1, d=0.1)"


class Block(nn.Module):
    """One MLP with known weights: up_proj is the identity."""

    def __init__(self, down, up=None):
        super().__init__()
        down = torch.as_tensor(down, dtype=torch.float32)
        up = torch.eye(down.shape[1]) if up is None else torch.as_tensor(up, dtype=torch.float32)
        self.up_proj = nn.Linear(*up.T.shape, bias=False)
        self.down_proj = nn.Linear(*down.T.shape, bias=False)
        self.up_proj.weight.data, self.down_proj.weight.data = up, down

    def forward(self, x):
        return self.down_proj(self.up_proj(x))


def llama(**config):
    sizes = {"hidden_size": 32, "intermediate_size": 50, "num_hidden_layers": 3, "num_attention_heads": 4}
    return tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=61, num_key_value_heads=2, **(sizes | config))).eval()


def ids():
    return torch.arange(14).view(2, 7)


def test_the_sheets_closed_form():
    model = Block([[1.0, 2], [3, 4]])
    adapter = veneer.attach(model, "s2ft(d=0.5, select='norm_max')", sites="all")
    (delta,) = adapter.deltas.values()
    assert delta.indices.tolist() == [1]
    put(delta, D=[[0.5], [-1]])
    assert torch.allclose(model(torch.tensor([[1.0, 2]])), torch.tensor([[6.0, 9]]))
    adapter.fold()
    assert model.down_proj.weight.tolist() == [[1, 2.5], [3, 3]]


def test_units_are_counted_over_all_blocks_and_come_again_from_the_seed():
    first = veneer.attach(llama(), ALL, seed=3)
    drawn = {p: d.indices.tolist() for p, d in first.deltas.items()}
    number = {role: sum(len(d.indices) for d in first.deltas.values() if d.site.role == role) for role in "vo"}
    assert number == {"v": 3 * 8, "o": 3 * 8}  # ⌊0.5·6⌋ of 6 key-value heads, ⌊0.25·12⌋ of 12 heads, 8 wide
    assert sum(len(d.indices) for d in first.deltas.values() if d.site.role == "down") == 15
    assert drawn == {p: d.indices.tolist() for p, d in veneer.attach(llama(), ALL, seed=3).deltas.items()}
    assert drawn != {p: d.indices.tolist() for p, d in veneer.attach(llama(), ALL, seed=4).deltas.items()}


def test_heads_train_whole():
    adapter = veneer.attach(llama(), ALL)
    for delta in adapter.deltas.values():
        if delta.site.role in "vo":
            heads = delta.indices.view(-1, 8)
            assert (heads[:, 0] % 8 == 0).all() and torch.equal(heads, heads[:, :1] + torch.arange(8))


def test_it_starts_at_the_base_and_only_the_slices_change():
    model = llama()
    before = copy.deepcopy(model)
    adapter = veneer.attach(model, ALL)
    assert torch.equal(model(ids()).logits, before(ids()).logits)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1)
    for _ in range(3):
        model(ids(), labels=ids()).loss.backward()
        optimizer.step()
    deltas, x = dict(adapter.deltas), model(ids()).logits
    adapter.bake()
    torch.testing.assert_close(model(ids()).logits, x, rtol=1e-4, atol=1e-5)
    for name, p in model.named_parameters():
        changed = p != before.get_parameter(name)
        delta = deltas.get(name.removesuffix(".weight"))
        if delta is None:
            assert not changed.any()
        else:
            units = changed.any(1) if delta.site.role in ("v", "up") else changed.any(0)
            assert set(units.nonzero().flatten().tolist()) <= set(delta.indices.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("recipe", ["s2ft(u=0.4, d=0)", "s2ft(d=0.4)"])
def test_the_gradients_are_the_slice_of_the_dense_one(recipe, below, dtype):
    model, x = Block(torch.randn(5, 10), torch.randn(10, 6)), torch.randn(3, 4, 6, requires_grad=True)
    plain = copy.deepcopy(model)
    if below:
        stirred(veneer.attach(model, "lora", rank=2, sites="all", name="below"), 0.1)
    adapter = veneer.attach(model, recipe, sites="all")
    ((path, delta),) = adapter.deltas.items()
    stirred(adapter)
    for name in ("up_proj", "down_proj"):
        layer = model.get_submodule(name)
        change = layer.veneer["below"].weight() if below else 0
        plain.get_submodule(name).weight.data += change + (delta.weight() if name == path else 0)
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        y = model(x)
    tolerance = 1e-4 if dtype == torch.float32 else 0.2
    torch.testing.assert_close(y.float(), plain(x), atol=tolerance, rtol=tolerance)
    D, into = gradients(y.float(), delta.D, x)
    W, dense_into = gradients(plain(x), plain.get_submodule(path).weight, x)
    slice_ = W[delta.indices] if path == "up_proj" else W[:, delta.indices]
    torch.testing.assert_close(D, slice_, atol=3 * tolerance, rtol=tolerance)
    torch.testing.assert_close(into, dense_into, atol=3 * tolerance, rtol=tolerance)


def test_twenty_steps_are_those_of_masked_full_fine_tuning():
    model = Block(torch.randn(5, 10), torch.randn(10, 6))
    plain, x = copy.deepcopy(model), torch.randn(16, 6)
    adapter = veneer.attach(model, "s2ft(d=0.4)", sites="all")
    (delta,) = adapter.deltas.values()
    mask = torch.zeros(10).index_fill_(0, delta.indices, 1.0)
    ours = torch.optim.Adam(adapter.parameters(), lr=0.01)
    theirs = torch.optim.Adam([plain.down_proj.weight], lr=0.01)
    for _ in range(20):
        for net, optimizer in ((model, ours), (plain, theirs)):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            if net is plain:
                plain.down_proj.weight.grad *= mask
            optimizer.step()
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)


def test_with_ratio_one_it_is_full_fine_tuning_of_that_matrix():
    model = Block(torch.randn(5, 10), torch.randn(10, 6))
    adapter = veneer.attach(model, "s2ft(d=1)", sites="all")
    (delta,) = adapter.deltas.values()
    stirred(adapter)
    assert torch.equal(delta.indices, torch.arange(10)) and torch.equal(delta.weight(), delta.D)


def test_columns_keep_their_slice_of_the_input_alone():
    model = Block(torch.randn(48, 512), torch.randn(512, 8))
    veneer.attach(model, "s2ft(d=0.01)", sites="all")
    kept, x = [], torch.randn(128, 512, requires_grad=True) * 1.0
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model.down_proj(x)
    own = {model.down_proj.weight.data_ptr()}
    assert sum(t.untyped_storage().nbytes() // 4 for t in kept if t.data_ptr() not in own) <= 5 * (128 + 48 + 2)


def test_a_layer_of_which_nothing_was_drawn_runs_as_it_is_and_exports(tmp_path):
    model = llama()
    adapter = veneer.attach(model, "s2ft(o=0, d=0.01)", sites="mlp")  # one channel of 150
    drawn = [len(d.indices) for d in adapter.deltas.values()]
    assert sorted(drawn) == [0, 0, 1] and adapter.parameter_count() == 32
    stirred(adapter)
    y = model(ids()).logits
    adapter.save(tmp_path / "kept")
    adapter.detach()
    veneer.load(model, tmp_path / "kept").fold()
    torch.testing.assert_close(model(ids()).logits, y, rtol=1e-5, atol=1e-5)


def test_ratios_that_choose_nothing_are_refused():
    with pytest.raises(UserError, match=r"ratios are too small .* 50 at down"):
        veneer.attach(llama(num_hidden_layers=1), "s2ft(o=0, d=0.01)", sites="down_proj")
    with pytest.raises(UserError, match="no place among the selected sites"):
        veneer.attach(llama(), "s2ft", sites="q_proj")
