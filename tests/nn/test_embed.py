"""An embedding takes the rows that flax's takes, and sums their gradient in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec

from sparsax.nn import Embed
from sparsax.nn.embed import FEW
from tests.helpers import assert_near

SIZES = pytest.mark.parametrize("count", [50, FEW + 50])  # by a product, by additions


def gradient(model, ids, weights):
    """Of a weighted sum of what the model gives, with respect to its table."""
    loss = lambda model: (model(ids).astype(jnp.float32) * weights).sum()
    return nnx.grad(loss)(model)["embedding"][...]


@SIZES
def test_values_are_those_of_flax(count):
    ids = jax.random.randint(jax.random.key(0), (3, 7), -count, count)
    ids = ids.at[0, 0].set(count)  # no such row: NaN
    for dtype in (None, jnp.bfloat16):
        ours, theirs = (
            kind(count, 8, dtype=dtype, rngs=nnx.Rngs(0))(ids) for kind in (Embed, nnx.Embed)
        )
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(theirs, np.float32))


@SIZES
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_gradient_is_the_sum_of_its_terms(count, dtype):
    # So many equal ids that a sum in bfloat16 would stop at a tenth of what is right.
    ids = jnp.where(
        jnp.arange(6000) % 2 == 0, 7, jax.random.randint(jax.random.key(1), 6000, -9, 9)
    )
    weights = jnp.ones((6000, 4)) + jax.random.normal(jax.random.key(2), (6000, 4)) / 8
    weights = weights.astype(dtype or jnp.float32).astype(jnp.float32)  # as it is when it arrives
    found = gradient(Embed(count, 4, dtype=dtype, rngs=nnx.Rngs(0)), ids, weights)
    want = np.zeros((count, 4))
    np.add.at(want, np.asarray(ids), np.asarray(weights, np.float64))
    assert found.dtype == jnp.float32
    assert_near(found, want, 1e-5, "table")


@SIZES
def test_works_under_vmap_and_shared_by_devices(count):
    model = Embed(count, 4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    ids = jax.random.randint(jax.random.key(0), (4, 9), 0, count)
    weights = jax.random.normal(jax.random.key(1), (4, 9, 4))

    def loss(state, ids, weights):
        return (nnx.merge(graph, state)(ids).astype(jnp.float32) * weights).sum()

    want = jax.grad(loss)(state, ids, weights)["embedding"][...]
    each = jax.vmap(jax.grad(loss), (None, 0, 0))(state, ids, weights)["embedding"][...]
    assert_near(each.sum(0), want, 1e-5, "vmap")

    mesh = Mesh(np.array(jax.devices()[:2]), ("two",))
    split = jax.shard_map(
        lambda *x: jax.lax.psum(loss(*x), "two"), mesh=mesh,
        in_specs=(Spec(), Spec("two"), Spec("two")), out_specs=Spec(),
    )  # fmt: skip
    found = jax.jit(jax.grad(split))(state, ids, weights)["embedding"][...]
    assert_near(found, want, 1e-5, "shard_map")
    inside = jax.shard_map(
        jax.grad(loss), mesh=mesh, in_specs=(Spec(), Spec("two"), Spec("two")), out_specs=Spec()
    )
    assert_near(jax.jit(inside)(state, ids, weights)["embedding"][...], want, 1e-5, "inside")


@pytest.mark.parametrize("count", [256, 300])
@pytest.mark.parametrize("kind", [np.uint8, jnp.uint8, jnp.int8])
def test_ids_of_8_bits_count_as_what_they_are(count, kind):
    ids = np.array([0, 1, 44, 100, 127 if kind is jnp.int8 else 255])
    weights = np.ones((5, 4), np.float32)
    want = np.zeros((count, 4))
    want[ids] = 1
    array = ids.astype(np.uint8) if kind is np.uint8 else jnp.asarray(ids, kind)
    found = gradient(Embed(count, 4, rngs=nnx.Rngs(0)), array, weights)
    np.testing.assert_array_equal(found, want)


def test_refuses_ids_that_are_no_integers():
    with pytest.raises(ValueError, match="ids must be integers; got float32"):
        Embed(5, 4, rngs=nnx.Rngs(0))(jnp.ones(3))
