"""SHERL against the numbered oracles of its sheet (147)."""

import pytest
import torch
import transformers as tf
from models import Case, llama, make
from recipes import moved

import veneer
from veneer.errors import UserError
from veneer.models import architecture
from veneer.sides.sherl import SHERL, aggregate

FORMS = ("norm", "gated")
KINDS = ("llama", "gpt2", "bert", "vit")


def beside(kind: str = "llama", fields: str = "", dtype: torch.dtype = torch.float32) -> tuple[Case, SHERL]:
    """A model, its adapter moved off its start."""
    case = make(kind, dtype)
    adapter = veneer.attach(case.model, f"sherl(reduction=4{fields})")
    moved(adapter, 0.05)
    return case, next(iter(adapter.deltas.values()))


# -- oracles 2, 3, 4, 5, 9 and 10: the aggregation


def test_the_numbers_of_oracle_2():
    f = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    z = aggregate(f[:, None], torch.ones(2), torch.zeros(()))
    assert torch.allclose(z, torch.tensor([[1.5, 1.5]]), atol=1e-5)


def test_copies_of_a_state_share_one_vote_and_order_does_not_count():
    f = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 3.0], [1.0, 1.0, 1.0]])
    w, beta = torch.tensor([0.3, 0.2, 0.5]), torch.tensor(0.1)
    z = aggregate(f, w, beta)
    assert torch.allclose(aggregate(f[[0, 0, 0, 1, 2]], w, beta), z, atol=1e-5)
    assert torch.allclose(aggregate(f[[1, 0, 2]], w, beta), z, atol=1e-6)


def test_without_a_score_above_zero_the_guide_is_left_and_one_state_has_all_the_weight():
    f = torch.rand(3, 4, 5)
    assert torch.equal(aggregate(f, torch.zeros(5), torch.tensor(-1.0)), f[-1])
    assert torch.allclose(aggregate(f[1:], torch.ones(5), torch.zeros(())), f[1] + f[2], atol=1e-4)


def test_tokens_are_independent():
    f, w, beta = torch.randn(3, 2, 4, 5), torch.randn(5), torch.tensor(0.1)
    assert torch.allclose(aggregate(f, w, beta)[1, 2], aggregate(f[:, 1, 2], w, beta), atol=1e-6)


# -- oracles 1, 6 and 7: where gradient goes, the gate, the start


@pytest.mark.parametrize("form", FORMS)
def test_gradient_goes_through_the_late_block_and_no_earlier_one(form):
    torch.manual_seed(0)
    model, ids = llama(num_hidden_layers=3).eval(), make("llama").batch["input_ids"]
    adapter = veneer.attach(model, f"sherl(reduction=4, reducer='{form}')")
    moved(adapter, 0.05)
    seen = set()
    for name, m in architecture.named_modules(model):
        if name.startswith("model."):
            m.register_full_backward_hook(lambda *_, name=name: seen.add(name))
    model(ids, labels=ids).loss.backward()
    late = {n for n, _ in architecture.named_modules(model) if n.startswith("model.layers.2")}
    assert seen == late | {"model.norm"}
    own = {id(p) for p in adapter.parameters()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in own)
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_of_the_early_block_nothing_is_kept_but_the_states(kind, form):
    case, delta = beside(kind, f", reducer='{form}'")
    module, kept, at, given = delta.site.module, [], [], []
    early, late = (b for _, b in architecture.blocks(module))
    own = delta.entry
    delta.entry = lambda states: (at.append(len(kept)), given.extend(states), own(states), at.append(len(kept)))[2]
    early.register_forward_hook(lambda *_: at.append(len(kept)))
    late.register_forward_hook(lambda *_: at.append(len(kept)))
    parameters = {p.data_ptr() for p in case.model.parameters()}
    case.model.train()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(**{k: v for k, v in case.batch.items() if k != "labels"})
    assert at[0] == at[1] == 0 < at[2] < at[3]  # after the early block, around the entry, after the late block
    read, entry = {s.data_ptr() for s in given}, kept[: at[2]]
    wide = [t for t in entry if t.ndim and t.shape[-1] == 32 and t.data_ptr() not in parameters]
    assert len(read) == len(given) == 2 and {t.data_ptr() for t in wide} >= read
    assert len([t for t in wide if t.data_ptr() not in read]) == (1 if form == "norm" else 0)  # what Out's norm reads


