"""Visiting lists of very different lengths without paying for the longest."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

# Rows handled by one step, largest first: wide steps keep matmuls big, and the last 1 means that
# no step ever holds an idle row, so the work is exactly that of the listed blocks.
STEP_SIZES = (64, 8, 1)


def walk_lists(counts, visit: Callable, carry):
    """Calls `carry = visit(rows, slot, carry)` until every entry of every list was visited once.

    Rows are sorted longest first: those that still have a `slot`-th entry are then a prefix, cut
    into steps of a static size. The rows of one step are distinct, so a step may overwrite its
    rows' accumulators: no atomics, and two runs give the same bits.

    Args:
        counts: entries of every list, int32 `[R]`; counts below 1 are never visited.
        visit: takes `rows [size]`, a scalar slot and the carry; returns the new carry.
        carry: any pytree.

    Returns:
        The carry after the last visit.
    """
    order = jnp.argsort(-counts, stable=True)

    def visit_slot(slot, carry):
        active = jnp.sum(counts > slot)
        start = jnp.zeros((), active.dtype)
        for size in (size for size in STEP_SIZES if size <= counts.shape[0]):
            steps = (active - start) // size

            def step(c, carry, size=size, start=start):
                rows = lax.dynamic_slice(order, (start + c * size,), (size,))
                return visit(rows, slot, carry)

            carry = lax.fori_loop(0, steps, step, carry)
            start = start + steps * size
        return carry

    return lax.fori_loop(0, jnp.maximum(counts.max(), 0), visit_slot, carry)


def take(array, rows):
    """`array[rows]` along the first axis; the rows are known to be inside."""
    return array.at[rows].get(mode="promise_in_bounds")


def varying_zero(*arrays):
    """A float32 0 that varies over every mesh axis that one of the arrays varies over.

    Inside `jax.shard_map` a loop's carry must start out as varying as it ends; elsewhere a plain 0.
    """
    arrays = [x for x in arrays if x is not None and x.size]
    return sum(jnp.zeros_like(x.reshape(-1)[0], jnp.float32) for x in arrays)


def vary_alike(arrays, *others) -> tuple[Any, ...]:
    """The arrays varying over the same mesh axes inside `jax.shard_map`; elsewhere as they are.

    Keys that are replicated while queries are sharded by head, or weights while rows are, get the
    sum of their gradients from the transpose of this promotion. The condition is a constant, so
    that XLA removes the choice. None stays None.
    """
    always = varying_zero(*arrays, *others) == 0
    return tuple(None if x is None else jnp.where(always, x, x) for x in arrays)


def put(array, rows, values):
    """`array` with its distinct `rows` replaced."""
    return array.at[rows].set(values, mode="promise_in_bounds", unique_indices=True)
