"""p-Adapter against its sheet's oracles (098)."""

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import nn

import veneer
from veneer.deltas.p_adapter import calibrated, pooled
from veneer.errors import UserError

IDS = torch.arange(12).view(2, 6) + 3
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(**more):
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=61, num_key_value_heads=2, **SIZES, **more)).eval()


def blip():
    torch.manual_seed(0)
    config = tf.BlipTextConfig(vocab_size=61, encoder_hidden_size=24, **SIZES)
    return tf.models.blip.modeling_blip_text.BlipTextLMHeadModel(config).eval()


def t5():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 61}
    return tf.T5ForConditionalGeneration(tf.T5Config(decoder_start_token_id=0, pad_token_id=0, **sizes)).eval()


def stirred(adapter, size=0.3):
    g = torch.Generator().manual_seed(1)
    for p in adapter.parameters():
        p.data.add_(size * torch.randn(p.shape, generator=g))


def by_pairs(mine, nodes, S, p, mu, own=None, eps=0.0):
    """The definition, pair by pair."""
    rows = []
    for i in range(len(mine)):
        keep = [j for j in range(len(nodes)) if S[i, j] > 0 and (own is None or j != i + own)]
        M = [S[i, j] * ((S[i, j] + eps).sqrt() * (nodes[j] - mine[i]) + eps).norm() ** (p - 2) for j in keep]
        alpha = 1 / (sum(M) + 2 * mu / p)
        rows.append(alpha * sum(m * nodes[j] for m, j in zip(M, keep)) + 2 * mu / p * alpha * mine[i])
    return torch.stack(rows)


@pytest.mark.parametrize("p", [1.0, 1.25, 2.0, 2.5])
def test_the_fast_form_is_the_definition(p):
    f, S = torch.randn(5, 3, dtype=torch.float64), torch.rand(5, 5, dtype=torch.float64).softmax(-1)
    assert torch.allclose(calibrated(f, f, S, p, 0.3, own=0), by_pairs(f, f, S, p, 0.3, own=0), atol=1e-6)
    q = torch.randn(4, 3, dtype=torch.float64)
    assert torch.allclose(calibrated(q, f, S[:4], p, 0.3), by_pairs(q, f, S[:4], p, 0.3), atol=1e-6)
    published = calibrated(q, f, S[:4], p, 0.3, published=True)
    assert torch.allclose(published, by_pairs(q, f, S[:4], p, 0.3, eps=1e-8), atol=1e-6)


def test_the_sheets_two_nodes():
    f, S = torch.tensor([[1.0], [0.0]]), torch.full((2, 2), 0.5)
    assert torch.allclose(calibrated(f, f, S, 2.0, 1.0), torch.tensor([[0.75], [0.25]]))
    assert torch.allclose(calibrated(f, f, S, 1.0, 1.0, own=0), torch.tensor([[0.73880], [0.26120]]), atol=1e-5)


def test_weights_of_a_row_sum_to_one_and_its_limits():
    f, S = torch.randn(6, 4), torch.rand(6, 6).softmax(-1)
    same = torch.ones(6, 4) * 3
    assert torch.allclose(calibrated(same, same, S, 1.3, 0.2, own=0), same, atol=1e-5)
    assert torch.allclose(calibrated(f, f, S, 2.0, 0.5), (S @ f + 0.5 * f) / 1.5, atol=1e-5)
    assert torch.allclose(calibrated(f, f, S, 1.5, 1e9), f, atol=1e-4)
    assert torch.allclose(calibrated(f, f, S, 2.0, 1e-9), S @ f, atol=1e-5)
    sums = calibrated(f, torch.ones(6, 4), S, 1.5, 0.2, teleport=False)
    assert (sums < 1).all()


def test_no_weight_no_message_and_gradients_stay_finite():
    f, S = torch.randn(4, 3, requires_grad=True), torch.rand(4, 4)
    S[:, 2] = 0
    other = f.detach().clone()
    other[2] += 5
    y = calibrated(f[:2], f, S[:2], 1.5, 0.2, own=0)
    assert torch.allclose(calibrated(f[:2], other, S[:2], 1.5, 0.2, own=0), y, atol=1e-2)
    equal = torch.ones(4, 3, requires_grad=True)
    p = torch.tensor(1.25, requires_grad=True)
    calibrated(equal, equal, S, p, 0.2, own=0).sum().backward()
    assert torch.isfinite(equal.grad).all() and torch.isfinite(p.grad)


def test_pooling_averages_and_leaves_hidden_keys_out():
    S, nodes = torch.rand(2, 3, 4, 8), torch.randn(2, 3, 8, 5)
    weights, features = pooled(S, nodes, 4)
    assert torch.allclose(weights, S.unflatten(-1, (4, 2)).mean(-1), atol=1e-6)
    assert torch.allclose(features, nodes.unflatten(2, (4, 2)).mean(3), atol=1e-6)
    S[:, :, :, 7] = 0
    assert torch.allclose(pooled(S, nodes, 4)[1][:, :, 3], nodes[:, :, 6], atol=1e-6)
    assert pooled(S, nodes, 8)[1] is nodes


