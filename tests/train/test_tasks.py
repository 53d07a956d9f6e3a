"""Every task trains on a small model of its kind, and its loss is the one the task is known by."""

import pytest
import torch
import torch.nn.functional as F
from small_runs import collated, encoded, llama

import veneer
from veneer.train.evaluate import scores
from veneer.train.feed import BatchFeed, feed
from veneer.train.loop import fit
from veneer.train.processes import Processes
from veneer.train.settings import Settings
from veneer.train.tasks import Task, task_of

TEXT = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def bert(kind, labels):
    import transformers

    config = transformers.BertConfig(**TEXT, num_labels=labels, max_position_embeddings=64)
    return getattr(transformers, f"BertFor{kind}")(config)


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    config = {k: v for k, v in TEXT.items() if k != "vocab_size"}
    return ViTForImageClassification(ViTConfig(**config, image_size=16, patch_size=8, num_labels=3))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def batches(task):
    """Six batches of eight rows whose labels can be read off the first token or the image's brightness."""
    g, out = torch.Generator().manual_seed(0), []
    for _ in range(6):
        ids = torch.randint(3, 64, (8, 6), generator=g)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if task == "image-classification":
            labels = torch.randint(0, 3, (8,), generator=g)
            batch = {"pixel_values": torch.randn(8, 3, 16, 16, generator=g) * 0.1 + labels.view(-1, 1, 1, 1)}
        elif task == "classification":
            labels = ids[:, 0] // 22
        elif task == "regression":
            labels = ids[:, 0] / 64
        elif task == "token-classification":
            labels = ids // 32
            labels[:, 4:] = -100
        else:
            ids = batch["input_ids"] = 3 + (ids[:, :1] + torch.arange(6)) % 6
            labels = ids
        out.append(batch | {"labels": labels})
    return out


KINDS = {
    "causal": gpt2,
    "seq2seq": t5,
    "classification": lambda: bert("SequenceClassification", 3),
    "regression": lambda: bert("SequenceClassification", 1),
    "token-classification": lambda: bert("TokenClassification", 2),
    "image-classification": vit,
}


@pytest.mark.parametrize("task", KINDS)
def test_each_task_is_seen_from_the_model_and_learns(task):
    torch.manual_seed(0)
    model = KINDS[task]()
    assert task_of(model, None) == task
    adapter = veneer.attach(model, "lora", rank=8)
    data = batches(task)
    run = fit(adapter, data, eval_data=data, epochs=10, lr=1e-2, precision="fp32", display=False)
    assert run.record["task"] == task
    assert run.record["held_out"]["after"] < 0.9 * run.record["held_out"]["before"]
    named = {"regression": "pearson", "causal": "perplexity", "seq2seq": "perplexity"}.get(task, "accuracy")
    assert named in run.record["held_out"]["scores"]


@pytest.mark.parametrize("task", [k for k in KINDS if k != "causal"])
def test_the_loss_is_in_fp32_whatever_the_base_computes_in(task):
    torch.manual_seed(0)
    model, batch = KINDS[task]().eval(), batches(task)[0]
    exact, _ = Task(task).with_outputs(model, batch)
    assert torch.equal(exact, model(**batch).loss)
    batch = {k: v.bfloat16() if k == "pixel_values" else v for k, v in batch.items()}
    loss, outputs = Task(task).with_outputs(model.bfloat16(), batch)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=0.03)
    outputs.logits = outputs.logits.double()
    with torch.no_grad():
        logits, labels = outputs.logits, batch["labels"]
        expected = (
            F.mse_loss(logits.squeeze(-1), labels.double()) if task == "regression"
            else F.cross_entropy(logits.flatten(0, -2), labels.flatten())
        )  # fmt: skip
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_held_out_loss_is_the_mean_over_units_and_not_over_batches():
    model, rows = llama(), encoded(10)
    found = scores(model, BatchFeed(collated(rows, 3), Task("causal")), Task("causal"), Processes())
    with torch.no_grad():
        wanted, count = 0.0, 0
        for batch in collated(rows, 1):
            logits = model(input_ids=batch["input_ids"]).logits[0, :-1]
            labels = batch["labels"][0, 1:]
            wanted += F.cross_entropy(logits, labels, reduction="sum").item()
            count += int((labels != -100).sum())
    assert found["loss"] == pytest.approx(wanted / count, rel=1e-5)


