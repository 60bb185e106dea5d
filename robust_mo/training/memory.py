"""What a program needs of a device's memory, told by the compiler.

Promises: the numbers are those of the program that is compiled, whether it fits or not; nothing is run.
Does not know what the program is for.
"""

import dataclasses
import math
import re

import jax

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes on every device.

    Attributes:
      arguments, temporaries: what is given and what is held on the way.
      output: what takes no argument's place.
      refused: whether the compiler would not make the program for want of memory.
    """

    arguments: int
    temporaries: int
    output: int
    refused: bool

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries + self.output


def needed(lowered: jax.stages.Lowered, arguments, compiler_options: dict[str, str | bool] | None = None) -> Need:
    """Compiles a program.

    Args:
      arguments: what it was lowered for, arrays or their shapes with shardings.
      compiler_options: XLA's, by name, beside those in force.
    """
    try:
        compiled = lowered.compile(compiler_options)
    except jax.errors.JaxRuntimeError as error:
        if (too_much := out_of_memory(error)) is None:
            raise
        given = held(arguments)
        return Need(given, too_much[0] - given, 0, refused=True)
    sizes = compiled.memory_analysis()
    output = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return Need(sizes.argument_size_in_bytes, sizes.temp_size_in_bytes, output, refused=False)


def held(arguments) -> int:
    """Bytes that arrays, or shapes with shardings, take on every device."""
    leaves = [leaf for leaf in jax.tree.leaves(arguments) if hasattr(leaf, "dtype")]
    shapes = (leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape for leaf in leaves)
    return sum(leaf.dtype.itemsize * math.prod(shape) for leaf, shape in zip(leaves, shapes, strict=True))


def out_of_memory(error: Exception) -> tuple[int, int] | None:
    """(bytes asked for, bytes there are) in the compiler's message; None where it says something else."""
    size = r"([\d.]+)([KMGTP]?)"
    for words in (rf"\({size}\) exceeds available HBM \({size}\)", rf"Used {size} of {size} hbm"):
        if match := re.search(words, str(error)):
            asked, unit, limit, limit_unit = match.groups()
            return int(float(asked) * _UNITS[unit]), int(float(limit) * _UNITS[limit_unit])
    return None
