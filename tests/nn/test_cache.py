"""Decoding with a cache against the model on whole sequences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sparsax
from sparsax.nn import DecoderConfig, KVCache, LanguageModel, attend_cached, rotate
from sparsax.rules import LoRA, Routed, TopL
from tests.helpers import assert_near, with_biases

SIZES = {"vocab_size": 50, "length": 32, "features": 32, "hidden": 64, "num_heads": 4, "layers": 2}
CONFIGS = {
    "opt": DecoderConfig.opt(**SIZES),
    "llama": DecoderConfig.llama(**SIZES, num_kv_heads=2),
}
TOKENS = jax.random.randint(jax.random.key(0), (3, 32), 0, 50)
PROMPTS = np.array([9, 1, 14])
SPT = [
    LoRA(path=r".*attention\.(query|key|value|out)", rank=4),
    Routed(path=r".*\.ffn", num_blocks=4, active=2, lora_rank=4, tokens=0),
    TopL(path=r".*\.attention", keep=6, sequences=2),
]
CASES = [
    ("opt", []), ("llama", []), ("llama", SPT),
    ("opt", [TopL(path=r".*\.attention", keep=6, sequences=2, score="match")]),
]  # fmt: skip

run = nnx.jit(lambda model, tokens: model(tokens))
decode = nnx.jit(lambda model, tokens, cache, start: model.decode(tokens, cache, start))


def model_of(style, rules):
    model = LanguageModel(CONFIGS[style], rngs=nnx.Rngs(0))
    if style == "opt":
        with_biases(model)
    if rules:
        model, _ = sparsax.sparsify(model, rules, calibrate=lambda m: m(TOKENS[:2]))
    return model


def decoded(model):
    """Logits of all tokens: prompts of several lengths in one call, then one by one."""
    prompts = jnp.where(jnp.arange(14) < PROMPTS[:, None], TOKENS[:, :14], 7)
    cache = model.empty_cache(3, 32)
    logits, cache = decode(model, prompts, cache, jnp.zeros(3, jnp.int32))
    found = [[*logits[b, :n]] for b, n in enumerate(PROMPTS)]
    for step in range(18):
        start = PROMPTS + step
        new = np.take_along_axis(np.asarray(TOKENS), start[:, None], 1)
        logits, cache = decode(model, jnp.asarray(new), cache, jnp.asarray(start))
        for b in range(3):
            found[b].append(logits[b, 0])
    return [np.stack(rows) for rows in found]


@pytest.mark.parametrize(("style", "rules"), CASES, ids=["opt", "llama", "spt", "match"])
def test_decoding_gives_the_logits_of_whole_sequences(style, rules):
    model = model_of(style, rules)
    want = run(model, TOKENS)
    for b, got in enumerate(decoded(model)):
        assert_near(got, want[b, : len(got)], 2e-5, f"sequence {b}")


def test_bfloat16_is_kept_in_the_cache():
    config = DecoderConfig.opt(**SIZES, dtype=jnp.bfloat16)
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    cache = model.empty_cache(2, 32)
    assert [x.keys.dtype for x in cache] == [jnp.bfloat16] * 2
    logits, cache = decode(model, TOKENS[:2, :5], cache, jnp.zeros(2, jnp.int32))
    assert logits.dtype == cache[1].values.dtype == jnp.bfloat16
    assert_near(logits, run(model, TOKENS[:2, :5]), 2e-2, "logits")


def test_what_stands_behind_the_new_tokens_is_not_seen():
    model = model_of("llama", [])
    layer, x = model.blocks[0].attention, jax.random.normal(jax.random.key(1), (1, 4, 32))
    empty = KVCache.empty(layer, 1, 16, jnp.float32)
    full = jax.tree.map(lambda leaf: leaf + 100, empty)
    start = jnp.zeros(1, jnp.int32)
    (one, _), (two, _) = (attend_cached(layer, x, cache, start) for cache in (empty, full))
    np.testing.assert_array_equal(one, two)
    assert_near(one, layer(x), 1e-5, "attention")


def test_positions_turn_as_tokens_in_a_row_do():
    x = jax.random.normal(jax.random.key(2), (2, 9, 3, 8))
    whole = rotate(x)
    positions = jnp.array([[3, 4], [7, 8]])
    parts = jnp.stack([x[0, 3:5], x[1, 7:9]])
    assert_near(rotate(parts, positions=positions), [whole[0, 3:5], whole[1, 7:9]], 1e-6, "x")


def test_refusals():
    opt = model_of("opt", [])
    with pytest.raises(ValueError, match="no more than the config's length=32; got 33"):
        opt.empty_cache(1, 33)
    for layer in (
        sparsax.nn.SparseAttention(4, 32, rngs=nnx.Rngs(0)),
        sparsax.nn.TopLAttention(4, 32, keep=6, rngs=nnx.Rngs(0)),
    ):
        cache = KVCache.empty(layer, 1, 16, jnp.float32)
        told = rf"needs causal attention, .*; got {type(layer).__name__} with causal=False\."
        with pytest.raises(ValueError, match=told):
            attend_cached(layer, jnp.ones((1, 2, 32)), cache, jnp.zeros(1, jnp.int32))
    sparsax.nn.set_patterns(opt, sparsax.patterns.causal(32, block=16))
    blocks = model_of("opt", [TopL(path=r".*\.attention", keep=6, sequences=0, select="blocks")])
    for model in (opt, blocks):
        with pytest.raises(NotImplementedError, match=r"Attention attends over blocks\. Call"):
            model.decode(TOKENS, model.empty_cache(3, 32), jnp.zeros(3, jnp.int32))
