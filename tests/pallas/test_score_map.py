"""The kernels of the score map against the float32 reference: interpreted, and on the GPU."""

import dataclasses
import importlib.util
import itertools
import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsax import pallas, score_map
from sparsax.patterns import spion
from tests.helpers import assert_near, launched
from tests.pallas.cases import KERNEL_CASES, LARGE, cells
from tests.pallas.test_machine_code import SERIALISED

# Probabilities never leave float32, and their relative error is the absolute one of their logits,
# which are exact products summed in float32. On a GPU sums are cut, not rounded, and exponentials
# are good to 2^-22: a few last bits of logits up to 64, 8e-6 each.
TOLERANCE, GPU_TOLERANCE = 1e-5, 5e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One map; letters as everywhere. `masks` is any of "causal", "padding" and "segments"."""

    name: str
    B: int = 2
    T: int = 128
    S: int = 128
    N: int = 2
    K: int = 2
    H: int = 64
    dtype: str = "bfloat16"
    masks: tuple[str, ...] = ()
    per_head: bool = False
    pool: int | None = None
    scale: float | None = None

    def inputs(self):
        """q, k and the options of the call."""
        rng = np.random.default_rng(0)
        q = jnp.asarray(2 * rng.standard_normal((self.B, self.T, self.N, self.H)), self.dtype)
        k = jnp.asarray(rng.standard_normal((self.B, self.S, self.K, self.H)), self.dtype)
        options = {"per_head": self.per_head, "pool": self.pool, "scale": self.scale}
        options["causal"] = "causal" in self.masks
        if "padding" in self.masks:
            ends = jnp.linspace(self.S, self.S // 3, self.B).astype(int)[:, None]
            options["key_mask"] = jnp.arange(self.S) < ends
        if "segments" in self.masks:
            cut = lambda length: jnp.asarray(np.sort(rng.integers(0, 3, (self.B, length)), axis=1))
            ids = cut(self.T)
            options["segment_ids"] = ids if self.T == self.S else (ids, cut(self.S))
        return q, k, options


name = lambda c: c.name
# Interpreting a tile takes a second or two; these few meet every feature between them.
INTERPRETED = (
    Case(name="tiny", B=1, T=40, S=24, N=1, K=1, H=32),
    Case(name="ragged_gqa", T=203, S=150, N=4),
    Case(name="ragged_causal_pooled", T=203, S=203, pool=32, masks=("causal",), dtype="float16"),
    Case(name="ids", H=32, B=3, T=100, S=100, masks=("padding", "segments")),
    Case(name="ids_pooled_per_head", T=90, S=140, masks=("segments",), pool=64, per_head=True),
    Case(name="everything", T=140, S=140, masks=("causal", "padding"), N=4, K=1, pool=24),
    Case(name="h96", H=96, B=1, T=64, S=320, per_head=True),
    Case(name="h128_negative_scale", H=128, B=1, scale=-0.2),
    Case(name="h256_causal_longer_keys", H=256, B=1, T=70, S=200, N=1, K=1, masks=("causal",)),
    Case(name="causal_longer_queries", B=1, T=260, S=70, masks=("causal",), pool=128),
)
# More tiles than multiprocessors, so 128 keys a tile; several maps to a thread block.
WIDE = (
    Case(name="wide", B=1, T=1600, S=1500, masks=("causal",)),
    Case(name="wide_pooled", B=1, T=1500, S=1500, pool=64, masks=("causal", "padding")),
    Case(name="wide_heads", B=2, T=1024, S=1024, N=16, K=4, per_head=True, H=128),
    Case(name="wide_pooled_heads", B=3, T=1000, S=1000, N=8, K=8, per_head=True, pool=96),
)


def both(c: Case):
    """The map of the kernels, and the reference's."""
    q, k, options = c.inputs()
    run = lambda implementation, dtype: jax.jit(
        lambda q, k: score_map(q, k, **options, implementation=implementation)
    )(q.astype(dtype), k.astype(dtype))
    got = run("pallas", c.dtype)
    assert got.dtype == jnp.float32
    with jax.default_matmul_precision("highest"):
        return got, run("reference", "float32")


@pytest.mark.usefixtures("no_races")
@pytest.mark.parametrize("c", INTERPRETED, ids=name)
def test_interpreted_kernels_match_the_reference_without_races(c):
    with pallas.interpreted(detect_races=True):
        assert_near(*both(c), TOLERANCE, "map")


@pytest.mark.usefixtures("fresh", "no_races")
def test_wide_tiles_and_thread_blocks_of_several_maps_interpreted(monkeypatch):
    from sparsax.pallas.score_map import mean, passes

    # A GPU of one multiprocessor has tiles enough already.
    monkeypatch.setattr(passes, "multiprocessors", lambda: 1)
    monkeypatch.setattr(mean, "multiprocessors", lambda: 1)
    for pool in (None, 128):
        c = Case(name="", T=200, S=300, N=4, per_head=True, masks=("causal",), pool=pool)
        with pallas.interpreted(detect_races=True):
            assert_near(*both(c), TOLERANCE, "map")


def test_pooled_is_the_pooled_map():
    q, k, options = Case(name="", T=203, S=203, masks=("padding", "causal")).inputs()
    run = lambda pool: score_map(q, k, **options | {"pool": pool}, implementation="pallas")
    with pallas.interpreted():
        grid, pooled = jax.jit(lambda: (run(None), run(32)))()
    assert_near(pooled[0], spion.average_pool(grid[0], 32), 1e-6, "pooled map")


