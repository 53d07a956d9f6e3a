"""Canonical examples against the oracles of their sheet (089), and runs under a budget of drift."""

import math

import pytest
import torch
from models import VOCABULARY, make
from torch import nn

import veneer
from veneer.core.hook import Schedule
from veneer.errors import UserError
from veneer.numerics.drift import last_within
from veneer.objectives.canonical import BEHAVIOURS, Behaviour, padded, surprise
from veneer.train.display import Silent

FIT = {"lr": 3e-2, "precision": "fp32", "display": False, "schedule": "constant"}


def letters(text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
    """A tokenizer: a token a letter, after a mark at the beginning."""
    return {"input_ids": [1] * add_special_tokens + [3 + ord(c) % 50 for c in text]}


class Fixed(nn.Module):
    """A language model whose next-token probabilities are always ``p``."""

    def __init__(self, p: torch.Tensor) -> None:
        super().__init__()
        self.p = p

    def forward(self, input_ids, attention_mask):
        return type("Outputs", (), {"logits": self.p.log().expand(*input_ids.shape, len(self.p))})


def background(count: int = 6) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, VOCABULARY, (count, 2, 9), generator=torch.Generator().manual_seed(2))
    return [padded([row.tolist()[: 9 - k] for k, row in enumerate(batch)]) for batch in ids]


def attached(fields: str = "", recipe: str = "canonical({})", held: bool = True):
    case = make("llama")
    adapter = veneer.attach(case.model, recipe.format(fields))
    hook = adapter.hooks[-1]
    if held:
        hook.hold(background()[:4], background()[4:])
    return case, adapter, hook


GOOD = Behaviour("good", 1.0)
EXAMPLES = [("ab", "xyz"), ("cd", "pq"), ("efg", "xxyz")]


def test_the_thresholds_of_oracle_3():
    expected = (1.609438, 2.995732, 2.995732, -6.907755, 0.405465, -2.772589)
    assert [b.threshold for b in BEHAVIOURS.values()] == pytest.approx(expected, abs=1e-6)


def test_the_scored_logits_of_a_prefix_of_four_and_a_suffix_of_two_are_those_at_three_and_four():
    (batch,) = GOOD.batches([("abc", "de")], letters)
    assert batch["suffix"][0].nonzero()[:, 0].tolist() == [4, 5]
    x = torch.randn(1, 6, VOCABULARY, requires_grad=True)
    model = lambda input_ids, attention_mask: type("Outputs", (), {"logits": x})  # noqa: E731
    surprise(model, batch, batch["suffix"])[0].sum().backward()
    assert x.grad.abs().sum(-1)[0].nonzero()[:, 0].tolist() == [3, 4]


def test_at_uniform_probability_a_token_costs_log_v_and_bad_is_minus_good():
    model = Fixed(torch.full((VOCABULARY,), 1 / VOCABULARY))
    batches = GOOD.batches(EXAMPLES, letters, 3)
    assert GOOD.loss(model, batches[0]).item() == pytest.approx(math.log(VOCABULARY), rel=1e-6)
    assert Behaviour("bad", 0.0).loss(model, batches[0]).item() == pytest.approx(-math.log(VOCABULARY), rel=1e-6)
    assert GOOD.scores(model, batches).tolist() == pytest.approx([n * math.log(VOCABULARY) for n in (3, 2, 4)])


def test_the_loss_is_a_mean_over_examples_not_tokens():
    case = make("llama")
    (together,) = GOOD.batches(EXAMPLES, letters, 3)
    alone = [GOOD.loss(case.model, b) for b in GOOD.batches(EXAMPLES, letters)]
    assert torch.allclose(GOOD.loss(case.model, together), torch.stack(alone).mean(), atol=1e-5)


