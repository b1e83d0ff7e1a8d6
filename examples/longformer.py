"""Longformer's attention on a real text whose sentences' starts are global tokens.

    uv run python examples/longformer.py                            # this project's licence
    uv run python examples/longformer.py --text FILE_OR_FOLDER      # your own, a long one

A window, and as many single columns and rows as the text has sentences: a block mask must compute
nearly every block, because nearly every one holds a column. Prints how many pairs attend, which
tiles each part takes, and the time against dense attention; saves a picture of the first tokens'
pairs by the part that computes them.
"""

import argparse
import re
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import sparsax
from sparsax.plots import slice_figure

HEADS, FEATURES = 4, 64


def read(path: Path) -> str:
    """A file's text, or that of all text files of a folder, one after the other."""
    if path.is_file():
        return path.read_text(encoding="utf-8")
    files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md", ".rst"))
    if not files:
        raise SystemExit(f"{path} holds no file of text (.txt, .md, .rst).")
    return "\n\n".join(p.read_text(encoding="utf-8") for p in files)


def tokens_of(text: str, length: int) -> tuple[list[str], list[int]]:
    """Words and marks with an `<s>` before every sentence, and where these stand."""
    tokens, starts = [], []
    for sentence in re.split(r"(?<=[.!?;:])\s+|\n\s*\n", text):
        if words := re.findall(r"\w+|[^\w\s]", sentence):
            starts.append(len(tokens))
            tokens += ["<s>", *words]
    return tokens[:length], [start for start in starts if start < length]


def pattern_of(length: int, starts: list[int], window: int) -> sparsax.CompoundPattern:
    return sparsax.patterns.compound.longformer(
        length, window=window, positions=np.array([[s for s in starts if s < length]])
    )


def milliseconds(attend, *args, repeats: int = 5) -> float:
    """The median of a forward and backward pass."""

    @jax.jit
    def step(q, k, v, *rest):
        return jax.grad(lambda *x: attend(*x, *rest).astype(jnp.float32).sum(), (0, 1, 2))(q, k, v)

    jax.block_until_ready(step(*args))
    found = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(step(*args))
        found.append(time.perf_counter() - begin)
    return 1e3 * float(np.median(found))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(__file__).parents[1] / "LICENSE"
    parser.add_argument("--text", type=Path, default=default, help="a file, or a folder of files")
    parser.add_argument("--length", type=int, default=4096, help="tokens at most")
    parser.add_argument("--window", type=int, default=64, help="one-sided")
    parser.add_argument("--shown", type=int, default=512, help="tokens in the picture")
    parser.add_argument("--out", type=Path, default=Path("longformer.png"), help="the picture")
    args = parser.parse_args()

    tokens, starts = tokens_of(read(args.text), args.length)
    length = len(tokens)
    pattern = pattern_of(length, starts, args.window)
    print(f"{length} tokens, {len(starts)} sentences, window {args.window} to either side")
    print(f"pairs that attend: {float(pattern.to_mask().mean()):.3f} of all\n")
    print(sparsax.slice_plan(pattern, head_dim=FEATURES), "\n")

    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, length, HEADS, FEATURES), dtype)
    ours = milliseconds(sparsax.compound_attention, q, k, v, pattern)
    dense = milliseconds(jax.nn.dot_product_attention, q, k, v)
    name = sparsax.default_implementation(q, pattern)
    print(f"forward and backward, {HEADS} heads of {FEATURES}, {dtype.__name__}, {name!r}:")
    print(f"{ours:.1f} ms; dense {dense:.1f} ms, {dense / ours:.2f} times as long")

    shown = pattern_of(min(args.shown, length), starts, args.window)
    slice_figure(shown).savefig(args.out, dpi=200)
    print(args.out)


if __name__ == "__main__":
    main()
