"""The kernels of tiles that share a factor against the float32 reference, interpreted, on a GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsax import CommonFactors, pallas, tsvd_common_matmul
from sparsax.pallas import tsvd
from sparsax.pallas.tsvd import resident
from tests.helpers import TOLERANCES, assert_near, tsvd_kernels
from tests.test_linear import Case, matches_the_reference, value_and_gradients

OWN = (
    Case(name="plain", M=(130,), D=192, F=256, tile=64, rank=32, dtype="bfloat16"),
    Case(name="ragged_gelu", M=(3, 67), D=300, F=200, tile=128, rank=64, dtype="float16",
         activation="gelu"),
    Case(name="rank_16", M=(9,), D=128, F=320, tile=64, rank=16, dtype="bfloat16", bias=False),
)  # fmt: skip
# The features that are not cut into tiles are whole lines.
WHOLE = {"right": {"D": 320}, "left": {"F": 192}}
CASES = tuple(
    dataclasses.replace(c, name=f"{side}_{c.name}", side=side, **whole)
    for c in OWN
    for side, whole in WHOLE.items()
)
BY_NAME = pytest.mark.parametrize("c", CASES, ids=lambda c: c.name)
# What the kernel that keeps `x u` takes: one row of tiles, as high as the matrix. Its first product
# has panels of 128 columns or fewer, one or two.
RESIDENT = (
    Case(name="one_panel", side="right", M=(330,), D=320, F=500, tile=128, rank=64,
         dtype="bfloat16", activation="silu"),
    Case(name="two_panels", side="right", M=(200,), D=320, F=500, tile=256, rank=128,
         dtype="float16", activation="gelu"),
    Case(name="two_panels_of_four_tiles", side="right", M=(130,), D=192, F=1024, tile=256, rank=64,
         dtype="bfloat16", bias=False),
)  # fmt: skip
RESIDENTS = pytest.mark.parametrize("c", RESIDENT, ids=lambda c: c.name)


def forward_is_near(c):
    x, factors, bias, _ = c.inputs()
    run = lambda *a: tsvd_common_matmul(*a, c.activation, implementation="pallas")
    want = tsvd_common_matmul(x, factors, bias, c.activation, implementation="reference")
    assert_near(jax.jit(run)(x, factors, bias), want, TOLERANCES[c.dtype].output, "y")


@BY_NAME
def test_values_and_gradients_match_the_reference(c):
    with pallas.interpreted():
        matches_the_reference(c, "pallas")


@pytest.fixture
def only_resident(fresh, monkeypatch):
    """The one schedule, on a GPU so small that tiles are grouped until products are wide."""
    monkeypatch.setattr(tsvd, "best_schedule", lambda *_: "resident")
    monkeypatch.setattr(resident, "multiprocessors", lambda: 1)


def wide(c):
    """Columns of the first product."""
    factors = c.inputs()[1]
    u, v = pallas.as_tiles(factors.tiles, factors.common, "right")
    tiling = resident.Tiling.of(u, v, c.M[0])
    assert tiling.in_place(u)
    return tiling.group * u.shape[3]


@RESIDENTS
@pytest.mark.usefixtures("only_resident")
def test_the_kernel_that_keeps_products_matches_the_reference(c):
    assert wide(c) == (128 if c.name == "one_panel" else 256)
    with pallas.interpreted():
        matches_the_reference(c, "pallas")


@RESIDENTS
@pytest.mark.usefixtures("no_races", "only_resident")
def test_products_in_the_place_of_x_race_with_nothing(c):
    with pallas.interpreted(detect_races=True):
        forward_is_near(c)


@RESIDENTS
@pytest.mark.gpu
@pytest.mark.usefixtures("only_resident")
def test_the_kernel_that_keeps_products_matches_the_reference_on_a_gpu(c):
    matches_the_reference(c, "pallas")


@pytest.mark.parametrize(
    ("rank", "columns", "rows", "group"),
    [(128, 256, 8192, 2), (64, 256, 8192, 4), (64, 512, 64, 1)],
)
def test_of_one_row_of_tiles_the_products_are_as_wide_as_they_can_be(rank, columns, rows, group):
    num_out = 4096 // columns
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.bfloat16)
    u, v = shape(1, 4096, num_out, rank), shape(num_out, 1, rank, columns)
    tiling = resident.Tiling.of(u, v, rows)
    assert tiling.group == group
    assert tiling.in_place(u)
    x = shape(rows, 4096)
    with pallas.lowering():
        run = jax.jit(lambda *a: resident.forward(*a, None, activation=None))
        assert "tsvd_resident" in run.trace(x, u, v).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("side", "features", "rank", "joined"),
    [("left", 192, 16, 1), ("right", 192, 16, 1), ("right", 256, 16, 4), ("right", 256, 32, 2),
     ("right", 256, 48, 1), ("right", 256, 64, 1), ("right", 384, 16, 2)],
)  # fmt: skip
def test_copies_of_the_common_factor_are_the_same_matrix(side, features, rank, joined):
    case = Case(name="copies", side=side, D=128, F=features, tile=64, rank=rank)
    _, factors, *_ = case.inputs()
    u, v = pallas.as_tiles(factors.tiles, factors.common, side)
    assert u.shape[3] == joined * rank
    w = jnp.einsum("iajr,jirc->iajc", u, v).reshape(factors.to_dense().shape)
    assert_near(w, factors.to_dense(), 1e-5, "w")


@BY_NAME
def test_a_product_lowers_to_kernels(c):
    x, factors, bias, _ = c.inputs()
    run = lambda *a: tsvd_common_matmul(*a, c.activation, implementation="pallas")
    with pallas.lowering():
        text = jax.jit(run).trace(x, factors, bias).lower(lowering_platforms=("cuda",)).as_text()
    assert "tsvd_hidden" in text
    assert "tsvd_out" in text


def common_factors(side, tile, rank, D=4096, F=4096):
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    if side == "right":
        return CommonFactors(of(D, F // tile, rank), of(rank, tile), pad=0, side="right")
    return CommonFactors(of(D // tile, rank, F), of(tile, rank), pad=0, side="left")


@pytest.mark.parametrize(
    ("rows", "side", "tile", "rank", "found"),
    [(8192, "right", 256, 64, {"shared"}), (8192, "right", 256, 128, set()),
     (8192, "right", 128, 16, {"shared"}), (4096, "right", 128, 8, set()),
     (4095, "right", 256, 64, set()), (8192, "left", 128, 64, {"hidden", "out"}),
     (8192, "left", 256, 32, {"hidden", "out"}), (8192, "left", 512, 64, set()),
     (4095, "left", 256, 64, set())],
)  # fmt: skip
def test_none_runs_the_kernels_where_they_were_measured_to_be_faster(rows, side, tile, rank, found):
    factors = common_factors(side, tile, rank)
    x = jax.ShapeDtypeStruct((rows, 4096), jnp.bfloat16)
    squares = lambda *a: (tsvd_common_matmul(*a).astype(jnp.float32) ** 2).sum()
    for run, wanted in ((tsvd_common_matmul, found), (jax.grad(squares, (0, 1)), set())):
        with pallas.lowering():
            text = jax.jit(run).trace(x, factors).lower(lowering_platforms=("cuda",)).as_text()
        assert tsvd_kernels(text) == wanted


@pytest.mark.gpu
@BY_NAME
def test_values_and_gradients_match_the_reference_on_a_gpu(c):
    matches_the_reference(c, "pallas")


@pytest.mark.gpu
def test_many_rows_of_a_large_matrix_are_near_the_reference_on_a_gpu():
    c = Case(name="large", side="right", M=(8192,), D=1024, F=4096, tile=256, rank=128,
             dtype="bfloat16")  # fmt: skip
    assert wide(c) == 256
    forward_is_near(c)


REFUSED = {
    "rank": ({"rank": 24}, r"takes ranks in multiples of 16; got 24, see pad_rank\(16\) of the"),
    "uncut": ({"D": 300}, r"features that no tile cuts, in multiples of 64; got 300 x 128"),
    "float32": ({"dtype": "float32"}, "takes x and factors in one of .* got float32"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernels_cannot_do_is_refused(name):
    changes, message = REFUSED[name]
    c = dataclasses.replace(CASES[0], **changes)
    with pallas.lowering(), pytest.raises(NotImplementedError, match=message):
        tsvd_common_matmul(*c.inputs()[:3], implementation="pallas")


def test_padded_ranks_are_the_same_matrix_and_run():
    for side, whole in WHOLE.items():
        c = dataclasses.replace(CASES[0], side=side, rank=24, **whole)
        _, factors, *_ = c.inputs()
        padded = factors.pad_rank(16)
        assert padded.rank == 32
        assert_near(padded.to_dense(), factors.to_dense(), 1e-6, "w")
        x = jax.random.normal(jax.random.key(0), (130, padded.in_features), jnp.bfloat16)
        with pallas.interpreted():
            y = tsvd_common_matmul(x, padded, implementation="pallas")
        assert_near(y, tsvd_common_matmul(x, factors), TOLERANCES[c.dtype].output, "y")


@pytest.mark.gpu
@pytest.mark.parametrize("side", ["left", "right"])
def test_two_runs_give_the_same_bits_on_a_gpu(side):
    c = Case(name="large", side=side, M=(4100,), D=1024, F=2048, tile=256, rank=64,
             dtype="bfloat16")  # fmt: skip
    matches_the_reference(c, "pallas")
    one, two = (value_and_gradients(c, c.dtype, "pallas") for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, two)
