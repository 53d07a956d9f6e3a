"""OwLore: scores, shares and what trains when; the sheet (030) numbers the properties."""

import pytest
import torch
from breaks import training
from small_runs import collated, encoded, llama

import veneer
from veneer.core.hook import Schedule
from veneer.optim.owlore import outlier_share
from veneer.parts.drawn_blocks import drawn


def calibration():
    return collated(encoded(16), 4)


def adapter_of(recipe, blocks=4, model=None, **own):
    """An adapter of the tiny Llama and its hook."""
    model = llama(num_hidden_layers=blocks) if model is None else model
    made = veneer.attach(model, recipe, calibration=calibration(), rank=4, **own)
    return made, next(h for h in made.hooks if h.name == "owlore")


def test_the_score_is_the_sheets_oracle_1():
    W, norms = torch.tensor([[1.0, 2.0], [3.0, 100.0]]), torch.tensor([1.0, 2.0])
    assert outlier_share(W, norms, 2.0) == 25.0
    assert outlier_share(7 * W, norms / 3, 2.0) == 25.0


def test_a_higher_threshold_finds_no_more_and_zero_finds_all():
    W, norms = torch.randn(20, 30) ** 3, torch.rand(30) + 0.1
    found = [outlier_share(W, norms, M) for M in (0.0, 1.0, 3.0, 9.0)]
    assert found[0] == 100.0 and found == sorted(found, reverse=True) and found[-1] < found[1]


def test_scores_are_those_of_inputs_seen_by_hand():
    model, batches = llama(num_hidden_layers=3).eval(), calibration()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers." in n}
    squares = dict.fromkeys(layers, 0.0)

    def note(name):
        def see(module, args):
            squares[name] = squares[name] + args[0][batch["attention_mask"].bool()].square().sum(0)

        return see

    handles = [m.register_forward_pre_hook(note(n)) for n, m in layers.items()]
    for batch in batches:
        with torch.no_grad():
            model(**batch)
    for h in handles:
        h.remove()
    shares = {n: outlier_share(m.weight, squares[n].sqrt(), 3.0) for n, m in layers.items()}
    _, hook = adapter_of("owlore(threshold=3.0)", model=model)
    for i in range(3):
        own = [d for n, d in shares.items() if f"layers.{i}." in n]
        assert len(own) == 7 and hook.scores[f"model.layers.{i}"] == pytest.approx(sum(own) / 7, rel=1e-4) and any(own)
    assert sum(hook.shares.values()) == pytest.approx(1.0)


def test_a_block_of_spikes_gets_the_largest_share_and_none_gets_nothing():
    model = llama(num_hidden_layers=4)
    with torch.no_grad():
        for p in model.model.layers[2].parameters():
            if p.ndim == 2:
                p[::7, ::5] *= 60
    _, hook = adapter_of("owlore", model=model)
    shares = hook.weights()
    assert max(range(4), key=shares.__getitem__) == 2 and shares[2] > 0.5
    assert min(shares) >= 1e-3 / 4 / 2
    reverse = adapter_of("owlore(mode='owl-reverse')", model=llama(num_hidden_layers=4))[1].weights()
    assert sum(reverse) == pytest.approx(1.0)


def test_the_other_modes_are_the_codes():
    assert adapter_of("owlore(mode='decrease')")[1].weights() == pytest.approx((0.4, 0.3, 0.2, 0.1))
    assert adapter_of("owlore(mode='increase')")[1].weights() == pytest.approx((0.1, 0.2, 0.3, 0.4))
    model = llama(num_hidden_layers=2)
    norms = [sum(p.norm().item() for p in b.parameters() if p.ndim == 2) for b in model.model.layers]
    expected = [n / sum(norms) for n in norms]
    assert adapter_of("owlore(mode='norm')", model=model)[1].weights() == pytest.approx(expected, rel=1e-5)


def test_draws_without_replacement_have_the_sheets_inclusion_probabilities():
    draws = [drawn(3, 2, 7, k, (0.5, 0.3, 0.2)) for k in range(3000)]
    counts = torch.bincount(torch.tensor(draws).flatten(), minlength=3) / 3000
    assert torch.allclose(counts, torch.tensor([0.839286, 0.675, 0.485714]), atol=0.03)


def started(recipe, blocks=3, lr=1e-2, **own):
    """The adapter with the optimiser that its recipe gives, and a function that takes a step."""
    made, hook = adapter_of(recipe, blocks, **own)
    groups = [g | {"lr": lr} for g in made.optimizer_groups()]
    given = [h.optimizer(groups) for h in made.hooks if h.axis == "optim"]
    made.optimizer = next((o for o in given if o is not None), None) or torch.optim.AdamW(groups, lr=lr)
    for h in made.hooks:
        h.on_start(made, Schedule(20, lr))

    def step(k):
        for h in made.hooks:
            h.before_step(k)
        made.model(**calibration()[k % 4]).loss.backward()
        made.optimizer.step()
        made.optimizer.zero_grad()

    return made, hook, step


def test_what_is_not_drawn_stays_bit_for_bit_and_state_is_bounded():
    made, _, step = started("owlore(blocks=1, period=1)")
    every = {f"{path}.{n}": p for path, d in made.every().items() for n, p in d.named_parameters()}
    for k in range(4):
        before = {n: p.detach().clone() for n, p in every.items()}
        step(k)
        moved = {n for n, p in every.items() if not torch.equal(p, before[n])}
        assert moved == {n for n, p in every.items() if p.requires_grad}
        assert len({n.split("layers.")[1][0] for n in moved if "layers." in n}) == 1
        assert any("embed" in n for n in moved) and any("lm_head" in n for n in moved)
        assert {id(p) for p in made.optimizer.state} == {id(p) for p in every.values() if p.requires_grad}
        matrices = [s for p, s in made.optimizer.state.items() if "right" in s or "left" in s]
        assert len(matrices) == 7 and all(s["step"] == 1 for s in matrices)  # a block that enters begins anew


def test_uniform_without_galore_is_lisa():
    lisa = training("lora+lisa(blocks=1, period=2)", blocks=3, rank=4)
    made, hook = adapter_of("lora+owlore(mode='uniform', blocks=1, period=2)", blocks=3)
    assert made.optimizer_groups() and hook.weights() is None
    assert str(made.recipe).count("galore") == 0
    for period in range(5):
        lisa_draw = drawn(3, 1, lisa.adapter.hooks[0].seed, period, None)
        assert drawn(len(hook.units), 1, hook.seed, period, hook.weights()) == lisa_draw


def test_without_scores_it_says_what_to_do():
    with pytest.raises(veneer.UserError, match="calibration"):
        veneer.attach(llama(), "owlore")
    _, hook = adapter_of("owlore")
    hook.shares = None
    with pytest.raises(veneer.UserError, match="attach it with calibration"):
        hook.weights()


def test_a_broken_run_draws_on_by_the_same_shares():
    _, hook = adapter_of("owlore")
    state = hook.state_dict()
    _, other = adapter_of("owlore", model=llama(num_hidden_layers=4))
    other.shares = None
    other.load_state_dict(state)
    assert other.weights() == hook.weights()


def test_fit_learns_with_it():
    made, _ = adapter_of("owlore(blocks=1, period=3)", blocks=2)
    run = veneer.fit(made, encoded(48), steps=12, lr=5e-3, display=False)
    assert sum(run.losses[-3:]) / 3 < sum(run.losses[:3]) / 3 - 0.1
