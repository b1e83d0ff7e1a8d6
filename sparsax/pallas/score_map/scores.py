"""What both passes share: scaled scores of a tile, one product ahead of what uses them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsax.pallas.block_sparse import masks
from sparsax.pallas.block_sparse.problem import Columns, Problem
from sparsax.pallas.hopper import SHARED_BYTES, WG_ROWS, Ring, TensorCores


def stages(slot: int, rest: int) -> int:
    """How many slots of so many bytes a ring may have beside the rest of shared memory."""
    return min(4, (SHARED_BYTES - rest) // slot)


def split_ids(refs, ids: bool) -> tuple[tuple[Any, Any], Any]:
    """`((q_ids, kv_ids) or two None, the operands that follow)`."""
    return (refs[:2], refs[2:]) if ids else ((None, None), refs)


def columns_of(x: Problem) -> Columns:
    """Tiles of keys, one after another."""
    return Columns(x.block_kv, x.block_kv, x.q_bounds)


def kept(columns: Columns, first_row, step, ids=None):
    """Boolean `[64, tile]`: which pairs of a warpgroup's rows and the keys of a tile attend."""
    start = step * columns.tile
    ids = ids and ((ids[0],), (ids[1],))
    return masks.kept(columns, ([start], [None]), first_row, WG_ROWS, ids)


def copy_keys(k, kv_ids, sample, kv_head, keys, k_slot, ids_slot, filled) -> None:
    """Starts the copies of a tile of keys and, where there are, of its ids."""
    plgpu.copy_gmem_to_smem(k.at[sample, keys, kv_head], k_slot, filled)
    if ids_slot is not None:
        plgpu.copy_gmem_to_smem(kv_ids.at[sample, keys], ids_slot, filled)


def each_tile(
    cores: TensorCores,
    ring: Ring,
    begun,
    steps,
    operands: Callable[[Any], tuple[Any, Any]],
    prepare: Callable[[Any, bool], Callable[..., jax.Array]],
    use: Callable[..., Any],
    carry,
    whole: Any = None,
):
    """`carry = use(scores of the step, carry)` for at least one step, from `begun` in the ring.

    While the tensor cores multiply the tile of a step, the warpgroup uses the one before it.
    `operands(step)` are the two factors in shared memory. `prepare(step, partial)` reads early what
    takes long, and returns `finish`; `finish(get)` makes scores of the product that `get()` waits
    for. Of so many `whole` tiles none but the first is called partial; None: no tile is.
    """

    def start(step, partial, then):
        finish = prepare(step, partial)
        ring.wait(begun + step)

        def and_release(get):
            carry = then()
            s = finish(get)
            cores.release(ring, begun + step)
            return s, carry

        return cores.start([(None, *operands(step))], and_release)

    def advance(step, state, partial=False):
        s, carry = state

        return start(step, partial, lambda: use(s, carry))

    state = start(jnp.int32(0), whole is not None, lambda: carry)
    end = steps if whole is None else jnp.clip(whole, 1, steps)
    state = lax.fori_loop(1, end, advance, state)
    if whole is not None:
        state = lax.fori_loop(end, steps, functools.partial(advance, partial=True), state)
    return use(*state)
