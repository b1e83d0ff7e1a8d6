"""The kernel whose common factor stays in shared memory against the reference, and its tilings."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsax import pallas, tsvd_common_matmul
from sparsax.pallas import tsvd
from sparsax.pallas.tsvd import shared
from tests.helpers import TOLERANCES, assert_near, launched, tsvd_kernels
from tests.pallas.test_tsvd_common import common_factors, forward_is_near
from tests.test_linear import Case, matches_the_reference, value_and_gradients

# More tiles of the first product than multiprocessors (see `alone`), rows that no tile fills.
CASES = (
    Case(name="ranks_of_16", side="right", M=(330,), D=1024, F=1000, tile=128, rank=16,
         dtype="bfloat16", activation="gelu"),
    Case(name="last_columns_are_half", side="right", M=(3, 67), D=512, F=1280, tile=128, rank=32,
         dtype="bfloat16"),
    Case(name="panels_of_two_lines", side="right", M=(260,), D=768, F=1024, tile=128, rank=16,
         dtype="float16"),
    Case(name="panels_are_tiles", side="right", M=(130,), D=256, F=256, tile=64, rank=64,
         dtype="float16", activation="silu", bias=False),
    Case(name="five_slots", side="right", M=(150,), D=512, F=768, tile=256, rank=64,
         dtype="bfloat16", activation="gelu"),
    Case(name="one_tile", side="right", M=(9,), D=320, F=256, tile=128, rank=128,
         dtype="bfloat16"),
)  # fmt: skip
BY_NAME = pytest.mark.parametrize("c", CASES, ids=lambda c: c.name)


@pytest.fixture
def alone(fresh, monkeypatch):
    """The one kernel, on a GPU so small that thread blocks have tiles one after the other."""
    monkeypatch.setattr(tsvd, "stays_shared", lambda *_: True)
    monkeypatch.setattr(shared, "multiprocessors", lambda: 2)


def kernels(run, *arrays):
    """The names of the kernels of a program, and how many there are."""
    with pallas.lowering():
        text = jax.jit(run).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    return tsvd_kernels(text), launched(text)


@BY_NAME
@pytest.mark.usefixtures("alone")
def test_values_and_gradients_match_the_reference(c):
    with pallas.interpreted():
        matches_the_reference(c, "pallas")


@BY_NAME
@pytest.mark.usefixtures("no_races", "alone")
def test_nothing_races(c):
    with pallas.interpreted(detect_races=True):
        forward_is_near(c)


@BY_NAME
@pytest.mark.usefixtures("alone")
def test_a_product_is_one_kernel(c):
    x, factors, bias, _ = c.inputs()
    run = lambda *a: tsvd_common_matmul(*a, c.activation, implementation="pallas")
    assert kernels(run, x, factors, bias) == ({"shared"}, 1)


@pytest.mark.usefixtures("alone")
def test_a_batch_of_inputs_is_the_same():
    x, factors, bias, _ = CASES[3].inputs()
    run = lambda x: tsvd_common_matmul(x, factors, bias, implementation="pallas")
    batch = jnp.stack([x, 2 * x])
    with pallas.interpreted():
        both = jax.jit(jax.vmap(run))(batch)
        in_turn = jax.jit(lambda batch: jax.lax.map(run, batch))(batch)
    want = tsvd_common_matmul(batch, factors, bias, implementation="reference")
    assert_near(both, want, TOLERANCES["float16"].output, "y")
    np.testing.assert_array_equal(both, in_turn)


@BY_NAME
@pytest.mark.gpu
@pytest.mark.usefixtures("alone")
def test_values_and_gradients_match_the_reference_on_a_gpu(c):
    matches_the_reference(c, "pallas")


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [16, 32, 64])
def test_two_runs_of_many_rows_give_the_same_bits_on_a_gpu(rank):
    c = Case(name="large", side="right", M=(8200,), D=1024, F=4096, tile=128, rank=rank,
             dtype="bfloat16")  # fmt: skip
    _, factors, *_ = c.inputs()
    assert tsvd.stays_shared(c.M[0], factors.tiles, factors.common)
    forward_is_near(c)
    one, two = (value_and_gradients(c, c.dtype, "pallas") for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, two)


FITS = list(itertools.product((64, 128, 256), (16, 32, 64, 128), (768, 4096)))


@pytest.mark.parametrize(("size", "rank", "inner"), FITS)
def test_what_there_is_a_tiling_for_lowers(size, rank, inner):
    factors = common_factors("right", size, rank, D=inner, F=3072)
    x = jax.ShapeDtypeStruct((8192, inner), jnp.bfloat16)
    found = shared.Tiling.of(factors.tiles, factors.common)
    too_few = inner == 768 and 128 // rank * size // 128 > 12
    too_large = (size, rank) == (256, 128)  # the common factor, for slots enough beside it
    assert (found is None) == (too_few or too_large)
    run = lambda *a: shared.forward(*a, None, activation="gelu")
    if found is not None:
        assert kernels(run, x, factors.tiles, factors.common) == ({"shared"}, 1)


@pytest.mark.parametrize(
    ("rows", "inner", "num_out", "rank", "columns", "wanted"),
    [
        (8192, 4096, 32, 64, 128, (64, 6)), (8192, 4096, 32, 16, 128, (64, 6)),
        (8192, 768, 24, 16, 128, (128, 6)), (8192, 4096, 16, 64, 256, (64, 5)),
        (8192, 4096, 86, 32, 128, (64, 6)),
        (8192, 4096, 86, 16, 128, None),  # columns of the tiles' factors are no whole lines
        (8192, 4096, 16, 128, 256, None),  # with slots enough the common factor does not fit
        (8192, 4096, 32, 48, 128, None),  # ranks do not fill a tile
        (8192, 4096, 4, 16, 128, None),  # nor do all of them together
        (8192, 512, 32, 16, 256, None),  # fewer steps than panels
    ],
)  # fmt: skip
def test_the_tilings(rows, inner, num_out, rank, columns, wanted):
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    tiles, common = of(inner, num_out, rank), of(rank, columns)
    assert shared.Tiling.of(tiles, common) == (wanted and shared.Tiling(*wanted))
    assert tsvd.stays_shared(rows, tiles, common) == (wanted is not None)


@pytest.mark.parametrize(
    ("rows", "inner", "features", "rank"),
    [(4096, 4096, 1024, 16), (8192, 5120, 1280, 32)],
    ids=["few tiles", "a sixth of the columns would be nobody's"],
)
def test_another_kernel_is_for_what_would_leave_much_idle(rows, inner, features, rank):
    factors = common_factors("right", 128, rank, D=inner, F=features)
    assert shared.Tiling.of(factors.tiles, factors.common) is not None
    x = jax.ShapeDtypeStruct((rows, inner), jnp.bfloat16)
    named = lambda *a: tsvd_common_matmul(*a, implementation="pallas")
    found, _ = kernels(named, x, factors)
    assert found
    assert "shared" not in found
    assert kernels(tsvd_common_matmul, x, factors) == (set(), 0)
