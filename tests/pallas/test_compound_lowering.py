"""The kernels of compound attention lower for CUDA, on a machine without a GPU."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsax import Band, CompoundPattern, compound_attention, pallas, patterns
from sparsax.pallas.compound.keys import problem_of
from sparsax.patterns import compound
from tests.helpers import launched
from tests.pallas.cases import cells

T = 1000
POSITIONS = np.arange(0, T, 41)[None].repeat(2, 0)
REAL = np.arange(T) < np.array([[T], [700]])
PATTERNS = {
    "window": lambda: compound.longformer(T, window=100),
    "longformer": lambda: compound.longformer(T, window=100, positions=POSITIONS),
    "padded": lambda: compound.longformer(
        T, window=100, positions=POSITIONS, causal=True, token_mask=REAL
    ),
    "bigbird": lambda: compound.bigbird(T, block=64, heads=2, token_mask=REAL),
    "everything": lambda: CompoundPattern.from_parts(
        T, bands=[Band(100, 90), Band(300, -290)], columns=POSITIONS[:1], rows=POSITIONS,
        blocks=patterns.random(T, blocks_per_row=3, block=32), token_mask=REAL,
    ),
}  # fmt: skip


def text_of(loss, *arrays):
    with pallas.lowering():
        step = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*arrays)
        return step.lower(lowering_platforms=("cuda",)).as_text()


def attend(q, k, v, pattern):
    o = compound_attention(q, k, v, pattern, implementation="pallas")
    return o.astype(jnp.float32).sum()


MATRIX = [
    *((name, 64, "bfloat16") for name in PATTERNS),
    *(("padded", features, "float16") for features in (32, 96, 128)),
    *(("everything", features, "bfloat16") for features in (32, 128, 256)),
]


def kept(name, features, dtype):
    """Every pattern and every head dim, of which 96 is in float16."""
    return name != "padded" or features in (64, 96)


@pytest.mark.parametrize(("name", "features", "dtype"), cells(MATRIX, kept))
def test_attention_and_its_gradient_lower(name, features, dtype):
    q = jax.ShapeDtypeStruct((2, T, 64, features), dtype)
    k = jax.ShapeDtypeStruct((2, T, 32, features), dtype)
    pattern = PATTERNS[name]()
    text = text_of(attend, q, k, k, pattern)
    halves = 2 if features == 256 else 1  # of dk and dv
    # Of forward and dq together, and of dkv; none where rows are done in order.
    tables = 0 if name in ("window", "longformer") else 2
    # Queries of global rows and packed keys are gathered; rows of o and of dq are put back.
    moved = 0 if name == "window" else 3
    assert launched(text) == 2 + halves + tables + moved
    assert f"{T}x{T}" not in text


def test_own_projections_without_global_rows_are_not_brought():
    q = jax.ShapeDtypeStruct((2, T, 2, 64), jnp.bfloat16)
    pattern = PATTERNS["window"]()

    def loss(q, k, v):
        own = {"q_global": pattern.take_rows(q), "k_global": 2 * k, "v_global": 2 * v}
        o = compound_attention(q, k, v, pattern, **own, implementation="pallas")
        return o.astype(jnp.float32).sum()

    text, plain = text_of(loss, q, q, q), text_of(lambda *x: attend(*x, pattern), q, q, q)
    assert launched(text) == launched(plain)
    assert problem_of(q, q, pattern, 1.0, own=True) == problem_of(q, q, pattern, 1.0)


def in_a_scan_with_remat(q, k, v, stacked):
    def layer(x, pattern):
        return x + compound_attention(x, k, v, pattern, implementation="pallas"), None

    return jax.lax.scan(jax.checkpoint(layer), q, stacked)[0].astype(jnp.float32).sum()


def sharded(q, k, v, pattern):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("batch", "head"))
    spec = jax.sharding.PartitionSpec("batch", None, "head")
    of_pattern = jax.sharding.PartitionSpec("batch")
    run = lambda *x: compound_attention(*x, implementation="pallas")
    split = jax.shard_map(run, mesh=mesh, in_specs=(spec, spec, spec, of_pattern), out_specs=spec)
    return split(q, k, v, pattern).astype(jnp.float32).sum()


def over_documents(q, k, v, stacked):
    return jax.vmap(attend, (None, None, None, 0))(q, k, v, stacked).sum()


TRANSFORMED = list(
    itertools.product(("longformer", "padded"), (in_a_scan_with_remat, sharded, over_documents))
)


def kept_within(name, loss):
    """All of what is padded and causal; without both, whose arrays are fewer, those of vmap."""
    return name == "padded" or loss is over_documents


@pytest.mark.usefixtures("one_multiprocessor")
@pytest.mark.parametrize(("name", "loss"), cells(TRANSFORMED, kept_within))
def test_gradients_lower_within_transformations(loss, name):
    pattern = PATTERNS[name]()
    if loss is not sharded:
        pattern = jax.tree.map(lambda x: jnp.stack([x, x]), pattern)
    q = jax.ShapeDtypeStruct((2, T, 4, 64), jnp.bfloat16)
    assert "mosaic_gpu" in text_of(loss, q, q, q, pattern)
