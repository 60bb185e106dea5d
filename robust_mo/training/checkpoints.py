"""Checkpoints of a training run, by Orbax.

Promises: a checkpoint is there whole or not at all; writing goes on beside training (`close` waits for it); no more are
kept than was asked for; what is read back in the dtype in which it was saved is what was saved, and damaged where a bit
has changed; a run whose newest one is damaged goes on from the one before it.
Does not know what the state means.  Items: `trainable`, `optimizer`, and `progress`, a JSON dict with the step, the
state of the data iterator and the sums of all arrays' bits, since the files themselves do not show a bit that has
changed; a finished run's have no `optimizer`.  In the files a stack of matrices is cut into its matrices, so that one
can be read without the others.
"""

import contextlib
import errno
import functools
import math
import os
import pathlib
import urllib.parse
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, EveryNSteps, LatestN

from robust_mo import hosts
from robust_mo.errors import InputError, first_line, passes, unreached
from robust_mo.runs import absolute
from robust_mo.training.step import TrainState

# What says nothing of the files; tensorstore has the words in a ValueError.
_TRANSIENT = (PermissionError, MemoryError)
_TRANSIENT_WORDS = ("PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "UNAUTHENTICATED", "Forbidden")


class _Damaged(InputError):
    """A checkpoint that cannot be read or is not what was saved; `what` leaves out what to do about it."""

    def __init__(self, what: str, remedy: str = "train again in another --workdir"):
        super().__init__(f"{what}: restore its files from a copy, or {remedy}")
        self.what = what


def _sums(tree) -> dict[str, list]:
    """Of each leaf its dtype and the sum of its bits."""
    sums = jax.device_get(_sum_bits(tree))
    return {
        jax.tree_util.keystr(path): [leaf.dtype.name, int(total)]
        for (path, leaf), total in zip(jax.tree.leaves_with_path(tree), jax.tree.leaves(sums), strict=True)
    }


# Without that pass, which adds up in a tree for the sake of rounding: on a CPU it writes all bits out before, as a copy
# of the whole state, and takes 2.6 (float32) or 12 (bfloat16) times as long (60 million numbers, two AMD EPYC cores).
@functools.partial(jax.jit, compiler_options={"xla_disable_hlo_passes": "tree_reduction_rewriter"})
def _sum_bits(tree):
    """Of each leaf the sum of its numbers' bits, of 32 bits itself, wherever it lies and however it is cut.  Leaves are
    numbers of whole bytes; their order is not seen."""

    def of(leaf):
        bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}"))
        return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)

    return jax.tree.map(of, tree)


def _bytes(leaf) -> int:
    return leaf.dtype.itemsize * math.prod(leaf.shape)


def _cut(tree):
    """How Orbax is to cut the arrays."""
    return jax.tree.map(lambda leaf: ocp.SaveArgs(shard_axes=(0,) if leaf.ndim > 2 else ()), tree)


class Stored:
    """An array that stays in its files: an index reads that part of it, as numpy has it.  For one pass over the array:
    every part is to be read once.

    Attributes:
      shape: of the array.
      dtype: in which parts are given, whatever it was saved in.
      saved_as: the name of that dtype.
      cut: whether a matrix of a stack can be read without the others.
      sum_of_bits: of the parts that were read, as `_sum_bits` has it.
    """

    def __init__(self, store: tensorstore.TensorStore, dtype, reading: Callable[[], contextlib.AbstractContextManager]):
        self.shape, self.dtype, self.saved_as = tuple(store.shape), dtype, store.dtype.name
        self.cut = len(self.shape) < 3 or store.chunk_layout.read_chunk.shape[0] == 1
        self.sum_of_bits = 0
        self._store, self._reading = store, reading

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index) -> np.ndarray:
        with self._reading():
            part = self._store[index].read().result()
        bits = int(part.view(f"uint{8 * part.itemsize}").sum(dtype=np.uint32))
        self.sum_of_bits = (self.sum_of_bits + bits) % 2**32
        return part.astype(self.dtype, copy=False)


