"""Ways to multiply by a factored matrix, of the layers of GPT-2 and Llama-7B, and what they take.

What is timed, in turns or alone, is for others to say: see tsvd_gpu.py.
"""

import functools
import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp

import sparsax
from sparsax import CommonFactors, TiledFactors, pallas

SHAPES = {
    "gpt2-s up": (768, 3072), "gpt2-s down": (3072, 768), "gpt2-s qkv": (768, 2304),
    "gpt2-m up": (1024, 4096), "gpt2-m down": (4096, 1024), "gpt2-m out": (1024, 1024),
    "gpt2-l up": (1280, 5120), "gpt2-l down": (5120, 1280),
    "llama-7b out": (4096, 4096), "llama-7b up": (4096, 11008), "llama-7b down": (11008, 4096),
}  # fmt: skip
KERNELS = ("products", "fused", "resident", "split")
# TSVD-common's, and their side, from more rows on.
COMMON = {"products": "left", "resident": "right", "shared": "right"}
ROUNDED = 1e-2  # relative error that rounding explains
DRAWN = 2**24 - 3  # numbers: odd, so that the rows of a matrix that needs more are not the same


@functools.cache
def drawn():
    with jax.ensure_compile_time_eval():
        return jax.random.normal(jax.random.key(0), (DRAWN,), jnp.bfloat16)


@functools.partial(jax.jit, static_argnums=1)
def cut(numbers, shape: tuple[int, ...], first, scale):
    size = math.prod(shape)
    numbers = jnp.tile(numbers, 1 + -(-size // DRAWN))
    return jax.lax.dynamic_slice(numbers, (first,), (size,)).reshape(shape) * scale.astype(
        numbers.dtype
    )


def draw(seed: int, *shape: int, scale: float = 1.0):
    """Normal numbers from a stock: to compile what makes them anew for each shape takes longer."""
    return cut(drawn(), shape, seed * 1_000_003 % DRAWN, jnp.float32(scale))


def dense(k: int, n: int, seed: int):
    return (draw(seed, k, n, scale=k**-0.5),)


def svd(ratio: float, k: int, n: int, seed: int):
    rank = round(k * n / ratio / (k + n))
    return draw(seed, k, rank, scale=k**-0.5), draw(seed + 1, rank, n, scale=rank**-0.5)


def tiled(size: int, ratio: float, k: int, n: int, seed: int):
    """Factors u, v of square tiles."""
    rank = round(size / (2 * ratio))
    u = draw(seed, k // size, size, n // size, rank, scale=k**-0.5)
    return u, draw(seed + 1, n // size, k // size, rank, size, scale=rank**-0.5)


def common(side: str, size: int, ratio: float, k: int, n: int, seed: int):
    """Factors of the tiles and the common one, in this order."""
    rank = round(size / ratio)
    own, shared = (
        ((k, n // size, rank), (rank, size))
        if side == "right"
        else ((k // size, rank, n), (size, rank))
    )
    return draw(seed, *own, scale=k**-0.5), draw(seed + 1, *shared, scale=rank**-0.5)


def times_tiled(x, u, v, implementation: str):
    factors = TiledFactors(u, v, pad_in=0, pad_out=0)
    return sparsax.tsvd_matmul(x, factors, implementation=implementation)


def times_common(x, tiles, shared, side: str):
    factors = CommonFactors(tiles, shared, pad=0, side=side)
    return sparsax.tsvd_common_matmul(x, factors, implementation="xla")


def scheduled(x, u, v, schedule: str, side: str | None = None):
    """The kernels' forward pass in one of its forms; with a side, of common factors."""
    if schedule == "shared":
        return pallas.tsvd.shared.forward(x, u, v, None, activation=None)
    if side is not None:
        u, v = pallas.as_tiles(u, v, side)
    options = {"schedule": schedule, "interpret": pallas.interpret()}
    return pallas.tsvd_forward(x, u, v, None, activation=None, **options)


def ways(args, ratio: float, k: int, n: int) -> dict:
    """`(weights of a layer k x n, product, name of the portable way)`; a tile must divide both.

    By name: of a way, then of a side, then of a size. A kernel has a portable way of the same
    factors beside it, the other ways have None.
    """
    found = {"svd": (partial(svd, ratio), lambda x, u, v: (x @ u) @ v, None)}
    fitting = lambda sizes: (size for size in sizes if k % size == n % size == 0)
    for side, size in itertools.product(("right", "left"), fitting(args.common_tiles)):
        make, portable = partial(common, side, size, ratio), f"common {side} {size}"
        found[portable] = make, partial(times_common, side=side), None
        for schedule, of_side in (
            COMMON.items() if args.kernels and round(size / ratio) % 16 == 0 else ()
        ):
            product = partial(scheduled, schedule=schedule, side=side)
            if side == of_side:
                found[f"common-{schedule} {side} {size}"] = make, product, portable
    for size in fitting(args.tiles):
        make, portable = partial(tiled, size, ratio), f"xla {size}"
        found[portable] = make, partial(times_tiled, implementation="xla"), None
        for schedule in KERNELS if args.kernels else ():
            product = partial(scheduled, schedule=schedule)
            found[f"{schedule} {size}"] = make, product, portable
    wanted = lambda name: name.split()[0].split("-")[0] in args.ways
    return {name: way for name, way in found.items() if wanted(name)}


def takes(name: str, rows: int, weights) -> bool:
    """Whether the kernel has a form for these rows and factors."""
    way, *rest = name.split()
    few = rows <= pallas.tsvd.split.ROWS
    if (way == "split" and not few) or (way == "resident" and few):
        return False
    if way.startswith("common-"):
        if few:
            return False
        way = way.removeprefix("common-")
        if way != "shared":
            weights = pallas.shapes_as_tiles(*weights, rest[0])
    form = getattr(pallas.tsvd, way, None)  # the module of a schedule
    return not hasattr(form, "Tiling") or form.Tiling.of(*weights) is not None


def relative_error(name: str, got, want, most: float = ROUNDED) -> float:
    """Relative L2 error; more than rounding is an error."""
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    found = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
    if not found < most:
        raise SystemExit(f"{name} is wrong: relative error {found}")
    return found
