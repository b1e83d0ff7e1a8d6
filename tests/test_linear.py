import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec

from sparsax import (
    CommonFactors,
    TiledFactors,
    tsvd,
    tsvd_common,
    tsvd_common_matmul,
    tsvd_matmul,
)
from tests.helpers import TOLERANCES, assert_near


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One cell: M rows, D x F features, tile, rank; `side` says that the tiles share a factor."""

    name: str
    M: tuple[int, ...] = (24,)
    D: int = 64
    F: int = 96
    tile: tuple[int, int] | int = 32
    rank: int = 8
    side: str | None = None
    bias: bool = True
    activation: str | None = None
    dtype: str = "float32"

    def inputs(self, seed=0):
        """x, factors, bias and the cotangent of y."""
        rng = np.random.default_rng([seed, zlib.crc32(self.name.encode())])
        draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), self.dtype)
        pads = [-n % t for n, t in zip((self.D, self.F), self.pair, strict=True)]
        (rows, columns), rank = self.pair, self.rank
        num_in, num_out = -(-self.D // rows), -(-self.F // columns)
        # Padded weights are zero in factors of a padded matrix, and must not matter here.
        if self.side is None:
            factors = TiledFactors(
                draw(num_in, rows, num_out, rank) / rank,
                draw(num_out, num_in, rank, columns),
                pad_in=pads[0], pad_out=pads[1],
            )  # fmt: skip
        elif self.side == "right":
            tiles, common = draw(self.D, num_out, rank) / rank, draw(rank, columns)
            factors = CommonFactors(tiles, common, pad=pads[1], side="right")
        else:
            tiles, common = draw(num_in, rank, self.F) / rank, draw(rows, rank)
            factors = CommonFactors(tiles, common, pad=pads[0], side="left")
        bias = draw(self.F) if self.bias else None
        return draw(*self.M, self.D), factors, bias, draw(*self.M, self.F)

    @property
    def pair(self):
        return (self.tile, self.tile) if isinstance(self.tile, int) else self.tile


OWN = (
    Case(name="plain"),
    Case(name="no_bias", bias=False),
    Case(name="one_tile", tile=(64, 96), rank=3),
    Case(name="tall_tiles", tile=(64, 12)),
    Case(name="one_row", M=(1,)),
    Case(name="batch", M=(2, 3, 5)),
    Case(name="rank_one", rank=1),
    Case(name="ragged", D=70, F=100),
    Case(name="ragged_gelu", D=33, F=65, activation="gelu", M=(2, 7)),
    Case(name="relu", activation="relu"),
    Case(name="silu", activation="silu", bias=False),
    Case(name="gelu_exact", activation="gelu_exact"),
    Case(name="bf16", dtype="bfloat16", M=(64,)),
    Case(name="bf16_ragged_gelu", dtype="bfloat16", D=70, F=100, activation="gelu"),
    Case(name="f16_silu", dtype="float16", activation="silu"),
)
CASES = OWN + tuple(
    dataclasses.replace(case, name=f"{side}_{case.name}", side=side)
    for case in OWN
    for side in ("right", "left")
)
BY_NAME = pytest.mark.parametrize("c", CASES, ids=lambda c: c.name)


def multiply(x, factors, *rest, **options):
    call = tsvd_matmul if isinstance(factors, TiledFactors) else tsvd_common_matmul
    return call(x, factors, *rest, **options)


def value_and_gradients(c, dtype, implementation):
    """`y` and the gradients of x, factors and bias under jit, from inputs cast to `dtype`."""
    *arguments, dy = jax.tree.map(lambda leaf: leaf.astype(dtype), c.inputs())

    @jax.jit
    def run(arguments, dy):
        call = lambda *a: multiply(*a, c.activation, implementation=implementation)
        y, pull = jax.vjp(call, *arguments)
        return y, pull(dy)

    return run(arguments, dy)


def matches_the_reference(c, implementation):
    """Compares values and gradients, of every leaf by name, with those in float32."""
    y, got = value_and_gradients(c, c.dtype, implementation)
    with jax.default_matmul_precision("highest"):  # a GPU would round float32 to 11 bits
        want_y, want = value_and_gradients(c, "float32", "reference")
    tolerance = TOLERANCES[c.dtype]
    assert y.dtype == jnp.dtype(c.dtype)
    assert_near(y, want_y, tolerance.output, "y")
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(want)]
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for name, one, other in zip(names, *map(jax.tree.leaves, (got, want)), strict=True):
        assert one.dtype == jnp.dtype(c.dtype)
        assert_near(one, other, tolerance.gradient, name)


@BY_NAME
def test_values_and_gradients_match_the_float32_reference(c):
    matches_the_reference(c, "xla")


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_product_is_that_of_the_dense_matrix(implementation):
    w = jax.random.normal(jax.random.key(0), (70, 100))
    x = jax.random.normal(jax.random.key(1), (5, 70))
    for factors in (
        tsvd(w, tile=32, rank=32),
        tsvd(w, tile=(35, 20), rank=4),
        tsvd(w, tile=(35, 20), rank=4).pad_rank(16),
        tsvd(w, rank=70),
        tsvd_common(w, tile=32, rank=8),
        tsvd_common(w, tile=32, rank=8, side="left"),
    ):
        y = multiply(x, factors, implementation=implementation)
        assert_near(y, x @ factors.to_dense(), 1e-5, "y")
    full = multiply(x, tsvd(w, tile=32, rank=32), implementation=implementation)
    assert_near(full, x @ w, 1e-5, "y")


def chosen(names):
    return pytest.mark.parametrize("c", [c for c in CASES if c.name in names], ids=lambda c: c.name)


FEW = chosen(("ragged", "right_ragged", "left_ragged"))


@FEW
def test_vmap_over_inputs_and_over_factors(c):
    x, factors, bias, _ = c.inputs()
    want = multiply(x, factors, bias)
    over_rows = jax.vmap(lambda row: multiply(row, factors, bias))(x)
    assert_near(over_rows, want, 1e-6, "rows")
    both = [c.inputs(seed)[:3] for seed in (0, 1)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *both)
    got = jax.jit(jax.vmap(multiply))(*stacked)
    for one, arguments in zip(got, both, strict=True):
        assert_near(one, multiply(*arguments), 1e-6, "stacked")


@FEW
def test_gradient_through_a_scan_over_layers(c):
    layers = [dataclasses.replace(c, D=70, F=70).inputs(seed)[1:3] for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    x = c.inputs()[0]

    def scanned(x, stacked):
        step = lambda x, layer: (multiply(x, *layer, "silu"), None)
        return jax.lax.scan(jax.checkpoint(step), x, stacked)[0].sum()

    def unrolled(x, stacked):
        for i in range(3):
            layer = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
            x = multiply(x, *layer, "silu", implementation="reference")
        return x.sum()

    got, want = (jax.jit(jax.grad(f, (0, 1)))(x, stacked) for f in (scanned, unrolled))
    for one, other in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert_near(one, other, 1e-4, "gradient")


@FEW
def test_shard_map_over_rows_sums_the_gradients_of_the_factors(c):
    x, factors, bias, dy = c.inputs()
    mesh = Mesh(np.array(jax.devices()[:4]), "rows")
    sharded = jax.shard_map(
        multiply, mesh=mesh, in_specs=(Spec("rows"), Spec(), Spec()), out_specs=Spec("rows")
    )
    got, want = (
        jax.jit(jax.grad(lambda *a, f=f: (f(*a) * dy).sum(), (0, 1, 2)))(x, factors, bias)
        for f in (sharded, multiply)
    )
    for one, other in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert_near(one, other, 1e-5, "gradient")


def test_shard_map_over_tiles():
    x, factors, bias, _ = Case(name="tiles", D=64, F=128, tile=16).inputs()
    mesh = Mesh(np.array(jax.devices()[:4]), "tiles")
    want = multiply(x, factors, bias)
    columns = TiledFactors(Spec(None, None, "tiles"), Spec("tiles"), pad_in=0, pad_out=0)
    by_column = jax.shard_map(
        multiply, mesh=mesh, in_specs=(Spec(), columns, Spec("tiles")),
        out_specs=Spec(None, "tiles"),
    )  # fmt: skip
    assert_near(jax.jit(by_column)(x, factors, bias), want, 1e-5, "columns")
    rows = TiledFactors(Spec("tiles"), Spec(None, "tiles"), pad_in=0, pad_out=0)
    by_row = jax.shard_map(
        lambda x, factors: jax.lax.psum(multiply(x, factors), "tiles"), mesh=mesh,
        in_specs=(Spec(None, "tiles"), rows), out_specs=Spec(),
    )  # fmt: skip
    assert_near(jax.jit(by_row)(x, factors) + bias, want, 1e-5, "rows")


@FEW
def test_two_runs_give_the_same_bits(c):
    one, two = (value_and_gradients(c, c.dtype, "xla") for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_no_product_is_stored_for_the_backward_pass():
    x, factors, bias, _ = Case(name="memory", M=(512,), tile=16, rank=8).inputs()
    _, pull = jax.vjp(lambda *a: tsvd_matmul(*a), x, factors, bias)
    assert max(leaf.size for leaf in jax.tree.leaves(pull)) <= x.size


def test_training_the_common_factor_alone_needs_no_gradient_of_the_tiles():
    x, factors, bias, _ = Case(name="frozen", side="right", M=(512,), F=640).inputs()

    def loss(common, tiles):
        factors_ = dataclasses.replace(factors, common=common, tiles=tiles)
        return multiply(x, factors_, bias).sum()

    cost = lambda argnums: (
        jax.jit(jax.grad(loss, argnums))
        .lower(factors.common, factors.tiles)
        .compile()
        .cost_analysis()["flops"]
    )
    assert cost(0) < 0.6 * cost((0, 1))


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_products_and_gradients_lower_in_sixteen_bits(platform, side):
    x, factors, bias, _ = Case(name="lower", dtype="bfloat16", side=side).inputs()
    loss = lambda *a: multiply(*a, "gelu").astype(jnp.float32).sum()
    step = jax.jit(jax.grad(loss, (0, 1, 2)))
    text = step.trace(x, factors, bias).lower(lowering_platforms=(platform,)).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert len(dots) >= 5
    assert all(line.count("bf16>") == 2 for line in dots)  # two inputs; the sum is float32


X, FACTORS, BIAS, _ = Case(name="refused").inputs()
COMMON = Case(name="refused", side="right").inputs()[1]
REFUSED = {
    "factors": (lambda: tsvd_matmul(X, COMMON), "must be sparsax.TiledFactors, from sparsax.tsvd;"),
    "common": (lambda: tsvd_common_matmul(X, FACTORS), "CommonFactors, from sparsax.tsvd_common;"),
    "stacked": (
        lambda: tsvd_matmul(X, jax.tree.map(lambda leaf: leaf[None], FACTORS)),
        "must be those of one matrix; got stacked ones",
    ),
    "features": (lambda: tsvd_matmul(X[:, :-1], FACTORS), r"D=64 input features; got \(24, 63\)"),
    "dtype": (
        lambda: tsvd_matmul(X.astype(jnp.bfloat16), FACTORS),
        r"share one dtype .* got bfloat16 and float32, float32. Cast with factors.astype",
    ),
    "bias": (lambda: tsvd_matmul(X, FACTORS, BIAS[1:]), r"F=96 output features; got \(95,\)"),
    "activation": (
        lambda: tsvd_matmul(X, FACTORS, activation="tanh"),
        "activation must be one of .* got 'tanh'",
    ),
    "implementation": (
        lambda: tsvd_matmul(X, FACTORS, implementation="cuda"),
        "implementation must be one of .* got 'cuda'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.usefixtures("unchecked")
def test_refusals(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()
