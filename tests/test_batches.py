"""Shuffling, packing, resuming."""

import json

import numpy as np
import pytest

from robust_mo.data.batches import batches, count_batches
from robust_mo.data.conversations import Example


def examples(number=60):
    generator = np.random.default_rng(0)
    made = []
    for i in range(number):
        tokens = (1000 * (i + 1) + np.arange(generator.integers(5, 40))).astype(np.int32)
        made.append(Example(tokens, np.arange(len(tokens)) >= 3))
    return made


SETTINGS = dict(length=64, rows=3, packing=True, epochs=2, seed=7)


def texts(batch):
    """{example number: (tokens, targets, loss_mask, positions)} of a batch."""
    found = {}
    for row in range(len(batch["tokens"])):
        for segment in range(1, batch["segments"][row].max() + 1):
            where = batch["segments"][row] == segment
            fields = {name: values[row][where] for name, values in batch.items()}
            found[int(fields["tokens"][0]) // 1000 - 1] = fields
    return found


@pytest.mark.parametrize("packing", [True, False])
def test_every_example_comes_once_an_epoch_and_whole(packing):
    made = examples()
    seen = []
    for batch in batches(made, **{**SETTINGS, "packing": packing, "epochs": 1}):
        assert {values.shape for values in batch.values()} == {(3, 64)}
        assert batch["loss_mask"].dtype == bool
        assert not batch["loss_mask"][batch["segments"] == 0].any()
        for number, fields in texts(batch).items():
            seen.append(number)
            np.testing.assert_array_equal(fields["tokens"], made[number].tokens[:-1])
            np.testing.assert_array_equal(fields["targets"], made[number].tokens[1:])
            np.testing.assert_array_equal(fields["loss_mask"], made[number].loss_mask[1:])
            np.testing.assert_array_equal(fields["positions"], np.arange(len(made[number].tokens) - 1))
        if not packing:
            assert batch["segments"].max() == 1
    assert sorted(seen) == list(range(len(made)))


def test_every_epoch_is_shuffled_anew():
    made = list(batches(examples(), **{**SETTINGS, "packing": False}))
    order = [int(row[0]) // 1000 - 1 for batch in made for row in batch["tokens"]]
    assert sorted(order[:60]) == sorted(order[60:]) == list(range(60)) and order[:60] != order[60:]


def test_packing_saves_rows():
    padded, packed = (count_batches(examples(), **{**SETTINGS, "packing": packing}) for packing in (False, True))
    assert packed < 0.6 * padded
    assert padded == 40  # 2 epochs of 60 examples, 3 to a batch


def test_seed_decides_the_order():
    first = [b["tokens"] for b in batches(examples(), **SETTINGS)]
    again = [b["tokens"] for b in batches(examples(), **SETTINGS)]
    other = [b["tokens"] for b in batches(examples(), **{**SETTINGS, "seed": 8})]
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert any((a != b).any() for a, b in zip(first, other, strict=False))


@pytest.mark.parametrize("after", [0, 1, 7])
def test_state_goes_on_with_the_next_batch(after):
    iterator = iter(batches(examples(), **SETTINGS))
    for _ in range(after):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    rest = list(iterator)
    resumed = iter(batches(examples(), **SETTINGS))
    resumed.set_state(state)
    again = list(resumed)
    assert len(rest) == len(again) > 0
    for a, b in zip(rest, again, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