def test_classifier_scores_count_only_labelled_tokens():
    torch.manual_seed(0)
    model, data = bert("TokenClassification", 2).eval(), batches("token-classification")
    found = scores(model, BatchFeed(data, Task("token-classification")), Task("token-classification"), Processes())
    with torch.no_grad():
        hits = [(model(b["input_ids"]).logits.argmax(-1) == b["labels"])[b["labels"] != -100].float() for b in data]
    assert found["accuracy"] == pytest.approx(torch.cat(hits).mean().item())


def test_greedy_answers_do_not_depend_on_the_batch():
    from veneer.train.evaluate import generate

    class Letters:
        pad_token_id = eos_token_id = 0

        def __call__(self, text):
            return {"input_ids": [ord(c) - 64 for c in text]}

        def decode(self, ids, skip_special_tokens=True):
            return "".join(chr(64 + i) for i in ids.tolist() if i)

    torch.manual_seed(0)
    model = llama()
    model.generation_config.eos_token_id = None
    prompts = ["A", "BCDEFG", "HIJ", "KLMNOPQR"]
    alone = [generate(model, Letters(), [p], 6)[0] for p in prompts]
    assert generate(model, Letters(), prompts, 6, batch_size=4) == alone
    assert all(len(text) == 6 for text in alone)


def test_rows_of_every_shape_become_a_feed():
    task, settings = Task("causal"), Settings(batch_size=4)
    assert feed(encoded(9), task, settings, lambda: None).length == 3
    assert feed(collated(encoded(9), 4), task, settings, lambda: None).length == 3
    datasets = pytest.importorskip("datasets")
    assert feed(datasets.Dataset.from_list(encoded(9)), task, settings, lambda: None).length == 3
    loader = torch.utils.data.DataLoader(encoded(9), batch_size=4, collate_fn=list)
    assert feed(loader, Task("custom", lambda model, batch: None), settings, lambda: None).length == 3


def test_a_torch_data_set_needs_a_loader():
    data = torch.utils.data.TensorDataset(torch.randn(4, 2))
    with pytest.raises(veneer.UserError, match="give its DataLoader"):
        feed(data, Task("custom", lambda model, batch: None), Settings(), lambda: None)


def test_two_processes_share_the_rows_of_each_batch():
    whole = collated(encoded(9), 4)
    parts = [list(BatchFeed(whole, Task("causal"), world=2, rank=r).epoch(0)) for r in (0, 1)]
    for batch, one, two in zip(whole, *parts):
        both = torch.cat([one.batch["input_ids"], two.batch["input_ids"]]) if two.units else one.batch["input_ids"]
        assert sorted(both.tolist()) == sorted(batch["input_ids"].tolist())
        assert one.units + two.units == Task("causal").units(batch)


@pytest.mark.parametrize(
    "data, said",
    [
        ([{"input_ids": [1, 2, 3]}], "no labels"),
        ([{"input_ids": [1, 2, 3], "labels": [1, 2]}], "3 input_ids and 2 labels"),
        ([{"input_ids": [1, 99, 3], "labels": [1, 2, 3]}], "token id 99"),
        ([], "no rows"),
        ("nowhere.jsonl", "nowhere.jsonl"),
    ],
)
def test_data_that_cannot_be_used_is_one_sentence(data, said):
    adapter = veneer.attach(llama(), "lora", rank=4)
    with pytest.raises(veneer.UserError, match=said):
        fit(adapter, data, tokenizer=object(), display=False, precision="fp32")


def test_a_model_that_does_not_say_its_task_is_asked_for_it():
    adapter = veneer.attach(torch.nn.Sequential(torch.nn.Linear(4, 4)), "lora", rank=2, sites=["0"])
    with pytest.raises(veneer.UserError, match="does not say what it learns: give task="):
        fit(adapter, [torch.randn(2, 4)], display=False)


def test_a_loss_that_is_no_number_is_named():
    adapter = veneer.attach(torch.nn.Sequential(torch.nn.Linear(4, 4)), "lora", rank=2, sites=["0"])
    with pytest.raises(veneer.UserError, match=r"loss= gave a tensor of shape \(2, 4\)"):
        fit(adapter, [torch.randn(2, 4)], loss=lambda model, batch: model(batch), display=False)
