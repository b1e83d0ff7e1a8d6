import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec

from sparsax import score_map
from sparsax.patterns import spion
from tests.helpers import assert_near


def draw(T=70, S=70, N=4, K=2, H=8, B=3, dtype="float32"):
    rng = np.random.default_rng(0)
    q = jnp.asarray(2 * rng.standard_normal((B, T, N, H)), dtype)
    return q, jnp.asarray(rng.standard_normal((B, S, K, H)), dtype)


def lengths(B, S):
    return jnp.arange(S) < jnp.linspace(S, S // 3, B).astype(int)[:, None]


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masks", ["none", "padding", "segments", "both"])
def test_xla_matches_the_reference(per_head, causal, masks):
    q, k = draw()
    options = {"per_head": per_head, "causal": causal}
    if masks in ("padding", "both"):
        options["key_mask"] = lengths(3, 70)
    if masks in ("segments", "both"):
        options["segment_ids"] = jnp.broadcast_to(jnp.arange(70) // 30, (3, 70))
    got = score_map(q, k, **options, implementation="xla")
    assert got.shape == (4 if per_head else 1, 70, 70)
    assert_near(got, score_map(q, k, **options, implementation="reference"), 1e-6, "map")


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(("T", "S", "pool"), [(70, 70, 16), (600, 75, 40), (70, 33, 300)])
@pytest.mark.parametrize("per_head", [False, True])
def test_pooled_is_the_pooled_map(implementation, T, S, pool, per_head):
    q, k = draw(T=T, S=S)
    options = {"per_head": per_head, "causal": True, "implementation": implementation}
    grids = np.asarray(score_map(q, k, **options))
    rows, cols = range(0, T, pool), range(0, S, pool)
    want = [
        [[grid[i : i + pool, j : j + pool].mean() for j in cols] for i in rows] for grid in grids
    ]
    assert_near(score_map(q, k, **options, pool=pool), np.asarray(want), 1e-6, "pooled map")


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_pooled_map_of_padded_samples(implementation):
    q, k = draw()
    options = {"key_mask": lengths(3, 70), "implementation": implementation}
    want = spion.average_pool(score_map(q, k, **options)[0], 32)
    assert_near(score_map(q, k, **options, pool=32)[0], want, 1e-6, "pooled map")


@pytest.mark.parametrize("T", [128, 100])
def test_a_search_in_the_pooled_map_finds_the_same(T):
    q, k = draw(T=T, S=T)
    settings = {"block": 16, "variant": "F", "quantile": 0.7}
    want = spion.search(score_map(q, k), **settings)
    got = spion.search(score_map(q, k, pool=16), **settings, length=T)
    assert (got.q_len, got.kv_len, got.block_q) == (T, T, 16)
    assert want.density() > 0.2  # more than the forced diagonal was found
    np.testing.assert_array_equal(got.to_block_mask(), want.to_block_mask())


@pytest.mark.parametrize("T", [100, 256, 300, 513])
def test_chunks_of_queries_join(T):
    q, k = draw(T=T, S=40, N=2, B=2)
    got = score_map(q, k, implementation="xla")
    assert_near(got, score_map(q, k, implementation="reference"), 1e-6, "map")


def test_bfloat16_inputs_give_a_float32_map():
    q, k = draw(dtype="bfloat16")
    got = score_map(q, k, implementation="xla")
    assert got.dtype == jnp.float32
    assert_near(got, score_map(q, k, implementation="reference"), 1e-5, "map")


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_the_map_is_the_mean_softmax(implementation):
    q, k = draw(K=4)
    s = np.einsum("btnh,bsnh->bnts", np.asarray(q, float), np.asarray(k, float)) * 0.3
    p = np.exp(s) / np.exp(s).sum(-1, keepdims=True)
    got = score_map(q, k, scale=0.3, implementation=implementation)
    assert_near(got[0], p.mean((0, 1)), 1e-5, "map")
    heads = score_map(q, k, scale=0.3, per_head=True, implementation=implementation)
    assert_near(heads, p.mean(0), 1e-5, "map per head")


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_padding_counts_neither_as_key_nor_as_query(implementation):
    q, k = draw()
    key_mask = lengths(3, 70)
    got = np.asarray(score_map(q, k, key_mask=key_mask, implementation=implementation)[0])
    # Row t sums to the share of samples in which query t is real.
    np.testing.assert_allclose(got.sum(-1), np.asarray(key_mask).mean(0), atol=1e-6)


@pytest.mark.parametrize("padded", [False, True])
def test_shard_map_over_batch_and_heads(padded):
    q, k = draw(T=300, B=4)  # more than one chunk of queries
    key_mask = lengths(4, 70) if padded else jnp.ones((4, 70), bool)
    mesh = Mesh(np.array(jax.devices("cpu")[:4]).reshape(2, 2), ("batch", "heads"))
    by_both = Spec("batch", None, "heads")

    def mean_of_shards(q, k, key_mask):
        found = score_map(q, k, key_mask=key_mask if padded else None, implementation="xla")
        return jax.lax.pmean(found, ("batch", "heads"))

    spread = jax.shard_map(
        mean_of_shards, mesh=mesh, in_specs=(by_both, by_both, Spec("batch")), out_specs=Spec()
    )
    got = jax.jit(spread)(q, k, key_mask)
    want = score_map(q, k, key_mask=key_mask, implementation="reference")
    assert_near(got, want, 1e-6, "map")


def test_no_gradient_flows():
    q, k = draw()
    gradients = jax.grad(lambda q, k: score_map(q, k).max(), argnums=(0, 1))(q, k)
    assert all((np.asarray(g) == 0).all() for g in gradients)


def test_the_maps_of_all_heads_are_never_held():
    q = jax.ShapeDtypeStruct((2, 2048, 8, 16), jnp.float32)
    run = jax.jit(lambda q, k: score_map(q, k, implementation="xla"))
    one_sample = 8 * 2048 * 2048 * 4
    assert run.lower(q, q).compile().memory_analysis().temp_size_in_bytes < one_sample / 2


def test_a_pooled_map_holds_the_rows_of_one_chunk():
    q = jax.ShapeDtypeStruct((2, 4096, 2, 16), jnp.float32)
    run = jax.jit(lambda q, k: score_map(q, k, pool=64, implementation="xla"))
    memory = run.lower(q, q).compile().memory_analysis()
    one_map = 4096 * 4096 * 4
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < one_map / 2
