"""The device mesh, and which axis of it each logical axis of an array is cut along.

Promises: one table, from which the sharding of every parameter, adapter and activation follows.
Does not know about any particular architecture or optimizer.

Mesh axes: `replica` holds copies of the parameters, `fsdp` cuts parameters and batch, `tensor` cuts within a product.
"""

import contextlib
import importlib.util
import math
import os
import pathlib
import sys
import threading
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils, multihost_utils
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from robust_mo.errors import InputError, first_line

AXES = ("replica", "fsdp", "tensor")

# (logical axis, mesh axes)
RULES = (
    ("batch", ("replica", "fsdp")),  # rows of text: every device that holds different rows
    ("embed", "fsdp"),  # hidden size: where parameters are cut, gathered layer by layer when used
    ("heads", "tensor"),  # query heads: whole ones where `tensor` divides them, so that attention needs no exchange
    ("kv_heads", "tensor"),  # key/value heads, cut beside the query heads that read them
    ("mlp", "tensor"),  # feed-forward width: column-cut going in, row-cut coming out
    ("vocab", "tensor"),  # vocabulary: the largest axis of embedding and head
    ("rank", "fsdp"),  # LoRA's inner dimension, where the other one is not cut so already
    ("norm", None),  # one number per hidden unit: cheaper to copy
    ("layers", None),  # scanned over, so every device needs every layer
)

# A machine's own devices answer in seconds, and so do hosts that are started together; machines that are made for a job
# may come minutes apart.
_PATIENCE_SECONDS, _WAITING_SECONDS = 30, 600


@contextlib.contextmanager
def waiting(told: str, status: int = 2):
    """Says on stderr what the block waits for, and after ten minutes ends the process with this exit status: jax waits
    for ever without a word, or ends it by a signal."""

    def remind() -> None:
        print(f"still waiting {told}", file=sys.stderr, flush=True)

    def end() -> None:
        print(f"waited {_WAITING_SECONDS} seconds {told}", file=sys.stderr, flush=True)
        os._exit(status)

    timers = [threading.Timer(_PATIENCE_SECONDS, remind), threading.Timer(_WAITING_SECONDS, end)]
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()


def leave_out_absent_tpus() -> None:
    """Before jax first looks for devices.  Where libtpu is installed, for the preflight, it looks for a TPU at every
    start, and libtpu complains at length of there being none."""
    vendors = (file.read_text().strip() for file in pathlib.Path("/sys/bus/pci/devices").glob("*/vendor"))
    installed = [name for name in ("libtpu", *_OTHER_PLUGINS) if importlib.util.find_spec(name)]
    if installed == ["libtpu"] and _GOOGLE not in vendors and not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")


_OTHER_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin")
_GOOGLE = "0x1ae0"  # as a maker of PCI devices, TPUs among them


def all_devices() -> list[jax.Device]:
    """Those of all hosts.  Programs for several CPUs, or for GPUs of several hosts that have not said where all of them
    keep theirs (JAX_COMPILATION_CACHE_DIR), are not kept on disk from here on.

    Where they do not come in ten minutes, as on one host of several alone, the process ends with a line and status 2.

    Raises:
      InputError: there is none, or it cannot be used.
    """
    told = (
        "for the devices: those of a TPU slice of several hosts come when the same command runs on every one of them; "
        "study, export and chat use one host, so give them a slice of one"
    )
    try:
        leave_out_absent_tpus()
        with waiting(told):
            devices = jax.devices()
    except Exception as error:  # of the driver or plugin; their classes differ
        reason = first_line(error)
        asked = os.environ.get("JAX_PLATFORMS")
        hint = f"JAX_PLATFORMS is {asked!r}: correct or unset it" if asked else "does another process hold it?"
        raise InputError(f"jax finds no device ({reason}); {hint}") from None
    # What jaxlib 0.10 reads from its cache for CPUs has lost the order between the collectives within a loop or branch
    # and those beside it: XLA's ThunkSequenceSerDesProtobuf gives each nested sequence a communicator of its own.  Two
    # devices may then begin with different ones and wait for each other for ever.
    several_cpus = len(devices) > 1 and devices[0].platform == "cpu"
    # jax writes on the first host alone.  With folders of their own the others would compile what that one reads, and
    # XLA shares out among hosts the trials by which it chooses a GPU's kernels: they would wait for those of the first.
    gpus_apart = devices[0].platform == "gpu" and jax.process_count() > 1
    if several_cpus or (gpus_apart and "JAX_COMPILATION_CACHE_DIR" not in os.environ):
        jax.config.update("jax_enable_compilation_cache", False)
        reset_cache()  # or what jax decided at its first compilation would stand
    return devices