def of_attention(c):
    """A case of attention, as one of the map."""
    masks = ("causal",) * c.causal + ("padding",) * (c.padding is not None)
    return Case(
        name=c.name, B=c.B, T=c.T, S=c.S, N=c.N, K=c.K, H=c.H, dtype=c.dtype, scale=c.scale,
        masks=masks + ("segments",) * c.segments,
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("pool", [None, 64])
@pytest.mark.parametrize(
    "c", INTERPRETED + WIDE + tuple(map(of_attention, KERNEL_CASES + LARGE)), ids=name
)
def test_kernels_match_the_reference_and_repeat_their_bits(c, pool):
    c = dataclasses.replace(c, pool=c.pool or pool)
    got, want = both(c)
    assert_near(got, want, GPU_TOLERANCE, "map")
    np.testing.assert_array_equal(got, both(c)[0])


SIZES = (1000, 1003), (4096, 4096)
MATRIX = [
    *itertools.product((32, 64, 96, 128, 256), ["bfloat16"], (None, 96), (False, True), SIZES),
    *itertools.product([64], ["float16"], (None, 8, 128), (False, True), SIZES),
]


def kept(features, dtype, pool, masks, size):
    """Every two of pool, masks and size, of every head dim and dtype."""
    return ((pool is None) + masks + SIZES.index(size)) % 2 == 0


@pytest.mark.parametrize(("features", "dtype", "pool", "masks", "size"), cells(MATRIX, kept))
def test_the_kernels_lower(features, dtype, pool, masks, size):
    T, S = size
    options = {"causal": masks, "per_head": not masks, "pool": pool}

    def run(q, k, key_mask):
        if masks:
            options["key_mask"] = key_mask
        return score_map(q, k, **options, implementation="pallas")

    q = jax.ShapeDtypeStruct((2, T, 4, features), dtype)
    k = jax.ShapeDtypeStruct((2, S, 2, features), dtype)
    with pallas.lowering():
        step = jax.jit(run).trace(q, k, jax.ShapeDtypeStruct((2, S), bool))
        text = step.lower(lowering_platforms=("cuda",)).as_text()
    assert launched(text) == 2
    sizes = [math.prod(map(int, shape.split("x"))) for shape in re.findall(r"<([\dx]+)xf32>", text)]
    assert (max(sizes) < T * S) == (pool is not None)  # a pooled map is never a whole one


def test_lowers_under_vmap_and_shard_map():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("batch", "head"))
    spec = jax.sharding.PartitionSpec("batch", None, "head")

    def mean(q, k):
        return jax.lax.pmean(score_map(q, k, implementation="pallas"), ("batch", "head"))

    q = jax.ShapeDtypeStruct((4, 256, 4, 64), jnp.bfloat16)
    spread = jax.shard_map(
        mean, mesh=mesh, in_specs=(spec, spec), out_specs=jax.sharding.PartitionSpec()
    )
    over_layers = jax.vmap(lambda q, k: score_map(q, k, pool=64, implementation="pallas"))
    with pallas.lowering():
        jax.jit(spread).trace(q, q).lower(lowering_platforms=("cuda",))
        layers = jax.ShapeDtypeStruct((3, *q.shape), q.dtype)
        jax.jit(over_layers).trace(layers, layers).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float32"}, r"takes q, k, v in one of .*got float32"),
        ({"H": 48}, r"takes head features H in .*got H=48"),
        ({"pool": 20}, r"pools blocks in multiples of 8 tokens; got pool=20"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused_and_left_to_xla(change, message):
    q, k, options = dataclasses.replace(Case(name=""), **change).inputs()
    with pallas.lowering():
        with pytest.raises(NotImplementedError, match=message + ".*'xla' runs"):
            score_map(q, k, **options, implementation="pallas")
        text = jax.jit(lambda q, k: score_map(q, k, **options)).trace(q, k).lower().as_text()
    assert "mosaic_gpu" not in text


@pytest.mark.parametrize(
    ("implementation", "kernels"), [("pallas", True), (None, True), ("xla", False)]
)
def test_the_kernels_run_where_they_are_named_and_by_default(implementation, kernels):
    q, k, _ = Case(name="").inputs()
    run = lambda q, k: score_map(q, k, implementation=implementation)
    with pallas.lowering():
        text = jax.jit(run).trace(q, k).lower(lowering_platforms=("cuda",)).as_text()
    assert ("mosaic_gpu" in text) == kernels


@pytest.mark.skipif(pallas.on_hopper(), reason="the kernels do run here")
def test_without_a_gpu_the_kernels_refuse():
    q, k, _ = Case(name="").inputs()
    with pytest.raises(NotImplementedError, match="needs an NVIDIA Hopper GPU"):
        score_map(q, k, implementation="pallas")


@pytest.mark.machine_code
@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="needs the dependency group machine-code (jax's CUDA plugin)",
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [1000, 4096])  # 64 and 128 keys a tile, ragged or not
@pytest.mark.parametrize("features", [32, 64, 96, 128, 256])
def test_products_overlap_and_registers_do_not_spill(features, length, masked):
    command = ["tests.pallas.compile_score_map", str(features), str(length), str(int(masked))]
    run = subprocess.run(
        [sys.executable, "-m", *command], cwd=Path(__file__).parents[2], capture_output=True,
        text=True, timeout=300, check=False,
    )  # fmt: skip
    said = run.stdout + run.stderr
    assert run.returncode == 0, said[-2000:]
    kernels = re.findall(r"Function properties for score_map_(lse|mean)_mosaic", said)
    assert sorted(kernels) == ["lse"] * 2 + ["mean"] * 2
    assert not SERIALISED.search(said)
    assert set(re.findall(r"(\d+) bytes spill stores", said)) == {"0"}