@pytest.mark.parametrize("make", [llama, t5, blip])
def test_the_start_is_the_base_bit_for_bit(make):
    model = make().requires_grad_(False)  # T5's bias, if it trains, makes torch take another kernel
    given = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if make is t5 else {})
    given |= {"encoder_hidden_states": torch.randn(2, 5, 24), "is_decoder": True} if make is blip else {}
    y = model(**given).logits
    adapter = veneer.attach(model, "p-adapter")
    assert len(adapter.deltas) == {llama: 2, t5: 6, blip: 4}[make]
    assert torch.equal(model(**given).logits, y)
    stirred(adapter)
    assert not torch.allclose(model(**given).logits, y, atol=1e-3)
    with adapter.disabled():
        assert torch.equal(model(**given).logits, y)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_block_adds_the_branch_of_its_own_attention(attention):
    model = llama(attn_implementation=attention)
    attn = model.model.layers[0].self_attn
    adapter = veneer.attach(model, "p-adapter(exponent=1.25)", sites=["layers.0.self_attn.q_proj"])
    (d,) = adapter.deltas.values()
    stirred(adapter)
    seen = {}
    for name, module in {"v": attn.v_proj, "o": attn.o_proj, "all": attn}.items():
        module.register_forward_hook(lambda m, a, y, name=name: seen.__setitem__(name, (a, y)))
    model(IDS)
    plain = llama(attn_implementation="eager")
    P = plain(IDS, output_attentions=True).attentions[0]
    o = F.linear(seen["o"][0][0], attn.o_proj.weight)
    z = seen["v"][1].unflatten(-1, (2, 8)).repeat_interleave(2, 2).flatten(2)
    f = F.linear(F.linear(z, attn.o_proj.weight), d.D, d.b_D).unflatten(-1, (4, -1)).transpose(1, 2)
    mu, p = 0.1 * (2 + d.m.tanh()), d.p.clamp(1, 4)
    first = [torch.stack([by_pairs(x, x, s, p, mu, own=0) for x, s in zip(fs, Ss)]) for fs, Ss in zip(f, P)]
    F_ = torch.stack(first).transpose(1, 2).flatten(2)
    expected = o + F.linear(F.gelu(F.linear(o, d.G, d.b_G)) * F_, d.U, d.b_U)
    assert torch.allclose(seen["all"][1][0], expected, atol=1e-4)


def test_decoding_with_a_cache_is_the_whole_sequence_at_once():
    model = llama()
    adapter = veneer.attach(model, "p-adapter")
    stirred(adapter)
    whole = model(IDS).logits
    out = model(IDS[:, :3], use_cache=True)
    parts = [out.logits]
    for t in range(3, 6):
        out = model(IDS[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
        parts.append(out.logits)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4)


def test_padding_does_not_reach_the_others():
    model = llama()
    stirred(veneer.attach(model, "p-adapter"))
    mask = torch.ones_like(IDS)
    mask[:, :2] = 0
    other = IDS.clone()
    other[:, :2] = 7
    a, b = (model(x, attention_mask=mask).logits[:, 2:] for x in (IDS, other))
    assert torch.allclose(a, b, atol=1e-4)


def test_cross_attention_sends_pooled_values_to_queries():
    model = t5()
    stirred(veneer.attach(model, "p-adapter(samples=2)", sites=["EncDecAttention.q"]))
    given = {"input_ids": IDS, "decoder_input_ids": IDS[:, :2]}
    two = model(**given).logits
    adapter = model.__dict__["_veneer"].adapters["default"]
    for d in adapter.deltas.values():
        d.samples = 6
    assert not torch.allclose(model(**given).logits, two, atol=1e-4)


def test_the_count_is_the_sheets():
    site = type("S", (), {"parts": {"o": type("O", (), {"out_features": 768, "heads": 12})}})
    form = type("F", (), {"site": site, "reduction": 8, "learn": True})
    cls = veneer.core.registry.find("p-adapter").cls
    form._sizes = lambda self=form: cls._sizes(form)
    assert cls.parameter_count(form) == 222_146
    assert veneer.attach(llama(), "p-adapter(learn=False)").parameter_count() == 2 * (3 * 32 * 4 + 2 * 4 + 32)


def test_the_papers_start_is_off_the_base_and_other_attentions_are_refused():
    model = llama()
    y = model(IDS).logits
    adapter = veneer.attach(model, "p-adapter(start='paper')")
    assert not torch.equal(model(IDS).logits, y)
    adapter.detach()
    with pytest.raises(UserError, match="lie in none"):
        veneer.attach(nn.Sequential(nn.Linear(3, 3)), "p-adapter", sites="all")
    veneer.attach(model, "p-adapter")
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(UserError, match="attn_implementation='flex_attention'"):
        model.model.layers[0].self_attn(torch.randn(1, 3, 32))


def test_no_matrix_of_pairs_is_kept_for_backward():
    model, saved = llama(), []
    ids = torch.randint(3, 61, (1, 40))
    adapter = veneer.attach(model, "p-adapter")
    stirred(adapter)
    pack = lambda t: saved.append(t.numel()) or t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(ids, use_cache=False).logits.square().mean()
    assert max(saved) < 4 * 40 * 40
    loss.backward()
    kept = {n: p.grad for n, p in adapter.named_parameters()}
    for d in adapter.deltas.values():
        d._add = lambda seen, cross, layer, args, o, d=d: o + d._branch(seen, cross, o)
    model.zero_grad()
    model(ids, use_cache=False).logits.square().mean().backward()
    for n, p in adapter.named_parameters():
        torch.testing.assert_close(p.grad, kept[n], rtol=1e-5, atol=1e-7)
