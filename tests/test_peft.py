import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file

from sparsax import sparsify
from sparsax.nn import Encoder, LoRALinear
from sparsax.peft import (
    adapters,
    count_parameters,
    load_adapters,
    merge,
    save_adapters,
    trainable_mask,
)
from sparsax.rules import TSVD, LoRA, TSVDCommon
from tests.helpers import assert_near

TOKENS = jnp.arange(16)[None]


def converted(rank=4, seed=0, **options):
    rule = TSVDCommon(path=r".*\.(up|down)", tile=16, rank=rank, **options)
    model = Encoder(50, 16, features=32, hidden=64, rngs=nnx.Rngs(seed))
    return sparsify(model, [rule])[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["compressed", "residual"])
def test_adapters_alone_carry_a_fine_tuning_over(tmp_path, mode, dtype):
    tuned, fresh = converted(mode=mode), converted(mode=mode)
    for model in (tuned, fresh):
        nnx.update(model, jax.tree.map(lambda leaf: leaf.astype(dtype), nnx.state(model)))
    for block in tuned.blocks:
        block.up.common[...] += 0.5
    save_adapters(tmp_path / "a.safetensors", tuned)
    saved = load_file(tmp_path / "a.safetensors")
    assert set(saved) == {f"blocks.{i}.{n}.common" for i in (0, 1) for n in ("up", "down")}
    assert sum(array.size for array in saved.values()) == 4 * 4 * 16
    assert not np.array_equal(fresh(TOKENS), tuned(TOKENS))
    load_adapters(tmp_path / "a.safetensors", fresh)
    np.testing.assert_array_equal(fresh(TOKENS), tuned(TOKENS))
    assert fresh.blocks[0].up.common[...].dtype == dtype


def test_any_type_of_variable_can_be_an_adapter(tmp_path):
    class Bias(nnx.Param):
        pass

    model, other = (Encoder(50, 16, rngs=nnx.Rngs(0)) for _ in range(2))
    model.norm.bias = Bias(jnp.full(64, 3.0))
    other.norm.bias = Bias(jnp.zeros(64))
    save_adapters(tmp_path / "b.safetensors", model, wrt=Bias)
    load_adapters(tmp_path / "b.safetensors", other, wrt=Bias)
    np.testing.assert_array_equal(other.norm.bias[...], 3.0)
    assert list(adapters(model, Bias)) == ["norm.bias"]


def test_adapters_of_another_model_are_refused(tmp_path):
    save_adapters(tmp_path / "a.safetensors", converted(rank=4))
    with pytest.raises(ValueError, match=r"a.safetensors must hold .*up.common', \(3, 16\)"):
        load_adapters(tmp_path / "a.safetensors", converted(rank=3))
    with pytest.raises(ValueError, match="variables of type CommonParam; Linear has none"):
        adapters(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("rule", [
    TSVD(tile=16, rank=4), TSVDCommon(tile=16, rank=4),
    TSVDCommon(tile=16, rank=4, side="left", mode="residual"),
])  # fmt: skip
def test_merging_gives_dense_layers_with_the_same_outputs(rule):
    model = Encoder(50, 16, features=32, hidden=64, rngs=nnx.Rngs(0))
    small, _ = sparsify(model, [rule])
    merged = merge(small)
    assert_near(merged(TOKENS), small(TOKENS), 1e-5, "output")
    assert nnx.graphdef(merged.blocks) == nnx.graphdef(model.blocks)
    with pytest.raises(ValueError, match="a factored layer or one with LoRA; got Encoder"):
        merge(model)


def with_lora(seed=0, **options):
    """A model with LoRA on feed-forward layers and projections, its B no longer 0."""
    model = Encoder(50, 16, features=32, hidden=64, rngs=nnx.Rngs(seed))
    tuned, _ = sparsify(model, [LoRA(path=r".*\.(up|query|out)", rank=4, **options)])
    for i, layer in enumerate(lora_layers(tuned)):
        layer.lora_b[...] = jax.random.normal(jax.random.key(i), layer.lora_b.shape)
    return model, tuned


def lora_layers(model):
    return [m for _, m in nnx.iter_modules(model) if isinstance(m, LoRALinear)]


def test_lora_starts_as_the_dense_model():
    model = Encoder(50, 16, features=32, hidden=64, rngs=nnx.Rngs(0))
    tuned, report = sparsify(model, [LoRA(path=r".*\.(up|query|out)", rank=4)])
    np.testing.assert_array_equal(tuned(TOKENS), model(TOKENS))
    assert len(lora_layers(tuned)) == 6
    added = 2 * 4 * ((32 + 64) + 2 * (32 + 32))
    assert report.parameters[1] - report.parameters[0] == added
    assert count_parameters(tuned, nnx.LoRAParam) == (added, report.parameters[1])
    starts = [layer.lora_a[...] for layer in lora_layers(tuned) if layer.lora_a.shape == (32, 4)]
    assert len({float(start.sum()) for start in starts}) == len(starts) == 6


@pytest.mark.parametrize("alpha", [None, 8.0])
def test_lora_adds_a_product_of_low_rank_and_merges(alpha):
    model, tuned = with_lora(alpha=alpha)
    layer, dense = tuned.blocks[0].up, model.blocks[0].up
    x = jax.random.normal(jax.random.key(9), (3, 32))
    scale = 1.0 if alpha is None else alpha / 4
    want = dense(x) + scale * x @ (layer.lora_a[...] @ layer.lora_b[...])
    assert_near(layer(x), want, 1e-5, "layer")
    merged = merge(tuned)
    assert_near(merged(TOKENS), tuned(TOKENS), 1e-5, "merged")
    assert nnx.graphdef(merged.blocks) == nnx.graphdef(model.blocks)


def test_fine_tuning_changes_the_adapters_alone_and_they_travel(tmp_path):
    (_, tuned), (_, fresh) = with_lora(), with_lora()
    optimizer = nnx.Optimizer(tuned, optax.adam(1e-2), wrt=nnx.LoRAParam)
    before = jax.tree.map(jnp.copy, nnx.state(tuned, nnx.Param))

    @nnx.jit
    def step(model, optimizer):
        loss = lambda model: (model(TOKENS) ** 2).mean()
        grads = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, grads)

    step(tuned, optimizer)
    after, mask = nnx.state(tuned, nnx.Param), trainable_mask(tuned, nnx.LoRAParam)
    changed = jax.tree.map(lambda x, y: bool((x != y).any()), before, after)
    assert jax.tree.leaves(changed) == jax.tree.leaves(mask)
    save_adapters(tmp_path / "lora.safetensors", tuned, wrt=nnx.LoRAParam)
    load_adapters(tmp_path / "lora.safetensors", fresh, wrt=nnx.LoRAParam)
    np.testing.assert_array_equal(fresh(TOKENS), tuned(TOKENS))


@pytest.mark.parametrize("rank", [0, 33])
def test_lora_refuses_a_rank_that_is_none(rank):
    with pytest.raises(ValueError, match=f"rank must be between 1 and .* 32; got {rank}"):
        LoRALinear(nnx.Linear(32, 64, rngs=nnx.Rngs(0)), rank=rank, rngs=nnx.Rngs(1))
