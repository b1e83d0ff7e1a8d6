"""Longformer in NumPy and float64, from weights by PyTorch's names: written from the paper and
from what Hugging Face's model does with padding, sharing no code with the library."""

import math

import numpy as np

EVERY = np.vectorize(math.erf)


def random_weights(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights of which none is negligible: no bias is zero, no softmax is flat."""
    rng = np.random.default_rng(seed)
    features, hidden = config["hidden_size"], config["intermediate_size"]
    weights = {}

    def linear(name, rows, columns, gain=1.0):
        weights[f"{name}.weight"] = gain * rng.standard_normal((rows, columns)) / columns**0.5
        weights[f"{name}.bias"] = 0.1 * rng.standard_normal(rows)

    def norm(name):
        weights[f"{name}.weight"] = 1 + 0.1 * rng.standard_normal(features)
        weights[f"{name}.bias"] = 0.1 * rng.standard_normal(features)

    for name, rows in (("word", "vocab_size"), ("position", "max_position_embeddings"),
                       ("token_type", "type_vocab_size")):  # fmt: skip
        weights[f"embeddings.{name}_embeddings.weight"] = rng.standard_normal(
            (config[rows], features)
        )
    norm("embeddings.LayerNorm")
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        for kind in ("query", "key", "value"):
            for end in ("", "_global"):
                gain = 1.0 if kind == "value" else 1.4  # logits of a spread of two
                linear(f"{layer}.attention.self.{kind}{end}", features, features, gain)
        linear(f"{layer}.attention.output.dense", features, features)
        norm(f"{layer}.attention.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", hidden, features)
        linear(f"{layer}.output.dense", features, hidden)
        norm(f"{layer}.output.LayerNorm")
    linear("pooler.dense", features, features)
    return {name: w.astype(np.float32) for name, w in weights.items()}


def hidden_states(config, weights, tokens, key_mask, global_mask, types=None):
    """The embeddings' features, then those of every layer, `[B, T, D]`."""
    weights = {name: np.asarray(w, np.float64) for name, w in weights.items()}
    samples = [
        _sample(config, weights, *(None if x is None else np.asarray(x)[b] for x in
                                   (tokens, key_mask, global_mask, types)))
        for b in range(len(tokens))
    ]  # fmt: skip
    return [np.stack(states) for states in zip(*samples, strict=True)]


def _sample(config, weights, tokens, real, chosen, types):
    linear = lambda x, name: x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
    embed = lambda kind, i: weights[f"embeddings.{kind}_embeddings.weight"][i]

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        x = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + config["layer_norm_eps"])
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    # Padding takes no position; its place in the table is the padding id's.
    positions, used = [], config["pad_token_id"]
    for token in tokens:
        used += token != config["pad_token_id"]
        positions.append(used if token != config["pad_token_id"] else config["pad_token_id"])
    types = np.zeros(len(tokens), int) if types is None else types
    x = embed("word", tokens) + embed("position", positions) + embed("token_type", types)
    states = [norm(x, "embeddings.LayerNorm")]
    for i in range(config["num_hidden_layers"]):
        layer, x = f"encoder.layer.{i}", states[-1]
        windows = config["attention_window"]
        window = (windows if isinstance(windows, int) else windows[i]) // 2
        project = lambda kind, layer=layer, x=x: linear(x, f"{layer}.attention.self.{kind}")
        o = _attention(project, config["num_attention_heads"], window, real, chosen & real)
        x = norm(x + linear(o, f"{layer}.attention.output.dense"),
                 f"{layer}.attention.output.LayerNorm")  # fmt: skip
        h = linear(x, f"{layer}.intermediate.dense")
        h = 0.5 * h * (1 + EVERY(h / 2**0.5))
        states.append(norm(x + linear(h, f"{layer}.output.dense"), f"{layer}.output.LayerNorm"))
    return states


def _attention(project, heads, window, real, chosen):
    """One query at a time: a list of keys, one softmax over it."""
    names = ("query", "key", "value")
    arrays = {end: [np.split(project(kind + end), heads, axis=-1) for kind in names]
              for end in ("", "_global")}  # fmt: skip
    length = len(real)
    o = np.zeros((length, heads, arrays[""][0][0].shape[-1]))
    for i in np.flatnonzero(real):  # the attention of padding is zero
        near = abs(np.arange(length) - i) <= window
        keys = np.flatnonzero(real & (near | chosen | chosen[i]))
        q, k, v = arrays["_global" if chosen[i] else ""]
        for n in range(heads):
            logits = k[n][keys] @ q[n][i] / math.sqrt(q[n].shape[-1])
            p = np.exp(logits - logits.max())
            o[i, n] = (p / p.sum()) @ v[n][keys]
    return o.reshape(length, -1)
