"""Flexora against the closed forms of its sheet (005), finite differences and PEFT's branch."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import veneer
from veneer.errors import UserError
from veneer.numerics.fused import by_autograd
from veneer.parts.attribution import loss_at
from veneer.parts.modes import in_mode
from veneer.ranks.flexora import Search, selected, weights

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))

from small_runs import collated, encoded, llama

BATCHES = 6


def batches():
    return collated(encoded(4 * BATCHES), 4)


class Exact(Search):
    """The same with a loss in fp64, where transformers rounds logits to fp32."""

    def loss(self, theta, h, batch):
        self.weigh(h)
        wanted = batch["labels"][:, 1:].flatten()
        entropy = lambda out, _: F.cross_entropy(out.logits[:, :-1].flatten(0, 1), wanted)  # noqa: E731
        return loss_at(self.model, dict(zip(self.names, theta)), batch, entropy)


def searched(power=1, moved=True):
    """A search on the tiny Llama in fp64, its B away from 0, that can be differentiated twice."""
    model = llama().double()
    adapter = veneer.attach(model, "lora", rank=2, sites="attention")
    model.double()
    with torch.no_grad():
        for d in adapter.deltas.values():
            d.product = by_autograd
            if moved:
                d.B.normal_(0, 0.1, generator=torch.Generator().manual_seed(d.B.numel()))
    search = Exact(adapter, power)
    return search, adapter.parameters(), torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)


def test_weights_are_the_sheets_oracles_1_and_2():
    assert torch.equal(weights(torch.zeros(5)), torch.ones(5))
    h = torch.randn(7)
    assert weights(h).sum().item() == pytest.approx(7)
    assert torch.allclose(weights(h + 3), weights(h), atol=1e-6)


def test_the_first_step_is_the_sheets_oracle_3():
    h = torch.zeros(2, requires_grad=True)
    adam = torch.optim.Adam([h], lr=0.01)
    (0.5 * (weights(h)[0] - 2) ** 2).backward()
    assert torch.allclose(h.grad, torch.tensor([-0.5, 0.5]))
    adam.step()
    assert torch.allclose(h, torch.tensor([0.01, -0.01]), atol=1e-6)
    assert selected(dict(enumerate(h.tolist()))) == [0]
    assert selected({3: -1.0, 4: 0.5, 9: 0.2}, keep=1) == [4] and selected({0: 0.0}) == [0]


def test_gradients_on_h_sum_to_nothing_and_are_none_at_a_fresh_start():
    search, theta, h = searched()
    found = search.gradient([p.detach() for p in theta], h, batches()[:2])
    assert found.abs().max() > 1e-6 and found.sum().item() == pytest.approx(0, abs=1e-12)
    search, theta, h = searched(moved=False)
    assert not search.gradient([p.detach() for p in theta], h, batches()[:1]).any()
    with sdpa_kernel(SDPBackend.MATH):
        new = search.unrolled(theta, h, batches()[1:2], 0.5)
        assert search.gradient(new, h, batches()[:1]).abs().max() > 1e-9


@pytest.mark.parametrize(("steps", "power"), [(0, 1), (1, 1), (2, 3)])
def test_the_gradient_is_that_of_finite_differences(steps, power):
    search, theta, h = searched(power)
    train, held, lr, far = batches()[:steps], batches()[3:5], 0.3, 3e-3
    with sdpa_kernel(SDPBackend.MATH):
        found = search.gradient(search.unrolled(theta, h, train, lr), h, held, retain=True)

        def value(at):
            new = search.unrolled(theta, at.detach(), train, lr)
            return sum(search.loss(new, at, b).item() for b in held) / len(held)

        for i, e in enumerate(torch.eye(2, dtype=torch.float64)):
            by_difference = (value(h + far * e) - value(h - far * e)) / (2 * far)
            assert found[i].item() == pytest.approx(by_difference, rel=1e-3)  # norms of the Llama are in fp32


def test_the_third_power_is_what_the_official_hooks_do_to_peft():
    from peft import LoraConfig, get_peft_model

    search, _, _ = searched(power=3)
    search.weigh(torch.tensor([0.4, -0.4], dtype=torch.float64))
    w = weights(torch.tensor([0.4, -0.4], dtype=torch.float64))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    theirs = get_peft_model(llama().double(), LoraConfig(r=2, lora_alpha=2, target_modules=targets))
    for path, d in search.adapter.deltas.items():
        layer = theirs.base_model.model.get_submodule(path)
        for inner, own in ((layer.lora_A["default"], d.A), (layer.lora_B["default"], d.B)):
            inner.double().weight.data.copy_(own.data)
        for inner in (layer.lora_dropout["default"], layer.lora_A["default"], layer.lora_B["default"]):
            inner.register_forward_pre_hook(lambda m, args, f=w[d.site.block]: (args[0] * f,))
    batch = batches()[0]
    torch.testing.assert_close(search.model(**batch).logits, theirs(**batch).logits, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("unroll", [0, 1])
def test_the_search_leaves_the_model_alone_and_the_form_starts_afresh_on_what_it_chose(unroll):
    model, reference = llama(num_hidden_layers=3), llama(num_hidden_layers=3)
    model.train()
    recipe = f"flexora(steps=4, batches=2, lr=0.01, keep=2, unroll={unroll})"
    adapter = veneer.attach(model, recipe, rank=2, sites="attention", calibration=batches(), seed=3)
    hook = adapter.hooks[0]
    assert set(hook.h) == {0, 1, 2} and any(hook.h.values())
    chosen = selected(hook.h, 2)
    assert {s.block for s in adapter.sites} == set(chosen) and len(adapter.deltas) == 8
    assert model.training and not any("flexora-search" in n for n, _ in model.named_modules())
    plain = [p for p in find(reference) if int(p.split(".")[2]) in chosen]
    twin = veneer.attach(reference, "lora", rank=2, sites=plain, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(adapter.state().values(), twin.state().values(), strict=True))
    for (n, a), (_, b) in zip(base(model), base(reference), strict=True):
        assert torch.equal(a, b), n


def find(model):
    return [n for n, _ in model.named_modules() if n.endswith(("q_proj", "k_proj", "v_proj", "o_proj"))]


def base(model):
    return [(n, p) for n, p in model.named_parameters() if "veneer" not in n]


def test_the_search_is_the_seeds_and_its_first_step_moves_nothing_without_b():
    found = []
    for steps in (3, 3):
        recipe = f"flexora(steps={steps}, batches=1, lr=0.01)"
        found.append(veneer.attach(llama(), recipe, rank=2, calibration=batches(), seed=1).hooks[0].h)
    assert found[0] == found[1]


def test_the_export_names_the_layers_that_were_chosen(tmp_path):
    from peft import PeftModel

    model = llama(num_hidden_layers=3)
    recipe = "flexora(steps=3, batches=1, keep=1)"
    adapter = veneer.attach(model, recipe, rank=2, sites="attention", calibration=batches())
    with torch.no_grad():
        for d in adapter.deltas.values():
            d.B.normal_()
    adapter.export(tmp_path / "p", format="peft")
    adapter.save(tmp_path / "ours")
    batch = batches()[0]
    theirs = PeftModel.from_pretrained(llama(num_hidden_layers=3), tmp_path / "p")
    torch.testing.assert_close(theirs(**batch).logits, model(**batch).logits, rtol=1e-5, atol=1e-5)
    fresh = llama(num_hidden_layers=3)
    veneer.load(fresh, tmp_path / "ours")
    assert torch.equal(fresh(**batch).logits, model(**batch).logits)


def test_too_few_batches_and_a_model_without_blocks_are_refused():
    with pytest.raises(UserError, match="two at least"):
        veneer.attach(llama(), "flexora", calibration=batches()[:1])
    with pytest.raises(UserError, match="no selected layer lies in one"):
        veneer.attach(llama(), "flexora", sites="embedding", calibration=batches())
    with pytest.raises(UserError, match="calibration"):
        veneer.attach(llama(), "flexora")


def test_modes_come_back_as_they_were():
    model = llama()
    model.model.layers[1].train()
    with in_mode(model):
        assert not any(m.training for m in model.modules())
    assert model.model.layers[1].training and not model.model.layers[0].training
