import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from sparsax import sparsify
from sparsax.nn import Encoder
from sparsax.peft import adapters, load_adapters, merge, save_adapters
from sparsax.rules import TSVD, TSVDCommon
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
    with pytest.raises(ValueError, match="no factored layer; got Encoder"):
        merge(model)
