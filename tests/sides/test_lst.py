"""LST against the numbered oracles of its sheet (126)."""

import pytest
import torch
from models import Case, make
from recipes import moved
from torch import Tensor

import veneer
from veneer.errors import UserError
from veneer.models import architecture
from veneer.parts import trunk
from veneer.sides.lst import LST, LSTFisher

KINDS = ("llama", "gpt2", "bert", "vit")


def beside(kind: str = "llama", fields: str = "", dtype: torch.dtype = torch.float32) -> tuple[Case, LST]:
    """A model and the side network beside its trunk."""
    case = make(kind, dtype)
    adapter = veneer.attach(case.model, f"lst(reduction=4{fields})")
    return case, next(iter(adapter.deltas.values()))


# -- oracles 1, 2 and 9: no backward pass through the base


def test_no_module_of_the_trunk_sees_a_gradient():
    case, _ = beside()
    seen = []
    base = case.model.model
    for name, m in architecture.named_modules(base):
        if name:
            m.register_full_backward_hook(lambda *_, name=name: seen.append(name))
    case.model.lm_head.register_full_backward_hook(lambda *_: seen.append("head"))
    case.model.train()
    case.loss().backward()
    assert seen == ["head"]
    assert not any(p.requires_grad for p in base.layers.parameters()) and case.model.lm_head.weight.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_trunk_keeps_nothing_for_backward_but_what_the_ladders_read(kind):
    case = make(kind)
    (delta,) = veneer.attach(case.model, "lst(reduction=2)").deltas.values()
    case.model.train()
    for m in case.model.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
    module, states, inside, kept = delta.site.module, [], [], []
    own = trunk.states

    def watched(*args, **kwargs):
        before = len(kept)
        trace = own(*args, **kwargs)
        states.extend(trace.states)
        inside.append(len(kept) - before)
        return trace

    parameters = {p.data_ptr() for p in case.model.parameters()}
    wide = {32, 128 if kind == "gpt2" else 48}  # the trunk's widths, which the side has nowhere
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trunk, "states", watched)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            module(**{k: v for k, v in case.batch.items() if k != "labels"})
    assert inside == [0]
    read = {s.data_ptr() for s in states}
    whole = [t for t in kept if t.ndim and t.shape[-1] in wide and t.data_ptr() not in parameters]
    pooled = 1 if kind == "bert" else 0  # tanh of the pooler, which belongs to the head
    assert len([t for t in whole if t.data_ptr() not in read]) <= pooled
    assert len({t.data_ptr() for t in whole} & read) == len(delta.kept) + 1


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_of_the_side_learns(kind):
    case, delta = beside(kind, ", merge_last=True, merge_alpha=0.0")
    case.loss().backward()
    assert all(p.grad is not None and p.grad.any() for p in delta.parameters())


# -- oracle 3


def test_states_of_an_earlier_run_give_the_same_output(monkeypatch):
    case, _ = beside()
    own, kept = trunk.states, []
    monkeypatch.setattr(trunk, "states", lambda *a, **k: kept.append(own(*a, **k)) or kept[-1])
    case.model.config.use_cache = False
    expected = case.run()
    monkeypatch.setattr(trunk, "states", lambda *a, **k: kept[0])
    assert torch.equal(case.run(), expected)


# -- oracles 4 to 6, 10: gates, sizes, and the side that is the trunk


def test_gates_start_at_one_half_with_slope_two_and_a_half():
    _, delta = beside()
    g = (delta.alpha / delta.temperature).sigmoid()
    g.sum().backward()
    assert torch.equal(g.detach(), torch.full((2,), 0.5)) and torch.allclose(delta.alpha.grad, torch.full((2,), 2.5))


def test_sizes_are_a_hand_count():
    _, delta = beside()
    d, s, f, heads, groups, head = 32, 8, 12, 4, 2, 2
    block = s * heads * head * 2 + s * groups * head * 2 + 3 * s * f + 2 * s
    ladders, up, gates, norm = 3 * (d * s + s), s * d + d, 2, s
    assert delta.parameter_count() == 2 * block + ladders + up + gates + norm
    assert sum(p.numel() for p in delta.parameters()) == delta.parameter_count()


