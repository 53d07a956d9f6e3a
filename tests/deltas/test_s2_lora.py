"""S2-LoRA against its sheet's oracles (107)."""

import pytest
import torch
import transformers as tf
from single import put, stirred
from torch import nn

import veneer
from veneer.deltas.s2_lora import normalise, prox
from veneer.errors import UserError


class Stack(nn.Module):
    def __init__(self, layers=3, width=6, wide=None):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))
        self.head = nn.Linear(width, wide or width, bias=False)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x)


def stack(recipe="s2-lora", rank=2, stir=True, **options):
    model = Stack(**options)
    adapter = veneer.attach(model, recipe, rank=rank, sites="all")
    if stir:
        stirred(adapter)
    return model, adapter, list(adapter.deltas.values())


def test_the_sheets_closed_form():
    _, adapter, (first, second, *_) = stack(width=2)
    with torch.no_grad():
        adapter.shared.A["2x2"].copy_(torch.eye(2)), adapter.shared.B["2x2"].copy_(torch.eye(2))
    put(first, c=[2.0, 0.0]), put(second, c=[0.0, 3.0])
    assert first.weight().tolist() == [[2, 0], [0, 0]]
    assert second.weight().tolist() == [[0, 0], [0, 3]]


@pytest.mark.parametrize("start", ["lora", "adalora"])
def test_both_starts_are_the_base_and_have_a_gradient(start):
    model, adapter, _ = stack(f"s2-lora(start='{start}')", stir=False)
    x = torch.randn(4, 6)
    with adapter.disabled():
        y = model(x)
    assert torch.equal(model(x), y)
    model(x).square().sum().backward()
    assert sum(p.grad.abs().sum() for p in adapter.parameters()) > 0


def test_the_factors_are_one_object_counted_and_saved_once():
    _, adapter, deltas = stack(wide=9)
    assert set(adapter.shared.A) == {"6x6", "9x6"}
    assert adapter.parameter_count() == 2 * (6 + 6) + 2 * (6 + 9) + 4 * 2
    assert sum(k.endswith("6x6") for k in adapter.state()) == 2
    before = [d.weight() for d in deltas]
    with torch.no_grad():
        adapter.shared.A["6x6"].mul_(2)
    assert all(torch.allclose(d.weight(), 2 * W) for d, W in zip(deltas[:3], before))


def test_the_papers_share_of_whispers_parameters():
    model = nn.ModuleList(nn.Linear(768, 768, bias=False) for _ in range(3))
    adapter = veneer.attach(model, "s2-lora", sites="all")
    assert adapter.parameter_count() == 32 * 2 * 768 + 3 * 32
    assert 32 * 2 * 768 + 192 * 32 == 55_296  # with all 192 matrices of Whisper-small


def test_gradients_are_the_sums_over_all_uses():
    model, adapter, deltas = stack("s2-lora(alpha=6.0)", rank=3)
    A, B = adapter.shared.A["6x6"], adapter.shared.B["6x6"]
    dense = [(d.site.weight() + d.weight()).detach().requires_grad_() for d in deltas]
    x = torch.randn(5, 6)
    h = x
    for W in dense[:-1]:
        h = (h @ W.T).tanh()
    G = torch.autograd.grad((h @ dense[-1].T).square().sum(), dense)
    model(x).square().sum().backward()
    wanted = sum(2.0 * d.c.diag() @ B.T @ g for d, g in zip(deltas, G))
    assert torch.allclose(A.grad, wanted, rtol=1e-4, atol=1e-4)
    for d, g in zip(deltas, G):
        assert torch.allclose(d.c.grad, 2.0 * (B.T @ g @ A.T).diagonal(), rtol=1e-4, atol=1e-4)


def test_all_changes_lie_in_one_space_of_r_dimensions():
    _, _, deltas = stack(width=12, rank=3)
    put(deltas[0], c=[1.0, 0.0, 0.0])
    assert torch.linalg.matrix_rank(deltas[0].weight()) == 1
    assert torch.linalg.matrix_rank(torch.cat([d.weight() for d in deltas], 1)) == 3
    assert torch.linalg.matrix_rank(torch.cat([d.weight() for d in deltas])) == 3


def test_the_proximal_step_is_the_sheets():
    assert torch.allclose(prox(torch.tensor([0.5, -0.01, 0.002]), 0.005), torch.tensor([0.495, -0.005, 0.0]))
    assert not prox(torch.tensor([3.0, -2.0]), 9.0).any()


