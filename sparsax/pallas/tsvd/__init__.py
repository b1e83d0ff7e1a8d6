"""Products with tiled factors: two batched matmuls, two fused kernels, or one for few rows."""

import functools
import math
import typing

import jax
import jax.numpy as jnp

from sparsax.pallas.activations import ACTIVATIONS
from sparsax.pallas.support import DTYPES, on_hopper, vary
from sparsax.pallas.tsvd import fused, products, resident, shared, split
from sparsax.pallas.tsvd.choice import FEW as FEW
from sparsax.pallas.tsvd.choice import (
    Schedule,
    best_schedule,
    common_is_faster,
    few_are_faster,
    many_are_faster,
    stays_shared,
)

LINE = 64  # numbers of 16 bits in a line of shared memory
# What divides tiles and ranks: a chunk's columns, a matrix instruction's depth.
ALIGNMENT = LINE, 16


def as_tiles(tiles, common, side: typing.Literal["left", "right"]):
    """`(u, v)` of a matrix whose tiles share a factor, as tiles with factors of their own.

    One row of tiles as high as the matrix, which all have the common factor as v; or one column of
    tiles, which all have it as u. It is so small that copies of it cost nothing. In a row tiles of
    small rank are joined to one whose ranks fill a line, with the factor in blocks on a diagonal.
    """
    if side == "right":
        num_out, rank = tiles.shape[1:]
        many = math.gcd(LINE // rank, num_out) if LINE % rank == 0 else 1
        joined = jnp.kron(jnp.eye(many, dtype=common.dtype), common)
        u = tiles.reshape(1, len(tiles), num_out // many, many * rank)
        return u, jnp.broadcast_to(joined, (num_out // many, 1, *joined.shape))
    size, rank = common.shape
    return jnp.broadcast_to(common[:, None], (len(tiles), size, 1, rank)), tiles[None]


def shapes_as_tiles(tiles, common, side: typing.Literal["left", "right"]):
    """What `as_tiles` gives, as shapes and dtypes: nothing is computed."""
    return jax.eval_shape(functools.partial(as_tiles, side=side), tiles, common)


def tsvd_refusal(x, u, v, activation: str | None) -> str | None:
    """Why the kernels cannot take these arrays, forward or backward; None if they can."""
    (_, size, _, rank), columns = u.shape, v.shape[3]
    if str(x.dtype) not in DTYPES:
        return f"takes x and factors in one of {DTYPES}; got {x.dtype}"
    if activation not in (None, *ACTIVATIONS):
        return f"takes activation None or one of {tuple(ACTIVATIONS)}; got {activation!r}"
    if size % ALIGNMENT[0] or columns % ALIGNMENT[0]:
        return (
            f"takes tiles, and features that no tile cuts, in multiples of {ALIGNMENT[0]}; got "
            f"{size} x {columns}"
        )
    if rank % ALIGNMENT[1]:
        return f"takes ranks in multiples of 16; got {rank}, see pad_rank(16) of the factors"
    if not on_hopper():
        return f"needs an NVIDIA Hopper GPU; the default device is {jax.devices()[0].device_kind}"
    return None


def tsvd_is_faster(x, u, v, activation: str | None) -> bool:
    """Whether the kernels can run, and were measured to be faster than XLA (forward alone)."""
    rows = x.size // x.shape[-1]
    if not isinstance(rows, int):  # a dimension is symbolic
        return False
    faster = few_are_faster(rows, u, v) or many_are_faster(rows, u, v)
    return faster and tsvd_refusal(x, u, v, activation) is None


def tsvd_common_is_faster(x, tiles, common, side, activation: str | None) -> bool:
    """The same with a common factor."""
    rows = x.size // x.shape[-1]
    if not (isinstance(rows, int) and common_is_faster(rows, tiles, common, side)):
        return False
    u, v = shapes_as_tiles(tiles, common, side)
    return tsvd_refusal(x, u, v, activation) is None


def tsvd_forward(
    x, u, v, bias, *, activation: str | None, schedule: Schedule | None = None, interpret=None
):  # fmt: skip
    """`activation(x w + bias)` `[M, J*C]`, w given by the factors of its tiles."""
    schedule = schedule or best_schedule(len(x), u, v)
    return _forward(x, u, v, bias, activation, schedule, interpret)


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _forward(x, u, v, bias, activation: str | None, schedule: Schedule, interpret):
    forms = {"fused": fused, "products": products, "resident": resident, "split": split}
    run = forms[schedule].forward
    y = run(x, u, v, bias, activation=activation, interpret=interpret)
    return vary(y, (x, u, v, bias))


def tsvd_common_forward(
    x, tiles, common, bias, *, side: typing.Literal["left", "right"], activation: str | None,
    interpret=None,
):  # fmt: skip
    """The same of tiles and their common factor."""
    if side == "right" and stays_shared(len(x), tiles, common):
        return _shared(x, tiles, common, bias, activation, interpret)
    u, v = as_tiles(tiles, common, side)
    return tsvd_forward(x, u, v, bias, activation=activation, interpret=interpret)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _shared(x, tiles, common, bias, activation: str | None, interpret):
    y = shared.forward(x, tiles, common, bias, activation=activation, interpret=interpret)
    return vary(y, (x, tiles, common, bias))


@functools.partial(jax.jit, static_argnames="interpret")
def tsvd_backward(x, u, v, dy, *, interpret=None):
    """`(dx, du, dv)`; the product `x u` is computed again."""
    return vary(products.backward(x, u, v, dy, interpret=interpret), (x, u, v, dy))
