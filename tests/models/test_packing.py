"""Rows without padding: the loss and its gradients are those of the padded batch."""

import pytest
import torch
from models import make

import veneer
from veneer.models.fast import packs
from veneer.models.packing import packing, rounded

LENGTHS = (7, 3, 12)


def batch(vocabulary=60, side="right"):
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(3, vocabulary, (len(LENGTHS), max(LENGTHS)), generator=g)
    look = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    look = look if side == "right" else look.flip(1)
    labels = ids.masked_fill(~look, -100)
    labels[:, :2] = -100
    return {"input_ids": ids.masked_fill(~look, 0), "attention_mask": look.long(), "labels": labels}


def loss_and_gradients(model, adapter, given, packed):
    seen = []
    handle = model.model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"].shape), with_kwargs=True)
    loss = veneer.causal_loss(model, given, packed=packed)
    handle.remove()
    loss.backward()
    gradients = [p.grad.clone() for p in adapter.parameters()]
    for p in adapter.parameters():
        p.grad = None
    return loss.detach(), gradients, seen[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("recipe", ["lora", "dora+pissa", "bitfit"])
def test_a_packed_batch_has_the_loss_and_gradients_of_the_padded_one(recipe, checkpointing, attention):
    model = make("llama").model
    model.config._attn_implementation = attention
    adapter = veneer.attach(model, recipe, **({} if recipe == "bitfit" else {"rank": 3}))
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    given = batch()
    padded, expected, shape = loss_and_gradients(model, adapter, given, False)
    packed, found, flat = loss_and_gradients(model, adapter, given, True)
    assert shape == (3, 12) and flat == (1, rounded(sum(LENGTHS)))
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-6)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def begun_alike(vocabulary=60):
    """Rows that share 6, 4 and 9 of their first tokens with one before; the third begins like the second's own part."""
    given = batch(vocabulary)
    ids = torch.randint(3, vocabulary, (5, 12), generator=torch.Generator().manual_seed(4))
    ids[1, :6] = ids[0, :6]
    ids[3, :4] = ids[0, :4]
    ids[4, :9] = ids[1, :9]
    look = torch.arange(12) < torch.tensor([9, 12, 8, 7, 11])[:, None]
    labels = ids.masked_fill(~look, -100)
    labels[:, :8] = -100
    labels[3, 5] = 3
    given = {"input_ids": ids.masked_fill(~look, 0), "attention_mask": look.long(), "labels": labels}
    # of the nine tokens that rows 1 and 4 share, the eighth is the first with a label after it
    return given, int(look.sum()) - 6 - 4 - 7


@pytest.mark.parametrize("attention", ["fast", "not ours"])
@pytest.mark.parametrize("recipe", ["lora", "dora+pissa"])
def test_what_rows_begin_with_in_common_is_computed_once(recipe, attention):
    model = make("llama").model
    model.config._attn_implementation = "eager"
    adapter = veneer.attach(model, recipe, rank=3)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    model.train()
    given, positions = begun_alike()
    padded, expected, _ = loss_and_gradients(model, adapter, given, False)
    model.config.output_attentions = attention != "fast"
    packed, found, flat = loss_and_gradients(model, adapter, given, True)
    assert flat == (1, rounded(positions))
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-6)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_rows_without_padding_are_packed_for_what_they_share_alone():
    ids = torch.randint(3, 60, (4, 60), generator=torch.Generator().manual_seed(5))
    labels = ids.clone()
    labels[:, :6] = -100
    assert packing({"input_ids": ids}, labels != -100) is None
    ids[1:, :7] = ids[0, :7]
    found = packing({"input_ids": ids}, labels != -100)
    assert len(found.place) == 4 * 59 - 3 * 5  # the sixth position predicts the first label: each row's own
    assert packing({"input_ids": ids}, torch.ones_like(ids, dtype=torch.bool)) is None


def test_what_follows_the_last_label_is_left_out():
    ids = torch.randint(3, 60, (3, 10), generator=torch.Generator().manual_seed(5))
    labels = torch.full_like(ids, -100)
    labels[0, 2:5] = labels[1, 8:] = 7
    found = packing({"input_ids": ids}, labels != -100)
    assert torch.bincount(found.row).tolist() == [4, 9, 1]  # the last label is predicted by the position before it


def test_attention_that_is_not_ours_gets_a_mask_by_rows():
    model = make("llama").model
    model.config._attn_implementation = "eager"
    adapter = veneer.attach(model, "lora", rank=3)
    model.train()
    given = batch()
    padded, expected, _ = loss_and_gradients(model, adapter, given, False)
    model.config.output_attentions = True  # the fast form stands back
    packed, found, flat = loss_and_gradients(model, adapter, given, True)
    assert flat == (1, rounded(sum(LENGTHS)))
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-6)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("change", ["left", "none", "labelled", "position_ids", "empty row"])
def test_other_batches_stay_as_they_are(change):
    given = batch(side="left" if change == "left" else "right")
    labels = given.pop("labels")
    if change == "none":
        given = {"input_ids": torch.randint(3, 60, (2, 60))}
        labels = given["input_ids"]
    if change == "labelled":
        labels = torch.ones_like(labels)
    if change == "position_ids":
        given["position_ids"] = torch.arange(12)[None]
    if change == "empty row":
        given["attention_mask"][1] = 0
    assert packing(given, labels != -100) is None


def test_prompts_and_other_families_are_not_packed():
    llama, gpt2 = make("llama").model, make("gpt2").model
    assert packs(llama) and not packs(gpt2)
    adapter = veneer.attach(llama, "prompt")
    llama.train()
    assert loss_and_gradients(llama, adapter, batch(), True)[2] == (3, 12)


def test_sizes_are_few_and_at_most_a_sixteenth_above_what_is_needed():
    assert [rounded(n) for n in (1, 16, 17, 255, 256, 511, 513, 1000, 5000)] == [
        16,
        16,
        32,
        256,
        256,
        512,
        544,
        1024,
        5120,
    ]
    assert all(n <= rounded(n) < n + max(16, n / 15) for n in range(1, 3000))
    assert len({rounded(n) for n in range(1, 4097)}) < 100
