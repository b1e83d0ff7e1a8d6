"""The kernels of tiled factors lower for CUDA without a GPU, and which of them is chosen where."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsax import TiledFactors, pallas, tsvd_matmul
from sparsax.pallas import tsvd
from sparsax.pallas.tsvd import products, resident
from tests.helpers import launched, tsvd_kernels
from tests.pallas.cases import cells
from tests.pallas.test_tsvd import CASES

BACKWARD = {"hidden", "dhidden", "dx", "du", "dv"}
FORWARD = {"fused": {"fused"}, "products": {"hidden", "out"}}


FITS = list(itertools.product((64, 192, 256, 512), (16, 32, 96, 128), ("bfloat16", "float16")))


def lower(size, rank, dtype, rows=200, num_out=5):
    of = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)
    u, v = of(3, size, num_out, rank), of(num_out, 3, rank, size)
    factors = TiledFactors(u, v, pad_in=0, pad_out=0)
    x, bias = of(rows, 3 * size), of(num_out * size)

    def loss(*a):
        y = tsvd_matmul(*a, implementation="pallas")
        return (y.astype(jnp.float32) ** 2).sum()

    with pallas.lowering():
        step = jax.jit(jax.grad(loss, (0, 1, 2))).trace(x, factors, bias)
        return step.lower(lowering_platforms=("cuda",)).as_text()


def kept(size, rank, dtype):
    """Every size with every rank, in one dtype; each size and each rank in both."""
    in_float16 = (size, rank) in ((64, 128), (192, 16), (256, 96), (512, 32))
    return in_float16 == (dtype == "float16")


@pytest.mark.parametrize(("size", "rank", "dtype"), cells(FITS, kept))
def test_the_kernels_lower_forward_and_backward(size, rank, dtype):
    text = lower(size, rank, dtype)
    # Two forward; x u again, its gradient, dx, du and dv.
    assert launched(text) == 7
    assert tsvd_kernels(text) == FORWARD["products"] | BACKWARD


@pytest.mark.parametrize(("size", "rank"), list(itertools.product((64, 256), (64, 128))))
def test_the_fused_kernel_lowers(size, rank):
    text = lower(size, rank, "bfloat16", rows=8192, num_out=9)
    assert launched(text) == 6
    assert tsvd_kernels(text) == FORWARD["fused"] | BACKWARD


@pytest.mark.parametrize(("size", "rank"), [(128, 64), (128, 128), (192, 64), (1024, 64)])
def test_the_kernel_that_keeps_products_lowers(size, rank):
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    run = jax.jit(lambda *a: pallas.tsvd_forward(*a, activation="relu", schedule="resident"))
    with pallas.lowering():
        arrays = of(300, 2 * size), of(2, size, 4, rank), of(4, 2, rank, size), of(4 * size)
        text = run.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert tsvd_kernels(text) == {"resident"}


@pytest.mark.parametrize(
    ("rows", "num_in", "size", "num_out", "rank", "columns", "wanted"),
    [(8192, 1, 1024, 8, 64, 1024, (2, 6)), (4096, 1, 1024, 4, 64, 1024, (1, 8)),
     (4096, 1, 1024, 4, 128, 1024, (1, 6)), (8192, 4, 1024, 4, 64, 1024, (1, 6)),
     (100, 2, 128, 3, 64, 192, (1, 8)), (8192, 4, 1024, 4, 128, 1024, None),
     (8192, 1, 1024, 4, 96, 1024, None), (8192, 1, 96, 4, 64, 1024, None),
     (8192, 1, 1024, 4, 256, 1024, (1, 4)), (8192, 1, 4096, 16, 64, 256, (4, 4)),
     (8192, 1, 1024, 4, 512, 1024, None)],
)  # fmt: skip
def test_what_the_kernel_that_keeps_products_has_a_tiling_for(
    rows, num_in, size, num_out, rank, columns, wanted
):
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    u, v = of(num_in, size, num_out, rank), of(num_out, num_in, rank, columns)
    found = resident.Tiling.of(u, v, rows)
    assert found == (wanted and resident.Tiling(*wanted))


@pytest.mark.parametrize(("size", "rank"), list(itertools.product((128, 256, 512), (16, 96, 128))))
def test_the_kernel_for_few_rows_lowers(size, rank):
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    run = jax.jit(lambda *a: pallas.tsvd_forward(*a, None, activation="relu", schedule="split"))
    with pallas.lowering():
        traced = run.trace(of(3, 5 * size), of(5, size, 7, rank), of(7, 5, rank, size))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert tsvd_kernels(text) == {"split"}


@pytest.mark.parametrize(
    ("rows", "rank", "gradient", "found"),
    [
        (4096, 64, False, True), (4095, 64, False, False), (4096, 64, True, False),
        (4096, 8, False, False),
    ],
)  # fmt: skip
def test_none_runs_the_kernels_where_they_are_faster(rows, rank, gradient, found):
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    factors = TiledFactors(of(8, 128, 8, rank), of(8, 8, rank, 128), pad_in=0, pad_out=0)

    def run(x, factors):
        return tsvd_matmul(x, factors).astype(jnp.float32).sum()

    with pallas.lowering():
        traced = jax.jit(jax.grad(run) if gradient else run).trace(of(rows, 1024), factors)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert bool(tsvd_kernels(text)) == found


# Rows, tile, rank, columns of tiles; the kernels that run forward.
CHOSEN = [
    (1, 256, 16, 16, {"split"}), (16, 256, 64, 16, {"split"}), (64, 256, 64, 16, {"split"}),
    (65, 256, 64, 16, set()), (64, 256, 64, 6, set()), (16, 256, 32, 16, {"split"}),
    (17, 256, 32, 16, set()),
    (16, 256, 80, 16, set()), (16, 512, 64, 16, set()), (16, 256, 64, 6, set()),
    (1, 256, 16, 15, set()), (16, 256, 16, 40, set()), (512, 256, 64, 16, {"fused"}),
    (1, 256, 32, 14, {"split"}), (1, 256, 32, 13, set()), (1, 512, 64, 16, {"split"}),
    (1, 512, 16, 16, set()), (512, 256, 32, 8, {"fused"}), (512, 256, 32, 7, FORWARD["products"]),
    (512, 256, 32, 3, set()), (768, 256, 64, 6, {"fused"}), (512, 256, 16, 16, FORWARD["products"]),
    (512, 256, 16, 15, set()), (512, 512, 64, 16, FORWARD["products"]), (512, 512, 64, 3, set()),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "size", "rank", "num_out", "found"), CHOSEN)
def test_none_runs_the_kernel_for_some_rows_where_it_is_faster(rows, size, rank, num_out, found):
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    u, v = of(4, size, num_out, rank), of(num_out, 4, rank, size)
    factors, x = TiledFactors(u, v, pad_in=0, pad_out=0), of(rows, 4 * size)

    def lowered(run, *arrays):
        with pallas.lowering():
            traced = jax.jit(run).trace(*arrays)
            return tsvd_kernels(traced.lower(lowering_platforms=("cuda",)).as_text())

    assert lowered(tsvd_matmul, x, factors) == found
    named = lambda *a: tsvd_matmul(*a, implementation="pallas")
    assert lowered(named, x, factors) == (found or FORWARD["products"])
    # Gradients, and a batch of few rows, which is many, are XLA's.
    squares = lambda *a: (tsvd_matmul(*a).astype(jnp.float32) ** 2).sum()
    assert not lowered(jax.grad(squares, (0, 1)), x, factors)
    if rows <= 64:
        batched = jax.vmap(tsvd_matmul, (0, None))
        assert not lowered(batched, of(5, *x.shape), factors)


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
def test_activations_lower_in_the_epilogue(activation, tsvd_schedule):
    x, factors, bias, _ = CASES[0].inputs()
    with pallas.lowering():
        run = jax.jit(lambda *a: tsvd_matmul(*a, activation, implementation="pallas"))
        text = run.trace(x, factors, bias).lower(lowering_platforms=("cuda",)).as_text()
    assert launched(text) == len(FORWARD[tsvd_schedule])
    assert tsvd_kernels(text) == FORWARD[tsvd_schedule]
    assert not any(
        name in text for name in ("stablehlo.tanh", "stablehlo.logistic", "stablehlo.maximum")
    )


def over_layers(x, factors):
    layer = lambda x, f: (x + tsvd_matmul(x, f, implementation="pallas"), None)
    return jax.lax.scan(jax.checkpoint(layer), x, factors)[0]


def sharded(x, factors):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), "rows")
    spec, none = jax.sharding.PartitionSpec("rows"), jax.sharding.PartitionSpec()
    one = jax.tree.map(lambda leaf: leaf[0], factors)
    call = lambda x, f: tsvd_matmul(x, f, implementation="pallas")
    return jax.shard_map(call, mesh=mesh, in_specs=(spec, none), out_specs=spec)(x, one)


def over_factors(x, factors):
    return jax.vmap(lambda f: tsvd_matmul(x, f, implementation="pallas"))(factors)


def test_few_rows_lower_sharded():
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    factors = TiledFactors(of(8, 256, 8, 32), of(8, 8, 32, 256), pad_in=0, pad_out=0)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), "rows")
    spec, none = jax.sharding.PartitionSpec("rows"), jax.sharding.PartitionSpec()
    run = jax.shard_map(tsvd_matmul, mesh=mesh, in_specs=(spec, none), out_specs=spec)
    with pallas.lowering():
        text = jax.jit(run).trace(of(8, 2048), factors).lower(lowering_platforms=("cuda",))
    assert tsvd_kernels(text.as_text()) == {"split"}


@pytest.mark.parametrize("model", [over_layers, sharded, over_factors])
def test_gradients_lower_within_transformations(model, tsvd_schedule):
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    factors = TiledFactors(of(3, 2, 128, 2, 32), of(3, 2, 2, 32, 128), pad_in=0, pad_out=0)
    loss = lambda *a: (model(*a).astype(jnp.float32) ** 2).sum()
    with pallas.lowering():
        step = jax.jit(jax.grad(loss, (0, 1))).trace(of(512, 256), factors)
        text = step.lower(lowering_platforms=("cuda",)).as_text()
    assert tsvd_kernels(text) == FORWARD[tsvd_schedule] | BACKWARD


@pytest.mark.parametrize(
    ("rows", "num_out", "rank", "columns", "schedule"),
    [(8192, 17, 64, 256, "fused"), (8192, 16, 64, 256, "products"), (8192, 17, 32, 256, "products"),
     (8192, 17, 64, 512, "products"), (8192, 17, 48, 256, "products"),
     (512, 3, 64, 256, "products"), (512, 20, 64, 256, "fused"), (8192, 43, 128, 256, "fused"),
     (512, 20, 32, 256, "fused"), (512, 16, 32, 256, "products"), (512, 34, 32, 256, "products"),
     (64, 16, 64, 256, "split"), (64, 16, 32, 256, "products"), (64, 4, 32, 256, "split"),
     (64, 1, 64, 256, "products"), (65, 16, 64, 256, "products"),
     (16, 16, 32, 256, "split"), (16, 16, 16, 256, "products"), (1, 16, 16, 256, "split")],
)  # fmt: skip
def test_the_schedule_that_was_measured_to_be_faster_is_chosen(
    rows, num_out, rank, columns, schedule
):
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    u, v = of(16, 256, num_out, rank), of(num_out, 16, rank, columns)
    assert tsvd.best_schedule(rows, u, v) == schedule


@pytest.mark.parametrize(
    ("rows", "num_in", "num_out", "rank", "schedule"),
    [(8192, 1, 4, 64, "resident"), (4096, 1, 4, 128, "resident"), (4096, 1, 3, 64, "products"),
     (2048, 1, 8, 64, "products"), (8192, 4, 4, 64, "products"), (8192, 1, 4, 96, "products"),
     (8192, 2, 2, 64, "resident"), (4096, 2, 2, 64, "products"), (8192, 2, 2, 128, "resident")],
)  # fmt: skip
def test_the_kernel_that_keeps_products_is_chosen_where_it_keeps_little(
    rows, num_in, num_out, rank, schedule
):
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    size = 512 if num_in == 2 else 1024
    u, v = of(num_in, size, num_out, rank), of(num_out, num_in, rank, size)
    assert tsvd.best_schedule(rows, u, v) == schedule


@pytest.mark.parametrize(
    ("batch", "rows", "columns", "wanted"),
    [(16, 8192, 512, (256, 2)), (16, 16, 512, (64, 1)), (4, 1024, 320, (64, 2)),
     (1, 128, 64, (64, 1)), (16, 8192, 192, (64, 2)), (3, 384, 256, (64, 1))],
)  # fmt: skip
def test_tiles_are_wide_where_there_are_enough(batch, rows, columns, wanted):
    assert products.tiles(batch, rows, columns) == wanted
