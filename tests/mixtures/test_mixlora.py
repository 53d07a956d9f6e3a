"""MixLoRA against the oracles of its sheet (087), explicit sums over folded experts, and Mixtral's own loss."""

import copy

import pytest
import torch
from models import Case, make
from recipes import moved
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import veneer
from veneer.core.context import Context, using
from veneer.core.delta import Delta
from veneer.errors import UserError
from veneer.mixtures.mixlora import balance_loss

TOKENS = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(3)).index_fill(2, torch.tensor(31), 1.0)


def mixed(recipe: str = "mixlora(experts=4)", kind: str = "llama", move: float = 0.2, **options) -> tuple[Case, Delta]:
    """A model with the recipe on it, moved from its start, and the mixture at its first MLP."""
    case = make(kind)
    adapter = veneer.attach(case.model, recipe, **({"rank": 3, "alpha": 6.0} | options))
    moved(adapter, move)
    return case, next(d for d in adapter.deltas.values() if d.site.kind == "module")


def run(delta: Delta, x: Tensor = TOKENS) -> Tensor:
    """The MLP's output."""
    with torch.no_grad():
        return delta.site.module(x)


def frozen(delta: Delta, x: Tensor = TOKENS) -> Tensor:
    """The MLP's output without adapter."""
    with torch.no_grad():
        return delta.site.module.veneer_own(x)


def naive(delta: Delta, e: int, x: Tensor = TOKENS) -> Tensor:
    """Fₑ(x) on every token: the MLP with the expert folded into a copy of its weights."""
    mlp = copy.deepcopy(delta.site.module)
    with torch.no_grad():
        for role, site in delta.site.parts.items():
            layer = next(
                m for (_, a), (_, m) in zip(delta.site.module.named_modules(), mlp.named_modules()) if a is site.module
            )
            W = delta.expert[role][e].fold(site.weight(), site.bias())[0]
            layer.weight.copy_(W.T if site.transposed else W)
        return mlp.veneer_own(x)


def probabilities(delta: Delta, x: Tensor = TOKENS) -> Tensor:
    """softmax(xRᵀ)."""
    return (x @ delta.router.weight.T).softmax(-1).detach()


def prefer(delta: Delta, logits: list[float]) -> None:
    """Give every one of TOKENS, whose last number is 1, these logits."""
    with torch.no_grad():
        delta.router.weight.zero_()[:, -1] = torch.tensor(logits)


# -- oracles 1 to 5: what the mixture computes


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_it_starts_at_the_base_for_every_router(kind):
    _, delta = mixed(kind=kind, move=0.0)
    for seed in range(3):
        delta.router.weight.data.normal_(generator=torch.Generator().manual_seed(seed))
        assert torch.allclose(run(delta), frozen(delta), atol=1e-6)


def test_dynamic_routing_starts_at_the_kept_probability_times_the_base():
    _, delta = mixed("mixlora(experts=4, routing='dynamic', top_p=0.6)", move=0.0)
    delta.router.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    ranked = probabilities(delta).sort(-1, descending=True).values
    needed = (ranked.cumsum(-1) > 0.6).int().argmax(-1, keepdim=True)  # the one that crosses is kept
    kept = ranked.cumsum(-1).gather(-1, needed)
    assert torch.allclose(run(delta), kept * frozen(delta), atol=1e-6)
    assert not torch.allclose(run(delta), frozen(delta), atol=1e-3)


def test_one_expert_is_plain_lora_with_the_same_tensors():
    case, _ = mixed("mixlora(experts=1, top_k=1)", sites="mlp")
    fresh = make("llama")
    plain = veneer.attach(fresh.model, "lora", rank=3, alpha=6.0, sites="mlp")
    for mixture in veneer.adapters(case.model)["default"].deltas.values():
        for role, site in mixture.site.parts.items():
            plain.deltas[site.path].load_state_dict(mixture.expert[role][0].state_dict())
    assert torch.allclose(case.run(), fresh.run(), atol=1e-5)


