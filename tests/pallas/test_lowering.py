"""The kernels lower for CUDA over the whole configuration matrix, on a machine without a GPU."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsax
from sparsax import pallas
from tests.helpers import launched
from tests.pallas.cases import cells

# `pytest --cells 2` takes the first and the last: short float16 heads, the longest with masks.
# One dtype is lowered as the other, in the same tiles: float16 meets every head dim that masks give
# other tiles, every block, and both with masks and without.
IN_FLOAT16 = [(64, 32, False), (64, 64, True), (128, 128, False), (128, 32, True)]
MATRIX = [
    *((features, block, "float16", masks) for features, block, masks in IN_FLOAT16),
    *itertools.product((32, 64, 96, 128, 256), (32, 64, 128), ["bfloat16"], (False, True)),
]


def kept(features, block, dtype, masks):
    """Where masks choose other tilings, all, each in one dtype; else every two of the others."""
    if features in (64, 128):
        return ((features, block, masks) in IN_FLOAT16) == (dtype == "float16")
    return ((32, 96, 256).index(features) + (32, 64, 128).index(block) + masks) % 2 == 0


@pytest.mark.parametrize(("features", "block", "dtype", "masks"), cells(MATRIX, kept))
def test_attention_and_its_gradient_lower(features, block, dtype, masks):
    pattern = sparsax.patterns.bigbird(1000, block=block)
    options = {"causal": True, "pruned": "zero", "window": (300, None)} if masks else {}

    def loss(q, k, v, pattern, key_mask):
        if masks:
            options["key_mask"] = key_mask
        o = sparsax.block_sparse_attention(q, k, v, pattern, **options, implementation="pallas")
        return o.astype(jnp.float32).sum()

    q = jax.ShapeDtypeStruct((16, 1000, 4, features), dtype)
    k = jax.ShapeDtypeStruct((16, 1000, 2, features), dtype)
    key_mask = jax.ShapeDtypeStruct((16, 1000), bool)
    with pallas.lowering():
        step = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, k, pattern, key_mask)
        text = step.lower(lowering_platforms=("cuda",)).as_text()
    halves = 2 if features == 256 else 1  # of dk and dv
    # Rows are dealt out for forward and dq together, and for dkv.
    assert launched(text) == 4 + halves


def test_rows_are_not_dealt_out_where_each_has_a_multiprocessor():
    pattern = sparsax.patterns.bigbird(1000, block=128)
    q = jax.ShapeDtypeStruct((4, 1000, 4, 128), jnp.bfloat16)  # 128 row tiles

    def loss(q):
        o = sparsax.block_sparse_attention(q, q, q, pattern, implementation="pallas")
        return o.astype(jnp.float32).sum()

    with pallas.lowering():
        text = jax.jit(jax.grad(loss)).trace(q).lower(lowering_platforms=("cuda",)).as_text()
    assert launched(text) == 3


def in_a_scan_with_remat(q, k, v, patterns):
    def layer(x, pattern):
        o = sparsax.block_sparse_attention(x, k, v, pattern, implementation="pallas")
        return x + o, None

    return jax.lax.scan(jax.checkpoint(layer), q, patterns)[0].astype(jnp.float32).sum()


def sharded(q, k, v, pattern):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("batch", "head"))
    spec = jax.sharding.PartitionSpec("batch", None, "head")
    attend = lambda *x: sparsax.block_sparse_attention(*x, implementation="pallas")
    none = jax.sharding.PartitionSpec()
    split = jax.shard_map(attend, mesh=mesh, in_specs=(spec, spec, spec, none), out_specs=spec)
    return split(q, k, v, pattern).astype(jnp.float32).sum()


def over_a_batch_of_patterns(q, k, v, patterns):
    attend = lambda pattern: sparsax.block_sparse_attention(
        q, k, v, pattern, implementation="pallas"
    )
    return jax.vmap(attend)(patterns).astype(jnp.float32).sum()


@pytest.mark.parametrize("loss", [in_a_scan_with_remat, sharded, over_a_batch_of_patterns])
def test_gradients_lower_within_transformations(loss):
    pattern = sparsax.patterns.bigbird(8192, block=128)  # long enough for rows to be split
    if loss is not sharded:
        pattern = sparsax.BlockPattern.stack([pattern, sparsax.patterns.causal(8192, block=128)])
    q = jax.ShapeDtypeStruct((2, 8192, 4, 64), jnp.bfloat16)
    with pallas.lowering():
        step = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, q, q, pattern)
        text = step.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


@pytest.mark.parametrize(("samples", "launches"), [(1, 8), (64, 5)])
def test_long_rows_are_cut_unless_many_samples_keep_the_gpu_busy(samples, launches):
    pattern = sparsax.patterns.bigbird(4096, block=128)
    q = jax.ShapeDtypeStruct((samples, 4096, 8, 64), jnp.bfloat16)

    def loss(q):
        o = sparsax.block_sparse_attention(q, q, q, pattern, implementation="pallas")
        return o.astype(jnp.float32).sum()

    with pallas.lowering():
        text = jax.jit(jax.grad(loss)).trace(q).lower(lowering_platforms=("cuda",)).as_text()
    assert launched(text) == launches


def test_equal_layers_are_lowered_once():
    pattern = sparsax.patterns.bigbird(256, block=64)
    q = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)

    def loss(layers, x):
        for _ in range(layers):
            x = sparsax.block_sparse_attention(x, x, x, pattern, implementation="pallas")
        return x.astype(jnp.float32).sum()

    def kernels(layers):
        with pallas.lowering():
            step = jax.jit(jax.grad(functools.partial(loss, layers))).trace(q)
            text = step.lower(lowering_platforms=("cuda",)).as_text()
        return text.count("stablehlo.custom_call @mosaic_gpu")

    assert kernels(3) == kernels(1) == 3