def test_dropped_blocks_have_no_ladder():
    _, delta = beside(fields=", blocks=(1,)")
    assert delta.down.shape == (2, 8, 32) and len(delta.side) == 1 and delta.alpha.shape == (1,)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unreduced_side_with_open_gates_is_the_trunk(kind):
    case = make(kind)
    adapter = veneer.attach(case.model, "lst(reduction=1)")
    (delta,) = adapter.deltas.values()
    with torch.no_grad():
        delta.down[0] = torch.eye(32)
        delta.up.copy_(torch.eye(32))
        delta.down_bias.zero_(), delta.up_bias.zero_(), delta.alpha.fill_(10.0)
    with adapter.disabled():
        base = case.run()
    assert torch.allclose(case.run(), base, atol=1e-6)


def hand(case: Case, delta: LST, after: bool) -> Tensor:
    """The last hidden state by the definition, on the trunk's own hidden states, with eager blocks of GPT-2."""
    module = delta.site.module
    given = {"attention_mask": None, "past_key_values": None}
    adapter = veneer.adapters(case.model)["default"]
    with adapter.disabled():
        h = trunk.states(module, module.forward, (case.batch["input_ids"],), {"use_cache": False}).states
    s = h[0] @ delta.down[0].T + delta.down_bias[0]
    for i in range(2):
        g = 1 / (1 + torch.exp(-delta.alpha[i] / 0.1))
        ladder = h[i + 1] @ delta.down[i + 1].T + delta.down_bias[i + 1]
        s = delta.side[i](s, **given) if after else s
        s = g * s + (1 - g) * ladder
        s = s if after else delta.side[i](s, **given)
    return delta.norm(s) @ delta.up.T + delta.up_bias


@pytest.mark.parametrize("after", [False, True])
def test_the_output_is_the_definition(after):
    case, delta = beside("gpt2", f", mix_after={after}")
    moved(veneer.adapters(case.model)["default"])
    with torch.no_grad():
        got = case.model.transformer(case.batch["input_ids"])[0]
        assert torch.allclose(got, hand(case, delta, after), atol=1e-5)


def test_a_merged_output_is_between_the_side_and_the_trunk_and_starts_next_to_the_base():
    case, delta = beside(fields=", merge_last=True")
    adapter = veneer.adapters(case.model)["default"]
    with adapter.disabled():
        base = case.run()
    assert torch.allclose(case.run(), base, atol=1e-3)
    delta.alpha.data[-1] = 10.0
    side = case.run()
    delta.alpha.data[-1] = 0.0
    assert torch.allclose(case.run(), (side + base) / 2, atol=1e-5)


# -- oracle 7, and the Fisher start


def test_a_fisher_start_keeps_what_the_loss_depends_on():
    case = make("gpt2")
    quiet = case.model.transformer.h[0].mlp
    with torch.no_grad():  # hidden units 16 and above are heavy but dead: nothing reads them
        quiet.c_fc.weight[:, 16:] += 50
        quiet.c_proj.weight[16:] = 0
    kept = {}
    for recipe in ("lst(reduction=8)", "lst(reduction=8)+lst-fisher"):
        adapter = veneer.attach(case.model, recipe, calibration=[case.batch])
        (delta,) = adapter.deltas.values()
        kept[recipe] = delta.side[0].mlp.c_fc.bias.detach().clone()
        adapter.detach()
    assert torch.equal(kept["lst(reduction=8)+lst-fisher"], quiet.c_fc.bias[:16])
    assert not torch.equal(*kept.values())


def test_the_side_turns_the_pairs_that_survive_by_the_trunks_own_angles():
    case = make("llama")
    with torch.no_grad():
        case.model.model.layers[1].self_attn.k_proj.weight.view(2, 8, 32)[:, [1, 5, 3, 7]] += 10
    (delta,) = veneer.attach(case.model, "lst(reduction=2)").deltas.values()
    assert delta.turn[1].tolist() == [1, 3, 5, 7]
    given = []
    delta.side[1].register_forward_pre_hook(lambda m, a, k: given.extend(k["position_embeddings"]), with_kwargs=True)
    case.run()
    whole = case.model.model.rotary_emb(torch.zeros(1), torch.arange(7)[None])
    assert all(torch.equal(a, b[..., [1, 3, 5, 7]]) for a, b in zip(given, whole))


