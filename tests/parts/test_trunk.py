"""Running a part of the trunk: states without gradient, the rest from any block, caches beside the call's."""

import copy
from types import SimpleNamespace

import pytest
import torch
from models import Case, make
from torch import nn
from transformers import DynamicCache

import veneer
from veneer.errors import UserError
from veneer.models import architecture
from veneer.parts import trunk

KINDS = ("llama", "gpt2", "bert", "vit")


def inner(case: Case) -> tuple[nn.Module, dict]:
    """The trunk of a model and the batch less its labels."""
    return architecture.trunk(case.model), {k: v for k, v in case.batch.items() if k != "labels"}


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_what_the_blocks_take_in_and_put_out(kind):
    module, batch = inner(make(kind))
    trace = trunk.states(module, module.forward, (), batch)
    own = module(**batch, output_hidden_states=True)
    blocks = architecture.blocks(module)
    assert len(trace.states) == len(blocks) + 1 and len(trace.calls) == len(blocks)
    for state, expected in zip(trace.states[:-1], own.hidden_states):
        assert torch.equal(state, expected)
    assert torch.equal(trunk.hidden(trace.output), own.last_hidden_state)


def test_states_carry_no_graph_whatever_trains():
    module, batch = inner(make("llama"))
    assert all(p.requires_grad for p in module.parameters())
    trace = trunk.states(module, module.forward, (), batch)
    assert not any(s.requires_grad for s in trace.states) and not trunk.hidden(trace.output).requires_grad


def test_states_stop_before_a_block_and_leave_no_hooks():
    module, batch = inner(make("llama"))
    trace = trunk.states(module, module.forward, (), batch, stop=1)
    assert len(trace.states) == 2 and len(trace.outputs) == 1 and trace.output is None
    assert not any(b._forward_pre_hooks or b._forward_hooks for _, b in architecture.blocks(module))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", [0, 1])
def test_resuming_with_the_same_state_is_the_whole_trunk(kind, start):
    module, batch = inner(make(kind))
    trace = trunk.states(module, module.forward, (), batch, stop=start)
    out = trunk.resume(module, module.forward, trace.states[start], trace, (), batch, start)
    assert torch.equal(trunk.hidden(out), module(**batch)[0])


def test_resuming_gives_the_gradient_of_the_rest_alone():
    module, batch = inner(make("llama"))
    trace = trunk.states(module, module.forward, (), batch, stop=1)
    h = trace.states[1].clone().requires_grad_()
    trunk.hidden(trunk.resume(module, module.forward, h, trace, (), batch, 1)).sum().backward()
    assert h.grad.abs().sum() > 0
    first, second = (b for _, b in architecture.blocks(module))
    assert all(p.grad is None for p in first.parameters()) and all(p.grad is not None for p in second.parameters())
    assert "forward" not in first.__dict__


def test_a_module_gets_its_own_forward_back_when_another_stood_in():
    layer = nn.Linear(2, 2)
    layer.forward = own = lambda x: x + 1
    with pytest.raises(ZeroDivisionError), trunk.standing_in({layer: lambda x: x + 2}):
        assert layer(1) == 3
        raise ZeroDivisionError
    assert layer.forward is own


@pytest.mark.parametrize("kind", KINDS)
def test_a_replaced_output_is_what_the_head_reads(kind):
    case = make(kind)
    module, batch = inner(case)
    h = torch.randn_like(module(**batch)[0])
    for tuples in (False, True):
        changed = trunk.replaced(module, module(**batch, return_dict=not tuples), h)
        assert torch.equal(changed[0], h)
        if kind == "bert":
            assert torch.equal(changed[1], module.pooler(h))


def test_the_call_of_a_block_has_no_context_in_it_and_a_cache_of_its_own():
    case = make("gpt2")
    veneer.attach(case.model, "lora")  # the blocks now carry the context in their keywords
    module, batch = inner(case)
    trace = trunk.states(module, module.forward, (), batch | {"use_cache": True}, cache="mine")
    first = trace.output.past_key_values
    for args, kwargs in trace.calls:
        given = [v for v in (*args, *kwargs.values()) if hasattr(v, "get_seq_length")]
        assert given == [trunk.beside(first, "mine")] and "veneer_context" not in kwargs
    assert first.get_seq_length() == 7 and trunk.beside(first, "mine").get_seq_length() == 0


def filled(cache: DynamicCache, width: int) -> DynamicCache:
    """Two rows of three tokens at one layer, the row's number in every place."""
    keys = torch.arange(2.0)[:, None, None, None].expand(2, 1, 3, width)
    cache.update(keys, keys, 0)
    return cache


def test_a_cache_beside_follows_what_is_done_to_rows_and_tokens():
    first = DynamicCache()
    second = trunk.beside(first, "side")
    filled(first, 4), filled(second, 2)
    first.reorder_cache(torch.tensor([1, 1]))
    first.batch_repeat_interleave(2)
    first.crop(-1)
    assert isinstance(first, DynamicCache) and trunk.beside(first, "side") is second
    assert second.layers[0].keys.shape == (4, 1, 2, 2) and (second.layers[0].keys == 1).all()
    twin = copy.deepcopy(first)
    twin.batch_select_indices(torch.tensor([0]))
    assert second.layers[0].keys.shape[0] == 4 and trunk.beside(twin, "side").layers[0].keys.shape[0] == 1


def test_a_cache_that_was_filled_without_its_companion_is_refused():
    with pytest.raises(UserError, match="filled while 'side' was off"):
        trunk.beside(filled(DynamicCache(), 4), "side")


def test_a_bare_tensor_is_replaced_too():
    h = torch.ones(1)
    assert trunk.replaced(SimpleNamespace(), torch.zeros(1), h) is h
