"""The kernels of tiled factors: interpreted against the float32 reference, and lowered."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsax import TiledFactors, pallas, tsvd_matmul
from sparsax.pallas import tsvd
from sparsax.pallas.grouped_matmul import product
from sparsax.pallas.tsvd import products, split
from tests.helpers import TOLERANCES, assert_near, launched
from tests.pallas.cases import cells
from tests.test_linear import Case, multiply

# Ragged rows and features, every width of a tile and of a chunk, sums that no step divides.
CASES = (
    Case(name="plain", M=(128,), D=192, F=128, tile=64, rank=32, dtype="bfloat16"),
    Case(name="ragged_gelu", M=(3, 67), D=300, F=200, tile=128, rank=64, dtype="float16",
         activation="gelu"),
    Case(name="tall_relu", M=(9,), D=256, F=64, tile=(256, 64), rank=64, dtype="bfloat16",
         activation="relu", bias=False),
    Case(name="rank_48", M=(130,), D=128, F=192, tile=64, rank=48, dtype="bfloat16"),
    Case(name="rank_16", M=(1,), D=256, F=320, tile=64, rank=16, dtype="bfloat16"),
    Case(name="wide_silu", M=(200,), D=64, F=512, tile=(64, 256), rank=96, dtype="bfloat16",
         activation="silu"),
)  # fmt: skip
BY_NAME = pytest.mark.parametrize("c", CASES, ids=lambda c: c.name)
# What the fused kernel takes besides.
FUSED = (
    dataclasses.replace(CASES[0], name="fused"), dataclasses.replace(CASES[1], name="fused_gelu"),
    Case(name="fused_deep", M=(64,), D=1024, F=64, tile=(512, 64), rank=32, dtype="bfloat16"),
    Case(name="fused_silu", M=(200,), D=64, F=512, tile=(64, 256), rank=96, dtype="bfloat16",
         activation="silu"),
    Case(name="fused_pair", M=(70,), D=128, F=768, tile=(64, 128), rank=32, dtype="bfloat16"),
)  # fmt: skip

# What the kernel for few rows takes: every rank's and tile's lines, shares that are not equal.
FEW = (
    Case(name="few", M=(1,), D=300, F=250, tile=128, rank=32, dtype="bfloat16"),
    Case(name="few_gelu", M=(2, 9), D=384, F=500, tile=(64, 128), rank=16, dtype="float16",
         activation="gelu"),
    Case(name="few_wide", M=(64,), D=128, F=512, tile=(64, 512), rank=96, dtype="bfloat16",
         bias=False),
    Case(name="few_silu", M=(16,), D=320, F=512, tile=(64, 256), rank=128, dtype="bfloat16",
         activation="silu"),
)  # fmt: skip


def value_and_gradients(c, implementation, dtype):
    """`y` and the gradients of x, factors and bias under jit, from inputs cast to `dtype`."""
    *arguments, dy = jax.tree.map(lambda leaf: leaf.astype(dtype), c.inputs())

    @jax.jit
    def run(arguments, dy):
        call = lambda *a: tsvd_matmul(*a, c.activation, implementation=implementation)
        y, pull = jax.vjp(call, *arguments)
        return y, pull(dy)

    return run(arguments, dy)


def check(c):
    got = value_and_gradients(c, "pallas", c.dtype)
    with jax.default_matmul_precision("highest"):
        want = value_and_gradients(c, "reference", "float32")
    tolerance = TOLERANCES[c.dtype]
    assert got[0].dtype == jnp.dtype(c.dtype)
    assert_near(got[0], want[0], tolerance.output, "y")
    for one, other in zip(*map(jax.tree.leaves, (got[1], want[1])), strict=True):
        assert_near(one, other, tolerance.gradient, "gradient")


@pytest.fixture
def few_blocks(fresh, monkeypatch):
    """Four thread blocks: products are wide, clusters share copies, and all walk over tiles."""
    monkeypatch.setattr(product, "multiprocessors", lambda: 4)
    monkeypatch.setattr(products, "multiprocessors", lambda: 4)
    monkeypatch.setattr(split, "multiprocessors", lambda: 4)


@pytest.fixture(params=["fused", "products"])
def schedule(request, monkeypatch):
    """The only schedule there is."""
    monkeypatch.setattr(tsvd, "best_schedule", lambda *_: request.param)
    return request.param


@BY_NAME
def test_values_and_gradients_match_the_reference(c):
    with pallas.interpreted():
        check(c)


def forward_is_near(c):
    x, factors, bias, _ = c.inputs()
    y = jax.jit(lambda *a: tsvd_matmul(*a, c.activation, implementation="pallas"))(x, factors, bias)
    want = tsvd_matmul(x, factors, bias, c.activation, implementation="reference")
    assert_near(y, want, TOLERANCES[c.dtype].output, "y")


@pytest.mark.parametrize("c", FUSED, ids=lambda c: c.name)
def test_the_fused_kernel_matches_the_reference(c, monkeypatch):
    monkeypatch.setattr(tsvd, "best_schedule", lambda *_: "fused")
    with pallas.interpreted():
        forward_is_near(c)


@pytest.fixture
def few_rows(monkeypatch):
    """The schedule for few rows, whatever the tiles."""
    monkeypatch.setattr(tsvd, "best_schedule", lambda *_: "split")


@pytest.mark.usefixtures("few_rows", "few_blocks")
@pytest.mark.parametrize("c", FEW, ids=lambda c: c.name)
def test_the_kernel_for_few_rows_matches_the_reference(c):
    with pallas.interpreted():
        forward_is_near(c)


@pytest.mark.usefixtures("few_blocks")
@pytest.mark.parametrize("implementation", [None, "pallas"])
def test_few_rows_are_chosen_and_match_the_reference(implementation, monkeypatch):
    monkeypatch.setattr(tsvd, "FEW_TILES", 2)
    x, factors, bias, _ = Case(name="chosen", M=(3,), D=256, F=500, tile=256, rank=16,
                               dtype="bfloat16").inputs()  # fmt: skip
    run = lambda x: tsvd_matmul(x, factors, bias, "gelu", implementation=implementation)
    batch = jnp.stack([x, 2 * x])
    with pallas.interpreted():
        assert "tsvd_split" in str(jax.make_jaxpr(run)(x))
        got, both = jax.jit(run)(x), jax.jit(jax.vmap(run))(batch)
    want = lambda x: tsvd_matmul(x, factors, bias, "gelu", implementation="reference")
    assert_near(got, want(x), TOLERANCES["bfloat16"].output, "y")
    assert_near(both, want(batch), TOLERANCES["bfloat16"].output, "y of a batch")


RACING = Case(name="races", M=(330,), D=192, F=256, tile=64, rank=64, dtype="bfloat16")


@pytest.mark.usefixtures("few_blocks", "no_races")
def test_no_races_forward(schedule):
    with pallas.interpreted(detect_races=True):
        forward_is_near(dataclasses.replace(RACING, M=(200,) if schedule == "fused" else (330,)))


@pytest.mark.usefixtures("few_rows", "few_blocks", "no_races")
def test_no_races_of_few_rows():
    with pallas.interpreted(detect_races=True):
        forward_is_near(FEW[0])


@pytest.mark.usefixtures("few_blocks", "no_races")
def test_no_races_backward():
    c = dataclasses.replace(RACING, F=128)
    x, factors, _, dy = c.inputs()
    arguments = x, factors.u, factors.v, dy
    with pallas.interpreted(detect_races=True):
        run = lambda *a: pallas.tsvd_backward(*a, interpret=pallas.interpret())
        got = jax.block_until_ready(jax.jit(run)(*arguments))
    wide = jax.tree.map(lambda leaf: leaf.astype("float32"), (x, factors, dy))
    _, pull = jax.vjp(lambda x, f: tsvd_matmul(x, f, implementation="reference"), *wide[:2])
    dx, dfactors = pull(wide[2])
    for name, one, want in zip(("dx", "du", "dv"), got, (dx, dfactors.u, dfactors.v), strict=True):
        assert_near(one, want, TOLERANCES[c.dtype].gradient, name)


@pytest.mark.gpu
@BY_NAME
def test_values_and_gradients_match_the_reference_on_the_gpu(c):
    check(c)
    one, two = (value_and_gradients(c, "pallas", c.dtype) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, two)


# Enough tiles to keep every multiprocessor busy: clusters share copies there.
LARGE = (
    Case(name="large", M=(4, 2048), D=1024, F=4096, tile=256, rank=32, dtype="bfloat16"),
    Case(name="large_ragged", M=(5001,), D=1000, F=3000, tile=256, rank=64, dtype="bfloat16"),
    Case(name="large_decode", M=(16,), D=4096, F=4096, tile=256, rank=32, dtype="bfloat16"),
)


@pytest.mark.gpu
@pytest.mark.parametrize("c", LARGE, ids=lambda c: c.name)
def test_large_products_match_the_reference_on_the_gpu(c):
    check(c)
    one, two = (value_and_gradients(c, "pallas", c.dtype) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.gpu
@pytest.mark.parametrize("c", [*FUSED, *LARGE], ids=lambda c: c.name)
def test_the_fused_kernel_matches_the_reference_on_the_gpu(c, monkeypatch):
    monkeypatch.setattr(tsvd, "best_schedule", lambda *_: "fused")
    forward_is_near(c)


@pytest.mark.gpu
@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("c", [*FEW, LARGE[2]], ids=lambda c: c.name)
def test_the_kernel_for_few_rows_matches_the_reference_on_the_gpu(c):
    forward_is_near(c)


BACKWARD = {"hidden", "dhidden", "dx", "du", "dv"}
FORWARD = {"fused": {"fused"}, "products": {"hidden", "out"}}


def kernels(text):
    """The names of the kernels in a lowered program."""
    return set(re.findall(r"tsvd_(\w+?)_mosaic_gpu", text))


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
    assert kernels(text) == FORWARD["products"] | BACKWARD


@pytest.mark.parametrize(("size", "rank"), list(itertools.product((64, 256), (64, 128))))
def test_the_fused_kernel_lowers(size, rank):
    text = lower(size, rank, "bfloat16", rows=8192, num_out=8)
    assert launched(text) == 6
    assert kernels(text) == FORWARD["fused"] | BACKWARD


@pytest.mark.parametrize(("size", "rank"), list(itertools.product((128, 256, 512), (16, 96, 128))))
def test_the_kernel_for_few_rows_lowers(size, rank):
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    run = jax.jit(lambda *a: pallas.tsvd_forward(*a, None, activation="relu", schedule="split"))
    with pallas.lowering():
        traced = run.trace(of(3, 5 * size), of(5, size, 7, rank), of(7, 5, rank, size))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert kernels(text) == {"split"}


@pytest.mark.parametrize(
    ("rows", "rank", "gradient", "found"),
    [
        (4096, 64, False, True), (4095, 64, False, False), (4096, 64, True, False),
        (4096, 8, False, False),
    ],
)  # fmt: skip
def test_none_runs_the_kernels_where_they_are_faster(rows, rank, gradient, found):
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    factors = TiledFactors(of(3, 64, 4, rank), of(4, 3, rank, 64), pad_in=0, pad_out=0)

    def run(x, factors):
        return tsvd_matmul(x, factors).astype(jnp.float32).sum()

    with pallas.lowering():
        traced = jax.jit(jax.grad(run) if gradient else run).trace(of(rows, 192), factors)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert bool(kernels(text)) == found


# Rows, tile, rank, columns of tiles; the kernels that run forward.
FEW_CHOSEN = [
    (1, 256, 16, 16, {"split"}), (16, 256, 64, 16, {"split"}), (17, 256, 64, 16, set()),
    (16, 256, 80, 16, set()), (16, 512, 64, 16, set()), (16, 256, 64, 15, set()),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "size", "rank", "num_out", "found"), FEW_CHOSEN)
def test_none_runs_the_kernel_for_few_rows_where_it_is_faster(rows, size, rank, num_out, found):
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    u, v = of(4, size, num_out, rank), of(num_out, 4, rank, size)
    factors, x = TiledFactors(u, v, pad_in=0, pad_out=0), of(rows, 4 * size)

    def lowered(run, *arrays):
        with pallas.lowering():
            traced = jax.jit(run).trace(*arrays)
            return kernels(traced.lower(lowering_platforms=("cuda",)).as_text())

    assert lowered(tsvd_matmul, x, factors) == found
    named = lambda *a: tsvd_matmul(*a, implementation="pallas")
    assert lowered(named, x, factors) == (found or {"hidden", "out"})
    # Gradients, and a batch of few rows, which is many, are XLA's.
    squares = lambda *a: (tsvd_matmul(*a).astype(jnp.float32) ** 2).sum()
    assert not lowered(jax.grad(squares, (0, 1)), x, factors)
    batched = jax.vmap(tsvd_matmul, (0, None))
    assert not lowered(batched, of(5, *x.shape), factors)


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
def test_activations_lower_in_the_epilogue(activation, schedule):
    x, factors, bias, _ = CASES[0].inputs()
    with pallas.lowering():
        run = jax.jit(lambda *a: tsvd_matmul(*a, activation, implementation="pallas"))
        text = run.trace(x, factors, bias).lower(lowering_platforms=("cuda",)).as_text()
    assert launched(text) == len(FORWARD[schedule])
    assert kernels(text) == FORWARD[schedule]
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
    assert kernels(text.as_text()) == {"split"}


@pytest.mark.parametrize("model", [over_layers, sharded, over_factors])
def test_gradients_lower_within_transformations(model, schedule):
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    factors = TiledFactors(of(3, 2, 128, 2, 32), of(3, 2, 2, 32, 128), pad_in=0, pad_out=0)
    loss = lambda *a: (model(*a).astype(jnp.float32) ** 2).sum()
    with pallas.lowering():
        step = jax.jit(jax.grad(loss, (0, 1))).trace(of(512, 256), factors)
        text = step.lower(lowering_platforms=("cuda",)).as_text()
    assert kernels(text) == FORWARD[schedule] | BACKWARD


@pytest.mark.parametrize(
    ("rows", "num_out", "rank", "columns", "schedule"),
    [(8192, 16, 64, 256, "fused"), (8192, 16, 32, 256, "products"), (64, 16, 64, 256, "products"),
     (8192, 16, 64, 512, "products"), (8192, 16, 48, 256, "products"),
     # Of 6 outputs two thread blocks share copies of x, of 43 none do.
     (8192, 6, 64, 256, "products"), (8192, 6, 128, 256, "fused"),
     (8192, 43, 64, 256, "products"), (8192, 43, 128, 256, "products")],
)  # fmt: skip
def test_the_schedule_that_reads_less_is_chosen(rows, num_out, rank, columns, schedule):
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    u, v = of(16, 256, num_out, rank), of(num_out, 16, rank, columns)
    assert tsvd.best_schedule(rows, u, v) == schedule


@pytest.mark.parametrize(
    ("batch", "rows", "columns", "wanted"),
    [(16, 8192, 512, (256, 2)), (16, 16, 512, (64, 1)), (4, 1024, 320, (64, 2)),
     (1, 128, 64, (64, 1)), (16, 8192, 192, (64, 2)), (3, 384, 256, (64, 1))],
)  # fmt: skip
def test_tiles_are_wide_where_there_are_enough(batch, rows, columns, wanted):
    assert products.tiles(batch, rows, columns) == wanted


REFUSED = {
    "float32": ({"dtype": "float32"}, "takes x and factors in one of .* got float32"),
    "rank": ({"rank": 24}, r"takes ranks in multiples of 16; got 24, see .*pad_rank\(16\)"),
    "tile": ({"tile": 48}, "takes tiles in multiples of 64; got 48 x 48"),
    "activation": ({"activation": "gelu_exact"}, "takes activation .* got 'gelu_exact'"),
    "common": ({"side": "right"}, "has no kernel for common factors"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernel_cannot_do_is_refused(name):
    changes, message = REFUSED[name]
    c = dataclasses.replace(CASES[0], **changes)
    x, factors, bias, _ = c.inputs()
    with pallas.lowering(), pytest.raises(NotImplementedError, match=message):
        multiply(x, factors, bias, c.activation, implementation="pallas")


def test_a_machine_without_hopper_is_refused():
    x, factors, *_ = CASES[0].inputs()
    with pytest.raises(NotImplementedError, match=r"needs an NVIDIA Hopper GPU.*'xla' runs this"):
        tsvd_matmul(x, factors, implementation="pallas")