def make_mesh(replica: int, fsdp: int, tensor: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (None: all that are here); one of the sizes may be -1 for "what is left".

    Why not `jax.make_mesh`: it refuses several hosts with GPUs, several slices of TPUs and, on most TPUs, sizes that
    cut a side of the slice.

    Raises:
      InputError: the sizes do not multiply to the number of devices, or there is no device.
    """
    devices = all_devices() if devices is None else devices
    sizes = abstract_mesh(replica, fsdp, tensor, len(devices)).axis_sizes
    slices = len({device.slice_index for device in devices}) if hasattr(devices[0], "slice_index") else 1
    if devices[0].platform == "tpu" and slices > 1:
        # Between slices the network is slow: the outermost axes span them.
        between, left = [], slices
        for size in sizes:
            between.append(math.gcd(size, left))
            left //= between[-1]
        within = [size // parts for size, parts in zip(sizes, between, strict=True)]
        laid = mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
    else:  # GPUs by their numbers, so that those of a host lie beside one another along the last axes
        laid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(laid, AXES, axis_types=(AxisType.Auto,) * 3)


def abstract_mesh(replica: int, fsdp: int, tensor: int, devices: int) -> AbstractMesh:
    """The shape of `make_mesh`'s mesh over so many devices, which need not be here.  Raises as that does."""
    sizes = [replica, fsdp, tensor]
    if sizes.count(-1) == 1 and (known := -int(np.prod(sizes))) > 0 and devices % known == 0:
        sizes[sizes.index(-1)] = devices // known
    if min(sizes) < 1 or int(np.prod(sizes)) != devices:
        shown = ", ".join(f"{name}={size}" for name, size in zip(AXES, (replica, fsdp, tensor), strict=True))
        raise InputError(f"config.mesh ({shown}) does not fit {devices} devices: the product must be that number")
    return AbstractMesh(tuple(sizes), AXES)


def with_more_along_tensor(mesh: Mesh, heads: int) -> Iterator[Mesh]:
    """Meshes of the same devices with two, four, ... of them along `tensor` and so many times less along `fsdp`, as
    long as that many key heads can be dealt out among them; none where `tensor` was chosen already."""
    replica, fsdp, tensor = (mesh.shape[axis] for axis in AXES)
    more = 2
    while tensor == 1 and fsdp % more == 0 and heads % more == 0:
        # In their order: programs take arrays of several meshes only if their devices have the same.
        yield Mesh(mesh.devices.reshape(replica, fsdp // more, more), AXES, axis_types=mesh.axis_types)
        more *= 2


@contextlib.contextmanager
def in_force(mesh: Mesh):
    """Within the block the table holds for activations too, where a model names their axes.

    Without it XLA cuts activations along the hidden size, as the embedding is, and gives every device all rows.
    """
    with nn.logical_axis_rules(RULES), jax.set_mesh(mesh):
        yield


def everywhere(x: jax.Array) -> jax.Array:
    """Within a compiled program under `in_force`: the array whole on every device, so that every host can fetch it."""
    return nn.with_logical_constraint(x, (None,) * x.ndim)


def constrained(x: jax.Array, names: Sequence[str | None]) -> jax.Array:
    """Within a compiled program under `in_force`: the array cut along these logical axes; without a mesh as it is."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, sharding(x.shape, names, mesh))


def parts_of(name: str, size: int) -> int:
    """Within a compiled program: into how many parts the mesh in force cuts a logical axis of this size."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else size // sharding((size,), (name,), mesh).shard_shape((size,))[0]


def shardings(abstract, mesh: Mesh):
    """NamedShardings for a tree of `jax.eval_shape(model.init, ...)` whose leaves carry logical axes."""
    return jax.tree.map(
        lambda leaf: sharding(leaf.value.shape, leaf.names, mesh),
        abstract,
        is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned),
    )


def sharding(shape: Sequence[int], names: Sequence[str | None], mesh: Mesh) -> NamedSharding:
    """Where an array with these logical axes lies.

    An axis that its devices do not divide evenly, such as an odd vocabulary, stays whole on each of them, and so does
    one whose devices cut an earlier axis already.  Where there are more devices than LoRA's inner dimension can be cut
    among, they cut the other one.
    """
    table, cut = dict(RULES), []
    for size, name in zip(shape, names, strict=True):
        axis = table[name] if name else None
        devices = math.prod(mesh.shape[part] for part in ([axis] if isinstance(axis, str) else axis or []))
        cut.append(axis if axis not in cut and size % devices == 0 else None)
    if "rank" in names and "fsdp" not in cut:
        other = len(names) - 1 if names[-1] != "rank" else len(names) - 2
        if shape[other] % (mesh.shape["tensor"] * mesh.shape["fsdp"]) == 0:
            cut[other] = ("tensor", "fsdp")
    return NamedSharding(mesh, PartitionSpec(*cut))


def memory_limit() -> int | None:
    """Bytes that programs may use of one of this machine's devices; None on a CPU, which does not say."""
    stats = jax.local_devices()[0].memory_stats()
    return stats.get("bytes_limit") if stats else None


def free_memory() -> int | None:
    """Bytes that are free on each device, of a CPU's its share of the host's; of several hosts the least.  None where
    no one knows."""
    if stats := jax.local_devices()[0].memory_stats():
        free = stats["bytes_limit"] - stats["bytes_in_use"]
    elif jax.default_backend() == "cpu" and (told := pathlib.Path("/proc/meminfo")).exists():
        available = next(line for line in told.read_text().splitlines() if line.startswith("MemAvailable:"))
        free = 1024 * int(available.split()[1]) // jax.local_device_count()
    else:  # no Linux, or a GPU whose allocator does not say
        return None
    if jax.process_count() == 1:
        return free
    # In MiB: jax would cut a number of bytes to 32 bits.
    return int(multihost_utils.process_allgather(np.int32(free >> 20)).min()) << 20


def of(params) -> Mesh:
    """The mesh on which parameters lie."""
    return jax.tree.leaves(params)[0].sharding.mesh


def rows_apart(mesh: Mesh) -> int:
    """Among how many devices the rows of a batch are dealt out."""
    return mesh.shape["replica"] * mesh.shape["fsdp"]


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def spread(tree, mesh: Mesh):
    """The tree with a copy on every device of what lies on a single one."""
    return jax.tree.map(
        lambda x: x if isinstance(x.sharding, NamedSharding) else jax.device_put(x, replicated(mesh)), tree
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows cut over the mesh."""
    return NamedSharding(mesh, PartitionSpec(("replica", "fsdp")))


def place(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """The batch on the mesh, rows cut over it; every host holds the whole and gives its devices their rows."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_callback(value.shape, sharding, value.__getitem__) for name, value in batch.items()
    }
