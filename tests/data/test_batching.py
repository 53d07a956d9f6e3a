"""Batches: every row once, the same for any number of processes, resumable, little padding."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.data.batching import Batches, scrambled
from veneer.data.collate import Collator
from veneer.errors import UserError

LENGTHS = np.random.default_rng(0).integers(5, 200, 1003)
lengths = st.lists(st.integers(1, 50), min_size=1, max_size=120)


@given(lengths, st.integers(1, 9), st.integers(1, 4), st.sampled_from([None, 60]), st.booleans())
@settings(deadline=None, max_examples=80)
def test_every_row_is_seen_once_whatever_the_settings(lengths, size, world, budget, shuffle):
    shares = [
        Batches(lengths, size, world=world, rank=rank, max_tokens=budget, shuffle=shuffle) for rank in range(world)
    ]
    assert len({len(share) for share in shares}) == 1
    assert sorted(row for share in shares for batch in share for row in batch) == list(range(len(lengths)))
    for batch in map(shares[0].whole, range(len(shares[0]))):
        assert len(batch) <= size
        assert budget is None or len(batch) * max(lengths[row] for row in batch) <= budget


def test_two_processes_see_the_batches_of_one():
    one = Batches(LENGTHS, 8, seed=3)
    left, right = (Batches(LENGTHS, 8, seed=3, world=2, rank=rank) for rank in (0, 1))
    assert [sorted(a + b) for a, b in zip(left, right)] == [sorted(batch) for batch in one]
    assert [abs(len(a) - len(b)) <= 1 for a, b in zip(left, right)] == [True] * len(one)


def test_the_order_is_fixed_by_seed_and_epoch():
    first = Batches(LENGTHS, 8, seed=1)
    assert list(first) == list(Batches(LENGTHS, 8, seed=1)) == list(first.at(1).at(0))
    assert list(first) != list(first.at(1))
    assert list(first) != list(Batches(LENGTHS, 8, seed=2))
    assert list(first.at(1)) != list(Batches(LENGTHS, 8, seed=2, epoch=0))


def test_the_hash_is_the_published_one():
    """SplitMix64's first outputs from state 0, as its reference implementation prints them."""
    from veneer.data.batching import _finish

    state = np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert [hex(word) for word in _finish(state)] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]
    assert scrambled(4, 0, 0).tolist() == scrambled(9, 0, 0).tolist()[:4]
    assert len(set(scrambled(10_000, 7, 1).tolist())) == 10_000


def test_skipping_to_a_step_is_the_rest_of_the_epoch():
    batches = Batches(LENGTHS, 8, seed=1)
    assert batches[70:] == list(batches)[70:]
    assert batches[-1] == list(batches)[-1]
    with pytest.raises(IndexError):
        batches[len(batches)]


def test_only_the_last_batch_is_smaller_and_it_is_kept():
    assert [len(batch) for batch in Batches(LENGTHS, 8)] == [8] * 125 + [3]


def test_padding_is_rare_and_lengths_stay_mixed_over_the_epoch():
    batches = Batches(LENGTHS, 8)
    in_order = np.split(LENGTHS[:1000], 125)
    padding_in_order = 1 - LENGTHS[:1000].sum() / sum(8 * part.max() for part in in_order)
    assert batches.padding() < 0.03 < 0.4 < padding_in_order
    assert Batches(LENGTHS, 8, shuffle=False).padding() < 0.01
    means = np.array([LENGTHS[batch].mean() for batch in batches])
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.2


def test_neighbours_change_from_epoch_to_epoch():
    batches = Batches(np.full(400, 7), 4, seed=0)
    pairs = [{frozenset((a, b)) for batch in batches.at(e) for a in batch for b in batch if a < b} for e in (0, 1)]
    assert len(pairs[0] & pairs[1]) < 0.05 * len(pairs[0])


def test_what_cannot_be_batched_is_refused():
    with pytest.raises(UserError, match="max_tokens is 10 and the longest row has 11 tokens"):
        Batches([3, 11], 2, max_tokens=10)
    with pytest.raises(UserError, match="batch_size is 0"):
        Batches([3], 0)
    with pytest.raises(UserError, match="no rows"):
        Batches([], 2)


def test_collating_pads_on_the_right_with_ignored_labels():
    examples = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = Collator(pad_id=9, multiple=4)(examples)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"].tolist() == [[5, 6, 7, 9], [8, 9, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100], [8, -100, -100, -100]]
    assert Collator()(examples)["input_ids"].shape == (2, 3)


def test_collating_classes_numbers_and_images():
    ids = {"input_ids": [1], "token_type_ids": [0]}
    batch = Collator()([{**ids, "labels": 2}, {"input_ids": [1, 2], "token_type_ids": [0, 1], "labels": 0}])
    assert batch["labels"].tolist() == [2, 0]
    assert batch["labels"].dtype == torch.int64
    assert batch["token_type_ids"].tolist() == [[0, 0], [0, 1]]
    assert Collator()([{**ids, "labels": 0.5}])["labels"].dtype == torch.float32
    images = Collator()([{"pixel_values": torch.ones(3, 2, 2), "labels": 1}] * 2)
    assert images["pixel_values"].shape == (2, 3, 2, 2)
    assert set(images) == {"pixel_values", "labels"}