def bytes_kept(recipe: str) -> int:
    """Bytes kept for backward of a small BERT with the proportions of MiniLM."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 6, "num_attention_heads": 12}
    model = tf.BertForSequenceClassification(tf.BertConfig(vocab_size=61, attn_implementation="eager", **sizes))
    veneer.attach(model.train(), recipe)
    own = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    found = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.data_ptr() not in own:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(torch.randint(61, (4, 64)), labels=torch.tensor([0, 1, 0, 1])).loss
    loss.backward()
    return sum(found.values())


@pytest.mark.parametrize("form", FORMS)
def test_it_keeps_a_third_of_what_lora_keeps_and_more_with_more_late_blocks(form):
    lora = bytes_kept("lora(rank=1)")
    one, five = (bytes_kept(f"sherl(reducer='{form}', late={late})") for late in (1, 5))
    assert one <= 0.35 * lora < 0.7 * lora < five


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_it_starts_at_the_base_and_the_gate_has_slope_ten(kind, form):
    case = make(kind)
    base = case.run()
    adapter = veneer.attach(case.model, f"sherl(reducer='{form}')")
    (delta,) = adapter.deltas.values()
    assert torch.equal(case.run(), base)
    assert len({p.requires_grad for p in delta.parameters()}) == 1
    h = [torch.rand(1, 1, 32) for _ in range(2)]
    delta.entry(h).sum().backward()
    assert delta.gamma.grad.item() == pytest.approx(10 * h[-1].sum().item(), rel=1e-5)


def test_the_papers_gate_is_closed_at_the_start_and_opens_to_the_state():
    _, delta = beside(fields=", start='paper'")
    h = [torch.rand(1, 2, 32) for _ in range(2)]
    with torch.no_grad():
        delta.gamma.zero_()
        shut = delta.entry(h)
        delta.gamma.fill_(5.0)
        assert torch.allclose(delta.entry(h), shut + h[-1], atol=1e-6) and not torch.allclose(shut, h[-1], atol=0.1)


@pytest.mark.parametrize("form, count", [("norm", 517_826), ("gated", 962_498)])
def test_sizes_are_those_of_the_sheet(form, count):
    model = llama(hidden_size=384, num_hidden_layers=6)
    (delta,) = veneer.attach(model, f"sherl(reducer='{form}')").deltas.values()
    norms = 0 if form == "gated" else 6 * 2 * 192 + 2 * 384
    assert delta.parameter_count() == sum(p.numel() for p in delta.parameters()) == count + norms


# -- running


@pytest.mark.parametrize("late", [1, 2])
def test_the_output_is_the_late_blocks_on_the_entry(late):
    model = llama(num_hidden_layers=3).eval()
    ids = make("llama").batch["input_ids"]
    with torch.no_grad():
        h = model.model(ids, output_hidden_states=True, use_cache=False).hidden_states
    adapter = veneer.attach(model, f"sherl(late={late})")
    moved(adapter, 0.05)
    (delta,) = adapter.deltas.values()
    n = 4 - late
    with torch.no_grad():
        x = delta.entry(list(h[:n]))
        angles = model.model.rotary_emb(x, torch.arange(ids.shape[1])[None])
        for block in model.model.layers[n - 1 :]:
            x = block(x, position_embeddings=angles)
        got = model.model(ids).last_hidden_state
    assert torch.allclose(got, model.model.norm(x), atol=1e-5) and not torch.allclose(got, h[-1], atol=1e-2)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_decoding_with_a_cache_equals_decoding_without(kind):
    case, _ = beside(kind)
    ids = case.batch["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    cached = case.model.generate(ids, **settings)
    assert torch.equal(cached, case.model.generate(ids, use_cache=False, **settings))


def test_checkpointing_gives_the_same_gradients_and_leaves_the_blocks_as_they_were():
    grads = []
    for checkpointing in (False, True):
        case, delta = beside()
        case.model.train()
        if checkpointing:
            case.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        case.loss().backward()
        grads.append([p.grad for p in delta.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    assert all(b.gradient_checkpointing for b in case.model.model.layers)


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


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_half_precision_trunk_has_a_side_of_fp32_tensors(kind):
    case, delta = beside(kind, dtype=torch.bfloat16)
    half = case.run().float()
    assert all(p.dtype == torch.float32 for p in delta.parameters())
    whole, other = beside(kind)
    whole.model.load_state_dict(case.model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(delta.parameters(), other.parameters()))
    assert (half - whole.run()).abs().max() < 0.03 * whole.run().abs().max()


def test_an_adapter_attached_before_learns_nothing_in_the_early_blocks():
    case = make("llama")
    first = veneer.attach(case.model, "lora", name="first")
    moved(first, 0.3)
    moved(veneer.attach(case.model, "sherl"), 0.05)
    case.loss().backward()
    assert all(p.grad is None for n, p in first.named_parameters() if "layers.0." in n)


@pytest.mark.parametrize(
    "kind, recipe, says",
    [
        ("llama", "sherl(late=2)", "leaves none of the 2 blocks"),
        ("t5", "sherl", "encoder–decoders are not supported"),
        ("llama", "lora+sherl", "lora inside them would not learn"),
        ("llama", "mosa+sherl", "mosa inside them would not learn"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_no_trace(kind, recipe, says):
    case = make(kind)
    before = case.run()
    with pytest.raises(UserError, match=says):
        veneer.attach(case.model, recipe)
    assert torch.equal(case.run(), before) and not veneer.adapters(case.model)
