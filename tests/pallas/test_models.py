"""Longformer's encoder and BigBird's attention on the kernels that None chooses."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from sparsax import default_implementation, pallas
from sparsax.nn import BigBirdSelfAttention, Longformer, LongformerConfig
from tests.helpers import assert_near, launched

CONFIG = LongformerConfig(
    vocab_size=100, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
    num_attention_heads=2, max_position_embeddings=1002, attention_window=200,
)  # fmt: skip


def launches(make, run, *arrays) -> int:
    """Kernels in the program of a function of a module."""
    graph, state = nnx.split(nnx.eval_shape(make))
    with pallas.lowering():
        step = jax.jit(lambda state, *x: run(nnx.merge(graph, state), *x))
        traced = step.trace(state, *arrays)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    return launched(text)


def test_longformer_launches_three_kernels_a_layer():
    """One gathers what is listed, one attends, one puts rows back: so few need not be dealt out."""
    tokens = jax.ShapeDtypeStruct((2, 1000), jnp.int32)
    mask = jax.ShapeDtypeStruct((2, 1000), bool)
    make = lambda: Longformer(CONFIG, max_global=20, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    run = lambda m, x, real, chosen: m(x, key_mask=real, global_mask=chosen)
    assert launches(make, run, tokens, mask, mask) == 3 * CONFIG.num_hidden_layers


@pytest.mark.parametrize(("length", "found"), [(500, 1), (1000, 3)])
def test_bigbird_attends_in_one_launch_or_is_dense(length, found):
    """Dense, nothing is gathered or put back."""
    x = jax.ShapeDtypeStruct((2, length, 128), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((2, length), bool)
    make = lambda: BigBirdSelfAttention(2, 128, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    run = lambda m, x, real: m(x, key_mask=real)
    assert launches(make, run, x, mask) == found


@pytest.mark.gpu
@pytest.mark.parametrize("length", [500, 1000])
def test_longformer_on_the_gpu_is_the_float32_model_within_rounding(length):
    keys = jax.random.split(jax.random.key(0), 2)
    tokens = jax.random.randint(keys[0], (2, length), 2, 100)
    real = jnp.arange(length) < jnp.array([[length], [length - 150]])
    chosen = jax.random.bernoulli(keys[1], 0.01, (2, length))

    make = lambda dtype, implementation: Longformer(
        CONFIG, max_global=40, dtype=dtype, implementation=implementation, rngs=nnx.Rngs(0)
    )
    full, low = make(jnp.float32, "xla"), make(jnp.bfloat16, None)
    nnx.update(low, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(full)))
    run = nnx.jit(Longformer.hidden_states)
    want, got = (run(m, jnp.where(real, tokens, 1), real, chosen) for m in (full, low))
    q = jnp.zeros((2, length, 2, 64), jnp.bfloat16)
    pattern = low.layers[0].attention.pattern(length)
    assert default_implementation(q, pattern) == "pallas"
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        # Weights, sums between layers and what attention reads are rounded, some 2e-3 each.
        assert_near(a, b, 3e-2, f"layer {i}")


@pytest.mark.gpu
def test_bigbird_on_the_gpu_is_the_float32_layer_within_rounding():
    x = jax.random.normal(jax.random.key(0), (2, 1000, 128))
    real = jnp.arange(1000) < jnp.array([[1000], [850]])

    def attended(dtype, implementation):
        layer = BigBirdSelfAttention(
            2, 128, dtype=dtype, implementation=implementation, rngs=nnx.Rngs(0)
        )
        return nnx.jit(lambda m, x: m(x, key_mask=real))(layer, x)

    assert_near(attended(jnp.bfloat16, "pallas"), attended(jnp.float32, "xla"), 2e-2, "y")