def test_equal_experts_make_the_router_irrelevant():
    _, delta = mixed()
    for bank in delta.expert.values():
        for twin in bank[1:]:
            twin.load_state_dict(bank[0].state_dict())
    before = run(delta)
    delta.router.weight.data.normal_()
    assert torch.allclose(run(delta), before, atol=1e-6)


def test_all_experts_chosen_are_the_dense_sum():
    _, delta = mixed("mixlora(experts=4, top_k=4)")
    p = probabilities(delta)
    dense = sum(p[..., e, None] * naive(delta, e) for e in range(4))
    assert torch.allclose(run(delta), dense, atol=1e-5)


@pytest.mark.parametrize("form", ["lora", "dora", "rslora"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_sparse_dispatch_equals_the_explicit_sum(kind, form):
    _, delta = mixed(f"{form}+mixlora(experts=4)", kind=kind)
    w, chosen = probabilities(delta).topk(2, dim=-1)
    w = torch.zeros(*w.shape[:2], 4).scatter(-1, chosen, w / w.sum(-1, keepdim=True))
    explicit = sum(w[..., e, None] * naive(delta, e) for e in range(4))
    assert torch.allclose(run(delta), explicit, atol=1e-5)


def test_experts_one_by_one_equal_experts_together():
    together, _ = mixed()
    one_by_one, delta = mixed("mixlora(experts=4)+allora")  # another product: the factors are not stacked
    assert next(iter(delta.members())).product is not delta.default_product
    assert torch.allclose(together.run(), one_by_one.run(), atol=1e-5)


def test_frozen_products_that_read_x_are_made_once_a_token():
    _, delta = mixed()
    rows = {}

    def count(name: str, layer: nn.Module) -> None:
        own = layer.forward
        layer.forward = lambda x: rows.update({name: rows.get(name, 0) + len(x)}) or own(x)

    for role, site in delta.site.parts.items():
        count(role, site.module)
    run(delta)
    assert rows == {"gate": 15, "up": 15, "down": 2 * 15}


def test_only_the_selected_layers_of_an_mlp_get_experts():
    _, delta = mixed(sites=["up_proj", "q_proj"])
    assert list(delta.expert) == ["up"]
    w, chosen = probabilities(delta).topk(2, dim=-1)
    w = torch.zeros(*w.shape[:2], 4).scatter(-1, chosen, w / w.sum(-1, keepdim=True))
    assert torch.allclose(run(delta), sum(w[..., e, None] * naive(delta, e) for e in range(4)), atol=1e-5)


def test_it_lies_on_adapters_attached_before():
    case = make("llama")
    moved(veneer.attach(case.model, "lora", name="first", rank=2))
    before = case.run()
    adapter = veneer.attach(case.model, "dora+mixlora", rank=2)
    assert torch.allclose(case.run(), before, atol=1e-5)
    moved(adapter)
    with adapter.disabled():
        assert torch.equal(case.run(), before)


# -- oracles 6 to 8: the auxiliary losses


@pytest.mark.parametrize(
    "logits, expected",
    [
        ([[0.0, 0, 0, 0]] * 3, 2.0),
        ([[2.0, 0, 0, 0]] * 5, 3.2300),
        ([[2.0, 1, 0, 0], [0, 2, 1, 0], [0, 0, 2, 1], [1, 0, 0, 2]], 2.0),
    ],
)
def test_the_balance_loss_is_the_sheets_oracle_6(logits, expected):
    _, delta = mixed()
    p = torch.tensor(logits).softmax(-1)
    counts = torch.bincount(delta.route(p)[1], minlength=4).float()
    assert balance_loss(counts, p.sum(0), torch.tensor(len(p))).item() == pytest.approx(expected, abs=1e-4)


def test_the_balance_loss_of_switch_is_the_sheets_oracle_7():
    _, delta = mixed("mixlora(experts=2, routing='switch')")
    p = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.2, 0.8]])
    counts = torch.bincount(delta.route(p)[1], minlength=2).float()
    assert balance_loss(counts, p.sum(0), torch.tensor(3)).item() == pytest.approx(1.0)


def losses(case: Case) -> Context:
    """The context of one forward pass."""
    with using(Context(training=True)) as ctx:
        case.model(**case.batch)
    return ctx


