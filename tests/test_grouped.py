import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec

from sparsax import gmm, tgmm
from tests.helpers import TOLERANCES, assert_near


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One cell: M rows in groups of these sizes, D x F features."""

    name: str
    sizes: tuple[int, ...] = (40, 0, 13, 75)
    M: int = 128
    D: int = 32
    F: int = 48
    bias: bool = True
    transpose_w: bool = False
    dtype: str = "float32"

    def inputs(self, seed=0):
        """x, w, group sizes, bias and the cotangent of y."""
        rng = np.random.default_rng([seed, zlib.crc32(self.name.encode())])
        draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), self.dtype)
        features = (self.F, self.D) if self.transpose_w else (self.D, self.F)
        bias = draw(len(self.sizes), self.F) if self.bias else None
        x, w = draw(self.M, self.D), draw(len(self.sizes), *features)
        return x, w, jnp.asarray(self.sizes, jnp.int32), bias, draw(self.M, self.F)


CASES = (
    Case(name="ragged"),
    Case(name="transposed", transpose_w=True),
    Case(name="no_bias", bias=False),
    Case(name="one_group", sizes=(128,)),
    Case(name="first_holds_all", sizes=(128, 0, 0)),
    Case(name="last_holds_all", sizes=(0, 0, 128)),
    Case(name="nobody_has_any", sizes=(0, 0, 0)),
    Case(name="rows_left_over", sizes=(40, 0, 13, 20)),
    Case(name="rows_left_over_transposed", sizes=(1, 31, 33, 0), transpose_w=True),
    Case(name="one_row", M=1, sizes=(0, 1, 0)),
    Case(name="one_each", M=7, sizes=(1,) * 7),
    Case(name="many", sizes=(3, 0, 5, 1) * 12, M=120),
    Case(name="odd_features", D=33, F=1),
    Case(name="every_tile", M=1400, sizes=(513, 0, 161, 700), D=8, F=12),
    Case(name="bf16", dtype="bfloat16"),
    Case(name="bf16_transposed_left_over", dtype="bfloat16", transpose_w=True, M=200),
    Case(name="f16", dtype="float16", M=131),
)
BY_NAME = pytest.mark.parametrize("c", CASES, ids=lambda c: c.name)


def multiply(c, implementation):
    """The product as a function of `(x, w, group_sizes, bias)`."""
    return lambda *a: gmm(*a, transpose_w=c.transpose_w, implementation=implementation)


def value_and_gradients(c, dtype, implementation):
    """`y`, the gradients of x, w and bias, and tgmm of x and dy, from inputs cast to `dtype`."""
    cast = lambda x: x if x.dtype == jnp.int32 else x.astype(dtype)
    x, w, sizes, bias, dy = jax.tree.map(cast, c.inputs())

    @jax.jit
    def run(x, w, sizes, bias, dy):
        call = lambda x, w, bias: multiply(c, implementation)(x, w, sizes, bias)
        y, pull = jax.vjp(call, x, w, bias)
        return {"y": y, "gradients": pull(dy), "tgmm": tgmm(x, dy, sizes)}

    return run(x, w, sizes, bias, dy)


@BY_NAME
def test_values_and_gradients_match_the_float32_reference(c):
    got, want = (
        value_and_gradients(c, *how) for how in ((c.dtype, "xla"), ("float32", "reference"))
    )
    tolerance = TOLERANCES[c.dtype]
    for name in got:
        for one, other in zip(*map(jax.tree.leaves, (got[name], want[name])), strict=True):
            assert one.dtype == jnp.dtype(c.dtype)
            limit = tolerance.output if name == "y" else tolerance.gradient
            assert_near(one, other, limit, name)


def chosen(*names):
    return pytest.mark.parametrize("c", [c for c in CASES if c.name in names], ids=lambda c: c.name)


@chosen("ragged", "transposed", "nobody_has_any", "rows_left_over", "one_row", "bf16")
def test_the_reference_multiplies_each_row_by_the_matrix_of_its_group(c):
    x, w, sizes, bias, dy = c.inputs()
    y = jax.jit(multiply(c, "reference"))(x, w, sizes, bias)
    sums = jax.jit(lambda *a: tgmm(*a, implementation="reference"))(x, dy, sizes)
    numpy = lambda a: np.asarray(a, np.float64)
    want, want_sums, start = np.zeros(y.shape), np.zeros(sums.shape), 0
    for g, size in enumerate(c.sizes):
        rows = slice(start, start + size)
        matrix = numpy(w[g]).T if c.transpose_w else numpy(w[g])
        want[rows] = numpy(x[rows]) @ matrix + (0 if bias is None else numpy(bias[g]))
        want_sums[g] = numpy(x[rows]).T @ numpy(dy[rows])
        start += size
    tolerance = TOLERANCES[c.dtype].output
    assert_near(y, want, tolerance, "y")
    assert_near(sums, want_sums, tolerance, "tgmm")


LEFT_OVER = Case(name="rows_left_over", sizes=(40, 0, 13, 20))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_rows_of_no_group_and_groups_of_no_rows_get_zeros(implementation):
    x, w, sizes, bias, dy = LEFT_OVER.inputs()
    total = sum(LEFT_OVER.sizes)
    x, dy = x.at[total:].set(jnp.nan), dy.at[total:].set(jnp.inf)
    y, pull = jax.vjp(
        lambda *a: gmm(a[0], a[1], sizes, a[2], implementation=implementation), x, w, bias
    )
    dx, dw, dbias = pull(dy)
    for array in (y[total:], dx[total:], dw[1], dbias[1]):
        np.testing.assert_array_equal(array, 0)
    for array in (y, dx, dw, dbias):
        assert jnp.isfinite(array).all()


def test_a_group_never_sees_the_rows_of_another():
    x, w, sizes, bias, dy = Case(name="ragged").inputs()
    x, dy = x.at[40:53].set(jnp.nan), dy.at[40:53].set(jnp.inf)  # the third group's
    y, sums = gmm(x, w, sizes, bias), tgmm(x, dy, sizes)
    for array in (y[:40], y[53:], sums[:2], sums[3:]):
        assert jnp.isfinite(array).all()


@pytest.mark.parametrize("transpose_w", [False, True])
def test_gradients_of_gradients_match_the_reference(transpose_w):
    c = Case(name="twice", transpose_w=transpose_w, sizes=(5, 0, 9), M=16, D=4, F=6)
    x, w, sizes, bias, _ = c.inputs()

    def slopes(implementation):
        loss = lambda x, w: (multiply(c, implementation)(x, w, sizes, bias) ** 3).sum()
        first = lambda *a: sum((g**2).sum() for g in jax.grad(loss, (0, 1))(*a))
        return jax.jit(jax.grad(first, (0, 1)))(x, w)

    for one, other in zip(slopes("xla"), slopes("reference"), strict=True):
        assert_near(one, other, 1e-5, "second gradient")


def test_other_sizes_need_no_compilation():
    x, w, *_ = Case(name="ragged").inputs()
    run = jax.jit(gmm)
    for sizes in ((40, 0, 13, 75), (0, 0, 0, 128), (1, 2, 3, 4)):
        sizes = jnp.asarray(sizes)
        assert_near(run(x, w, sizes), gmm(x, w, sizes, implementation="reference"), 1e-5, "y")
    assert run._cache_size() == 1


def test_sizes_that_become_known_too_late_are_cut_off():
    x, w, _, bias, dy = Case(name="ragged").inputs()
    run = jax.jit(lambda sizes: (gmm(x, w, sizes, bias), tgmm(x, dy, sizes)))
    too_many, cut = run(jnp.array([60, -5, 300, 7])), run(jnp.array([60, 0, 68, 0]))
    jax.tree.map(np.testing.assert_array_equal, too_many, cut)


def test_vmap_over_everything_and_over_rows_alone():
    c = Case(name="ragged")
    one, two = c.inputs(0)[:4], dataclasses.replace(c, sizes=(0, 64, 10, 3)).inputs(1)[:4]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), one, two)
    loss = lambda x, w, sizes, bias: (gmm(x, w, sizes, bias) ** 2).sum()
    step = jax.value_and_grad(loss, (0, 1, 3))
    got = jax.jit(jax.vmap(step))(*stacked)
    want = jax.tree.map(lambda *a: jnp.stack(a), step(*one), step(*two))
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert_near(a, b, 1e-5, "vmap")
    w, sizes, bias = one[1:]
    both = jax.vmap(lambda x: gmm(x, w, sizes, bias))(stacked[0])
    assert_near(both[1], gmm(two[0], w, sizes, bias), 1e-5, "rows")


def test_shard_map_over_rows_sums_the_gradients_of_the_matrices():
    x, w, _, bias, dy = Case(name="ragged").inputs()
    sizes = jnp.array([[10, 0, 2, 20], [0, 32, 0, 0], [1, 1, 1, 1], [0, 5, 6, 7]])  # of each shard
    mesh = Mesh(np.array(jax.devices()[:4]), "rows")
    sharded = jax.shard_map(
        lambda x, w, sizes, bias: gmm(x, w, sizes[0], bias), mesh=mesh,
        in_specs=(Spec("rows"), Spec(), Spec("rows"), Spec()), out_specs=Spec("rows"),
    )  # fmt: skip
    apart = lambda x, w, sizes, bias: jnp.concatenate(
        [gmm(*pair, bias) for pair in zip(jnp.split(x, 4), [w] * 4, sizes, strict=True)]
    )
    got, want = (
        jax.jit(jax.grad(lambda *a, f=f: (f(a[0], a[1], sizes, a[2]) * dy).sum(), (0, 1, 2)))(
            x, w, bias
        )
        for f in (sharded, apart)
    )
    for one, other in zip(got, want, strict=True):
        assert_near(one, other, 1e-5, "gradient")


def test_shard_map_over_output_features():
    x, w, sizes, bias, _ = Case(name="ragged").inputs()
    mesh = Mesh(np.array(jax.devices()[:4]), "features")
    split = jax.shard_map(
        gmm, mesh=mesh, out_specs=Spec(None, "features"),
        in_specs=(Spec(), Spec(None, None, "features"), Spec(), Spec(None, "features")),
    )  # fmt: skip
    loss = lambda f: jax.jit(jax.grad(lambda *a: (f(a[0], a[1], sizes, a[2]) ** 2).sum(), (0, 1)))
    for one, other in zip(loss(split)(x, w, bias), loss(gmm)(x, w, bias), strict=True):
        assert_near(one, other, 1e-5, "gradient")


@chosen("every_tile", "bf16_transposed_left_over")
def test_two_runs_give_the_same_bits(c):
    one, two = (value_and_gradients(c, c.dtype, "xla") for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_memory_does_not_grow_with_the_groups():
    groups, c = 32, Case(name="memory", M=1024, D=64, F=64, sizes=(32,) * 32)
    x, w, sizes, bias, dy = c.inputs()

    def step(x, w, bias):
        y, pull = jax.vjp(lambda *a: gmm(*a[:2], sizes, a[2]), x, w, bias)
        return y, pull(dy)

    compiled = jax.jit(step).lower(x, w, bias).compile()
    dense = 4 * c.M * groups * c.F  # [M, G, F] and [G, M, D] alike
    assert compiled.memory_analysis().temp_size_in_bytes < dense / 2
    _, pull = jax.vjp(lambda *a: gmm(*a[:2], sizes, a[2]), x, w, bias)
    kept = sum(leaf.size for leaf in jax.tree.leaves(pull))
    assert kept < x.size + w.size + dy.size  # x and w, and no product


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
def test_products_and_gradients_lower_in_sixteen_bits(platform):
    x, w, sizes, bias, _ = Case(name="bf16", dtype="bfloat16").inputs()
    loss = lambda x, w, bias: gmm(x, w, sizes, bias).astype(jnp.float32).sum()
    text = jax.jit(jax.grad(loss, (0, 1, 2))).trace(x, w, bias)
    text = text.lower(lowering_platforms=(platform,)).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert len(dots) >= 3
    assert all(line.count("bf16>") == 2 for line in dots)  # two inputs; the sum is float32


X, W, SIZES, BIAS, DY = Case(name="refused").inputs()
REFUSED = {
    "features": (lambda: gmm(X[:, 1:], W, SIZES), r"w must be \[G, D, F\]; got \(128, 31\)"),
    "transposed": (
        lambda: gmm(X, W, SIZES, transpose_w=True),
        r"w must be \[G, F, D\] with transpose_w; got \(128, 32\) and \(4, 32, 48\)",
    ),
    "dtype": (lambda: gmm(X.astype(jnp.bfloat16), W, SIZES), "one dtype .* bfloat16 and float32"),
    "integers": (lambda: gmm(X.astype(int), W.astype(int), SIZES), "one dtype .* got int32"),
    "groups": (lambda: gmm(X, W, SIZES[1:]), r"one size for each of w's G=4 .*; got \(3,\)"),
    "float_sizes": (lambda: gmm(X, W, SIZES / 2), "must be integers .* got float32"),
    "negative": (lambda: gmm(X, W, jnp.array([3, -1, 0, 0])), r"got \[3, -1, 0, 0\]"),
    "too_many": (lambda: gmm(X, W, SIZES + 1), r"sum to at most M=128; got \[41, 1, 14, 76\]"),
    "bias": (lambda: gmm(X, W, SIZES, BIAS[:, 1:]), r"F\]=\(4, 48\); got \(4, 47\)"),
    "rows": (lambda: tgmm(X, DY[1:], SIZES), r"dy \[M, F\]; got \(128, 32\) and \(127, 48\)"),
    "two_dtypes": (lambda: tgmm(X, DY.astype(jnp.float16), SIZES), "float32 and float16"),
    "no_sizes": (lambda: tgmm(X, DY, SIZES[:0]), r"G >= 1; got int32 \(0,\)"),
    "implementation": (
        lambda: gmm(X, W, SIZES, implementation="cuda"),
        "implementation must be one of .* got 'cuda'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.usefixtures("unchecked")
def test_refusals(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()
