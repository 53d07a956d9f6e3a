"""Forecasts: counted parameters, affine costs, refusals with offers, and a base left as it was."""

import pytest
import torch
from models import make

import veneer
from veneer.analysis import plan, samples
from veneer.errors import UserError
from veneer.train.feed import _encoded

GIB = 2**30


def of_task(architecture, task):
    """A small model of random weights with the head of a task."""
    import transformers

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    if architecture == "vit":
        config = transformers.ViTConfig(**small, image_size=16, patch_size=8, num_labels=3)
        return transformers.ViTForImageClassification(config)
    if architecture == "t5":
        config = transformers.T5Config(
            vocab_size=40, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
        return transformers.T5ForConditionalGeneration(config)
    labels = {"classification": 3, "token-classification": 3, "regression": 1}[task]
    config = transformers.BertConfig(**small, vocab_size=40, max_position_embeddings=32, num_labels=labels)
    kind = "TokenClassification" if task.startswith("token") else "SequenceClassification"
    return getattr(transformers, f"BertFor{kind}")(config)


def test_a_forecast_counts_what_attaching_trains_and_leaves_the_model_as_it_was():
    model = make("llama").model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = plan.Planner(lambda: model).forecast(plan.Job("lora", rank=3, rows=5, length=16), room=64 * GIB)
    adapter = veneer.attach(model, "lora", rank=3)
    assert found.parameters == adapter.parameter_count()
    assert found.adapter_bytes == sum(t.numel() * t.element_size() for t in adapter.state().values())
    adapter.detach()
    assert found.probed and found.step > 0 and found.fits(64 * GIB)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_costs_lie_on_a_rising_line_through_two_probes():
    assert plan._on_line([(1.0, 2.0), (3.0, 4.0)], 8.0) == pytest.approx(2 + 7)
    assert plan._on_line([(1.0, 4.0), (3.0, 3.0)], 8.0) == 4.0
    assert plan._on_line([(1.0, 4.0)], 8.0) == 4.0


@pytest.mark.parametrize(
    "rows, size, probed", [(8, 128.0, [2, 6]), (4, 768.0, [1, 2]), (1, 64.0, [1]), (3, 64.0, [1, 3])]
)
def test_probes_hold_some_hundred_tokens_and_no_more_rows_than_the_job(rows, size, probed):
    assert plan._probed_rows("causal", rows, size) == probed


def test_a_recipe_that_converts_the_base_is_followed_by_a_fresh_one():
    loaded = []

    def load():
        loaded.append(make("llama").model)
        return loaded[-1]

    planner = plan.Planner(load)
    small = {"rows": 2, "length": 16}
    planner.forecast(plan.Job("lora+nf4", **small))
    assert planner.forecast(plan.Job("full", **small)).probed  # needs dense weights
    assert len(loaded) == 2


def test_a_job_whose_weights_alone_exceed_the_room_is_not_probed_and_gets_offers_that_fit():
    planner = plan.Planner(lambda: make("llama").model)
    wanted = planner.forecast(plan.Job("full", rows=4, length=16), room=1)
    assert not wanted.probed and not wanted.fits(1)
    offers = list(planner.alternatives(wanted, 64 * GIB))
    assert all(o.fits(64 * GIB) for o in offers)
    assert "lora rank 16" in [plan.words(o, wanted.job) for o in offers]


@pytest.mark.parametrize(
    "architecture, task",
    [("bert", "classification"), ("vit", "image-classification"), ("t5", "seq2seq"), ("bert", "token-classification")]
    + [("bert", "regression")],
)
def test_other_tasks_get_batches_of_their_own_kind(architecture, task):
    model = of_task(architecture, task)
    found = plan.Planner(lambda: model, task).forecast(plan.Job("lora", rank=2, rows=4, length=12))
    assert found.probed and found.step > 0


def test_a_batch_of_the_data_is_probed_where_there_is_data():
    items = [{"input_ids": [1] * (4 + i % 3), "labels": [1] * (4 + i % 3)} for i in range(20)]
    data = _encoded(items, "causal")
    source = samples.of_data(data, 4)
    assert source.usual == pytest.approx(data.tokens / 5) and source.largest <= 24
    assert [len(b["input_ids"]) for b in source.make(3, 2)] == [3, 3]


@pytest.mark.parametrize("text, size", [("2GiB", 2 * GIB), ("1500M", 1500 * 2**20), ("12kb", 12 * 1024), ("77", 77)])
def test_sizes_are_read_as_people_write_them(text, size):
    assert plan.parsed_bytes(text) == size


def test_other_sizes_are_refused():
    with pytest.raises(UserError, match="2GiB"):
        plan.parsed_bytes("lots")
