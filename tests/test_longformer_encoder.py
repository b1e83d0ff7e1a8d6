import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from sparsax.nn import Longformer, LongformerConfig
from tests.helpers import assert_gradients_near, assert_near
from tests.longformer_reference import hidden_states, random_weights

CONFIG = {
    "model_type": "longformer", "hidden_act": "gelu", "vocab_size": 40, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 66, "attention_window": [8, 12], "type_vocab_size": 1,
    "layer_norm_eps": 1e-5, "pad_token_id": 1,
}  # fmt: skip
T = 45
VECTORS = Path(__file__).parent / "data" / "longformer_parity.safetensors"


def write(folder, config=CONFIG, weights=None, **changes):
    (folder / "config.json").write_text(json.dumps(config | changes))
    save_file(weights or random_weights(config), folder / "model.safetensors")
    return folder


def batch(name):
    """`(tokens, key_mask, global_mask)` of two documents."""
    rng = np.random.default_rng(0)
    tokens, real = rng.integers(2, 40, (2, T)), np.ones((2, T), bool)
    chosen = np.zeros((2, T), bool)
    if name == "scattered":
        chosen[0, [0, 9, 30, 44]] = chosen[1, [17]] = True
    elif name == "contiguous":
        chosen[:, :6] = True
    elif name == "padded":
        real[1, 29:] = False
        tokens[~real] = 1
        chosen[:, [0, 12, 40]] = True  # the last one is padding in the second document
    elif name == "padding_by_its_mask_alone":  # and a padding id that is not hidden
        real[0, 33:] = False
        tokens[1, 5] = 1
        chosen[:, 2] = True
    return tokens, real, chosen


CASES = ["scattered", "contiguous", "padded", "padding_by_its_mask_alone", "none"]
run = nnx.jit(Longformer.hidden_states)


@pytest.mark.parametrize("name", CASES)
def test_published_weights_give_the_hidden_states_of_the_written_down_model(name, tmp_path):
    inputs = batch(name)
    model = Longformer.from_folder(write(tmp_path), max_global=6)
    want = hidden_states(CONFIG, random_weights(CONFIG), *inputs)
    got = run(model, *map(jnp.asarray, inputs))
    assert len(got) == len(want) == 3
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_near(a, b, 1e-5, f"layer {i}")


def test_parity_with_hugging_face(tmp_path):
    """Computed by Hugging Face's model; the file's metadata names the versions."""
    assert VECTORS.exists(), (
        f"{VECTORS.name} is missing: `PYTHONPATH=. python benchmarks/longformer_parity.py vectors` "
        "writes it where PyTorch and transformers are installed."
    )
    with safe_open(VECTORS, "numpy") as file:
        metadata = file.metadata()
    arrays = load_file(VECTORS)
    weights = {n.removeprefix("weights/"): x for n, x in arrays.items() if n[:8] == "weights/"}
    write(tmp_path, json.loads(metadata["config"]), weights)
    model = Longformer.from_folder(tmp_path, max_global=16, pooler=True)
    cases = json.loads(metadata["cases"])
    assert len(cases) >= 4
    for name in cases:
        tokens, key_mask, global_mask = (
            arrays[f"{name}/{x}"] for x in ("tokens", "key_mask", "global_mask")
        )
        got = run(model, jnp.asarray(tokens), jnp.asarray(key_mask), jnp.asarray(global_mask))
        for i, state in enumerate(got):
            assert_near(state, arrays[f"{name}/hidden_states/{i}"], 1e-5, f"{name}, layer {i}")
        pooled = model.pool(got[-1])
        assert_near(pooled, arrays[f"{name}/pooled"], 1e-5, f"{name}, pooled")


def test_token_types_and_the_pooler(tmp_path):
    tokens, real, chosen = batch("padded")
    types = np.random.default_rng(1).integers(0, 2, tokens.shape)
    config = CONFIG | {"type_vocab_size": 2}
    model = Longformer.from_folder(write(tmp_path, config), max_global=6, pooler=True)
    weights = random_weights(config)
    want = hidden_states(config, weights, tokens, real, chosen, types)[-1]
    x = model(
        jnp.asarray(tokens), key_mask=jnp.asarray(real), global_mask=jnp.asarray(chosen),
        types=jnp.asarray(types),
    )  # fmt: skip
    assert_near(x, want, 1e-5, "features")
    pooled = np.tanh(want[:, 0] @ weights["pooler.dense.weight"].T + weights["pooler.dense.bias"])
    assert_near(model.pool(x), pooled, 1e-5, "pooled")


def test_files_of_models_with_a_head_are_read_as_well(tmp_path):
    weights = random_weights(CONFIG)
    headed = {f"longformer.{name}": w for name, w in weights.items() if "pooler" not in name}
    headed["lm_head.bias"] = np.zeros(40, np.float32)
    model = Longformer.from_folder(write(tmp_path, weights=headed))
    embedding = weights["embeddings.word_embeddings.weight"]
    np.testing.assert_array_equal(model.tokens.embedding[...], embedding)
    with pytest.raises(ValueError, match=r"must hold 'pooler\.dense\.(bias|weight)'; it is"):
        Longformer.from_folder(tmp_path, pooler=True)


