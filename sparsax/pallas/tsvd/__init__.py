"""Products with tiled factors: two batched matmuls, two fused kernels, or one for few rows."""

import functools
import math
import typing

import jax
import jax.numpy as jnp

from sparsax.pallas.activations import ACTIVATIONS
from sparsax.pallas.hopper import multiprocessors
from sparsax.pallas.support import DTYPES, on_hopper, vary
from sparsax.pallas.tsvd import fused, products, resident, shared, split

Schedule = typing.Literal["fused", "products", "resident", "split"]
# Rows and numbers of a matrix from which on the kernels are ahead of XLA.
MANY, LARGE = 4096, 2**20
LARGE_LEFT = 2**22  # the same numbers where the left factor is common
SOME, LARGER = 512, 2**22  # the same of fewer rows, but for tiles of 256 with ranks of 32 and more
FUSED_TILES = 32  # of its output, rows by 128, from which on the fused kernel has a GPU to fill
RESIDENT_TILES = 128  # the same of "resident"
SHARED_TILES = 96  # and of "shared"
FULL = 0.9  # of the columns of the latter's tiles, at least, are the matrix'
FEW, FEWER = 64, 16  # rows at most
FEW_TILES, FEW_RANKS = 64, 27 * 64  # tiles, or their ranks in all, at least
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
    faster = few_are_faster(rows, u, v) or _many_are_faster(rows, u, v)
    return faster and tsvd_refusal(x, u, v, activation) is None


def tsvd_common_is_faster(x, tiles, common, side, activation: str | None) -> bool:
    """The same with a common factor, from 4,096 rows on.

    Of layers of GPT-2 and Llama-7B, with tiles of 128 and 256 at 2x, 4x and 8x on an H200, where
    this says yes: on the right, the kernel whose common factor stays took .62 to 1.04 of XLA's
    time, .79 in the mean of 49 cases; on the left, where features do not become fewer, the
    two products .77 to 1.03, .93 in the mean of 30. Where they do these took 1.09 in the mean.
    """
    rank, size = common.shape if side == "right" else common.shape[::-1]
    rows = x.size // x.shape[-1]
    if not isinstance(rows, int) or rows < MANY:
        return False
    u, v = shapes_as_tiles(tiles, common, side)
    if side == "right":
        chosen = stays_shared(rows, tiles, common)
    else:
        whole = tiles.shape[2] >= x.shape[-1] and tiles.size // rank * size >= LARGE_LEFT
        chosen = whole and size <= 256 and best_schedule(rows, u, v) == "products"
    return chosen and tsvd_refusal(x, u, v, activation) is None


def stays_shared(rows: int, tiles, common) -> bool:
    """Whether "shared" computes the product with a common right factor.

    It does where its tiles fill the GPU and little of the last ones lies beyond the matrix.
    """
    _, num_out, rank = tiles.shape
    own, whole = num_out * rank, -(-num_out * rank // shared.WIDTH) * shared.WIDTH
    fills = shared.items(rows, tiles) >= SHARED_TILES and own >= FULL * whole
    return fills and shared.Tiling.of(tiles, common) is not None


def few_are_faster(rows: int, u, v) -> bool:
    """Whether "split" was measured to be the fastest way with such factors.

    Of 171 cases of layers of GPT-2 and Llama-7B with 1, 16 and 64 rows, and tiles of 256, 512 and
    1,024, on an H200, it was by more than 5 % where this says no in seven, and 5 % behind where
    this says yes in one. One row of fewer ranks is faster through it, too, but in a decoder XLA
    joins the first products of queries, keys and values. The 64 rows were not timed in a chain of
    layers: factors could stay in the cache.
    """
    num_in, size, num_out, rank = u.shape
    if not (size == v.shape[3] and 1 <= rows <= FEW):
        return False
    tiles = num_in * num_out
    if rows == 1 and tiles >= FEW_TILES:
        return (size == 256 and rank <= 64) or (size == 512 and 32 <= rank <= 128)
    if rows > FEWER and not (rank == 64 or num_in > num_out):
        return False
    return size == 256 and 32 <= rank <= 64 and tiles * rank >= FEW_RANKS


def _many_are_faster(rows: int, u, v) -> bool:
    """The same of the other three, with 512 rows and more.

    Where this says yes they took .53 to 1.04 of XLA's time with 512 rows, .74 in the mean of 47
    cases, and .11 to 1.06, .70 in the mean of 114, with 4,096 and 8,192.
    """
    (num_in, size, num_out, rank), columns = u.shape, v.shape[3]
    numbers = num_in * size * num_out * columns
    if rows >= MANY:
        return numbers >= LARGE
    if rows < SOME or not size == columns >= 256:
        return False
    return numbers >= (LARGE if size == 256 and rank >= 32 else LARGER)


def best_schedule(rows: int, u, v) -> Schedule:
    """Which way to compute `x w` for so many rows; few of them as `few_are_faster` says.

    By layers of GPT-2 and Llama-7B on an H200. The fused kernel is chosen where it has a tiling
    (see `fused.Tiling.of`) whose tiles, J for every 128 rows, fill a quarter of the GPU. From 4,096
    rows on ranks must be 64 or more and J odd, which makes the products' tiles narrow: with tiles
    of 256 it took .65 to .90 of their time, with an even J .96 to 1.24. With fewer rows there must
    be fewer rows of tiles than columns, .68 to .90 of their time with 512; ranks of 32 are enough
    as long as all its tiles run at once.

    The one that keeps `x u` is, where it has little to keep: with one row of tiles of 1,024 it took
    .75 to 1.06 of the products' time, with two of 512 .77 to 1.03. With four rows of tiles it keeps
    four times as much, leaves too few slots for what is on its way, and takes 1.1 to 1.35 times as
    long as they do for 4,096 x 4,096.
    """
    if few_are_faster(rows, u, v):
        return "split"
    (num_in, size, num_out, rank), tiles = u.shape, _tiles(rows, u)
    little = num_in == 1 or (num_in, size) == (2, 512)
    full = rows >= MANY and tiles >= RESIDENT_TILES
    if little and full and resident.Tiling.of(u, v, rows) is not None:
        return "resident"
    if rows >= MANY:
        ahead = rank >= 64 and num_out % 2 == 1
    else:
        at_once = rows >= SOME and tiles <= multiprocessors()
        ahead = num_in < num_out and (rank >= 64 or at_once)
    full = ahead and tiles >= FUSED_TILES
    return "fused" if full and fused.Tiling.of(u, v) is not None else "products"


def _tiles(rows: int, u) -> int:
    """How many tiles of the output the fused kernels compute."""
    return -(-rows // fused.ROWS) * u.shape[2]


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