def forget_optimizers(folder: pathlib.Path) -> None:
    """Deletes of a finished run's checkpoints what only going on would need: of all weights with Adam two thirds."""

    def forget() -> None:
        for optimizer in epath.Path(folder).glob("*/optimizer"):
            optimizer.rmtree()

    hosts.by_first(forget)


class _Manager(ocp.CheckpointManager):
    """Orbax's, but it does not ask jax whether SIGTERM has come: jax counts the calls that ask (`hosts.stopping`), and
    one with a number of its own in between would have the hosts wait for a call that has passed."""

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """The checkpoints folder of one run.

    Args:
      keep: how many of the newest to keep: with 1 there is none to go back to where it is damaged.  None where they are
        only read, which touches nothing of a run that may still be writing.
      keep_every: steps that are a multiple of this are kept beside them; 0: none.
    """

    def __init__(self, folder: pathlib.Path, keep: int | None, keep_every: int = 0):
        self.folder, self._keep, self._keep_every = folder, keep, keep_every
        if keep is None:
            options = ocp.CheckpointManagerOptions(read_only=True)
        else:
            kept = [LatestN(keep), *[EveryNSteps(keep_every)] * bool(keep_every)]
            options = ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy(kept), cleanup_tmp_directories=True
            )
        self._manager = _Manager(absolute(folder), options=options)

    def at_most(self, state: TrainState, steps: int) -> tuple[int, int]:
        """(checkpoints that lie here at once in a run of `steps`, bytes of one).

        Those that are kept, one that is being written, and as many as are kept that were damaged and stand aside.
        """
        marked = steps // self._keep_every if self._keep_every else 0
        return 2 * (self._keep + marked) + 1, sum(map(_bytes, jax.tree.leaves(state)))

    def latest(self) -> int | None:
        """The newest step that is complete, or None."""
        return hosts.agreed(self._manager.latest_step())

    def save(self, state: TrainState, iterator_state: dict) -> None:
        """Begins to save; the arrays may be donated to the next step as soon as this returns.

        Raises:
          InputError: the disk does not take it; the checkpoints before stay as they were.
          OSError: a file system or bucket does not take it now; the same.
        """
        step = int(state.step)
        if step == self.latest():
            return
        sums = {name: _sums(getattr(state, name)) for name in ("trainable", "optimizer")}
        items = ocp.args.Composite(
            trainable=ocp.args.StandardSave(state.trainable, _cut(state.trainable)),
            optimizer=ocp.args.StandardSave(state.optimizer, _cut(state.optimizer)),
            progress=ocp.args.JsonSave({"step": step, "iterator": iterator_state, "sums": sums}),
        )
        self._guard(lambda: self._manager.save(step, args=items))

    def restore(self, state: TrainState) -> tuple[TrainState, dict]:
        """The newest checkpoint that can be read, placed and typed as `state` is (arrays or jax.ShapeDtypeStructs with
        shardings).  Damaged ones are reported and put aside as `damaged-STEP`, in the place of earlier ones.

        Raises:
          InputError: none can be read, and all stay where they are; or it was saved with another optimizer or model.
        """
        items = ocp.args.Composite(
            trainable=ocp.args.StandardRestore(state.trainable),
            optimizer=ocp.args.StandardRestore(state.optimizer),
            progress=ocp.args.JsonRestore(),
        )
        damaged = {}
        for step in sorted(hosts.agreed([*self._manager.all_steps()]), reverse=True):
            found = damage = None  # there may be no room for what was read and what will be
            try:
                found = self._read(step, items)
            except _Damaged as error:
                damage = error
            if not hosts.anywhere(damage is not None):
                sums = {name: _sums(found[name]) for name in ("trainable", "optimizer")}
                damage = self._changed(step, found.progress, sums)
                if not hosts.anywhere(damage is not None):
                    break
            damaged[step] = damage or _Damaged(f"{self.folder / str(step)} cannot be read by another host")
        else:
            raise damaged[max(damaged)]
        if damaged:
            self._put_aside(list(damaged))
            for damage in damaged.values():
                print(f"{damage.what}: it is put aside as damaged, and the one before it used, of step {step}")
        step = jax.device_put(jnp.int32(found.progress["step"]), state.step.sharding)
        return TrainState(step, found.trainable, found.optimizer), found.progress["iterator"]

    def restore_trainable(self, trainable, step: int | None):
        """The trainable of one checkpoint (None: the newest), placed as `trainable` says.

        Raises:
          InputError: no such checkpoint, or it is damaged.
        """
        items = ocp.args.Composite(trainable=ocp.args.StandardRestore(trainable), progress=ocp.args.JsonRestore())
        with self._one(step) as chosen:
            found = self._read(chosen, items)
            if damage := self._changed(chosen, found.progress, {"trainable": _sums(found.trainable)}):
                raise damage
            return found.trainable

    @contextlib.contextmanager
    def opened(self, trainable, step: int | None):
        """Within the block: the trainable of one checkpoint (None: the newest), shaped as `trainable`, left where it
        lies, each array a `Stored`, of which the block is to read the whole.  For a single host.

        Raises:
          InputError: no such checkpoint, of another model, or damaged; a changed bit is told at the block's end.
        """
        with self._one(step) as chosen:
            progress = self._read(chosen, ocp.args.Composite(progress=ocp.args.JsonRestore())).progress
            names = {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(trainable)}
            stored = None
            if names == set(progress.get("sums", {}).get("trainable", ())):
                stored = jax.tree.map_with_path(functools.partial(self._open, chosen), trainable)
            if stored is None or not all(leaf.cut for leaf in jax.tree.leaves(stored)):
                # Of another model, which Orbax tells, or of a version of this program that did not cut stacks.
                yield self.restore_trainable(trainable, chosen)
                return
            yield stored
            sums = {
                jax.tree_util.keystr(path): [leaf.saved_as, leaf.sum_of_bits]
                for path, leaf in jax.tree.leaves_with_path(stored)
            }
            if damage := self._changed(chosen, progress, {"trainable": sums}):
                raise damage

    def _open(self, step: int, path, leaf) -> Stored:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        folder = f"{absolute(self.folder)}/{step}/trainable"
        if "://" in folder:
            base = urllib.parse.quote(folder, safe=":/") + "/"
        else:
            base = {"driver": "file", "path": os.path.normpath(folder) + "/"}  # tensorstore takes no ".."
        spec = {"driver": "auto", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}}
        reading = functools.partial(self._reading, step)
        with reading():
            store = tensorstore.open(spec, open=True, read=True).result()
            if tuple(store.shape) != leaf.shape:
                raise ValueError(f"{name} of {leaf.shape} does not fit with the stored shape {store.shape}")
        return Stored(store, leaf.dtype, reading)

    @contextlib.contextmanager
    def _one(self, step: int | None):
        """Within the block: the step of the checkpoint that was asked for (None: the newest), which is read there."""
        steps = hosts.agreed([*self._manager.all_steps()])
        chosen = self.latest() if step is None else step
        if chosen is None or chosen not in steps:
            wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
            have = f"it has {sorted(steps)}" if steps else "train it first"
            raise InputError(f"{self.folder.parent} has no {wanted}: {have}")
        try:
            yield chosen
        except _Damaged as error:
            self._manager.reload()
            if chosen not in self._manager.all_steps():
                gone = f"{self.folder / str(chosen)} has gone while it was read, since its run goes on: try again"
                raise InputError(gone) from error
            # The one before is not taken unasked: what is made of it would pass for what the run came to.
            if earlier := [other for other in steps if other < chosen]:
                remedy = f"delete that folder, so that the one before it is the newest, of step {max(earlier)}"
                raise _Damaged(error.what, remedy) from error
            raise

    def _put_aside(self, steps: list[int]) -> None:
        def move() -> None:
            folder = epath.Path(self.folder)
            for earlier in folder.glob("damaged*"):
                earlier.rmtree()
            for step in steps:
                (folder / str(step)).rename(folder / f"damaged-{step}")

        hosts.by_first(move)
        self._manager.reload()

    def _read(self, step: int, items):
        """The checkpoint's `items`.  Beside what has been placed no more of them than the largest array or a gigabyte
        are in host memory, in part twice.  Of several hosts each reads for itself: otherwise those whose files are
        whole would wait in Orbax for one whose files are not."""
        self._guard(self._manager.wait_until_finished)
        arrays = {name: item.item for name, item in items.items() if isinstance(item, ocp.args.StandardRestore)}
        at_once = int(max(map(_bytes, jax.tree.leaves(arrays)), default=0) // 1e9) + 1
        handlers = {name: ocp.StandardCheckpointHandler(restore_concurrent_gb=at_once) for name in arrays}
        handler = ocp.CompositeCheckpointHandler(progress=ocp.JsonCheckpointHandler(), **handlers)
        own = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
        with self._reading(step), ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
            return reader.restore(absolute(self.folder) / str(step), args=items)

    @contextlib.contextmanager
    def _reading(self, step: int):
        """What Orbax and tensorstore raise within the block, as what it says of a checkpoint."""
        try:
            yield
        except Exception as error:  # they raise many kinds for files that are cut short or missing
            said = first_line(error).partition(" [tensorstore_spec=")[0]
            # Of a disk an input or output error may be for good, and there is another checkpoint.
            passing = isinstance(error, OSError) and passes(error) and error.errno != errno.EIO
            if passing or isinstance(error, _TRANSIENT) or "RESOURCE_EXHAUSTED" in str(error):
                raise
            if unreached(error) or any(word in str(error) for word in _TRANSIENT_WORDS):
                folder = str(self.folder / str(step))
                raise OSError(errno.EIO, f"cannot be read now, try again ({said})", folder) from error
            if any(words in str(error) for words in ("tree structures do not match", "with the stored shape")):
                raise InputError(
                    f"{self.folder / str(step)} was saved with another optimizer, model or version of this program: "
                    "go on with those, or choose another --workdir"
                ) from error
            raise _Damaged(f"{self.folder / str(step)} cannot be read ({said})") from error

    def _changed(self, step: int, progress: dict, sums: dict[str, dict[str, list]]) -> _Damaged | None:
        """The damage, where what was read of a checkpoint, by item, has not the bits that were saved."""
        saved = progress.get("sums", {})  # the first versions of this program kept none
        for name in [name for name in sums if name in saved]:
            for path, (dtype, total) in sums[name].items():
                before = saved[name].get(path, [None])
                if before[0] == dtype and before[1] != total:  # what was read in another dtype has other bits
                    return _Damaged(f"{self.folder / str(step)} has other bits than were saved, in {name} {path}")
        return None

    def close(self) -> None:
        self._guard(self._manager.close)

    def _guard(self, work) -> None:
        try:
            work()
        except Exception as error:
            if isinstance(error, OSError) and passes(error):
                raise
            if unreached(error):
                raise OSError(
                    errno.EIO, f"no checkpoint can be saved now ({first_line(error)})", str(self.folder)
                ) from error
            # tensorstore reports a full or forbidden disk as a ValueError whose text holds the status.
            if isinstance(error, OSError) or any(
                word in str(error)
                for word in ("RESOURCE_EXHAUSTED", "No space left", "PERMISSION_DENIED", "Error writing")
            ):
                reason = " ".join(str(error).split())[:300]
                raise InputError(f"cannot save a checkpoint under {self.folder}: {reason}") from None
            raise
