"""Which kernel multiplies by factored tiles, and where one is faster than XLA: what was measured.

Layers of GPT-2 and Llama-7B on an H200 (docs/tsvd.md); the tests compare with the results.
"""

import typing

from sparsax.pallas.hopper import multiprocessors
from sparsax.pallas.tsvd import fused, resident, shared

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


def many_are_faster(rows: int, u, v) -> bool:
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


def common_is_faster(rows: int, tiles, common, side: str) -> bool:
    """Whether a kernel was measured to be faster with a common factor, from 4,096 rows on.

    Of layers of GPT-2 and Llama-7B, with tiles of 128 and 256 at 2x, 4x and 8x on an H200, where
    this says yes: on the right, the kernel whose common factor stays took .62 to 1.04 of XLA's
    time, .80 in the mean of 49 cases; on the left, where features do not become fewer, the
    two products .77 to 1.03, .94 in the mean of 30. Where they do these took 1.12 in the mean.
    """
    if rows < MANY:
        return False
    if side == "right":
        (features, num_out, _), size = tiles.shape, common.shape[1]
        measured = 128 <= size <= 256 and features * num_out * size >= LARGE
        return measured and stays_shared(rows, tiles, common)
    (num_in, _, columns), size = tiles.shape, common.shape[0]
    numbers = num_in * size * columns
    return size <= 256 and columns >= num_in * size and numbers >= LARGE_LEFT


def stays_shared(rows: int, tiles, common) -> bool:
    """Whether "shared" computes the product with a common right factor.

    It does where its tiles fill the GPU and little of the last ones lies beyond the matrix.
    """
    _, num_out, rank = tiles.shape
    own, whole = num_out * rank, -(-num_out * rank // shared.WIDTH) * shared.WIDTH
    fills = shared.items(rows, tiles) >= SHARED_TILES and own >= FULL * whole
    return fills and shared.Tiling.of(tiles, common) is not None