def logits_of(case: Case) -> list[Tensor]:
    """The router logits (tokens, E) of every layer in one forward pass."""
    seen = []
    for d in veneer.adapters(case.model)["default"].deltas.values():
        if d.site.kind == "module":
            d.router.register_forward_hook(lambda m, a, y: seen.append(y))
    case.run()
    return seen


def test_the_pooled_loss_is_mixtrals():
    case, _ = mixed(move=1.0)
    logits = logits_of(case)
    mask = case.batch["attention_mask"]
    expected = load_balancing_loss_func(tuple(logits), 4, 2, mask)
    assert torch.allclose(torch.stack(losses(case).losses["balance"]).sum(), 0.01 * expected, atol=1e-6)


def test_the_loss_by_layer_is_the_mean_over_layers():
    case, _ = mixed("mixlora(experts=4, pooled=False, balance=1.0)", move=1.0)
    logits, mask = logits_of(case), case.batch["attention_mask"]
    expected = torch.stack([load_balancing_loss_func((x,), 4, 2, mask) for x in logits]).mean()
    assert torch.allclose(losses(case).total_loss(), expected, atol=1e-6)


def test_the_losses_of_an_encoder_and_decoder_mask_each_its_own_padding():
    case, _ = mixed("mixlora(experts=4, pooled=False)", kind="t5")
    short = torch.ones_like(case.batch["attention_mask"])
    short[0, 3:] = 0
    with using(Context(training=True)) as ctx:
        case.model(**case.batch, decoder_attention_mask=short)
    tokens = [counts.sum().item() / 2 for _, counts in ctx.stats["mixlora"]]
    assert tokens == [12, 12, 10, 10]


def test_the_gradient_of_the_balance_loss_passes_through_the_probabilities_alone():
    counts = torch.tensor([3.0, 1.0], requires_grad=True)
    mass = torch.tensor([1.5, 0.5], requires_grad=True)
    balance_loss(counts, mass, torch.tensor(2)).backward()
    assert counts.grad is None and torch.allclose(mass.grad, torch.tensor([1.5, 0.5]))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
def test_the_router_moves_without_a_language_loss_and_checkpointing_changes_nothing(pooled, checkpointing):
    case, _ = mixed(f"mixlora(experts=5, balance=1.0, pooled={pooled})", move=0.3)
    case.model.train()
    if checkpointing:
        case.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    losses(case).total_loss().backward()
    routers = [
        d.router.weight for d in veneer.adapters(case.model)["default"].deltas.values() if d.site.kind == "module"
    ]
    analytic = [w.grad for w in routers]
    case.model.eval()
    with torch.no_grad():  # finite differences in the direction of the gradient of the second router
        step = 1e-3 * analytic[1] / analytic[1].norm()
        routers[1].add_(step)
        up = losses(case).total_loss()
        routers[1].sub_(2 * step)
        down = losses(case).total_loss()
    assert all(g.norm() > 1e-2 for g in analytic)
    assert ((up - down) / 2e-3).item() == pytest.approx(analytic[1].norm().item(), rel=2e-2)


def test_without_a_weight_there_is_no_loss():
    case, _ = mixed("mixlora(experts=4, balance=0.0)")
    assert losses(case).total_loss() is None


# -- oracles 9 and 10: gradients and sizes


def test_an_expert_without_tokens_has_a_zero_gradient():
    _, delta = mixed()
    prefer(delta, [1.0, 1.0, 0.0, 0.0])
    delta.site.module(TOKENS).square().sum().backward()
    for bank in delta.expert.values():
        used, idle = bank[:2], bank[2:]
        assert all(p.grad.abs().sum() > 0 for d in used for p in d.parameters())
        assert all(torch.equal(p.grad, torch.zeros_like(p)) for d in idle for p in d.parameters())


def test_at_the_first_step_only_b_and_not_a_has_a_gradient():
    _, delta = mixed(move=0.0)
    delta.site.module(TOKENS).square().sum().backward()
    for d in delta.members():
        assert d.B.grad.abs().sum() > 0 and not d.A.grad.any()


