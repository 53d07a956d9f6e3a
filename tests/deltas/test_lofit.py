"""LoFiT against its sheet's oracles (081)."""

import copy

import pytest
import torch
import transformers as tf

import veneer
from veneer.errors import UserError
from veneer.parts.restore import attach_from
from veneer.parts.state import clone

IDS = torch.arange(14).view(2, 7)
O_PROJ = "model.layers.{}.self_attn.o_proj"


def llama(**config):
    """Two blocks of four query heads of width 6, which do not add up to the hidden size, on two key-value heads."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 6}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = tf.LlamaConfig(vocab_size=61, **(sizes | config))
    return tf.LlamaForCausalLM(config).eval()


def scored(adapter, scores):
    """Give head i of block l scales of norm scores[l][i]."""
    with torch.no_grad():
        for l, row in enumerate(scores):
            a = adapter.deltas[O_PROJ.format(l)].a
            a.copy_(torch.tensor(row)[:, None] * torch.nn.functional.normalize(torch.randn_like(a), dim=1))


def test_the_sheets_closed_form():
    model = llama(hidden_size=2, num_attention_heads=1, num_key_value_heads=1, head_dim=2, num_hidden_layers=1)
    layer = model.model.layers[0].self_attn.o_proj
    layer.weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    adapter = veneer.attach(model, "lofit")
    (scale,) = adapter.deltas.values()
    with torch.no_grad():
        scale.a.copy_(torch.tensor([[1.0, -0.5]]))
    assert scale.fold(layer.weight, None)[0].tolist() == [[2, 1], [6, 2]]
    adapter.advance()
    (offset,) = adapter.deltas.values()
    with torch.no_grad():
        offset.v.copy_(torch.tensor([[1.0, -1.0]]))
    W, b = offset.fold(layer.weight, None)
    assert torch.equal(W, layer.weight) and b.tolist() == [-1, -1]


def test_at_zero_it_is_the_base_and_at_its_start_nearly():
    for std, exact in ((0.0, True), (1e-3, False)):
        model = llama()
        y = model(IDS).logits
        veneer.attach(model, f"lofit(std={std})")
        moved = model(IDS).logits
        assert torch.equal(moved, y) == exact
        assert (moved - y).abs().max() < 0.1 * y.abs().max()


def test_every_head_has_a_scale_then_each_chosen_head_an_offset_and_no_other_anything():
    model = llama()
    adapter = veneer.attach(model, "lofit+lofit-selection(keep=3)")
    assert adapter.parameter_count() == 2 * 4 * 6
    assert {n.rpartition(".")[2] for n, _ in adapter.named_parameters()} == {"a"}
    scored(adapter, [[0.1, 0.9, 0.2, 0.8], [0.3, 0.1, 0.1, 0.7]])
    assert adapter.advance() and adapter.phase == 1
    assert adapter.parameter_count() == 3 * 6
    assert [d.heads for d in adapter.deltas.values()] == [(1, 3), (3,)]
    assert set(adapter.state()) == {f"{O_PROJ.format(0)}.v", f"{O_PROJ.format(1)}.v"}
    assert not adapter.advance()


def test_a_layer_without_a_chosen_head_loses_its_adapter():
    model = llama()
    adapter = veneer.attach(model, "lofit+lofit-selection(keep=2)")
    scored(adapter, [[0.1, 0.1, 0.1, 0.1], [0.9, 0.1, 0.8, 0.1]])
    adapter.advance()
    assert list(adapter.deltas) == [O_PROJ.format(1)]
    assert "veneer" not in dict(model.model.layers[0].self_attn.o_proj.named_children())


def test_heads_are_ranked_by_the_norm_of_their_scales():
    adapter = veneer.attach(llama(), "lofit")
    values = [[0.1, 0.5, 0.3, 0.2], [0.6, 0.05, 0.4, 0.25]]
    scored(adapter, values)
    ranked = [(path, head) for path, head, _ in adapter.hooks[0].scores()]
    places = sorted(((l, i) for l in range(2) for i in range(4)), key=lambda at: -values[at[0]][at[1]])
    assert ranked == [(O_PROJ.format(l), i) for l, i in places]


@pytest.mark.parametrize("phase", [0, 1])
def test_scales_fold_into_columns_and_offsets_into_a_bias(phase):
    model = llama()
    y0 = model(IDS).logits
    adapter = veneer.attach(model, "lofit+lofit-selection(keep=5)")
    for _ in range(phase):
        adapter.advance()
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.5 * torch.randn_like(p))
    y = model(IDS).logits
    assert not torch.allclose(y, y0, atol=1e-3)
    adapter.fold()
    assert (model.model.layers[0].self_attn.o_proj.bias is not None) == bool(phase)
    assert torch.allclose(model(IDS).logits, y, atol=1e-5)
    adapter.unfold()
    adapter.detach()
    assert torch.equal(model(IDS).logits, y0)


def test_an_offset_is_the_same_vector_at_every_position_and_its_gradient_sums_over_them():
    model = llama()
    adapter = veneer.attach(model, "lofit+lofit-selection(keep=8)")
    adapter.advance()
    delta = adapter.deltas[O_PROJ.format(0)]
    layer, x = delta.site.module, torch.randn(2, 7, 24)
    with adapter.disabled():
        base = layer(x)
    y = layer(x)
    shift = (y - base).flatten(0, 1)
    assert torch.allclose(shift, shift[:1].expand_as(shift), atol=1e-6)
    g = torch.randn_like(y)
    (y * g).sum().backward()
    assert torch.allclose(delta.v.grad.flatten(), (g.flatten(0, 1) @ layer.weight).sum(0), atol=1e-4)
    lora = delta.as_lora(layer.weight, None)
    assert not (lora.B @ lora.A).any() and torch.allclose(lora.bias, shift[0], atol=1e-6)


def test_a_large_penalty_keeps_all_scores_at_the_size_of_a_step():
    model = llama()
    finals = []
    for penalty in (0.0, 100.0):
        twin = copy.deepcopy(model)
        adapter = veneer.attach(twin, f"lofit+lofit-selection(penalty={penalty})")
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0.0)
        for _ in range(40):
            optimizer.zero_grad()
            loss = twin(IDS, labels=IDS).loss
            extra = adapter.hooks[0].loss(None, None, None)
            (loss if extra is None else loss + extra).backward()
            optimizer.step()
        finals.append(adapter.hooks[0].scores()[0][2])
    assert finals[1] < 1e-2 * 6**0.5 * 1.5 < finals[0]


def test_scales_train_at_half_the_rate_and_offsets_at_the_whole():
    adapter = veneer.attach(llama(), "lofit")
    (group,) = adapter.optimizer_groups()
    assert group["rate"] == 0.5 and len(group["params"]) == 2
    adapter.advance()
    assert all(g["rate"] == 1.0 for g in adapter.optimizer_groups())


def test_a_finished_adapter_comes_back_without_choosing_again():
    model = llama()
    adapter = veneer.attach(model, "lofit+lofit-selection(keep=2)")
    scored(adapter, [[0.1, 0.1, 0.9, 0.1], [0.1, 0.8, 0.1, 0.1]])
    adapter.advance()
    y, state, description = model(IDS).logits, clone(adapter.state()), adapter.description()
    assert description["finished"]
    adapter.detach()
    back = attach_from(model, description, state)
    assert torch.equal(model(IDS).logits, y)
    assert [d.heads for d in back.deltas.values()] == [(2,), (1,)]


def test_selections_and_recipes_without_heads_are_refused():
    with pytest.raises(UserError, match="lofit has no place among the selected sites"):
        veneer.attach(llama(), "lofit", sites="mlp")
    with pytest.raises(UserError, match="chooses attention heads for lofit"):
        veneer.attach(llama(), "lora+lofit-selection")
    model = torch.nn.ModuleDict({"attn": torch.nn.ModuleDict({"o_proj": torch.nn.Linear(8, 8)})})
    with pytest.raises(UserError, match="number of heads that end in attn"):
        veneer.attach(model, "lofit")
