"""What the thread blocks of a cluster send each other, to be added up there.

Each block has room for a part from every block of its cluster, itself among them, so that a sum is
of parts in the order of those who sent them, whenever they came: two runs give the same bits.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm

from sparsax.pallas.hopper import COMPUTE, MATRIX


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Room for float32 parts, `slots` sums of one part of every block.

    A part goes from registers to shared memory of the block that adds it up. Pallas has no call for
    that in 0.11, nor has interpret mode: there it goes through global memory, one more output, and
    the blocks meet at a barrier in shared memory. Nothing else differs.
    """

    blocks: int  # of a cluster
    slots: int
    shape: tuple[int, int]
    interpret: bool

    @property
    def bytes(self) -> int:
        """What it needs of shared memory."""
        return 4 * self.blocks * self.slots * math.prod(self.shape)

    def outputs(self, clusters: int) -> tuple[Any, ...]:
        """Outputs that interpret mode needs, for so many clusters."""
        shape = (clusters, self.blocks, self.slots, self.blocks, *self.shape)
        return (jax.ShapeDtypeStruct(shape, jnp.float32),) if self.interpret else ()

    def scratch(self) -> dict[str, Any]:
        """Scratch for `Room`, by the names of its fields."""
        if self.interpret:
            return {
                "meeting": plgpu.ClusterBarrier(collective_axes=("cluster",), num_arrivals=COMPUTE)
            }
        return {"parts": plgpu.SMEM((self.slots, self.blocks, *self.shape), jnp.float32)}


@dataclasses.dataclass(frozen=True)
class Room:
    """An exchange as a warpgroup that computes sees it; all of them send before any `meet`."""

    parts: Any = None  # in shared memory
    outputs: tuple[Any, ...] = ()  # instead of it
    meeting: Any = None

    def send(self, value: jax.Array, block, slot) -> None:
        """Sends a block of the cluster this block's part of the sum in a slot of it."""
        own = lax.axis_index("cluster")
        if self.outputs:
            self.outputs[0].at[lax.axis_index("item"), block, slot, own][...] = value
        else:
            _store(value, self.parts.at[slot, own], block)

    def meet(self) -> None:
        """Waits until all that the cluster's blocks sent is there.

        Every thread that sends arrives at the hardware's barrier of the cluster with its stores
        released, and the wait acquires what all others released, so that ordinary loads of shared
        memory find it. The warpgroup that copies need not arrive: threads that have left count as
        arrived. Every block waits, so that none has left, and its shared memory with it, while
        others still send; that all have started, Mosaic waits for before the kernel's body.
        """
        if self.outputs:
            plgpu.barrier_arrive(self.meeting)
            plgpu.barrier_wait(self.meeting)
        else:
            _meet()

    def total(self, slot, read: Callable[[Any], jax.Array]) -> jax.Array:
        """The sum in a slot, in order of the blocks that sent its parts; `read` loads one."""
        if self.outputs:
            mine = lax.axis_index("item"), lax.axis_index("cluster"), slot
            parts = self.outputs[0].at[mine]
        else:
            parts = self.parts.at[slot]
        return sum((read(parts.at[n]) for n in range(1, parts.shape[0])), read(parts.at[0]))


def _inline(*types) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Has a function that writes instructions run on arguments of such types."""
    return plgpu.inline_mgpu(arg_types=types)  # pyright: ignore[reportReturnType]


@_inline(MATRIX, plgpu.RefType(), plgpu.Layout.WG_SPLAT)
def _store(_, value, ref, block):
    """Stores registers where a block of the cluster has what `ref` is here."""
    index = arith.index_cast(ir.IndexType.get(), block.registers.item())
    value.store_untiled(mgpu.get_cluster_ref(ref, gpu.Dimension.x, index), optimized=False)


@_inline()
def _meet(_):
    for action in ("arrive.release", "wait.acquire"):
        asm = f"barrier.cluster.{action}.aligned;"
        void = ir.Type.parse("!llvm.void")
        llvm.inline_asm(void, [], asm, "~{memory}", has_side_effects=True)
