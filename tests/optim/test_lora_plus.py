"""LoRA+ against its sheet's oracle (000, 3) and against PEFT's groups."""

import copy

import pytest
import torch
from torch import nn

import veneer
from veneer.core.recipe import parse
from veneer.train.optimizer import build


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 3)

    def forward(self, x):
        return self.second(self.first(x).tanh())


def test_the_first_step_of_adam_moves_b_by_the_ratio_and_a_not_at_all():
    model = TwoLayers()
    adapter = veneer.attach(model, "lora-plus(ratio=8)", rank=2, sites="all")
    optimizer = build(adapter, lr=1e-3, weight_decay=0.0)
    before = {n: p.detach().clone() for n, p in adapter.named_parameters()}
    model(torch.randn(5, 6)).square().sum().backward()
    optimizer.step()
    for name, p in adapter.named_parameters():
        step = (p - before[name]).abs().max()
        assert step == 0 if name.endswith(".A") else 8e-3 * 0.999 < step < 8e-3 * 1.001


@pytest.mark.parametrize("form", ["lora", "dora"])
def test_steps_are_those_of_pefts_optimiser(form):
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    model, x = TwoLayers(), torch.randn(5, 6)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["first", "second"], use_dora=form == "dora")
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    adapter = veneer.attach(model, f"{form}+lora-plus", rank=2, alpha=4.0, sites="all")
    with torch.no_grad():
        for path, d in adapter.deltas.items():
            d.A.copy_(theirs.base_model.model.get_submodule(path).lora_A["default"].weight)
    runs = [
        (model, build(adapter, lr=1e-3, weight_decay=0.0)),
        (theirs, create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)),
    ]
    for net, optimizer in runs:
        for _ in range(4):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
    assert torch.allclose(model(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_its_short_name_stands_alone():
    assert str(parse("lora+")) == "lora+lora-plus"
    assert str(parse("dora+lora-plus(ratio=4)")) == "dora+lora-plus(ratio=4.0)"


@pytest.mark.parametrize("form", ["lora+sora", "dora+sora", "adalora"])
def test_a_gated_pair_has_its_b_as_well(form):
    adapter = veneer.attach(TwoLayers(), f"{form}+lora-plus(ratio=8)", rank=2, sites="all")
    group = next(g for g in adapter.optimizer_groups() if g.get("rate") == 8)
    assert {n.rpartition(".")[2][0] for n in group["names"]} >= {"B"}
    assert not any(n.rpartition(".")[2].startswith("A") for n in group["names"])


@pytest.mark.parametrize("form", ["oft", "vera", "increlora"])
def test_a_form_without_a_trained_b_is_refused(form):
    with pytest.raises(veneer.UserError, match="none trains"):
        veneer.attach(TwoLayers(), f"{form}+lora-plus", sites="all")