def test_lengths_move_into_c_without_a_change_of_the_weights():
    _, adapter, deltas = stack(wide=9)
    before = [d.weight() for d in deltas]
    normalise(deltas)
    for A, B in zip(adapter.shared.A.values(), adapter.shared.B.values()):
        assert torch.allclose(A.norm(dim=1), torch.ones(2)) and torch.allclose(B.norm(dim=0), torch.ones(2))
    assert all(torch.allclose(d.weight(), W, atol=1e-6) for d, W in zip(deltas, before))


def test_what_shares():
    _, adapter, deltas = stack("s2-lora(share='slice')", wide=9)
    assert adapter.shared.A["all"].shape == (2, 6) and adapter.shared.B["all"].shape == (9, 2)
    assert torch.allclose(deltas[0].weight(), adapter.shared.B["all"][:6] * deltas[0].c @ adapter.shared.A["all"])
    config = tf.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=61
    )
    model = tf.LlamaForCausalLM(config)
    assert len(veneer.attach(model, "s2-lora(share='type')", rank=2, name="t").shared.A) == 7
    assert len(veneer.attach(model, "s2-lora", rank=2, name="s").shared.A) == 3


def batches(count=20):
    return [{"x": torch.randn(8, 6, generator=torch.Generator().manual_seed(i))} for i in range(count)]


def mean_square(model, batch):
    return (model(batch["x"]) - batch["x"].flip(-1)).square().mean()


def fit(adapter, **settings):
    plain = {"loss": mean_square, "steps": 40, "lr": 1e-2, "display": False, "precision": "fp32"}
    return veneer.fit(adapter, batches(), **(plain | settings))


def test_the_penalty_is_in_the_loss_and_c_has_a_rate_of_its_own():
    _, adapter, _ = stack("s2-lora(penalty=0.5)", stir=False)
    _, bare, _ = stack("s2-lora(penalty=0)", stir=False)
    bare.model.load_state_dict(adapter.model.state_dict())
    with_penalty, without = fit(adapter, steps=1), fit(bare, steps=1)
    assert with_penalty.losses[0] == pytest.approx(without.losses[0] + 0.5 * 4 * 2, rel=1e-5)
    coefficients, factors = adapter.optimizer_groups()
    assert coefficients["rate"] == 10 and coefficients["weight_decay"] == 0 and len(coefficients["params"]) == 4
    assert len(factors["params"]) == 2


def test_shrinking_prunes_and_what_is_left_trains_on():
    _, adapter, deltas = stack("s2-lora(penalty=0, shrink=2.5, refit=0.25)", rank=6, stir=False)
    hook, seen = adapter.hooks[0], []
    step = hook.after_step
    hook.after_step = lambda k: (step(k), seen.append(torch.stack([d.c.detach().clone() for d in deltas])))
    fit(adapter)
    start, end = seen[hook.until - 1], seen[-1]
    assert 0 < sum(hook.counts()) < 24
    assert torch.equal(start != 0, end != 0) and not torch.equal(start, end)
    for d in deltas:
        form = d.as_lora(d.site.weight(), None)
        assert len(form.A) == max(1, int(d.c.count_nonzero()))
        assert torch.allclose(form.scale * form.B @ form.A, d.weight(), atol=1e-6)


def test_a_run_that_was_broken_off_while_refitting_ends_the_same(tmp_path):
    calls = []

    def breaking(model, batch):
        calls.append(batch)
        if len(calls) == 35:
            raise KeyboardInterrupt
        return mean_square(model, batch)

    def run(folder, **settings):
        torch.manual_seed(0)
        _, adapter, _ = stack("s2-lora(penalty=0, shrink=2.5, refit=0.25)", rank=6, stir=False)
        fit(adapter, out=tmp_path / folder, save_every=4, **settings)
        return adapter.state()

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("broken", loss=breaking)
    again = run("broken", resume=True)
    assert 0 < sum(int(v.count_nonzero()) for k, v in whole.items() if k.endswith(".c")) < 24
    assert all(torch.equal(whole[k], again[k]) for k in whole)


def test_a_penalty_without_end_leaves_the_base():
    model, adapter, _ = stack("s2-lora(shrink=1e6, refit=0.0)", stir=False)
    with pytest.warns(UserWarning, match="every coefficient is zero"):
        fit(adapter)
    x = torch.randn(4, 6)
    with adapter.disabled():
        y = model(x)
    assert torch.equal(model(x), y)


def test_the_ranks_part_wants_this_form():
    with pytest.raises(UserError, match="which lora does not have"):
        veneer.attach(Stack(), "lora+s2-lora-ranks", sites="all")
