"""MAN against the numbered oracles of its sheet (144)."""

import weakref

import pytest
import torch
from breaks import goes_on_bit_for_bit, training
from small_runs import encoded, llama
from torch import nn

import veneer
from veneer.errors import UserError
from veneer.optim.man import MAN, Border
from veneer.train.steps import Runner


def on_its_way(fields="blocks=2", form="lora(rank=4)", layers=4, **settings):
    """A run that has taken two steps, its hook, and its next batch."""
    made = training(f"{form}+man({fields})", blocks=layers, lr=1e-2, **settings)
    for _ in range(2):
        made.take_step()
    return made, made.adapter.hooks[0], made._take()[0][0].batch


def passes(made, hook, batch):
    """The local losses of one micro-batch and the gradients that each leaves, by name."""
    losses, found = [], []

    def backward(loss):
        loss.backward()
        losses.append(loss.item())
        found.append({n: p.grad for n, p in made.adapter.named_parameters() if p.grad is not None})
        for p in made.adapter.parameters():
            p.grad = None

    hook.micro_step(Runner(made.adapter, made.loss, backward), batch)
    return losses, found


def layer_of(name):
    return int(name.split("layers.")[1].split(".")[0])


# -- oracles 1 and 2: whose gradient is whose


@pytest.mark.parametrize("form", ["lora(rank=4)", "full(norms=True)", "dora(rank=4)"])
def test_each_loss_moves_its_own_block_and_auxiliary_network_alone(form):
    made, hook, batch = on_its_way("blocks=2", form, layers=3)
    _, found = passes(made, hook, batch)
    inner, last = ({n for n in g if not n.startswith("hook:")} for g in found)
    assert {layer_of(n) for n in inner if "layers." in n} == {0, 1}
    assert {layer_of(n) for n in last if "layers." in n} == {2}
    assert {n for n in found[0] if n.startswith("hook:")} == {f"hook:man.{n}" for n in hook.parameters()}
    assert not any(n.startswith("hook:") for n in found[1])
    assert inner | last == {n for n, _ in made.adapter.named_parameters() if not n.startswith("hook:")}
    assert inner.isdisjoint(last) and all(g.any() for one in found for g in one.values())


def test_what_runs_before_the_layers_goes_with_the_first_block_and_the_head_with_the_last():
    tensors = ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight")
    made, hook, batch = on_its_way("blocks=2", train=tensors)
    first, last = ({n for n in g if n.startswith("train:")} for g in passes(made, hook, batch)[1])
    assert first == {"train:model.embed_tokens.weight"}
    assert last == {"train:lm_head.weight", "train:model.norm.weight"}


def test_one_block_is_end_to_end_training():
    made, hook, batch = on_its_way("blocks=1")
    (found,) = passes(made, hook, batch)[1]
    made.loss(batch).backward()
    assert all(torch.allclose(found[n], p.grad, atol=1e-7) for n, p in made.adapter.named_parameters())


def test_a_forward_that_fills_a_cache_gives_the_same_losses_and_gradients():
    made, hook, batch = on_its_way("blocks=2")
    found = []
    for keep in (False, True):
        made.loss = lambda rows, keep=keep: made.adapter.model(**rows, use_cache=keep).loss
        found.append(passes(made, hook, batch))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a[n], b[n]) for a, b in zip(found[0][1], found[1][1]) for n in a)


def test_the_first_local_loss_is_that_of_the_model_cut_after_the_next_layer():
    made = training("lora(rank=4)+man(blocks=2)", blocks=4)
    hook, batch = made.adapter.hooks[0], made._take()[0][0].batch
    losses, _ = passes(made, hook, batch)
    whole = llama(num_hidden_layers=4)
    whole.model.layers = whole.model.layers[:3]
    with torch.no_grad():
        assert losses[0] == pytest.approx(veneer.causal_loss(whole, batch).item(), rel=1e-5)
        assert losses[1] == pytest.approx(veneer.causal_loss(llama(num_hidden_layers=4), batch).item(), rel=1e-5)


@pytest.mark.parametrize("form", ["lora(rank=4)", "full"])
def test_checkpointing_gives_the_same_gradients(form):
    found = []
    for checkpointing in (False, True):
        made = training(f"{form}+man(blocks=2)", blocks=4)
        if checkpointing:
            made.adapter.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        found.append(passes(made, made.adapter.hooks[0], made._take()[0][0].batch)[1])
    for plain, again in zip(*found):
        assert plain.keys() == again.keys()
        assert all(torch.allclose(plain[n], again[n], rtol=1e-4, atol=1e-6) for n in plain)


# -- oracles 3, 4 and 6: the moving average


def test_the_distance_to_a_target_that_stands_shrinks_as_the_sheet_says():
    hook = on_its_way("blocks=2")[1]
    border = hook.borders[0]
    for n, t in border.slow.items():
        t.copy_(border.now()[n].detach() + 1)
    for step in range(100):
        hook.before_optimizer(step)
    for n, t in border.slow.items():
        assert torch.allclose(t - border.now()[n], torch.tensor(0.605770), atol=1e-4)


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_without_momentum_it_is_the_layer_before_the_step_and_with_all_of_it_stands_still(momentum):
    made, hook, _ = on_its_way(f"blocks=2, momentum={momentum}")
    border = hook.borders[0]
    now = {n: t.detach().clone() for n, t in border.now().items()}
    slow = {n: t.clone() for n, t in border.slow.items()}
    made.take_step()
    assert all(torch.equal(t, (slow if momentum else now)[n]) for n, t in border.slow.items())
    assert not all(torch.equal(t, now[n]) for n, t in border.now().items())


