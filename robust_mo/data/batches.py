"""Tokenized conversations to batches of fixed shape: shuffled, packed, endless or not, resumable to the exact row.

Promises: the order depends on `seed` alone; an iterator's state is a small JSON dict (grain's `get_state`), and setting
it continues with the very batch that would have come next.  A next-token target never crosses from one conversation
into another.
Does not know about templates, models or devices.
"""

import grain
import numpy as np
from grain.experimental import FirstFitPackIterDataset

from robust_mo.data.conversations import Example

# Conversations wait in this many open rows until one fits: more rows fill better, and are kept in memory.
_OPEN_ROWS = 32


def batches(examples: list[Example], length: int, rows: int, packing: bool, epochs: int, seed: int):
    """A grain dataset of batches; each is a dict of numpy arrays `[rows, length]`:

      tokens     int32, the model's inputs; 0 where nothing is
      targets    int32, the token that comes next
      loss_mask  bool, True where the target is to be learnt
      positions  int32, place of the token in its own conversation
      segments   int32, number of the conversation within the row, from 1; 0 where nothing is

    Rows missing from the last batch are filled with nothing.  Examples must have at most `length` + 1 tokens.

    Args:
      examples: what to learn from.
      length: positions in a row.
      rows: rows in a batch.
      packing: put as many conversations into a row as fit (first fit); otherwise one to a row.
      epochs: passes over the examples, each shuffled anew.
      seed: of the shuffling.
    """
    dataset = grain.MapDataset.source(examples).map(_shift).seed(seed).shuffle()
    dataset = dataset.repeat(epochs, reseed_each_epoch=True)
    # One thread, nothing read ahead: the examples are in memory, and the state stays exact.
    dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    dataset = FirstFitPackIterDataset(
        dataset,
        length_struct=dict.fromkeys(("tokens", "targets", "loss_mask"), length),
        num_packing_bins=max(rows, _OPEN_ROWS) if packing else rows,
        shuffle_bins=False,
        max_sequences_per_bin=None if packing else 1,
    )
    return dataset.batch(rows, drop_remainder=False).map(lambda batch: _finish(batch, rows))


def count_batches(examples: list[Example], **settings) -> int:
    """How many batches there will be, found by packing once; takes about a second for 10,000 examples."""
    return sum(1 for _ in batches(examples, **settings))


def _shift(example: Example) -> dict[str, np.ndarray]:
    """[a b c d] -> tokens [a b c], targets [b c d]"""
    return {
        "tokens": example.tokens[:-1],
        "targets": example.tokens[1:],
        "loss_mask": example.loss_mask[1:],
    }


def _finish(batch: dict[str, np.ndarray], rows: int) -> dict[str, np.ndarray]:
    batch = {
        "tokens": batch["tokens"],
        "targets": batch["targets"],
        "loss_mask": batch["loss_mask"].astype(bool),
        "positions": batch["tokens_positions"],
        "segments": batch["tokens_segment_ids"],
    }
    missing = rows - len(batch["tokens"])
    return {name: np.pad(value, ((0, missing), (0, 0))) for name, value in batch.items()}
