"""What one run does: its losses against a hand-written loop, its normalisation, its hooks, its ends."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from small_runs import collated, encoded, llama

import veneer
from veneer.core.hook import Schedule
from veneer.train.loop import fit
from veneer.train.steps import unlabelled


def by_hand(model, adapter, batches, accumulate, steps, lr, clip):
    """The same run in plain torch: cross entropy summed over the labels of the accumulated batch over their number."""
    params = adapter.parameters()
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.0)
    schedule, losses = Schedule(steps, lr, round(0.03 * steps), "linear"), []
    model.train()
    for step in range(steps):
        group = batches[step * accumulate : (step + 1) * accumulate]
        count = sum((b["labels"][:, 1:] != -100).sum() for b in group)
        total = 0.0
        for b in group:
            logits = model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), b["labels"][:, 1:].flatten(), reduction="sum") / count
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(params, clip)
        for g in optimizer.param_groups:
            g["lr"] = lr * schedule.factor(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def test_losses_are_those_of_a_plain_loop_normalised_over_tokens():
    batches = collated(encoded(48), 4)
    model = llama()
    adapter = veneer.attach(model, "lora", rank=4)
    run = fit(adapter, batches, accumulate=3, lr=1e-2, clip=0.5, precision="fp32", display=False)
    model = llama()
    wanted = by_hand(model, veneer.attach(model, "lora", rank=4), batches, 3, 4, 1e-2, 0.5)
    assert run.losses == pytest.approx(wanted, rel=1e-5)


def test_accumulation_equals_one_large_batch():
    rows = encoded(48)
    large = fit(veneer.attach(llama(), "lora", rank=4), collated(rows, 8), lr=1e-2, precision="fp32", display=False)
    small = fit(
        veneer.attach(llama(), "lora", rank=4),
        collated(rows, 2),
        accumulate=4,
        lr=1e-2,
        precision="fp32",
        display=False,
    )
    assert small.losses == pytest.approx(large.losses, rel=1e-5)


def test_the_same_call_gives_the_same_adapter_bit_for_bit(rows, quick):
    def trained():
        adapter = veneer.attach(llama(attention_dropout=0.1), "lora", rank=4, dropout=0.1)
        fit(adapter, rows, **quick)
        return adapter.vector()

    assert torch.equal(trained(), trained())


def test_the_global_generators_and_the_model_are_left_as_they_were(adapter, rows, quick):
    torch.manual_seed(5)
    before, modes = torch.get_rng_state(), [m.training for m in adapter.model.modules()]
    fit(adapter, rows, **quick)
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in adapter.model.modules()] == modes


def test_hooks_are_called_in_the_order_of_the_contract(adapter, rows, quick):
    from veneer.core.hook import Hook

    seen = []

    class Spy(Hook):
        name = "spy"

        def on_start(self, adapter, schedule):
            assert adapter.optimizer is not None
            seen.append(("on_start", schedule.steps))

        def before_step(self, step):
            seen.append(("before_step", step))

        def loss(self, outputs, batch, run):
            assert outputs.logits.shape[:2] == batch["labels"].shape
            seen.append("loss")

        def after_backward(self, step):
            assert all(p.grad is not None for p in self.adapter.parameters())
            seen.append("after_backward")

        def before_optimizer(self, step):
            norm = torch.stack([p.grad.norm() for p in self.adapter.parameters()]).norm()
            assert norm <= 1e-3 * (1 + 1e-4)
            self.before = self.adapter.vector()
            seen.append("before_optimizer")

        def after_step(self, step):
            assert not torch.equal(self.before, self.adapter.vector())
            assert any(p.grad is not None for p in self.adapter.parameters())
            seen.append("after_step")

        def on_epoch(self, epoch):
            seen.append(("on_epoch", epoch))

        def on_phase_end(self, phase):
            seen.append("on_phase_end")

        def on_end(self):
            seen.append("on_end")

    spy = Spy()
    spy.adapter = adapter
    adapter.hooks.append(spy)
    fit(adapter, rows[:8], accumulate=2, clip=1e-3, **quick | {"steps": 2, "batch_size": 4})
    step = ["loss", "loss", "after_backward", "before_optimizer", "after_step"]
    assert seen == [
        ("on_start", 2),
        ("before_step", 0),
        *step,
        ("on_epoch", 0),
        ("before_step", 1),
        *step,
        ("on_epoch", 1),
        "on_phase_end",
        "on_end",
    ]


def test_micro_step_replaces_forward_and_backward_with_the_same_result(rows, quick):
    from veneer.core.hook import Hook

    class Twice(Hook):
        name = "twice"

        def micro_step(self, run, batch):
            run.backward(0.5 * run.loss(batch))
            loss = run.loss(batch)
            run.backward(0.5 * loss)
            return loss

    plain = fit(veneer.attach(llama(), "lora", rank=4), rows, accumulate=2, **quick)
    adapter = veneer.attach(llama(), "lora", rank=4)
    adapter.hooks.append(Twice())
    assert fit(adapter, rows, accumulate=2, **quick).losses == pytest.approx(plain.losses, rel=1e-5)


def test_run_off_is_the_base_and_run_with_a_state_is_that_state(adapter, rows, quick):
    from veneer.core.hook import Hook

    batch = collated(rows, 4)[0]
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        base = adapter.model.train()(**inputs).logits
    start = {k: v.clone() for k, v in adapter.state().items()}
    found = {}

    class Look(Hook):
        name = "look"

        def after_step(self, step):
            loop = self.run
            found["on"], found["off"] = loop(batch).logits, loop(batch, adapter="off").logits
            found["start"] = loop(batch, adapter=start).logits

        def loss(self, outputs, batch, run):
            self.run = run

    adapter.hooks.append(Look())
    fit(adapter, rows, **quick)
    assert torch.equal(found["off"], base)
    assert torch.equal(found["start"], base)
    assert not torch.allclose(found["on"], base)


def test_a_run_learns_and_its_folder_holds_what_it_should(tmp_path, adapter, rows, quick):
    run = fit(adapter, rows, tmp_path / "run", eval_data=encoded(8, 2), **quick | {"steps": 30})
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"adapter", "run.json", "run.jsonl", "curves.png"} <= names
    assert any(n.startswith("checkpoint-") for n in names)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["held_out"]["after"] < record["held_out"]["before"]
    assert record["finished"] and record["steps"] == 30 and record["tokens_per_second"] > 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "run.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == run.losses
    assert run.adapter_path == tmp_path / "run" / "adapter"
    again = veneer.load(llama(), run.adapter_path)
    assert torch.equal(again.vector(), adapter.vector())


def test_early_stopping_keeps_the_best_adapter(rows, quick):
    adapter = veneer.attach(llama(), "lora", rank=4)
    run = fit(
        adapter, rows, eval_data=encoded(8, 2), eval_every=2, early_stopping=2, **quick | {"steps": 200, "lr": 0.5}
    )
    assert len(run.losses) < 200
    assert run.record["stopped_early"]
    measured = [loss for step, loss in run.held_out[1:]]
    assert run.record["held_out"]["after"] == pytest.approx(min(measured), rel=1e-6)


def test_gradient_checkpointing_changes_memory_and_not_the_losses(rows, quick):
    plain = fit(veneer.attach(llama(), "lora", rank=4), rows, **quick)
    adapter = veneer.attach(llama(), "lora", rank=4)
    assert fit(adapter, rows, checkpointing=True, **quick).losses == pytest.approx(plain.losses, rel=1e-6)
    assert not adapter.model.is_activation_checkpointing


def test_any_model_trains_with_its_own_loss():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
    x = torch.randn(64, 6)
    batches = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8, shuffle=True
    )
    adapter = veneer.attach(net, "lora", rank=4, sites=["0", "2"])
    run = fit(adapter, batches, loss=lambda model, b: F.mse_loss(model(b[0]), b[1]), epochs=10, lr=3e-2, display=False)
    assert len(run.losses) == 80
    assert sum(run.losses[-8:]) < 0.2 * sum(run.losses[:8])


def test_an_auxiliary_loss_of_the_forward_pass_is_added(adapter, rows, quick):
    from veneer.core.context import current

    layer = adapter.model.model.layers[0]
    layer.register_forward_pre_hook(lambda module, args: current().add_loss("test", torch.tensor(2.0)))
    plain = fit(veneer.attach(llama(), "lora", rank=4), rows, **quick)
    run = fit(adapter, rows, **quick)
    assert [a - b for a, b in zip(run.losses, plain.losses)] == pytest.approx([2.0] * 12, rel=1e-4)


@pytest.mark.parametrize(
    "given, said",
    [
        ({"epoch": 2}, "no field 'epoch'; did you mean \"epochs\"?"),
        ({"steps": 3, "epochs": 1}, "give one of them"),
        ({"warmup": 500}, "longer than the run"),
        ({"early_stopping": 2}, "give eval_data"),
        ({"resume": True}, "without out"),
        ({"log": "tensorboard"}, "give out"),
    ],
)
def test_wrong_arguments_are_one_sentence_before_any_work(adapter, rows, given, said):
    with pytest.raises(veneer.UserError, match=said.replace("?", r"\?")):
        fit(adapter, rows, display=False, **given)


def test_data_without_a_length_needs_steps(adapter):
    endless = (b for b in collated(encoded(48), 4))
    with pytest.raises(veneer.UserError, match="give steps="):
        fit(adapter, endless, display=False, precision="fp32")


def test_a_folded_adapter_is_refused(adapter, rows):
    adapter.fold()
    with pytest.raises(veneer.UserError, match="unfold"):
        fit(adapter, rows, display=False)


def test_another_adapter_on_the_model_stays_as_it_is(adapter, rows, quick):
    other = veneer.attach(adapter.model, "lora", rank=2, name="other")
    before = adapter.vector()
    fit(other, rows, **quick)
    assert torch.equal(adapter.vector(), before)
    assert all(p.grad is None and p.requires_grad for p in adapter.parameters())


def test_training_goes_on_from_where_an_adapter_stands(adapter, rows, quick):
    first = fit(adapter, rows, **quick | {"steps": 30})
    second = fit(adapter, rows, **quick | {"steps": 30})
    assert second.losses[0] < first.losses[0] - 0.1  # the same batch first, after thirty steps


def test_tensorboard_gets_what_the_log_gets(tmp_path, adapter, rows, quick):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = fit(adapter, rows, tmp_path / "run", log="tensorboard", **quick | {"steps": 3})
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(run.losses)


def test_plain_lines_say_what_matters(capsys, adapter, rows, quick):
    fit(adapter, rows, eval_data=encoded(8, 2), **quick | {"display": None})
    said = capsys.readouterr().out
    for words in ("recipe: lora(rank=4)", "step 12/12", "tokens/s", "held-out loss", "12 steps in"):
        assert words in said


def test_steps_beyond_one_epoch_go_on_with_the_next(adapter, rows, quick):
    run = fit(adapter, rows[:8], **quick)
    assert len(run.losses) == 12 and run.record["epochs"] == 6


def test_the_rate_follows_the_schedule(tmp_path, adapter, rows, quick):
    fit(adapter, rows, tmp_path / "run", schedule="cosine", warmup=4, **quick)
    lines = [json.loads(line) for line in (tmp_path / "run" / "run.jsonl").read_text().splitlines()]
    wanted = [min((t + 1) / 5, 0.5 * (1 + math.cos(math.pi * (t - 4) / 8)) if t >= 4 else 2) * 1e-2 for t in range(12)]
    assert [line["lr"] for line in lines] == pytest.approx(wanted)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_loss_that_is_not_finite_stops_with_step_batch_and_site(tmp_path, rows, quick, where):
    adapter = veneer.attach(llama(), "lora", rank=4)
    layer = adapter.model.model.layers[1].mlp.up_proj
    seen, before = [], []

    def spoil(module, args, out):
        seen.append(1)
        if len(seen) <= 5 * 2:  # five steps of two micro-batches are sound
            before.append(adapter.vector())
            return out
        if where == "forward":
            return out * float("nan")
        out.register_hook(lambda g: g * float("inf"))
        return out

    layer.register_forward_hook(spoil)
    with pytest.raises(veneer.UserError) as error:
        fit(adapter, rows, tmp_path / "run", accumulate=2, **quick)
    said = str(error.value)
    assert "step 6: the" in said and "data[" in said
    kind = "output of" if where == "forward" else "gradient at the output of"
    assert f"{kind} model.layers.1.mlp.up_proj is the first" in said
    kept = veneer.load(llama(), tmp_path / "run" / "checkpoint-5" / "adapter")
    assert torch.equal(kept.vector(), adapter.vector())
    assert not torch.equal(before[0], adapter.vector())


def test_batch_norms_keep_the_statistics_of_the_base():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
    adapter = veneer.attach(model, "lora", rank=2)
    before = {name: t.clone() for name, t in model[1].state_dict().items()}
    data = [(torch.randn(6, 4, generator=torch.Generator().manual_seed(i)), torch.ones(6, 1)) for i in range(3)]
    fit(adapter, data, loss=lambda m, b: (m(b[0]) - b[1]).square().mean(), display=False)
    assert all(torch.equal(t, before[name]) for name, t in model[1].state_dict().items())


class Asking(torch.nn.Module):
    """A model whose forward cannot do without labels."""

    def forward(self, x, labels):
        return x + labels


def test_a_forward_without_labels_has_all_that_the_model_needs():
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(
        d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=9, decoder_start_token_id=0,
    ))  # fmt: skip
    batch = {"input_ids": torch.tensor([[3, 4]]), "labels": torch.tensor([[5, -100]])}
    assert unlabelled(t5, batch)["decoder_input_ids"].tolist() == [[0, 5]]
    assert t5(**unlabelled(t5, batch)).logits.shape == (1, 2, 9)
    assert unlabelled(llama(), batch).keys() == {"input_ids"}
    assert unlabelled(Asking(), {"x": 1, "labels": 2}) == {"x": 1, "labels": 2}