def test_the_kinds_of_two_suffixes():
    model = make("llama").model
    first, second = (GOOD.batches([("ab", s)], letters)[0] for s in ("xyz", "pq"))
    (a, n), (b, m) = (surprise(model, x, x["suffix"]) for x in (first, second))
    for kind, size in (("balance", torch.abs), ("good-v-bad", lambda v: v)):
        behaviour = Behaviour(kind, 0.0)
        batches = behaviour.batches([("ab", "xyz", "pq"), ("ab", "pq", "xyz")], letters)
        assert torch.allclose(behaviour.loss(model, batches[0]), size(a / n - b / m)[0], atol=1e-5)
        assert torch.allclose(behaviour.scores(model, batches), size(torch.cat([a - b, b - a])), atol=1e-5)
    same = Behaviour("balance", 0.0).batches([("ab", "xyz", "xyz")], letters)[0]
    assert Behaviour("balance", 0.0).loss(model, same).abs() < 1e-6


@pytest.mark.parametrize("probability, failure", [(0.21, 0.0), (0.19, 1.0)])
def test_failure_at_a_fifth_is_oracle_4(probability, failure):
    p = torch.full((VOCABULARY,), (1 - probability) / (VOCABULARY - 1))
    p[letters("x", False)["input_ids"]] = probability
    capital = BEHAVIOURS["country-capital"]
    assert capital.failure(Fixed(p), capital.batches([("ab", "x")], letters)) == failure


def test_at_the_start_the_anchor_is_zero_with_no_gradient():
    _, adapter, hook = attached()
    hook.on_start(adapter, Schedule(1))
    value = hook.loss(None, None, runner(adapter))
    value.backward()
    assert value == 0 and all(p.grad is None or p.grad.abs().max() < 1e-6 for p in adapter.parameters())


def runner(adapter):
    def run(batch, adapter="on"):
        if adapter == "on":
            return own.model(**batch)
        with own.disabled():
            return own.model(**batch)

    own = adapter
    return run


def test_the_anchor_holds_the_model_and_the_base_stays_as_it_was():
    drifts, edits = [], []
    for weight in (0.0, 3.0):
        case, adapter, hook = attached(f"weight={weight}, budget=None")
        before = {n: p.clone() for n, p in case.model.named_parameters() if ".veneer." not in n}
        batches = GOOD.batches(EXAMPLES, letters, 3)
        with torch.no_grad():
            start = GOOD.loss(case.model, batches[0]).item()
        veneer.fit(adapter, batches, loss=GOOD.loss, steps=20, **FIT)
        with torch.no_grad():
            edits.append(start - GOOD.loss(case.model.eval(), batches[0]).item())
        hook.weight = 1.0
        hook.on_start(adapter, Schedule(1))
        drifts.append(sum(hook.loss(None, None, runner(adapter)).item() for _ in range(8)))
        assert all(torch.equal(p, before[n]) for n, p in case.model.named_parameters() if n in before)
    assert drifts[1] < 0.5 * drifts[0] and min(edits) > 0.5


def test_the_run_ends_with_the_last_adapter_within_the_budget():
    _, adapter, hook = attached("weight=0.0, budget=0.009")
    hook.hold(GOOD.batches([("ab", "mno"), ("cd", "uv")], letters, 2))  # what the edit makes less likely
    kept = {}

    class Watch(Silent):  # the state after every epoch, taken apart from the hook
        def step(self, values):
            kept[values["step"]] = {k: v.clone() for k, v in adapter.state().items()}

    veneer.fit(adapter, GOOD.batches(EXAMPLES, letters, 3), loss=GOOD.loss, epochs=12, **FIT | {"display": Watch()})
    losses = hook.general_losses
    assert len(losses) == 13 and 0 < hook.chosen < 12 and losses[-1] > 1.009 * losses[0]
    assert hook.chosen == last_within(losses, 0.009)
    assert all(torch.equal(v, kept[hook.chosen][k]) for k, v in adapter.state().items())
    assert hook.general_loss() == pytest.approx(losses[hook.chosen], rel=1e-6)
    with adapter.disabled():
        assert hook.general_loss() == pytest.approx(losses[0], rel=1e-6)


