"""Longformer's encoder and BigBird's attention lower for CUDA, on the kernels that None chooses."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from sparsax import pallas
from sparsax.nn import BigBirdSelfAttention, Longformer, LongformerConfig

CONFIG = LongformerConfig(
    vocab_size=100, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
    num_attention_heads=2, max_position_embeddings=1002, attention_window=200,
)  # fmt: skip


def launches(make, run, *arrays) -> int:
    """Kernels in the program of a function of a module and arrays."""
    graph, state = nnx.split(nnx.eval_shape(make))
    with pallas.lowering():
        step = jax.jit(lambda state, *x: run(nnx.merge(graph, state), *x))
        traced = step.trace(state, *arrays)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    return text.count("stablehlo.custom_call @mosaic_gpu")


def test_longformer_lowers_two_kernels_which_its_layers_share():
    tokens = jax.ShapeDtypeStruct((2, 1000), jnp.int32)
    mask = jax.ShapeDtypeStruct((2, 1000), bool)
    make = lambda: Longformer(CONFIG, max_global=20, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    run = lambda m, x, real, chosen: m(x, key_mask=real, global_mask=chosen)
    assert launches(make, run, tokens, mask, mask) == 2


@pytest.mark.parametrize("length", [500, 1000])
def test_bigbird_runs_its_global_rows_apart_unless_it_is_dense(length):
    x = jax.ShapeDtypeStruct((2, length, 128), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((2, length), bool)
    make = lambda: BigBirdSelfAttention(2, 128, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    run = lambda m, x, real: m(x, key_mask=real)
    assert launches(make, run, x, mask) == (2 if length == 1000 else 1)