def test_a_layer_of_smollm2_trains_as_many_numbers_as_the_sheet_says():
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(hidden_size=576, intermediate_size=1536, num_hidden_layers=1, vocab_size=8, **heads)
    model = LlamaForCausalLM(config)
    adapter = veneer.attach(model, "mixlora", rank=8)
    mixture = next(d for d in adapter.deltas.values() if d.site.kind == "module")
    assert mixture.parameter_count() == 405_504 + 4_608
    assert adapter.parameter_count() == 440_832


# -- switch


def test_switch_takes_one_expert_times_its_probability_at_inference():
    _, delta = mixed("mixlora(experts=4, routing='switch')")
    p = probabilities(delta)
    top, chosen = p.max(-1)
    expected = sum((top * (chosen == e))[..., None] * naive(delta, e) for e in range(4))
    assert torch.allclose(run(delta), expected, atol=1e-5)


def test_switch_sends_tokens_over_capacity_through_the_frozen_mlp_in_training():
    _, delta = mixed("mixlora(experts=4, routing='switch', capacity=2, jitter=0.0)")
    prefer(delta, [1.0, 0.0, 0.0, 0.0])
    delta.train()
    p = probabilities(delta)[..., :1]
    expected = p * torch.cat([naive(delta, 0)[:, :2], frozen(delta)[:, 2:]], dim=1)
    assert torch.allclose(run(delta), expected, atol=1e-5)


def test_switch_adds_the_squared_logsumexp():
    case, _ = mixed("mixlora(experts=4, routing='switch')")
    case.batch["attention_mask"].fill_(1)
    z = torch.cat(logits_of(case)).logsumexp(-1).square().mean()
    assert torch.allclose(losses(case).losses["router-z"][0], 0.001 * z, rtol=1e-5)


# -- the rest


def test_jitter_is_drawn_in_training_only():
    _, delta = mixed("mixlora(experts=4, jitter=0.5)")
    quiet = run(delta)
    delta.train()
    noisy = run(delta)
    assert not torch.allclose(noisy, quiet, atol=1e-3) and torch.equal(run(delta), noisy)


def test_the_router_stays_in_fp32():
    case, delta = mixed()
    before = delta.router.weight.clone()
    case.model.to(torch.bfloat16)
    assert torch.equal(delta.router.weight, before)
    with torch.autocast("cpu", torch.bfloat16):
        assert delta.router(TOKENS.bfloat16()).dtype == torch.float32


def test_attention_gets_the_plain_form():
    case, _ = mixed("rslora+mixlora")
    names = {p.rpartition(".")[2]: d.name for p, d in veneer.adapters(case.model)["default"].deltas.items()}
    assert names == {"mlp": "mixlora"} | dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "rslora")


def test_the_fast_loss_is_the_plain_one():
    case, _ = mixed()
    assert torch.allclose(veneer.causal_loss(case.model, case.batch), case.loss(), atol=1e-5)


def test_decoding_with_a_cache_equals_decoding_without():
    case, _ = mixed()
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ids = case.batch["input_ids"][:1]
    cached = case.model.generate(ids, **settings)
    assert torch.equal(cached, case.model.generate(ids, use_cache=False, **settings))


@pytest.mark.parametrize(
    "kind, recipe, sites, says",
    [
        ("bert", "mixlora", "linear", "BERT and BART keep"),
        ("llama", "mixlora", "attention", "none among the selected"),
        ("llama", "mixlora(experts=2, top_k=3)", "linear", "more than there are experts"),
        ("llama", "bitfit+mixlora", "linear", "bitfit does not"),
        ("llama", "full+mixlora", "linear", "frozen-base"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_no_trace(kind, recipe, sites, says):
    case = make(kind)
    before = case.run()
    with pytest.raises(UserError, match=says):
        veneer.attach(case.model, recipe, sites=sites)
    assert torch.equal(case.run(), before) and not veneer.adapters(case.model)


def test_layers_that_the_form_does_not_claim_are_left_alone():
    case = make("llama")
    adapter = veneer.attach(case.model, "mixlora+gaussian-lora", sites="all")
    assert "model.embed_tokens" not in adapter.deltas and "model.layers.0.self_attn.q_proj" in adapter.deltas
