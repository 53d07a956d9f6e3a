"""The fast forms against the models' own forwards: outputs, gradients, masks, groups, recomputation, what is kept."""

import copy

import pytest
import torch
import transformers as tf

from veneer.models import fast_attention, fast_self_attention
from veneer.models.fast import fast_forms
from veneer.numerics import lowrank
from veneer.numerics.dropout import keep_mask
from veneer.numerics.fused import lowrank_linear
from veneer.numerics.lowrank import Branch

TIME = 40


def tiny(family="Llama", heads=4, groups=2, dtype=torch.float32, **extra):
    torch.manual_seed(0)
    config = getattr(tf, f"{family}Config")(
        vocab_size=64,
        hidden_size=8 * heads,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=8,
        max_position_embeddings=256,
        pad_token_id=0,
        **extra,
    )
    model = getattr(tf, f"{family}ForCausalLM")(config)
    for name, p in model.named_parameters():
        # Norm weights away from one and biases away from zero, so that leaving one out would show.
        if p.ndim == 1:
            p.data.normal_(0, 0.3).add_("norm" in name)
        else:
            p.data.mul_(6)
    return model.to(dtype).eval()


def tokens(batch=3, time=TIME):
    return torch.randint(1, 64, (batch, time), generator=torch.Generator().manual_seed(1))


def outputs_and_gradients(model, ids, keep=None, **inputs):
    """Logits where ``keep``, and the gradients of embeddings and all parameters of a fixed weighted sum of them."""
    model.zero_grad()
    x = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=x, use_cache=False, **inputs).logits.float()
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    if keep is not None:
        weight = weight * keep[..., None]
        logits = logits * keep[..., None]
    (logits * weight).sum().backward()
    return [logits.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def difference(mine, true):
    assert len(mine) == len(true)
    return max(
        ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-6)).item() for a, b in zip(mine, true)
    )


def compare(model, ids, tolerance=2e-5, **inputs):
    own = outputs_and_gradients(model, ids, **inputs)
    with fast_forms(model):
        assert any("forward" in m.__dict__ for m in model.modules())
        fast = outputs_and_gradients(model, ids, **inputs)
    assert difference(fast, own) < tolerance


@pytest.fixture
def frozen_calls(monkeypatch):
    """Counts the passes through the fast attention."""
    calls = []
    own = fast_attention.attend
    for module in (fast_attention, fast_self_attention):
        monkeypatch.setattr(module, "attend", lambda *a: calls.append(1) or own(*a))
    return calls


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3"])
def test_every_family_gives_its_own_outputs_and_gradients(family, frozen_calls):
    compare(tiny(family), tokens())
    assert bool(frozen_calls) == (family in ("Llama", "Mistral", "Qwen2"))


@pytest.mark.parametrize("heads,groups", [(4, 4), (4, 1), (6, 2)])
def test_grouped_queries(heads, groups):
    compare(tiny(heads=heads, groups=groups), tokens())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding(side, attention, frozen_calls):
    model = tiny(attn_implementation=attention)
    mask = torch.ones(3, TIME, dtype=torch.long)
    for row, pad in enumerate((0, 7, 19)):
        mask[row, slice(0, pad) if side == "left" else slice(TIME - pad, TIME)] = 0
    compare(model, tokens(), keep=mask, attention_mask=mask)
    assert frozen_calls


def test_packed_rows_see_only_their_own_part(frozen_calls):
    positions = torch.cat((torch.arange(15), torch.arange(TIME - 15)))[None].expand(3, -1)
    same = torch.arange(TIME)[:, None] < 15
    mask = (same == same.T).tril()[None, None].expand(3, 1, -1, -1)
    compare(tiny(), tokens(), attention_mask=mask, position_ids=positions)
    assert frozen_calls


def test_a_mask_that_looks_ahead_is_left_to_the_model(frozen_calls):
    mask = torch.ones(TIME, TIME, dtype=torch.bool).tril()
    mask[:5, :5] = True
    compare(tiny(), tokens(), attention_mask=mask[None, None].expand(3, 1, -1, -1))
    assert not frozen_calls


@pytest.mark.parametrize("kept", [0, 512])
@pytest.mark.parametrize("block", [1, 7, 64])
def test_blocks_of_rows_and_probabilities_formed_again(kept, block, monkeypatch):
    monkeypatch.setattr(fast_attention, "KEPT", kept)
    monkeypatch.setattr(fast_attention, "BLOCK", block)
    compare(tiny(), tokens(time=37))


