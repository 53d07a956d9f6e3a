"""What every method must satisfy, in the words of its own declaration."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models import output
from recipes import attached, cases, form, is_written, moved, name

from veneer.core import registry
from veneer.core.delta import Written
from veneer.errors import UserError
from veneer.parts.restore import attach_from
from veneer.parts.state import clone

pytestmark = pytest.mark.parametrize("method, kind", cases(), ids=name)
Method = registry.Method


def starts_at_base(method: Method) -> bool:
    """What the method declares, or the form it brings."""
    return getattr(method.cls, "starts_at_base", True) and form(method).starts_at_base


def test_start_is_as_declared(method, kind):
    case, adapter = attached(method, kind)
    with adapter.disabled():
        base = case.run()
    difference = (case.run() - base).abs().max() / base.abs().max()
    assert (difference < 2e-5) == starts_at_base(method)


def test_every_no_has_its_reason(method, kind):
    for flag in ("starts_at_base", "folds", "deterministic", "encoder_decoder"):
        if not getattr(method.cls, flag, True):
            assert method.cls.reasons[flag].strip().count(" ") >= 2


def test_disabled_and_detached_restore_the_base_bit_for_bit(method, kind):
    case, adapter = attached(method, kind)
    with adapter.disabled():
        reference = case.run()  # a converted base stays converted
    moved(adapter)
    with adapter.disabled():
        assert torch.equal(case.run(), reference)
    adapter.detach()
    assert torch.equal(case.run(), reference)
    assert not any(".default." in n for n, _ in case.model.named_parameters())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 5e-2)], ids=["fp32", "bf16"])
def test_folding_equals_running(method, kind, dtype, tolerance):
    case, adapter = attached(method, kind, dtype)
    moved(adapter, 0.02)
    running = case.run().float()
    if not form(method).folds or adapter.recipe.part("base") is not None:
        with pytest.raises(UserError):
            adapter.fold()
        return
    adapter.fold()
    assert (case.run().float() - running).abs().max() <= tolerance * running.abs().max()
    adapter.unfold()
    assert torch.equal(case.run().float(), running)


def test_plain_lora_form_equals_the_fold(method, kind):
    _, adapter = attached(method, kind)
    moved(adapter)
    for d in adapter.deltas.values():
        if isinstance(d, Written) or d.site.kind in ("module", "parameter"):
            continue
        W, b = d.site.weight().float(), d.site.bias()
        b = None if b is None else b.float()
        lora = d.as_lora(W, b)
        if lora is None:
            continue
        folded, bias = d.fold(W, b)
        change = lora.scale * lora.B @ lora.A
        assert torch.allclose(W + change, folded, atol=2e-5)
        if lora.bias is not None:
            assert torch.allclose((0 if b is None else b) + lora.bias, bias, atol=2e-5)


def test_state_comes_back_bit_for_bit(method, kind):
    case, adapter = attached(method, kind)
    moved(adapter)
    expected, state, description = case.run(), clone(adapter.state()), adapter.description()
    fresh, _ = attached(method, kind)  # the same base; what was attached on it for evidence or experts stays
    for other in list(fresh.model.__dict__["_veneer"].adapters.values()):
        if other.name == "default":
            other.detach()
    attach_from(fresh.model, description, state)
    assert torch.equal(fresh.run(), expected)


def test_only_the_declared_tensors_get_gradients(method, kind):
    case, adapter = attached(method, kind)
    moved(adapter)
    case.model.train()
    case.loss().backward()
    own = {id(p) for p in adapter.parameters()}
    for n, p in case.model.named_parameters():
        if id(p) not in own:
            assert p.grad is None, n
    assert all(p.grad is not None for p in adapter.parameters())
    assert any(p.grad.abs().sum() > 0 for p in adapter.parameters())


def test_parameter_count_is_the_formula(method, kind):
    _, adapter = attached(method, kind)
    formula = sum(d.parameter_count() for d in adapter.every().values())
    assert formula == sum(p.numel() for n, p in adapter.named_parameters() if not n.startswith("hook:"))


def test_seeds_reproduce_and_leave_the_global_state_alone(method, kind):
    before = torch.random.get_rng_state()
    _, first = attached(method, kind)
    assert torch.equal(torch.random.get_rng_state(), before)
    _, second = attached(method, kind)
    for (a, x), (b, y) in zip(first.state().items(), second.state().items()):
        assert a == b and torch.equal(x, y), a


def test_a_deep_copy_and_a_pickled_copy_run_alike_and_apart(method, kind):
    case, adapter = attached(method, kind)
    moved(adapter)
    expected = case.run()
    for twin in (copy.deepcopy(case.model), pickle.loads(pickle.dumps(case.model))):
        with torch.no_grad():
            assert torch.equal(output(twin, case.batch), expected)
            for p in twin.parameters():
                p.mul_(0.5)
        assert torch.equal(case.run(), expected)


def test_gradient_checkpointing_gives_the_same_gradients(method, kind):
    case, adapter = attached(method, kind)
    if not hasattr(case.model, "gradient_checkpointing_enable"):
        pytest.skip("not a transformers model: it has no checkpointing switch")
    moved(adapter, 0.02)  # a larger move lets RandLoRA's scale of 20 amplify the order of sums
    case.model.train()
    for m in case.model.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
    adapter.root.draws = 0  # what a form draws is the same in both passes
    case.loss().backward()
    plain = [p.grad.clone() for p in adapter.parameters()]
    for p in adapter.parameters():
        p.grad = None
    case.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapter.root.draws = 0
    case.loss().backward()
    for (n, p), g in zip(adapter.named_parameters(), plain):
        assert (p.grad - g).abs().max() <= 2e-5 * g.abs().max() + 1e-7, n


def test_runs_in_bf16_and_under_autocast(method, kind):
    for dtype in (torch.bfloat16, torch.float32):
        case, adapter = attached(method, kind, dtype)
        moved(adapter, 0.02)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            loss = case.loss()
        loss.backward()
        assert torch.isfinite(loss)
        assert all(torch.isfinite(p.grad).all() for p in adapter.parameters() if p.grad is not None)


def test_small_tensors_keep_their_type_when_the_model_is_cast(method, kind):
    case, adapter = attached(method, kind)
    before = {n: t.dtype for n, t in adapter.state().items() if t.ndim < 2}
    case.model.to(torch.bfloat16)
    if not is_written(adapter):
        assert {n: t.dtype for n, t in adapter.state().items() if t.ndim < 2 and not n.startswith("train:")} == {
            n: d for n, d in before.items() if not n.startswith("train:")
        }
