"""MoSA and its form on LoRA against their sheet's oracles (096)."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from single import put, single, stirred
from torch import nn

import veneer
from veneer.deltas.mosa import consistency
from veneer.errors import UserError

LAYER = "mosa(placement='layer', dropout=0.0, norm=False, scaling=0.5{})+mosa-consistency(weight=0.0)"
CONFIG = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def vit():
    return tf.ViTForImageClassification(tf.ViTConfig(image_size=8, patch_size=4, num_labels=3, **CONFIG)).eval()


def images():
    return {"pixel_values": torch.randn(6, 3, 8, 8), "labels": torch.tensor([0, 1, 2, 0, 1, 2])}


def dense(delta, name="U"):
    """The N matrices as the official code has them: dense, zero off their own entries."""
    shape = (delta.site.out_features, delta.rank)
    return [delta.matrix(name, shape, i) for i in range(delta.modules)]


@pytest.mark.parametrize("share", ["down", "up", "none"])
def test_the_start_is_the_base_in_both_modes(share):
    model, batch = vit(), images()
    y = model(**batch).logits
    adapter = veneer.attach(model, f"mosa(share={share!r}, rank=8)")
    assert len(adapter.deltas) == 2
    assert torch.equal(model(**batch).logits, y) and torch.allclose(model.train()(**batch).logits, y, atol=1e-6)


def test_the_modules_entries_are_disjoint_covering_even_and_reproducible():
    at, again = (single(nn.Linear(5, 7), LAYER.format(""), rank=3) for _ in range(2))
    for i in range(4):
        put(at.delta, **{f"U{i}": torch.full_like(getattr(at.delta, f"U{i}"), i + 1.0)})
    parts = [M != 0 for M in dense(at.delta)]
    assert torch.equal(sum(p.int() for p in parts), torch.ones(7, 3, dtype=torch.int32))
    assert {int(p.sum()) for p in parts} <= {5, 6}
    assert torch.equal(at.delta.U_places, again.delta.U_places)


def test_merging_is_the_mean_over_the_draws():
    model, adapter, delta = single(nn.Linear(5, 7), LAYER.format(""), rank=3)
    stirred(adapter)
    x = torch.randn(4, 5)
    every = torch.stack([delta._branch(x, i) for i in range(4)])
    assert torch.allclose(every.mean(0), delta._branch(x, None), atol=1e-6)
    merged = model.eval()(x)
    with adapter.disabled():
        assert torch.allclose(model(x) + delta._branch(x, None), merged)


def test_the_sheets_two_modules_merge_to_their_mean():
    _, _, delta = single(nn.Linear(3, 1), LAYER.format(", modules=2"), rank=2)
    first = int(delta.U_places[0])  # which of the two entries belongs to module 0
    put(delta, U0=[2.0] if first == 0 else [4.0], U1=[4.0] if first == 0 else [2.0])
    assert torch.allclose(delta.matrix("U", (1, 2), None), torch.tensor([[1.0, 2.0]]))


def test_one_module_is_a_plain_parallel_adapter():
    torch.manual_seed(0)
    batch, model = images(), vit()
    twin = copy.deepcopy(model)
    one = veneer.attach(model, "mosa(modules=1, norm=False, dropout=0.0, scaling=2.0)", rank=4)
    two = veneer.attach(twin, "adapter(placement='parallel', activation='gelu', scaling=2.0)", rank=4)
    for path, d in one.deltas.items():
        other = two.deltas[path]
        put(d, **{n: torch.randn(p.shape) for n, p in d.named_parameters()})
        U, b_U = d.matrix("U", (32, 4), None), d.bias("U", None)
        put(other, D=d.D.detach(), b_D=d.b_D.detach(), U=U.detach(), b_U=b_U.detach())
    assert torch.allclose(model.train()(**batch).logits, twin(**batch).logits, atol=1e-5)


@pytest.mark.parametrize("share", ["down", "none"])
def test_training_is_that_of_dense_copies_with_masked_gradients(share):
    torch.manual_seed(0)
    layer, x, y = nn.Linear(5, 3), torch.randn(16, 5), torch.randint(0, 3, (16,))
    W, b = layer.weight.detach().clone(), layer.bias.detach().clone()
    model, adapter, delta = single(layer, LAYER.format(f", modules=2, share={share!r}"), rank=4)
    model.train()
    start = delta.D.detach() if share == "down" else delta.D_start.detach()
    masks = {n: [M != 0 for M in _entries(delta, n, s)] for n, s in (("U", (3, 4)), ("D", (4, 5)))}
    copies = []
    for i in range(2):
        D = start.clone().requires_grad_() if i == 0 or share == "none" else copies[0]["D"]
        b_D = torch.zeros(4, requires_grad=True) if i == 0 or share == "none" else copies[0]["b_D"]
        copies.append({"D": D, "b_D": b_D, "U": torch.zeros(3, 4, requires_grad=True),
                       "b_U": torch.zeros(3, requires_grad=True)})  # fmt: skip
    every = {id(t): t for c in copies for t in c.values()}.values()
    theirs = torch.optim.AdamW(every, lr=0.05, weight_decay=0.0)
    ours = torch.optim.AdamW(adapter.parameters(), lr=0.05, weight_decay=0.0)
    for _ in range(8):
        drawn = adapter.root.draws + 1
        loss = F.cross_entropy(model(x), y)
        i = veneer.numerics.chance.derived_seed(delta.seed, "module", 0, drawn) % 2
        c = copies[i]
        z = F.gelu(F.linear(x, c["D"], c["b_D"]))
        other = F.cross_entropy(F.linear(x, W, b) + 0.5 * F.linear(z, c["U"], c["b_U"]), y)
        assert torch.allclose(loss, other, atol=1e-5)
        ours.zero_grad(), theirs.zero_grad()
        loss.backward(), other.backward()
        for name in ("U",) if share == "down" else ("U", "D"):
            c[name].grad *= masks[name][i]
        adapter.hooks[0].before_optimizer(0)
        ours.step(), theirs.step()
    assert torch.allclose(delta.matrix("U", (3, 4), None), (copies[0]["U"] + copies[1]["U"]) / 2, atol=1e-5)
    assert torch.allclose(delta.bias("U", None), (copies[0]["b_U"] + copies[1]["b_U"]) / 2, atol=1e-5)


def _entries(delta, name, shape):
    if f"{name}_places" not in delta._buffers:
        return ()
    sizes = torch.tensor([len(getattr(delta, f"{name}{i}")) for i in range(delta.modules)])
    owner = torch.arange(delta.modules).repeat_interleave(sizes)[getattr(delta, f"{name}_places").long()].view(shape)
    return [(owner == i).float() for i in range(delta.modules)]


def test_a_step_moves_one_nth_of_the_entries_of_each_block():
    model, batch = vit().train(), images()
    adapter = veneer.attach(model, "mosa(rank=8, dropout=0.0)")
    model(**batch).loss.backward()
    adapter.hooks[0].before_optimizer(0)
    for d in adapter.deltas.values():
        with_gradient = [i for i in range(4) if getattr(d, f"U{i}").grad is not None]
        assert len(with_gradient) == 1 and getattr(d, f"U{with_gradient[0]}").numel() == 32 * 8 / 4


def test_passes_draw_anew_and_blocks_apart():
    model, batch = vit().train(), images()
    adapter = veneer.attach(model, "mosa(rank=8)")
    seen = []
    for d in adapter.deltas.values():
        d.draw = lambda d=d, own=d.draw: seen.append((d.site.block, own())) or seen[-1][1]
    for _ in range(20):
        model(**batch)
    blocks = [[i for b, i in seen if b == k] for k in (0, 1)]
    assert set(blocks[0]) == {0, 1, 2, 3} and blocks[0] != blocks[1]


def test_the_consistency_of_logits():
    p, q = torch.tensor([[1.0, 0.0]], requires_grad=True), torch.tensor([[0.0, 1.0]], requires_grad=True)
    assert consistency(p, p).item() == 0
    assert consistency(p, q).item() == pytest.approx(0.4621, abs=1e-4)
    assert consistency(p, q).item() == pytest.approx(consistency(q, p).item())
    (g,) = torch.autograd.grad(consistency(p, q), p)
    assert torch.allclose(g, 0.5 * (p.softmax(1) - q.softmax(1)), atol=1e-6)  # of KL(q ‖ p) alone


def test_the_loop_adds_the_consistency_and_the_merged_adapter_learns():
    torch.manual_seed(0)
    model = vit()
    adapter = veneer.attach(model, "mosa(rank=8)")
    batches = [images() for _ in range(2)]
    run = veneer.fit(adapter, batches, steps=6, lr=1e-2, task="classification", display=False)
    assert run.losses[-1] < run.losses[0]


def test_on_lora_the_fold_is_the_merged_pair():
    layer, x = nn.Linear(9, 7), torch.randn(4, 9)
    model, adapter, delta = single(layer, "mosl(scaling=2.0)", rank=3)
    stirred(adapter)
    assert torch.allclose(delta.weight(), sum(2 * delta._pair(i).B @ delta.A for i in range(4)) / 4, atol=1e-6)
    merged = model.eval()(x)
    assert torch.allclose(merged, F.linear(x, layer.weight + delta.weight(), layer.bias), atol=1e-5)
    assert not torch.allclose(model.train()(x), merged, atol=1e-3)
    adapter.fold()
    assert torch.allclose(model.eval()(x), merged, atol=1e-5)
    assert adapter.parameter_count() == 3 * (9 + 7)


def test_mlps_that_lie_apart_are_refused():
    bert = tf.BertForSequenceClassification(tf.BertConfig(vocab_size=61, **CONFIG))
    with pytest.raises(UserError, match="placement='layer'"):
        veneer.attach(bert, "mosa")
    assert len(veneer.attach(bert, "mosa(placement='layer')", sites=["intermediate.dense"]).deltas) == 2
