"""The kernels of top-L attention lower for CUDA, on a machine without a GPU."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsax import ProductQuantizer, pallas, top_l_attention
from sparsax.quantise import Codes
from tests.helpers import launched

T = 1000
MATRIX = [
    *itertools.product((32, 64, 96, 128), ["bfloat16"], [True]),
    (64, "bfloat16", False),
    (128, "float16", False),
]


def text_of(loss, *arrays):
    with pallas.lowering():
        step = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*arrays)
        return step.lower(lowering_platforms=("cuda",)).as_text()


def inputs(heads=4, kv_heads=2, features=64, dtype="bfloat16", length=T):
    shape = lambda n, *x, dtype: jax.ShapeDtypeStruct((2, length, n, *x), dtype)
    words = lambda n: shape(n, -(-features // 64), dtype=jnp.uint32)
    k = shape(kv_heads, features, dtype=dtype)
    codes = Codes(words(heads), words(kv_heads), num_codes=features // 8)
    return shape(heads, features, dtype=dtype), k, k, codes


def attend(q, k, v, codes, key_mask=None, *, causal=True):
    o = top_l_attention(
        q, k, v, codes, keep=q.shape[1] // 8, causal=causal, key_mask=key_mask,
        implementation="pallas",
    )  # fmt: skip
    return o.astype(jnp.float32).sum()


@pytest.mark.usefixtures("one_multiprocessor")
@pytest.mark.parametrize(("features", "dtype", "causal"), MATRIX)
def test_attention_and_its_gradient_lower(features, dtype, causal):
    key_mask = jax.ShapeDtypeStruct((2, T), bool) if causal else None
    loss = lambda *x: attend(*x, causal=causal)
    text = text_of(loss, *inputs(features=features, dtype=dtype), key_mask)
    # The choice; rows are dealt out for forward and dq together, and for dkv.
    assert launched(text) == 1 + 5
    assert f"{T}x{T}" not in text


def test_what_is_kept_for_the_backward_pass_is_of_the_length():
    q, k, v, codes = inputs(length=4096)
    residuals = lambda q, k, v, codes: jax.vjp(lambda *x: attend(*x, codes), q, k, v)[1]
    with pallas.lowering():
        leaves = jax.tree.leaves(jax.eval_shape(residuals, q, k, v, codes))
    assert max(leaf.size for leaf in leaves) <= q.size


def in_a_scan_with_remat(q, k, v, codes):
    def layer(x, codes):
        o = top_l_attention(x, k, v, codes, keep=99, causal=True, implementation="pallas")
        return x + o, None

    return jax.lax.scan(jax.checkpoint(layer), q, codes)[0].astype(jnp.float32).sum()


def of_codes_made_inside(q, k, v, _):
    books = jnp.zeros((k.shape[2], q.shape[-1] // 8, 16, 8))
    quantizer = ProductQuantizer(books, jnp.ones(books.shape[:3]))
    layer = lambda q, k, v: attend(q, k, v, quantizer.codes(q, k, score="match"))
    return jax.checkpoint(layer)(q, k, v)


def over_a_stack(q, k, v, codes):
    return jax.vmap(attend, (None, None, None, 0))(q, k, v, codes).sum()


def sharded(q, k, v, codes):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("batch", "head"))
    spec = jax.sharding.PartitionSpec("batch", None, "head")
    of_keys = spec if k.shape[2] > 1 else jax.sharding.PartitionSpec("batch")
    run = lambda q, k, v, codes: top_l_attention(
        q, k, v, codes, keep=99, causal=True, implementation="pallas"
    )
    of_codes = Codes(spec, of_keys, num_codes=codes.num_codes)
    split = jax.shard_map(
        run, mesh=mesh, in_specs=(spec, of_keys, of_keys, of_codes), out_specs=spec
    )
    return split(q, k, v, codes).astype(jnp.float32).sum()


@pytest.mark.parametrize(
    ("loss", "kv_heads"),
    [(in_a_scan_with_remat, 2), (of_codes_made_inside, 2), (over_a_stack, 1), (sharded, 1),
     (sharded, 2)],
)  # fmt: skip
def test_gradients_lower_within_transformations(loss, kv_heads):
    q, k, v, codes = inputs(kv_heads=kv_heads)
    if loss in (in_a_scan_with_remat, over_a_stack):
        codes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), codes)
    text = text_of(loss, q, k, v, codes)
    for kernel in ("top_l_select", "block_sparse_forward", "block_sparse_dkv"):
        assert kernel in text
