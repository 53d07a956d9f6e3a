"""X-LoRA against the oracles of its sheet (033): degenerate routings equal plain merges."""

import pytest
import torch
from models import Case, make
from recipes import moved

import veneer
from veneer.errors import UserError
from veneer.mixtures.x_lora import Classifier


def mixed(recipe: str, count: int = 2, sites: str = "attention") -> tuple[Case, veneer.Adapter]:
    """A llama with ``count`` adapters of different ranks and X-LoRA over them."""
    case = make("llama")
    for i in range(count):
        moved(veneer.attach(case.model, "lora", rank=2 + i, alpha=4.0, sites=sites, name="abc"[i], seed=i))
    names = list("abc"[:count])
    return case, veneer.attach(case.model, recipe.format(names=names), sites=sites)


def uniform(adapter: veneer.Adapter) -> None:
    """All logits 0."""
    with torch.no_grad():
        for p in adapter.parameters():
            p.zero_()


def test_one_expert_under_softmax_is_that_adapter():
    case, adapter = mixed("x-lora(adapters={names})", count=1)
    moved(adapter)
    got = case.run()
    with adapter.disabled():
        assert torch.allclose(got, case.run(), atol=1e-6)


def test_no_strength_is_the_base():
    case, _ = mixed("x-lora(adapters={names}, strength=0.0)")
    assert torch.equal(case.run(), make("llama").run())


def test_equal_logits_are_the_average_of_the_changes():
    case, adapter = mixed("x-lora(adapters={names})")
    uniform(adapter)
    fresh = make("llama")
    experts = veneer.adapters(case.model)
    for site in veneer.find_sites(fresh.model, "attention"):
        site.write(site.weight() + sum(experts[n].deltas[site.path].weight() for n in "ab") / 2)
    assert torch.allclose(case.run(), fresh.run(), atol=1e-5)


def test_the_toy_of_the_sheet_has_136_trainable_numbers():
    fields = {"layerwise": True, "softmax": True, "temperature": 1.0, "top_k": None, "softmax_top_k": False}
    classifier = Classifier(16, 4, 2, fields | {"depth": 1, "size": 8, "dropout": 0.0}, 0)
    assert sum(p.numel() for p in classifier.parameters()) == 136
    S = classifier(torch.randn(2, 5, 16))
    assert S.shape == (2, 5, 4, 2) and torch.allclose(S.sum(-1), torch.ones(2, 5, 4))


def test_top_k_is_the_sheets_oracle_5():
    S = torch.tensor([0.5, 0.3, 0.2])
    fields = {"layerwise": True, "softmax": True, "temperature": 1.0, "depth": 1, "size": 8, "dropout": 0.0}
    plain = Classifier(4, 1, 3, fields | {"top_k": 2, "softmax_top_k": False}, 0)
    renewed = Classifier(4, 1, 3, fields | {"top_k": 2, "softmax_top_k": True}, 0)
    assert torch.allclose(plain.chosen(S), torch.tensor([0.5, 0.3, 0.0]))
    assert torch.allclose(renewed.chosen(S), torch.tensor([0.5498, 0.4502, 0.0]), atol=1e-4)


def test_the_classifier_sees_the_bare_base():
    case, adapter = mixed("x-lora(adapters={names})")
    seen = []
    adapter.shared.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    case.run()
    fresh = make("llama")
    with torch.no_grad():
        expected = fresh.model.model(case.batch["input_ids"], attention_mask=case.batch["attention_mask"])[0]
    assert torch.equal(seen[0], expected)


def test_only_the_classifier_learns():
    case, adapter = mixed("x-lora(adapters={names}, depth=2, size=8)")
    case.loss().backward()
    assert {n.split(".")[0] for n, _ in adapter.named_parameters()} == {"shared"}
    assert all(p.grad is not None for p in adapter.parameters())
    assert adapter.parameter_count() == 33 * 8 + 9 * (2 * 8)


@pytest.mark.parametrize("beams", [1, 3])
def test_decoding_with_a_cache_equals_decoding_without(beams):
    case, adapter = mixed("x-lora(adapters={names})")
    moved(adapter)
    ids = case.batch["input_ids"][:1]
    settings = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    cached = case.model.generate(ids, **settings)
    assert torch.equal(cached, case.model.generate(ids, use_cache=False, **settings))


def test_a_file_brings_its_experts_along():
    case, adapter = mixed("x-lora(adapters={names})")
    moved(adapter)
    expected, state, said = case.run(), adapter.state(), adapter.description()
    fresh = make("llama")
    from veneer.parts.restore import attach_from

    attach_from(fresh.model, said, {k: v.clone() for k, v in state.items()})
    assert torch.equal(fresh.run(), expected)


@pytest.mark.parametrize("recipe, says", [("x-lora", "attached"), ("x-lora(adapters=['a', 'ab'])", "no adapter 'ab'")])
def test_missing_experts_are_named(recipe, says):
    case = make("llama")
    veneer.attach(case.model, "lora", name="a")
    with pytest.raises(UserError, match=says):
        veneer.attach(case.model, recipe)