def test_bfloat16_throughout_is_near(tmp_path):
    tokens, real, chosen = (jnp.asarray(x) for x in batch("padded"))
    make = lambda dtype: Longformer.from_folder(write(tmp_path), max_global=6, dtype=dtype)
    low, full = make(jnp.bfloat16), make(jnp.float32)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(low))} == {jnp.dtype(jnp.bfloat16)}
    got, want = run(low, tokens, real, chosen), run(full, tokens, real, chosen)
    assert got[-1].dtype == jnp.bfloat16
    # Each of a layer's dozen roundings is some 2e-3 of what it rounds.
    assert_near(got[-1], want[-1], 3e-2, "features")


def test_implementations_agree_and_gradients_reach_every_parameter(tmp_path):
    tokens, real, chosen = (jnp.asarray(x) for x in batch("padded"))

    def gradients(implementation):
        model = Longformer.from_folder(write(tmp_path), max_global=6, implementation=implementation)
        loss = lambda m: jnp.sum(jnp.sin(m(tokens, key_mask=real, global_mask=chosen)))
        return nnx.state(nnx.jit(nnx.grad(loss))(model))

    assert_gradients_near(gradients("xla"), gradients("reference"), 2e-5)


def test_too_many_global_tokens_are_refused_or_nan(tmp_path):
    model = Longformer.from_folder(write(tmp_path), max_global=3)
    tokens, real, chosen = (jnp.asarray(x) for x in batch("scattered"))
    with pytest.raises(ValueError, match="capacity must hold the longest list, 4 tokens; got 3"):
        model(tokens, key_mask=real, global_mask=chosen)
    y = run(model, tokens, real, chosen)[-1]
    assert np.isnan(y[0]).all()
    assert np.isfinite(y[1]).all()
    hidden = real.at[0, 44].set(False)  # padding is no global token
    assert np.isfinite(model(tokens, key_mask=hidden, global_mask=chosen)).all()


@pytest.mark.usefixtures("unchecked")
def test_refusals(tmp_path):
    config = LongformerConfig(**{k: v for k, v in CONFIG.items() if k[:5] not in ("model", "hidde")}
                              | {"hidden_size": 32})  # fmt: skip
    model = Longformer(config, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="at most 64 tokens, as many as there are positions; got"):
        model(jnp.ones((1, 65), int))
    with pytest.raises(ValueError, match="the model has no pooler"):
        model.pool(jnp.ones((1, 4, 32)))
    for window in (7, 0, [8], [8, 9]):
        with pytest.raises(ValueError, match=r"two-sided: it must be an even number.*got \[?\d"):
            Longformer.from_folder(write(tmp_path, attention_window=window))
    with pytest.raises(ValueError, match=r"must describe .*longformer.* got {'hidden_act': 'relu"):
        Longformer.from_folder(write(tmp_path, hidden_act="relu"))


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("encoder.layer.1.intermediate.dense.weight", (48, 32), (32, 48)),  # as flax has it
        ("encoder.layer.1.output.dense.weight", (32, 48), (48, 32)),
        ("encoder.layer.1.intermediate.dense.bias", (48,), (32,)),
        ("encoder.layer.1.attention.self.query.weight", (32, 32), (32, 4, 8)),
        ("encoder.layer.1.attention.self.query.bias", (32,), (4, 8)),
        ("encoder.layer.0.attention.self.query_global.weight", (32, 32), (16, 32)),
        ("encoder.layer.0.attention.self.key_global.weight", (32, 32), (32, 16)),
        ("encoder.layer.0.attention.self.value_global.bias", (32,), (1, 32)),
        ("encoder.layer.0.attention.output.dense.weight", (32, 32), (4, 8, 32)),
        ("encoder.layer.0.attention.output.LayerNorm.weight", (32,), (48,)),
        ("embeddings.LayerNorm.bias", (32,), (1, 32)),
        ("embeddings.word_embeddings.weight", (40, 32), (32, 40)),
        ("embeddings.position_embeddings.weight", (66, 32), (64, 32)),
        ("pooler.dense.weight", (32, 32), (32, 31)),
    ],
)
@pytest.mark.parametrize("prefix", ["", "longformer."])
def test_the_shape_that_the_file_must_have_is_told(name, right, wrong, prefix, tmp_path):
    weights = random_weights(CONFIG)
    assert weights[name].shape == right
    weights[name] = np.zeros(wrong, np.float32)
    write(tmp_path, weights={prefix + name: weight for name, weight in weights.items()})
    told = f"'{prefix}{name}' must be {right} by config.json; got {wrong}."
    with pytest.raises(ValueError, match=re.escape(told)):
        Longformer.from_folder(tmp_path, pooler=True)
