"""LISA: what trains when, on a small Llama; the sheet (079) numbers the properties."""

import pytest
import torch
from breaks import goes_on_bit_for_bit, training
from small_runs import encoded, llama
from torch import nn

import veneer
from veneer.parts.drawn_blocks import drawn


def snapshot(adapter):
    """Copies of all tensors, by name."""
    return {k: v.clone() for k, v in adapter.state().items()}


def block_of(name):
    """The block's number in a tensor's name, or None."""
    return int(name.split("layers.")[1].split(".")[0]) if "layers." in name else None


def moved(before, adapter):
    """The blocks (None: outside) whose tensors differ from ``before``."""
    return {block_of(k) for k, v in adapter.state().items() if not torch.equal(v, before[k])}


def active(run):
    """The drawn blocks of a run."""
    return {block_of(n) for n, _ in run.adapter.named_parameters()} - {None}


def test_drawn_blocks_and_the_outside_move_and_the_others_stay_bit_for_bit():
    run = training("lisa(blocks=1, period=2)", blocks=3)
    start = snapshot(run.adapter)
    run.take_step()
    run.take_step()
    first = active(run)
    assert len(first) == 1 and moved(start, run.adapter) == first | {None}
    for _ in range(4):
        run.take_step()
    assert len(moved(start, run.adapter)) > 2


def test_all_blocks_and_one_draw_are_full_training():
    runs = [training("lisa(blocks=2, period=8)", blocks=2), training("full(norms=True)", blocks=2, sites="all")]
    losses = [[run.take_step() for _ in range(5)] for run in runs]
    assert losses[0] == losses[1]
    assert torch.equal(runs[0].adapter.vector(), runs[1].adapter.vector())


def test_all_blocks_and_more_draws_are_full_training_with_its_state_reset():
    run, plain = training("full+lisa(blocks=2, period=2)", blocks=2, sites="linear"), training("full", blocks=2)
    for step in range(4):
        run.take_step()
        if step % 2 == 0:
            plain.adapter.optimizer.state.clear()
        plain.take_step()
    assert torch.equal(run.adapter.vector(), plain.adapter.vector())


def test_frequencies_and_coverage_are_the_sheets_oracles_3_and_4():
    draws = [drawn(30, 2, seed=7, period=k) for k in range(3000)]
    counts = torch.bincount(torch.tensor(draws).flatten(), minlength=30)
    assert all(len(set(d)) == 2 for d in draws)
    assert ((counts - 200).abs() <= 45).all()
    for n, expected in ((6, 10.17), (50, 29.05)):
        seen = [len({b for d in draws[i : i + n] for b in d}) for i in range(0, 3000 - n, n)]
        assert sum(seen) / len(seen) == pytest.approx(expected, rel=0.05)


def test_weights_steer_the_draw():
    uniform = [drawn(5, 2, 7, k, (0.2,) * 5) for k in range(2000)]
    counts = torch.bincount(torch.tensor(uniform).flatten(), minlength=5)
    assert ((counts - 800).abs() <= 100).all()
    assert all(drawn(5, 1, 7, k, (0.0, 0.0, 1.0, 0.0, 0.0)) == [2] for k in range(20))
    with pytest.raises(veneer.UserError, match="each of the 2 blocks"):
        veneer.attach(llama(), "lisa(probs=(1.0,), blocks=1)")


def test_after_every_draw_state_and_gradients_belong_to_what_trains():
    run = training("lisa(blocks=1, period=1)", blocks=3)
    every = {n: p for d in run.adapter.deltas.values() for n, p in d.named_parameters(prefix=d.site.path)}
    for _ in range(4):
        run.take_step()
        own = {id(p) for p in run.adapter.parameters()}
        assert {id(p) for p in run.adapter.optimizer.state} <= own
        grouped = [id(p) for g in run.adapter.optimizer.param_groups for p in g["params"]]
        assert len(grouped) == len(set(grouped)) and set(grouped) == own
        assert all(p.grad is None for p in every.values() if not p.requires_grad)
        assert sum(block_of(n) is not None for n, p in every.items() if p.requires_grad) == 9