def test_where_nothing_is_within_the_budget_the_start_stays():
    case, adapter, hook = attached("weight=0.0, budget=1e-9")
    before = case.run()
    veneer.fit(adapter, GOOD.batches(EXAMPLES, letters, 3), loss=GOOD.loss, epochs=3, **FIT)
    assert hook.chosen == 0 or min(hook.general_losses[1:]) < hook.general_losses[0]
    assert hook.chosen or torch.equal(case.run(), before)


class Stop(Silent):
    """Ends a run after its third step."""

    def step(self, values):
        if values["step"] == 3:
            raise KeyboardInterrupt


def test_a_broken_run_goes_on_bit_for_bit(tmp_path):
    states = []
    for name, display in (("whole", False), ("broken", Stop())):
        _, adapter, hook = attached("budget=0.02")
        options = FIT | {"loss": GOOD.loss, "epochs": 6, "save_every": 1, "display": display}
        if name == "whole":
            veneer.fit(adapter, GOOD.batches(EXAMPLES, letters, 3), tmp_path / name, **options)
        else:
            with pytest.raises(KeyboardInterrupt):
                veneer.fit(adapter, GOOD.batches(EXAMPLES, letters, 3), tmp_path / name, **options)
            _, adapter, hook = attached("budget=0.02")
            options["display"] = False
            veneer.fit(adapter, GOOD.batches(EXAMPLES, letters, 3), tmp_path / name, resume=True, **options)
        states.append((hook.general_losses, hook.chosen, adapter.state()))
    assert states[0][:2] == states[1][:2] and states[0][1] > 0
    assert all(torch.equal(v, states[1][2][k]) for k, v in states[0][2].items())


def test_the_background_is_a_file_a_fifth_of_it_kept_apart(tmp_path):
    (tmp_path / "text").write_text("\n".join("abcdefghij"[k:] * 3 for k in range(10)))
    case, adapter, hook = attached(f"background='{tmp_path / 'text'}', rows=3, length=8", held=False)
    case.model.__dict__["veneer_tokenizer"] = letters
    hook.on_start(adapter, Schedule(1))
    general = torch.cat([b["input_ids"] for b in hook._general])
    held = torch.cat([b["input_ids"] for b in hook._background])
    expected = [
        [1, *letters("efghij" * 2, False)["input_ids"]][:8],
        [1, *letters("jjj", False)["input_ids"], 0, 0, 0, 0],
    ]
    assert general.tolist() == expected and held.shape == (8, 8) and expected[0] not in held.tolist()
    assert len(hook.general_losses) == 1


def test_without_a_file_it_is_pythons_own_reference():
    *_, hook = attached(held=False)
    hook.hold(*hook._read(letters))
    assert sum(len(b["input_ids"]) for b in hook._general) == 64 and len(hook._background) == 64


def test_an_odd_use_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match="without a tokenizer"):
        attached(held=False)[2]._read(None)
    for text, says in (("one\ntwo", "2 paragraphs"), (None, "cannot read the background")):
        if text is not None:
            (tmp_path / "few").write_text(text)
        hook = attached(f"background='{tmp_path / ('few' if text else 'none')}'")[2]
        with pytest.raises(UserError, match=says):
            hook._read(letters)
    with pytest.raises(UserError, match="causal language models"):
        veneer.attach(make("t5").model, "canonical", sites="linear")
    with pytest.raises(UserError, match="a prefix and 2 suffixes"):
        Behaviour("balance", 0.0).batches([("ab", "x")], letters)
    pairs = Behaviour("good-v-bad", 0.0).batches([("ab", "x", "y"), ("cd", "x", "y")], letters, 2)[0]
    with pytest.raises(UserError, match="one process"):
        Behaviour("good-v-bad", 0.0).loss(make("llama").model, {k: v[::2] for k, v in pairs.items()})


def test_it_goes_with_other_forms_and_objectives():
    case, adapter, _ = attached("weight=0.5", recipe="dora+canonical({})+pego(slices=2)", held=False)
    hook = next(h for h in adapter.hooks if h.name == "canonical")
    hook.hold(background())
    run = veneer.fit(adapter, [case.batch], steps=3, **FIT)
    assert run.losses[-1] < run.losses[0]
