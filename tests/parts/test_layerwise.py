"""Evidence block by block is the same as in one pass, in the memory of one block."""

import pytest
import torch
import transformers as tf
from torch import nn

import veneer
from veneer.core.site import find_sites
from veneer.errors import UserError
from veneer.parts import layerwise
from veneer.parts.evidence import gather
from veneer.parts.layerwise import GradientSum

IDS = torch.randint(3, 61, (3, 2, 7), generator=torch.Generator().manual_seed(1))
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}


def llama():
    return tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=61, **SIZES))


def gpt2():
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=16, n_layer=3, n_head=2, n_positions=8, vocab_size=61, **ends))


def bert():
    return tf.BertForSequenceClassification(tf.BertConfig(vocab_size=61, **SIZES))


def t5():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 61}
    return tf.T5ForConditionalGeneration(tf.T5Config(decoder_start_token_id=0, pad_token_id=0, **sizes))


MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert, "t5": t5}


def batches(kind):
    mask = torch.ones_like(IDS[0])
    mask[1, -2:] = 0
    labels = (lambda ids: torch.tensor([0, 1])) if kind == "bert" else (lambda ids: ids.masked_fill(mask == 0, -100))
    return [{"input_ids": ids, "attention_mask": mask, "labels": labels(ids)} for ids in IDS]


def made(kind):
    torch.manual_seed(0)
    return MODELS[kind](), batches(kind)


class Moment:
    """Σ xᵀx over the positions that count."""

    def __init__(self, site):
        self.total = 0.0

    def inputs(self, site, x, mask):
        rows = site.input_rows(x)
        rows = rows if mask is None else rows[mask.reshape(-1)]
        self.total = self.total + rows.T @ rows


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("select", ["linear", "all", "down"])
def test_gradients_are_those_of_one_pass_over_everything(kind, select):
    model, data = made(kind)
    sites = find_sites(model, select)
    expected = gather(model, sites, data, frozenset({"weight_gradient"}))
    found = {s.path: w.total / len(data) for s, w in layerwise.layerwise(model, sites, data, GradientSum, True)}
    known = {s.path: expected[s].gradient for s in sites if expected[s].gradient is not None}
    assert known.keys() <= found.keys() and len(known) > 2
    for path, G in known.items():
        assert torch.allclose(found[path], G, atol=1e-6), path


@pytest.mark.parametrize("kind", MODELS)
def test_inputs_are_those_of_one_pass_and_siblings_share(kind):
    model, data = made(kind)
    sites = find_sites(model, "linear")
    expected = gather(model, sites, data, frozenset({"input_covariance"}))
    watchers = []
    for site, watcher in layerwise.layerwise(model, sites, data, Moment):
        found = expected[site]
        assert torch.allclose(watcher.total / found.tokens, found.covariance, atol=1e-5), site.path
        watchers.append(watcher)
    assert len(watchers) == len(sites)
    assert len({id(w) for w in watchers}) < len(sites)


@pytest.mark.parametrize("size", [None, 10**9])
def test_long_batches_keep_the_states_of_fewer_doors(size, monkeypatch):
    model, data = made("llama")
    sites = find_sites(model, "linear")
    doors = []
    monkeypatch.setattr(layerwise, "_first_pass", lambda *a, own=layerwise._first_pass: doors.append(a[2]) or own(*a))
    if size:
        monkeypatch.setattr(layerwise, "_chain", lambda *a: size)
    expected = gather(model, sites, data, frozenset({"weight_gradient"}))
    for site, w in layerwise.layerwise(model, sites, data, GradientSum, True):
        assert torch.allclose(w.total / len(data), expected[site].gradient, atol=1e-6)
    assert doors[0] == ([0] if size else [0, 1, 2])


@pytest.mark.parametrize("backward", [True, False])
def test_one_blocks_sums_exist_at_a_time(backward):
    alive, most = set(), []

    class Counted(GradientSum):
        def __init__(self, site):
            super().__init__(site)
            alive.add(site.path)
            most.append(len(alive))
            self.path = site.path

        def __del__(self):
            alive.discard(self.path)

    model, data = made("llama")
    sites = find_sites(model, "linear")
    for _, watcher in layerwise.layerwise(model, sites, data, Counted, backward):
        del watcher
    assert max(most) <= len(sites) // 3 and not alive


def test_the_model_is_left_as_it_was():
    model, data = made("llama")
    model.train()
    model.model.norm.weight.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    for backward in (True, False):
        list(layerwise.layerwise(model, find_sites(model), data, GradientSum, backward))
    assert model.training and all(p.grad is None for p in model.parameters())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


def test_it_sees_the_model_beneath_an_adapter():
    model, data = made("llama")
    sites = find_sites(model, "linear")
    plain = {s.path: w.total for s, w in layerwise.layerwise(model, sites, data, GradientSum, True)}
    adapter = veneer.attach(model, "lora", rank=2)
    with adapter.disabled():
        for site, w in layerwise.layerwise(model, sites, data, GradientSum, True):
            assert torch.equal(w.total, plain[site.path])
    assert all(p.requires_grad for p in adapter.parameters())


def test_no_batch_and_no_loss_are_refused():
    model, data = made("llama")
    sites = find_sites(model, "linear")
    with pytest.raises(UserError, match="no batch"):
        next(layerwise.layerwise(model, sites, [], GradientSum, True))
    with pytest.raises(UserError, match="give no loss"):
        next(layerwise.layerwise(model, sites, [{"input_ids": data[0]["input_ids"]}], GradientSum, True))


def test_layers_without_blocks_have_a_pass_each():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))
    x = [(torch.randn(6, 4),), (torch.randn(2, 4),)]
    seen = {s.path: w.total for s, w in layerwise.layerwise(model, find_sites(model, "all"), x, Moment)}
    assert torch.allclose(seen["0"], sum(a.T @ a for (a,) in x), atol=1e-5)
    h = [torch.relu(model[0](a)) for (a,) in x]
    assert torch.allclose(seen["2"], sum(a.T @ a for a in h), atol=1e-5)
