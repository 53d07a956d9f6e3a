"""Attaching: names and classes of the base stay, adapters nest, base files load, refusals leave no trace."""

import copy

import pytest
import torch
from models import llama, make, output
from recipes import moved
from torch import nn

import veneer
from veneer.core.context import Context, current, using
from veneer.errors import UserError
from veneer.parts.state import average, clone, interpolate


def test_paths_classes_and_state_dict_of_the_base_stay():
    model = make("llama").model
    names, keys, classes = [n for n, _ in model.named_parameters()], list(model.state_dict()), {}
    classes = {n: type(m) for n, m in model.named_modules()}
    veneer.attach(model, "lora")
    assert list(model.state_dict()) == keys
    assert [n for n, _ in model.named_parameters() if ".veneer." not in n] == names
    assert all(isinstance(model.get_submodule(n), c) for n, c in classes.items())
    model.load_state_dict(make("llama").model.state_dict(), strict=True)


def test_a_saved_attached_model_is_the_base_alone(tmp_path):
    from transformers import AutoModelForCausalLM

    case = make("llama")
    reference = case.run()
    moved(veneer.attach(case.model, "lora"))
    case.model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**case.batch).logits, reference)


def test_adapters_nest_and_switch_apart():
    case = make("llama")
    base = case.run()
    first, second = (veneer.attach(case.model, "lora", name=n, seed=i) for i, n in enumerate("ab"))
    moved(first)
    only_first = case.run()
    moved(second, 0.3)
    both = case.run()
    with second.disabled():
        assert torch.equal(case.run(), only_first)
    with first.disabled(), second.disabled():
        assert torch.equal(case.run(), base)
    first.detach()
    assert not torch.equal(case.run(), both)
    second.detach()
    assert torch.equal(case.run(), base)


def test_two_plain_pairs_on_a_site_add_up():
    case = make("llama")
    adapters = [veneer.attach(case.model, "lora", sites="q_proj", name=n, seed=i) for i, n in enumerate("ab")]
    for a in adapters:
        moved(a)
    W = [d.site.weight() + sum(a.deltas[p].weight() for a in adapters) for p, d in adapters[0].deltas.items()]
    together = case.run()
    fresh = make("llama")
    for site, w in zip(veneer.find_sites(fresh.model, "q_proj"), W):
        site.write(w)
    assert torch.allclose(fresh.run(), together, atol=1e-5)


def test_an_instance_that_carries_its_own_forward_has_that_one_wrapped():
    model = nn.Sequential(nn.Linear(4, 3))
    original = model[0].forward
    model[0].forward = lambda x: original(x) + 1
    x = torch.randn(2, 4)
    before = model(x)
    adapter = veneer.attach(model, "lora", sites="linear")
    assert torch.allclose(model(x), before)
    adapter.detach()
    assert torch.equal(model(x), before) and "forward" in model[0].__dict__


def test_a_folded_adapter_can_still_be_disabled():
    case = make("llama")
    base = case.run()
    adapter = veneer.attach(case.model, "lora")
    moved(adapter)
    adapter.fold()
    with adapter.disabled():
        assert torch.equal(case.run(), base)
    assert not torch.equal(case.run(), base)


def test_baking_leaves_a_plain_model():
    case = make("gpt2")
    adapter = veneer.attach(case.model, "lora")
    moved(adapter)
    running = case.run()
    model = adapter.bake()
    assert torch.allclose(case.run(), running, atol=1e-5)
    assert not veneer.adapters(model) and "Adapted" not in repr(model)


def test_a_tied_tensor_is_not_folded_until_untied():
    case = make("embedding")
    case = case._replace(model=llama(tie_word_embeddings=True).eval())
    adapter = veneer.attach(case.model, "lora", sites="embedding")
    moved(adapter)
    running = case.run()
    with pytest.raises(UserError, match=r"lm_head.*untie"):
        adapter.fold()
    veneer.untie(case.model)
    adapter.fold()
    assert torch.allclose(case.run(), running, atol=1e-5)


