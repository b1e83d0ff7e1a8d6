"""The kernels of grouped products: interpreted against the float32 reference, and lowered."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsax import gmm, pallas, reference, tgmm
from sparsax.pallas.grouped_matmul import product, tables
from tests.helpers import TOLERANCES, assert_near, launched
from tests.test_grouped import Case

# Groups that share slabs of 8 rows with one, two and several others; tiles of each width.
CASES = (
    Case(name="aligned", sizes=(128, 0, 8), M=136, D=64, F=64, dtype="bfloat16"),
    Case(name="tiny_groups", sizes=(3, 2, 1, 0, 5, 141), M=160, D=64, F=128, dtype="bfloat16"),
    Case(name="transposed", sizes=(61, 75), M=139, D=192, F=64, transpose_w=True, bias=False,
         dtype="float16"),
    Case(name="one_row", sizes=(0, 1, 0), M=1, D=64, F=64, dtype="bfloat16"),
    Case(name="wide", sizes=(30, 66), M=96, D=192, F=256, dtype="bfloat16"),
    Case(name="side_by_side", sizes=(30, 66), M=96, D=256, F=512, dtype="bfloat16"),
    Case(name="pairs", sizes=(30, 180, 1), M=220, D=320, F=512, dtype="bfloat16"),
)  # fmt: skip
BY_NAME = pytest.mark.parametrize("c", CASES, ids=lambda c: c.name)


def value_and_gradients(c, implementation, dtype):
    """`y` and the gradients of x, w and bias under jit, from inputs cast to `dtype`."""
    cast = lambda x: x if x.dtype == jnp.int32 else x.astype(dtype)
    x, w, sizes, bias, dy = jax.tree.map(cast, c.inputs())
    options = {"transpose_w": c.transpose_w, "implementation": implementation}

    @jax.jit
    def run(x, w, sizes, bias, dy):
        y, pull = jax.vjp(lambda x, w, bias: gmm(x, w, sizes, bias, **options), x, w, bias)
        return y, pull(dy)

    return run(x, w, sizes, bias, dy)


def check(c):
    got = value_and_gradients(c, "pallas", c.dtype)
    want = value_and_gradients(c, "reference", "float32")
    tolerance = TOLERANCES[c.dtype]
    assert got[0].dtype == jnp.dtype(c.dtype)
    assert_near(got[0], want[0], tolerance.output, "y")
    for one, other in zip(*map(jax.tree.leaves, (got[1], want[1])), strict=True):
        assert_near(one, other, tolerance.gradient, "gradient")


@pytest.fixture
def few_blocks(fresh, monkeypatch):
    """Two thread blocks, so that each walks over several tiles."""
    monkeypatch.setattr(product, "multiprocessors", lambda: 2)


@BY_NAME
@pytest.mark.usefixtures("few_blocks")
def test_values_and_gradients_match_the_reference(c):
    with pallas.interpreted():
        check(c)


ALONE = {  # one kernel each
    "gmm": lambda x, w, sizes, bias, dy, **which: gmm(x, w, sizes, bias, **which),
    "transposed": lambda x, w, sizes, bias, dy, **which: gmm(
        dy, w, sizes, transpose_w=True, **which
    ),
    "tgmm": lambda x, w, sizes, bias, dy, **which: tgmm(x, dy, sizes, **which),
}


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.usefixtures("few_blocks", "no_races")
def test_no_races(name):
    inputs = Case(name="races", sizes=(3, 297, 0, 30), M=340, D=512, F=512, dtype="bfloat16")
    inputs, run = inputs.inputs(), ALONE[name]
    with pallas.interpreted(detect_races=True):
        got = jax.block_until_ready(
            jax.jit(functools.partial(run, implementation="pallas"))(*inputs)
        )
    assert_near(got, run(*inputs, implementation="reference"), TOLERANCES["bfloat16"].output, name)


@pytest.mark.gpu
@BY_NAME
def test_values_and_gradients_match_the_reference_on_the_gpu(c):
    check(c)
    one, two = (value_and_gradients(c, "pallas", c.dtype) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, two)


LEFT_OVER = Case(name="left_over", sizes=(50, 0, 43), M=200, D=64, F=64, dtype="bfloat16")


def test_rows_of_no_group_do_not_matter():
    x, w, sizes, bias, dy = LEFT_OVER.inputs()
    x, dy = x.at[93:].set(1e18), dy.at[93:].set(1e18)

    def value_and_pull(implementation):
        step = lambda x, w, bias: gmm(x, w, sizes, bias, implementation=implementation)
        y, pull = jax.vjp(jax.jit(step), x, w, bias)
        return y, *pull(dy)

    with pallas.interpreted():
        y, dx, dw, dbias = value_and_pull("pallas")
    for array in (y[93:], dx[93:], dw[1], dbias[1]):
        np.testing.assert_array_equal(array, 0)
    for one, other in zip((y, dx, dw, dbias), value_and_pull("reference"), strict=True):
        assert_near(one, other, TOLERANCES["bfloat16"].gradient, "without them")


def with_activation(activation):
    options = {"activation": activation, "interpret": pallas.interpret()}
    return jax.jit(lambda x, w, n, b: pallas.gmm_sum([(x, [w])], n, [b], **options))


def test_an_activation_in_the_epilogue():
    *inputs, _ = LEFT_OVER.inputs()
    with pallas.interpreted():
        y = with_activation("gelu")(*inputs)
    want = jax.nn.gelu(reference.gmm(*inputs, transpose_w=False))
    assert_near(y, want, TOLERANCES["bfloat16"].output, "gelu")


def two_terms_and_a_gate():
    """Terms, sizes and biases; groups share slabs of rows, and some rows are of none."""
    keys = iter(jax.random.split(jax.random.key(0), 8))
    draw = lambda *shape: jax.random.normal(next(keys), shape, jnp.bfloat16) / 8
    terms = [(draw(140, d), [draw(3, d, 128) for _ in range(2)]) for d in (128, 64)]
    return terms, jnp.array([30, 0, 101]), [draw(3, 128), None]


@pytest.mark.usefixtures("few_blocks", "no_races")
def test_two_terms_and_a_gate_in_one_kernel():
    terms, sizes, biases = two_terms_and_a_gate()
    with pallas.interpreted(detect_races=True):
        options = {"activation": "silu", "interpret": pallas.interpret()}
        run = jax.jit(lambda *a: pallas.gmm_sum(*a, **options))
        y = jax.block_until_ready(run(terms, sizes, biases))
    (x, (up, gate)), (low, (up_b, gate_b)) = terms
    of = lambda x, w, bias=None: reference.gmm(x, w, sizes, bias, transpose_w=False)
    want = jax.nn.silu(of(x, gate) + of(low, gate_b)) * (of(x, up, biases[0]) + of(low, up_b))
    assert_near(y, want, TOLERANCES["bfloat16"].output, "gated")
    np.testing.assert_array_equal(y[131:], 0)


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
def test_activations_lower_in_the_epilogue(activation):
    *inputs, _ = LEFT_OVER.inputs()
    with pallas.lowering():
        traced = with_activation(activation).trace(*inputs)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert launched(text) == 1
    assert not any(name in text for name in ("stablehlo.tanh", "stablehlo.logistic"))


def random_sizes():
    rng = np.random.default_rng(0)
    for groups, rows in itertools.product((1, 3, 20), (64, 200, 1000)):
        for share in (1.0, 0.6):
            weights = rng.random(groups) * (rng.random(groups) < 0.7)
            yield rows, rng.multinomial(int(rows * share), weights / max(weights.sum(), 1e-9))


@pytest.mark.parametrize(("rows", "sizes"), list(random_sizes()))
def test_tables_list_every_row_of_every_group_once(rows, sizes):
    starts, ends = tables.bounds(jnp.asarray(sizes, jnp.int32), rows)
    group_of = np.concatenate([np.full(n, g) for g, n in enumerate(sizes)])

    count, *fields = np.split(
        np.asarray(tables.row_tiles(starts, ends, rows)),
        1 + tables.most_tiles(rows, len(sizes)) * np.arange(5),
    )
    group, slab, start, end, place = (f[: count[0]] for f in fields)
    assert count[0] <= len(fields[0])
    own = [  # by each tile
        np.arange(max(8 * s, a), min(8 * s + tables.ROWS, e))
        for s, a, e in zip(slab, start, end, strict=True)
    ]
    assert all(len(r) for r in own)
    np.testing.assert_array_equal(np.concatenate([*own, []]), np.arange(len(group_of)))
    np.testing.assert_array_equal(np.repeat(group, [len(r) for r in own]), group_of)
    for g in set(group):  # pairs of neighbours, and what is left of an odd number
        tiles = sum(group == g)
        np.testing.assert_array_equal(
            place[group == g], ([1, 2] * tiles)[: tiles - tiles % 2] + [0] * (tiles % 2)
        )

    first, whole, steps = np.split(np.asarray(tables.steps(starts, ends)), 3)
    at_ends = np.asarray(tables.rows_at_ends(starts, ends))
    for g in range(len(sizes)):
        begin = 8 * first[g]
        rest = at_ends[g][: tables.DEPTH * (steps[g] - whole[g])]
        summed = [*range(begin, begin + tables.DEPTH * whole[g]), *rest[rest >= 0]]
        assert (at_ends[g][len(rest) :] < 0).all()
        assert sorted(summed) == list(np.flatnonzero(group_of == g))


FITS = [
    *itertools.product(
        ((4096, 8192), (64, 192), (1024, 128)), (1, 64), ["bfloat16"], (False, True)
    ),
    ((256, 320), 8, "float16", False),
]


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (16, 3), (37, 5), (64, 2), (3, 40)])
def test_every_tile_has_its_turn_and_neighbours_share_columns(rows, columns):
    places = [tuple(map(int, product.raster(n, rows, columns))) for n in range(rows * columns)]
    assert set(places) == set(itertools.product(range(rows), range(columns)))
    run = places[: product.BAND]
    assert len({column for _, column in run}) == -(-len(run) // min(rows, product.BAND))


@pytest.mark.parametrize(("features", "groups", "dtype", "transpose_w"), FITS)
def test_the_kernels_lower_with_their_gradients(features, groups, dtype, transpose_w):
    of = jax.ShapeDtypeStruct
    x, sizes = of((1001, features[0]), dtype), of((groups,), jnp.int32)
    w = of((groups, *(features[::-1] if transpose_w else features)), dtype)
    bias = of((groups, features[1]), dtype)

    def loss(x, w, bias, sizes):
        y = gmm(x, w, sizes, bias, transpose_w=transpose_w, implementation="pallas")
        return (y.astype(jnp.float32) ** 2).sum()

    with pallas.lowering():
        step = jax.jit(jax.grad(loss, (0, 1, 2))).trace(x, w, bias, sizes)
        text = step.lower(lowering_platforms=("cuda",)).as_text()
    assert launched(text) == 3


def in_a_scan_with_remat(x, w, sizes):
    layer = lambda x, w: (x + gmm(x, w, sizes, implementation="pallas"), None)
    return jax.lax.scan(jax.checkpoint(layer), x, w)[0].astype(jnp.float32).sum()


def sharded(x, w, sizes):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), "rows")
    spec, none = jax.sharding.PartitionSpec("rows"), jax.sharding.PartitionSpec()
    call = lambda x, w, sizes: gmm(x, w, sizes, implementation="pallas")
    split = jax.shard_map(call, mesh=mesh, in_specs=(spec, none, none), out_specs=spec)
    return split(x, w[0], sizes).astype(jnp.float32).sum()


def over_a_batch(x, w, sizes):
    call = lambda w: gmm(x, w, sizes, implementation="pallas")
    return jax.vmap(call)(w).astype(jnp.float32).sum()


@pytest.mark.parametrize("loss", [in_a_scan_with_remat, sharded, over_a_batch])
def test_gradients_lower_within_transformations(loss):
    x, w = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((512, 256), (2, 4, 256, 256)))
    sizes = jax.ShapeDtypeStruct((4,), jnp.int32)
    with pallas.lowering():
        step = jax.jit(jax.grad(loss, (0, 1))).trace(x, w, sizes)
        text = step.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


REFUSED = {
    "float32": ({"dtype": "float32"}, "takes rows and matrices in one of .* got float32"),
    "features": ({"D": 96}, "takes features D and F in multiples of 64; got D=96 and F=64"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernels_cannot_do_is_refused(name):
    changes, message = REFUSED[name]
    x, w, sizes, _, dy = dataclasses.replace(CASES[0], **changes).inputs()
    with pallas.lowering():
        with pytest.raises(NotImplementedError, match=message):
            gmm(x, w, sizes, implementation="pallas")
        with pytest.raises(NotImplementedError, match=message):
            tgmm(x, dy, sizes, implementation="pallas")


def test_a_machine_without_hopper_is_refused():
    x, w, sizes, *_ = CASES[0].inputs()
    with pytest.raises(NotImplementedError, match=r"needs an NVIDIA Hopper GPU.*'xla' runs this"):
        gmm(x, w, sizes, implementation="pallas")