def test_a_window_shorter_than_the_row_is_left_to_the_model(frozen_calls):
    compare(tiny("Mistral", sliding_window=9), tokens())
    assert not frozen_calls
    compare(tiny("Mistral", sliding_window=TIME), tokens())
    assert frozen_calls


def test_attention_dropout_is_left_to_the_model_in_training(frozen_calls):
    model = tiny(attention_dropout=0.5)
    with fast_forms(model):
        model.train()(tokens())
        assert not frozen_calls
        model.eval()(tokens(), use_cache=False)
        assert frozen_calls


def test_decoding_with_a_cache_inside_is_the_models_own():
    model = tiny()
    with torch.no_grad(), fast_forms(model):
        first = model(tokens()[:, :-1], use_cache=True)
        last = model(tokens()[:, -1:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(last[:, 0], model(tokens()).logits[:, -1], rtol=1e-4, atol=1e-4)


def test_in_bf16_it_is_as_near_to_the_truth_as_the_model_itself():
    true = outputs_and_gradients(tiny(dtype=torch.float64), tokens(time=100))
    model = tiny(dtype=torch.bfloat16)
    own = outputs_and_gradients(model, tokens(time=100))
    with fast_forms(model):
        fast = outputs_and_gradients(model, tokens(time=100))
    ours, theirs = ([((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, true)] for found in (fast, own))
    assert sum(ours) < 1.15 * sum(theirs)
    assert all(a < 1.5 * b for a, b in zip(ours, theirs))


def test_outside_of_the_context_the_model_is_as_it_was():
    model = tiny()
    before = {n: (type(m), set(m.__dict__)) for n, m in model.named_modules()}
    with pytest.raises(RuntimeError, match="stop"), fast_forms(model):
        raise RuntimeError("stop")
    assert before == {n: (type(m), set(m.__dict__)) for n, m in model.named_modules()}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_are_recomputed_in_the_same_forms(reentrant, frozen_calls):
    plain, model = tiny().train(), tiny().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    own = outputs_and_gradients(plain, tokens())
    x = model.get_input_embeddings()(tokens()).detach().requires_grad_()
    with fast_forms(model):
        logits = model(inputs_embeds=x, use_cache=False).logits
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    seen = len(frozen_calls)
    (logits * weight).sum().backward()
    fast = [logits.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
    assert difference(fast, own) < 2e-5
    assert len(frozen_calls) == 2 * seen
    assert not any("forward" in m.__dict__ for m in model.modules())


class Pair(torch.nn.Linear):
    """A linear layer with a hand-made pair, run by the fused product."""

    def branch(self):
        return Branch(self.weight, self.bias, self.A, self.B, 0.5, self.p, self.seed, self.gain)

    def forward(self, x):
        b = self.branch()
        return lowrank_linear(x, b.weight, b.bias, b.A, b.B, b.scale, b.dropout, b.seed, b.gain)


def with_pairs(model, p=0.0, gain=False, names="qkvo gate up down", seed_of=lambda name, number: number):
    model.requires_grad_(False)
    g = torch.Generator().manual_seed(3)
    ends = tuple(f"{n}_proj" for n in names.replace("qkvo", "q k v o").split())
    for number, (name, m) in enumerate(model.named_modules()):
        if isinstance(m, torch.nn.Linear) and name.endswith(ends):
            m.__class__ = Pair
            m.p, m.seed, m.gain = p, seed_of(name, number), None
            m.A = torch.nn.Parameter(torch.randn(3, m.in_features, generator=g) * 0.1)
            m.B = torch.nn.Parameter(torch.randn(m.out_features, 3, generator=g) * 0.1)
            if gain:
                m.gain = torch.nn.Parameter(1 + 0.2 * torch.randn(m.out_features, generator=g))
    return model


def plain(module):
    return module.branch() if isinstance(module, Pair) else None


@pytest.mark.parametrize(
    "p,gain,bias", [(0.0, False, False), (0.3, False, True), (0.0, True, True), (0.3, True, False)]
)
def test_grouped_layers_give_what_each_gives_alone(p, gain, bias):
    model = with_pairs(tiny(attention_bias=bias, mlp_bias=bias), p, gain)
    own = outputs_and_gradients(model, tokens())
    calls = []
    for m in model.modules():
        if isinstance(m, Pair):
            m.forward = lambda x, m=m: calls.append(1) or Pair.forward(m, x)
    with fast_forms(model, plain):
        fast = outputs_and_gradients(model, tokens())
    assert not calls
    assert difference(fast, own) < 2e-5


@pytest.mark.parametrize("names", ["qkvo gate up down", "q v up down"])
def test_siblings_of_one_seed_share_a_mask(names, monkeypatch):
    """Layers whose dropout has the same seed drop the same inputs: grouped, the mask is drawn once."""
    model = with_pairs(tiny(), 0.3, names=names, seed_of=lambda name, _: len(name.rpartition(".")[0]))
    own = outputs_and_gradients(model, tokens())
    drawn = []
    monkeypatch.setattr(lowrank, "keep_mask", lambda *a: drawn.append(1) or keep_mask(*a))
    with fast_forms(model, plain):
        fast = outputs_and_gradients(model, tokens())
    assert difference(fast, own) < 2e-5
    groups = 4 if "o" in names.split()[0] else 3
    assert len(drawn) == 2 * 2 * groups  # layers, directions


@pytest.mark.parametrize("names", ["qkvo", "up", "gate up", "down", "k"])
def test_some_layers_adapted_and_others_frozen(names):
    model = with_pairs(tiny(), names=names)
    own = outputs_and_gradients(model, tokens())
    with fast_forms(model, plain):
        fast = outputs_and_gradients(model, tokens())
    assert difference(fast, own) < 2e-5


def test_a_layer_with_a_hook_is_called():
    model = with_pairs(tiny())
    own = outputs_and_gradients(model, tokens())
    seen = []
    for n in ("q_proj", "o_proj"):
        getattr(model.model.layers[0].self_attn, n).register_forward_hook(lambda *a: seen.append(1))
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda *a: seen.append(1))
    with fast_forms(model, plain):
        fast = outputs_and_gradients(model, tokens())
    assert len(seen) == 3
    assert difference(fast, own) < 2e-5


def test_under_autocast_the_models_own_forward_runs():
    model = tiny()
    with torch.autocast("cpu", torch.bfloat16):
        own = model(tokens()).logits
        with fast_forms(model):
            assert torch.equal(model(tokens(), use_cache=False).logits, own)


def kept_bytes(call, model):
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in known:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = call()
    del out
    return sum(kept.values())


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("leave", [(), ("attention",)])
def test_what_is_kept_for_backward_is_less_than_of_the_frozen_base(p, leave, monkeypatch):
    monkeypatch.setattr(fast_attention, "KEPT", 0)
    base = tiny(dtype=torch.bfloat16).requires_grad_(False)
    x = base.get_input_embeddings()(tokens()).detach().requires_grad_()
    frozen = kept_bytes(lambda: base.model(inputs_embeds=x, use_cache=False), base)
    model = with_pairs(copy.deepcopy(base), p)
    with fast_forms(model, plain, leave):
        ours = kept_bytes(lambda: model.model(inputs_embeds=x, use_cache=False), model)
    assert ours < frozen


@pytest.mark.parametrize("layers", ["", "o", "gate", "down"])
def test_the_input_of_frozen_factors_is_not_kept(layers):
    """A frozen layer keeps no input, nor does one whose A is frozen (LoRA-FA); the gradients stay right."""
    model = with_pairs(tiny(), names=layers) if layers else tiny().requires_grad_(False)
    for m in model.modules():
        if isinstance(m, Pair):
            m.A.requires_grad_(False)
    own = outputs_and_gradients(model, tokens())
    x = torch.randn(3, TIME, 32).requires_grad_()
    with fast_forms(model, plain):
        assert difference(outputs_and_gradients(model, tokens()), own) < 2e-5
        mlp = kept_bytes(lambda: model.model.layers[0].mlp(x), model)
    small = (3 + 1) * 3 * TIME * 4 + 4 * (32 + 48) * 3
    assert mlp < 2 * 48 * 3 * TIME * 4 + small  # gate and up


def test_the_same_mask_comes_from_the_same_seed_in_every_precision():
    masks = [keep_mask(5, (30, 20), 0.3, d, torch.device("cpu")).double() for d in (torch.float64, torch.bfloat16)]
    assert torch.equal(*masks)
