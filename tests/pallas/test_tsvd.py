"""The kernels of tiled factors against the float32 reference, interpreted and on a GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsax import pallas, tsvd_matmul
from sparsax.pallas import tsvd
from sparsax.pallas.grouped_matmul import product
from sparsax.pallas.tsvd import products, split
from tests.helpers import TOLERANCES, assert_near
from tests.test_linear import Case, matches_the_reference, multiply, value_and_gradients

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

# What the kernel that keeps `x u` takes.
RESIDENT = (
    Case(name="resident", M=(330,), D=256, F=512, tile=128, rank=64, dtype="bfloat16"),
    Case(name="resident_gelu", M=(3, 67), D=300, F=400, tile=128, rank=64, dtype="float16",
         activation="gelu"),
    Case(name="resident_silu", M=(130,), D=128, F=256, tile=(64, 128), rank=128, dtype="bfloat16",
         activation="silu", bias=False),
    Case(name="resident_odd", M=(70,), D=384, F=576, tile=(128, 192), rank=64, dtype="bfloat16"),
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


@pytest.fixture
def few_blocks(fresh, monkeypatch):
    """Four thread blocks: products are wide, clusters share copies, and all walk over tiles."""
    monkeypatch.setattr(product, "multiprocessors", lambda: 4)
    monkeypatch.setattr(products, "multiprocessors", lambda: 4)
    monkeypatch.setattr(split, "multiprocessors", lambda: 4)


@BY_NAME
def test_values_and_gradients_match_the_reference(c):
    with pallas.interpreted():
        matches_the_reference(c, "pallas")


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


@pytest.mark.parametrize("c", RESIDENT, ids=lambda c: c.name)
def test_the_kernel_that_keeps_products_matches_the_reference(c, monkeypatch):
    monkeypatch.setattr(tsvd, "best_schedule", lambda *_: "resident")
    with pallas.interpreted():
        forward_is_near(c)


@pytest.mark.usefixtures("no_races")
def test_no_races_where_products_are_kept(monkeypatch):
    monkeypatch.setattr(tsvd, "best_schedule", lambda *_: "resident")
    with pallas.interpreted(detect_races=True):
        forward_is_near(RESIDENT[0])


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
    monkeypatch.setattr(tsvd.choice, "FEW_RANKS", 64)
    x, factors, bias, _ = Case(name="chosen", M=(3,), D=256, F=500, tile=256, rank=32,
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
def test_no_races_forward(tsvd_schedule):
    with pallas.interpreted(detect_races=True):
        forward_is_near(
            dataclasses.replace(RACING, M=(200,) if tsvd_schedule == "fused" else (330,))
        )


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
    matches_the_reference(c, "pallas")
    one, two = (value_and_gradients(c, c.dtype, "pallas") for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, two)


# Enough tiles to keep every multiprocessor busy: clusters share copies there.
LARGE = (
    Case(name="large", M=(4, 2048), D=1024, F=4096, tile=256, rank=32, dtype="bfloat16"),
    Case(name="large_ragged", M=(5001,), D=1000, F=3000, tile=256, rank=64, dtype="bfloat16"),
    Case(name="large_decode", M=(16,), D=4096, F=4096, tile=256, rank=32, dtype="bfloat16"),
)


LARGE_RESIDENT = Case(
    name="large_resident", M=(5000,), D=4096, F=4096, tile=1024, rank=64, dtype="bfloat16"
)


@pytest.mark.gpu
@pytest.mark.parametrize("c", LARGE, ids=lambda c: c.name)
def test_large_products_match_the_reference_on_the_gpu(c):
    matches_the_reference(c, "pallas")
    one, two = (value_and_gradients(c, c.dtype, "pallas") for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.gpu
@pytest.mark.parametrize("c", [*FUSED, *LARGE], ids=lambda c: c.name)
def test_the_fused_kernel_matches_the_reference_on_the_gpu(c, monkeypatch):
    monkeypatch.setattr(tsvd, "best_schedule", lambda *_: "fused")
    forward_is_near(c)


@pytest.mark.gpu
@pytest.mark.parametrize("c", [*RESIDENT, LARGE_RESIDENT], ids=lambda c: c.name)
def test_the_kernel_that_keeps_products_matches_the_reference_on_the_gpu(c, monkeypatch):
    monkeypatch.setattr(tsvd, "best_schedule", lambda *_: "resident")
    forward_is_near(c)


@pytest.mark.gpu
@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("c", [*FEW, LARGE[2]], ids=lambda c: c.name)
def test_the_kernel_for_few_rows_matches_the_reference_on_the_gpu(c):
    forward_is_near(c)


REFUSED = {
    "float32": ({"dtype": "float32"}, "takes x and factors in one of .* got float32"),
    "rank": ({"rank": 24}, r"takes ranks in multiples of 16; got 24, see .*pad_rank\(16\)"),
    "tile": ({"tile": 48}, "takes tiles, .* in multiples of 64; got 48 x 48"),
    "activation": ({"activation": "gelu_exact"}, "takes activation .* got 'gelu_exact'"),
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
