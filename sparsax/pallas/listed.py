"""Rows of arrays at listed positions: gathered to stand together, and put back.

XLA's gathers and scatters find the place of every number for itself. Here a row of all heads is one
copy, and what a pattern wants, of several arrays by several lists, is one launch.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsax.pallas.support import vary

STRIP = 4  # rows of each array that a thread block copies
SPACE = 192 * 1024  # bytes of shared memory for them


class Listed(NamedTuple):
    """Positions in a sequence, distinct ones, as far as they are used."""

    positions: Any  # `[samples, G]`, samples being 1 or B
    counts: Any  # `[samples]`; below 0: none


class Wanted(NamedTuple):
    """What to gather by a list: rows of some arrays `[B, T, N, H]`, `size` of each."""

    listed: Listed
    size: int
    arrays: list[Any]


def gather(wanted: Sequence[Wanted], interpret) -> list[list[jax.Array]]:
    """`[B, size, N, H]` of each array, in the order of its list; zeros where that is unused."""
    asked = [x for x in wanted if x.arrays]
    if not asked:
        return [[] for _ in wanted]
    arrays = [(nth, x) for nth, of_list in enumerate(asked) for x in of_list.arrays]
    kind = lambda x: (x.shape[2:], x.dtype)
    kinds = list(dict.fromkeys(kind(x) for _, x in arrays))
    # A row of zeros; and one of ones, or filling a constant of equal numbers costs a kernel.
    nothing = [np.stack([np.zeros(shape, dtype), np.ones(shape, dtype)]) for shape, dtype in kinds]
    strip, many = _strip([x for _, x in arrays]), len(arrays)

    def kernel(*refs, smem, arrived):
        of_lists, refs = refs[: 2 * len(asked)], refs[2 * len(asked) :]
        sources, zeros, targets = refs[:many], refs[many:-many], refs[-many:]
        sample, begin = lax.axis_index("sample"), lax.axis_index("strip") * strip
        each = zip(of_lists[::2], of_lists[1::2], strict=True)
        places = [_places(*refs, sample, begin, strip) for refs in each]

        def bring(i, nth, x):
            unused = zeros[kinds.index(kind(x))].at[pl.ds(0, 1)]
            for row, (used, place) in zip(smem[i], places[nth], strict=True):
                copy = lambda source, row=row: plgpu.copy_gmem_to_smem(source, row, arrived.at[i])
                of_place = sources[i].at[sample, pl.ds(place, 1)]
                pl.when(used)(lambda copy=copy, of_place=of_place: copy(of_place))
                pl.when(~used)(lambda copy=copy: copy(unused))

        def write(i, *_):
            plgpu.barrier_wait(arrived.at[i])
            for j, row in enumerate(smem[i]):
                plgpu.copy_smem_to_gmem(row, targets[i].at[sample, pl.ds(begin + j, 1)])

        for visit in (bring, write):  # the copies of all arrays are under way before any is awaited
            for i, (nth, x) in enumerate(arrays):
                visit_one = lambda visit=visit, i=i, nth=nth, x=x: visit(i, nth, x)
                pl.when(begin < asked[nth].size)(visit_one)
        plgpu.wait_smem_to_gmem(0)

    results = plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((len(x), asked[nth].size, *x.shape[2:]), x.dtype)
            for nth, x in arrays
        ],
        scratch_types={
            "smem": [_space(x, strip) for _, x in arrays],
            "arrived": plgpu.Barrier(num_arrivals=strip, num_barriers=many),
        },
        grid=(len(arrays[0][1]), max(x.size for x in asked) // strip),
        grid_names=("sample", "strip"),
        kernel_name="compound_gather",
        interpret=interpret,
    )(*(y for x in asked for y in x.listed), *(x for _, x in arrays), *map(jnp.asarray, nothing))
    found = iter(vary(list(results), [(x.listed, x.arrays) for x in asked]))
    return [[next(found) for _ in x.arrays] for x in wanted]


def put(x, listed: Listed, rows, interpret) -> jax.Array:
    """`x [B, T, N, H]`, and in place of its listed rows the first of `rows [B, size, N, H]`.

    Written over in place; x must not vary over axes of a mesh (see `support.vary`).
    """
    strip = _strip([x])

    def kernel(positions, counts, rows, target, *, smem, arrived):
        sample, begin = lax.axis_index("sample"), lax.axis_index("strip") * strip
        for j, row in enumerate(smem):
            plgpu.copy_gmem_to_smem(rows.at[sample, pl.ds(begin + j, 1)], row, arrived)
        places = _places(positions, counts, sample, begin, strip)
        plgpu.barrier_wait(arrived)
        for row, (used, place) in zip(smem, places, strict=True):
            of_place = target.at[sample, pl.ds(place, 1)]
            write = lambda row=row, of_place=of_place: plgpu.copy_smem_to_gmem(row, of_place)
            pl.when(used)(write)
        plgpu.wait_smem_to_gmem(0)

    target = jax.new_ref(x)
    plgpu.kernel(
        kernel,
        out_type=(),
        scratch_types={
            "smem": _space(x, strip), "arrived": plgpu.Barrier(num_arrivals=strip),
        },
        grid=(len(x), rows.shape[1] // strip),
        grid_names=("sample", "strip"),
        kernel_name="compound_put",
        interpret=interpret,
    )(*listed, rows, target)  # fmt: skip
    return jax.freeze(target)


def _places(positions, counts, sample, begin, strip: int) -> list[tuple[Any, Any]]:
    """Whether each entry of a strip is used, and its position: read before any is needed."""
    at = sample if positions.shape[0] > 1 else 0  # all samples may share a list
    count, last = counts[at], jnp.int32(positions.shape[1] - 1)
    entries = [begin + j for j in range(strip)]
    places = [positions[at, jnp.minimum(entry, last)] for entry in entries]
    return [(entry < count, place) for entry, place in zip(entries, places, strict=True)]


def _space(x, strip: int) -> list[Any]:
    """Shared memory of each row apart, since copies want to begin at multiples of 128 bytes."""
    return [plgpu.SMEM((1, *x.shape[2:]), x.dtype) for _ in range(strip)]


def _strip(arrays) -> int:
    """Rows of each array for which there is shared memory, a power of two."""
    row = sum(math.prod(x.shape[2:]) * x.dtype.itemsize for x in arrays)
    return min(STRIP, 1 << (max(1, SPACE // row).bit_length() - 1))