def test_a_new_task_head_trains_and_named_tensors_too():
    case = make("bert")
    adapter = veneer.attach(case.model, "lora", sites="query", train="*LayerNorm.bias")
    assert {"classifier.weight", "classifier.bias"} <= set(adapter.trained)
    assert sum("LayerNorm.bias" in n for n in adapter.trained) == 5
    moved(adapter)
    trained = case.run()
    with adapter.disabled():
        assert torch.equal(case.run(), make("bert").run())
    assert not torch.equal(trained, make("bert").run())


@pytest.mark.parametrize(
    "options, says",
    [
        ({"recipe": "nothing"}, "no method"),
        ({"sites": "nowhere"}, "matches nothing"),
        ({"rank": -1}, "at least 1"),
        ({"name": "a.b"}, "must not"),
        ({"train": "wrong.name"}, "matches no tensor"),
        ({"keep_base": False}, "stands for W"),
    ],
)
def test_a_refusal_leaves_the_model_as_it_was(options, says):
    case = make("llama")
    before = case.run()
    with pytest.raises(UserError, match=says):
        veneer.attach(case.model, **options)
    assert torch.equal(case.run(), before) and not veneer.adapters(case.model)
    assert all(p.requires_grad for p in case.model.parameters())


def test_a_name_is_taken_once():
    model = make("llama").model
    veneer.attach(model, "lora")
    with pytest.raises(UserError, match="already has"):
        veneer.attach(model, "lora")


def test_the_state_is_a_value():
    case = make("llama")
    adapter = veneer.attach(case.model, "lora", sites="q_proj")
    start = clone(adapter.state())
    moved(adapter)
    end = clone(adapter.state())
    out = case.run()
    with adapter.using(start):
        assert torch.equal(case.run(), make("llama").run())
    assert torch.equal(case.run(), out)
    middle = interpolate(start, end, 0.5)
    assert all(torch.allclose(middle[k], average([start, end])[k]) for k in middle)
    flat = adapter.vector()
    adapter.set_vector(flat * 0)
    adapter.set_vector(flat)
    assert torch.equal(case.run(), out)
    assert sum(torch.Size(s).numel() for _, s in adapter.layout()) == flat.numel() == adapter.parameter_count()


def test_the_context_reaches_blocks_that_are_recomputed():
    case = make("llama")
    seen = []
    case.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: seen.append(current()))
    veneer.attach(case.model, "lora")
    case.model.train()
    case.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ctx = Context(training=True)
    with using(ctx):
        loss = case.loss()
    loss.backward()
    assert len(seen) == 2 and seen[0] is ctx and seen[1] is ctx


def test_dropout_is_drawn_anew_each_pass_and_alike_in_recomputation():
    case = make("llama")
    adapter = veneer.attach(case.model, "lora(dropout=0.5)")
    moved(adapter)
    case.model.train()
    a, b = (output(case.model, case.batch) for _ in range(2))
    assert not torch.equal(a, b)
    case.model.eval()
    c, d = (output(case.model, case.batch) for _ in range(2))
    assert torch.equal(c, d)


def test_hidden_states_and_generation_work_as_before():
    case = make("llama")
    moved(veneer.attach(case.model, "lora"))
    out = case.model(**case.batch, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    ids = case.batch["input_ids"][:1]
    cached = case.model.generate(ids, max_new_tokens=5, do_sample=False)
    plain = case.model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)


def test_a_deep_copied_adapter_drives_its_own_copy():
    case = make("llama")
    moved(veneer.attach(case.model, "lora"))
    twin = copy.deepcopy(case.model)
    adapter = veneer.adapters(twin)["default"]
    out = case.run()
    adapter.detach()
    assert torch.equal(case.run(), out) and not veneer.adapters(twin)