def test_entering_blocks_start_from_zero_moments():
    run = training("full+lisa(blocks=1, period=1)", blocks=2, sites="linear")
    for _ in range(5):
        run.take_step()
        steps = {float(s["step"]) for s in run.adapter.optimizer.state.values()}
        assert steps == {1.0}


def test_no_blocks_leave_the_outside_and_no_outside_the_blocks():
    run = training("lisa(blocks=0)", blocks=2)
    start = snapshot(run.adapter)
    run.take_step()
    assert moved(start, run.adapter) == {None}
    run = training("lisa(blocks=1, outside=False)", blocks=2)
    start = snapshot(run.adapter)
    run.take_step()
    assert moved(start, run.adapter) == active(run) and len(active(run)) == 1


def test_one_draw_lasts_when_the_period_is_longer_than_the_run():
    run = training("lisa(blocks=1, period=100)", blocks=3)
    seen = []
    for _ in range(5):
        run.take_step()
        seen.append(active(run))
    assert all(s == seen[0] for s in seen)


def test_gradients_of_drawn_blocks_are_those_of_full_training():
    run, plain = training("full+lisa(blocks=1)", blocks=2, sites="linear"), training("full", blocks=2)
    run.adapter.hooks[0].before_step(0)
    for r in (run, plain):
        r.task.loss(r.adapter.model, r.feed.data[0]).backward()
    wanted = dict(plain.adapter.named_parameters())
    found = dict(run.adapter.named_parameters())
    assert len(found) == 7 and all(torch.equal(p.grad, wanted[n].grad) for n, p in found.items())


def test_by_itself_it_trains_the_whole_model():
    adapter = veneer.attach(llama(), "lisa")
    assert adapter.parameter_count() == sum(p.numel() for n, p in llama().named_parameters())
    cheaper = veneer.attach(llama(), "lisa", sites="linear")
    assert not any("embed" in n or "lm_head" in n for n, _ in cheaper.named_parameters())


def test_a_tied_head_is_in_the_optimiser_once():
    model = llama(tie_word_embeddings=True)
    adapter = veneer.attach(model, "lisa")
    grouped = [n for g in adapter.optimizer_groups() for n in g["names"]]
    assert sum("embed" in n or "lm_head" in n for n in grouped) == 1


def test_without_blocks_layers_are_drawn():
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(3, 2))
    adapter = veneer.attach(model, "lisa(blocks=1, period=1)")
    adapter.optimizer = torch.optim.AdamW(adapter.optimizer_groups(), lr=1e-2)
    adapter.hooks[0].before_step(0)
    assert len({n.split(".")[0] for n, _ in adapter.named_parameters()}) == 1


def test_rates_rise_within_a_period():
    hook = veneer.attach(llama(), "lisa(period=5, warmup=3)").hooks[0]
    assert [hook.rate({}, step) for step in range(4, 9)] == [1.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("before", [2, 3])
def test_a_broken_run_goes_on_bit_for_bit(before):
    make = lambda: training("lisa(blocks=1, period=2)", blocks=3, accumulate=2)  # noqa: E731
    assert goes_on_bit_for_bit(make, before=before)


def test_it_draws_the_matrices_of_galore_too():
    assert goes_on_bit_for_bit(lambda: training("galore(gap=2)+lisa(blocks=1, period=2)", blocks=3, rank=4))


def test_fit_learns_with_it_and_gives_every_tensor_back():
    adapter = veneer.attach(llama(), "lisa(blocks=1, period=3)")
    before, names = snapshot(adapter), [n for n, _ in adapter.named_parameters()]
    run = veneer.fit(adapter, encoded(48), steps=12, lr=5e-3, display=False)
    assert sum(run.losses[-3:]) / 3 < sum(run.losses[:3]) / 3 - 0.1
    assert [n for n, _ in adapter.named_parameters()] == names
    assert moved(before, adapter) == {None, 0, 1}