def test_the_slow_layer_does_not_train_and_passes_gradient_on():
    made, hook, batch = on_its_way("blocks=2, auxiliary='slow', head_rank=0")
    assert not hook.parameters() and not any(t.requires_grad for t in hook.borders[0].slow.values())
    assert all(g.any() for g in passes(made, hook, batch)[1][0].values())
    before = passes(made, hook, batch)[0]
    for t in hook.borders[0].slow.values():
        t.add_(0.3)
    after = passes(made, hook, batch)[0]
    assert after[0] != before[0] and after[1] == before[1]


# -- oracles 7 and 9: the auxiliary network's parts, and λ


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"mix": "sum"}, (2 + 3) * 5),
        ({}, (2 + 3) * 5 / 2),
        ({"auxiliary": "own"}, 3 * 5),
        ({"auxiliary": "slow"}, 2 * 5),
        ({"auxiliary": "none"}, 5),
    ],
)
def test_z_is_made_of_the_slow_layer_and_the_trained_one(fields, expected):
    u = nn.Linear(1, 1, bias=False)
    slow, own = {"weight": torch.tensor([[2.0]])}, {"weight": nn.Parameter(torch.tensor([[3.0]]))}
    border = Border(u, {"weight": (u, "weight")}, slow, own)
    own_weight, x = u.weight, torch.tensor([[5.0]])
    assert MAN(head_rank=0, **fields)._seen(border, x, lambda: u(x)).item() == pytest.approx(expected)
    border.A, border.B = nn.Parameter(torch.tensor([[1.0], [2.0]])), nn.Parameter(torch.tensor([[1.0, 0.5]]))
    assert MAN(**fields)._seen(border, x, lambda: u(x)).item() == pytest.approx(3 * expected)
    assert u.weight is own_weight


def test_weights_of_local_losses_go_from_first_to_last_and_the_heads_is_one():
    hook = MAN(blocks=4, first=0.5, last=0.1)
    assert [hook.weight(k) for k in range(4)] == pytest.approx([0.5, 0.3, 0.1, 1.0])
    assert [MAN(blocks=2, first=0.5, last=0.1).weight(k) for k in range(2)] == [0.5, 1.0]
    made, hook, batch = on_its_way("blocks=2, first=0.0")
    assert not any(g.any() for g in passes(made, hook, batch)[1][0].values())


def test_each_block_is_clipped_by_itself():
    made, hook, batch = on_its_way("blocks=2, clip=1e-3", clip=0.0)
    hook.micro_step(made.runner, batch)
    hook.after_backward(2)
    for k in range(2):
        own = [p.grad for p in made.adapter.parameters() if hook.owner[id(p)] == k]
        assert torch.cat([g.flatten() for g in own]).norm().item() == pytest.approx(1e-3, rel=1e-3)


# -- oracles 5 and 8: what is left, and what is alive


def test_the_model_does_not_see_the_auxiliary_networks_and_the_file_has_none():
    made, hook, batch = on_its_way("blocks=2")
    with torch.no_grad():
        before = made.adapter.model(**batch).logits
        for p in hook.parameters().values():
            p.normal_()
        assert torch.equal(made.adapter.model(**batch).logits, before)
    adapter = veneer.attach(llama(num_hidden_layers=4), "lora(rank=4)+man")
    run = veneer.fit(adapter, encoded(32), steps=12, batch_size=8, lr=1e-2, display=False)
    assert run.losses[-1] < run.losses[0]
    assert not any(k.startswith("hook:") for k in adapter.state())


def alive(blocks, layers=8):
    """(bytes kept at the start of each pass, their peak) of a micro-batch, the parameters left out."""
    made = training(f"lora(rank=2)+man(blocks={blocks}, head_rank=2)", blocks=layers)
    hook, batch = made.adapter.hooks[0], made._take()[0][0].batch
    own = {p.untyped_storage().data_ptr() for p in made.adapter.model.parameters()}
    now, peak, starts = {}, [0], []

    class Kept:
        def __init__(self, t):
            self.t = t

    def pack(t):
        kept, storage = Kept(t), t.untyped_storage()
        if storage.data_ptr() not in own:
            key = storage.data_ptr()
            now[key] = (now.get(key, (0, 0))[0] + 1, storage.nbytes())
            weakref.finalize(kept, gone, key)
            peak[0] = max(peak[0], sum(size for _, size in now.values()))
        return kept

    def gone(key):
        count, size = now.pop(key)
        if count > 1:
            now[key] = (count - 1, size)

    made.adapter.model.model.embed_tokens.register_forward_pre_hook(lambda *_: starts.append(len(now)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.t):
        hook.micro_step(made.runner, batch)
    return starts, peak[0]


def test_one_block_is_alive_at_a_time():
    whole, most = alive(1)
    starts, local = alive(8)
    assert whole == [0, 0] and starts == [0] * 9  # the first forward of all is the survey's
    assert local < 0.55 * most  # one layer, the next one twice, and the head, of eight and the head


# -- the loop


def test_a_broken_run_goes_on_bit_for_bit():
    assert goes_on_bit_for_bit(lambda: training("lora(rank=4, dropout=0.1)+man(blocks=2)", blocks=3, accumulate=2))


@pytest.mark.parametrize(
    "recipe, says",
    [
        ("lora+man(blocks=5)", "has 4 layers in one stack to make 5"),
        ("lora+adalora+man", "changes tensors in mid-run"),
        ("mos+man", "shares trained tensors between blocks"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_no_trace(recipe, says):
    model = llama(num_hidden_layers=4)
    with pytest.raises(UserError, match=says):
        veneer.attach(model, recipe)
    assert not veneer.adapters(model)