def test_a_random_start_takes_nothing_from_the_trunk_and_is_seeded():
    first, second, pruned = (beside(fields=f)[1] for f in (", start='random'", ", start='random'", ""))
    weights = [d.side[0].mlp.up_proj.weight for d in (first, second, pruned)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert weights[0].std().item() == pytest.approx(0.02, rel=0.3)


# -- running


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("beams", [1, 3])
def test_decoding_with_a_cache_equals_decoding_without(kind, beams):
    case, _ = beside(kind)
    moved(veneer.adapters(case.model)["default"], 0.3)
    ids = case.batch["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :2] = 0  # padded on the left
    settings = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "pad_token_id": 0, "attention_mask": mask}
    cached = case.model.generate(ids, **settings)
    assert torch.equal(cached, case.model.generate(ids, use_cache=False, **settings))


def test_a_cache_filled_without_the_side_is_refused():
    case, _ = beside()
    ids = case.batch["input_ids"]
    with veneer.adapters(case.model)["default"].disabled():
        cache = case.model(ids, use_cache=True).past_key_values
    with pytest.raises(UserError, match="filled while"):
        case.model(ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_half_precision_trunk_has_a_side_of_fp32_tensors(kind):
    case, delta = beside(kind, dtype=torch.bfloat16)
    adapter = veneer.adapters(case.model)["default"]
    moved(adapter, 0.05)
    half = case.run().float()
    assert all(p.dtype == torch.float32 for p in delta.parameters())
    whole, _ = beside(kind)
    whole.model.load_state_dict(case.model.state_dict())
    veneer.adapters(whole.model)["default"].load_state(adapter.state())
    assert (half - whole.run()).abs().max() < 0.03 * whole.run().abs().max()


def test_checkpointing_in_half_precision_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        case, delta = beside(dtype=torch.bfloat16)
        case.model.train()
        if checkpointing:
            case.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        case.loss().backward()
        grads.append([p.grad for p in delta.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_the_fast_loss_is_the_plain_one_with_its_gradients():
    case, delta = beside()
    case.model.train()
    losses = []
    for run in (lambda: veneer.causal_loss(case.model, case.batch), case.loss):
        delta.zero_grad()
        losses.append(run())
        losses[-1].backward()
        losses.append(torch.cat([p.grad.flatten() for p in delta.parameters()]))
    assert torch.allclose(losses[0], losses[2], atol=1e-5) and torch.allclose(losses[1], losses[3], atol=1e-5)


def test_it_runs_beside_an_adapter_attached_before():
    case = make("llama")
    first = veneer.attach(case.model, "lora", name="first")
    moved(first, 0.3)
    adapter = veneer.attach(case.model, "lst(reduction=4)")
    with_first = case.run()
    with first.disabled():
        assert not torch.allclose(case.run(), with_first, atol=1e-4)
    case.loss().backward()
    assert all(p.grad is None for p in first.parameters()) and all(p.grad is not None for p in adapter.parameters())


def test_a_quantised_trunk_is_pruned_and_run():
    case = make("llama")
    adapter = veneer.attach(case.model, "lst(reduction=4)+nf4")
    (delta,) = adapter.deltas.values()
    case.loss().backward()
    assert delta.parameter_count() == adapter.parameter_count() == beside()[1].parameter_count()
    assert all(p.grad.any() for p in delta.parameters())


@pytest.mark.parametrize(
    "kind, recipe, says",
    [
        ("llama", "lst(reduction=8)", "head_dim=8 .* into pairs"),
        ("llama", "lst(reduction=4, blocks=(0, 2))", "0 to 1"),
        ("t5", "lst", "encoder–decoders are not supported"),
        ("cnn", "lst", "another kind of model"),
        ("llama", "lora+lst(reduction=4)", "lora inside it would not learn"),
        ("llama", "sara+lst(reduction=4)", "sara inside it would not learn"),
        ("llama", "p-adapter+lst(reduction=4)", "p-adapter inside it would not learn"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_no_trace(kind, recipe, says):
    case = make(kind)
    before = case.run()
    with pytest.raises(UserError, match=says):
        veneer.attach(case.model, recipe, calibration=[case.batch], sites=case.sites)
    assert torch.equal(case.run(), before) and not veneer.adapters(case.model)


def test_a_fisher_start_without_a_side_network_is_refused():
    adapter = veneer.attach(make("llama").model, "lora")
    with pytest.raises(UserError, match="starts the side network of lst"):
        LSTFisher().settle(adapter, [])
