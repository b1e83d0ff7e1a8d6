"""A decoder of GPT-2's sizes with factored layers on this machine's GPU: prefill and decoding.

    python benchmarks/tsvd_decoder_gpu.py          # --quick: one compression, the smallest batch

bfloat16, random weights of the right shapes: what is computed is the same. All dense layers of the
blocks are factored, embeddings and attention are not. Prefill is one pass over `--batch` sequences
of `--length`, with the logits of the last token alone. Decoding writes tokens one after the other
inside one program, with a cache of keys and values, for each of `--decode` sequences at a time.
Factors run through XLA, and as they do by themselves: through the kernels where these were measured
to be ahead. Bytes are those of the parameters, and what XLA reserves beside them in prefill.
"""

import argparse
import functools
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from language import halve, use_flash
from resumed import Rows
from timing import kernels, milliseconds
from tqdm import tqdm
from tsvd_ways import common, tiled

from sparsax import CommonFactors, TiledFactors, pallas
from sparsax.nn import (
    DecoderConfig,
    LanguageModel,
    TSVDCommonLinear,
    TSVDLinear,
    named_modules,
    replace_modules,
)
from sparsax.nn.dense import read_linear

LINEAR = (nnx.Linear, nnx.LinearGeneral)
SIZES = {"small": (768, 12, 12), "medium": (1024, 16, 24), "large": (1280, 20, 36)}


@functools.partial(jax.jit, static_argnums=(0, 3))
def call(graph, state, x, activation: str | None):
    layer = nnx.merge(graph, state)
    return layer(x) if activation is None else layer.activated(x, activation)


class Once(nnx.Module):
    """A factored layer that is traced once for all that have its shapes: kernels take a while."""

    def __init__(self, layer):
        self.layer, self.out_shape = layer, layer.out_shape

    def __call__(self, x):
        """The layer's own output."""
        return call(*nnx.split(self.layer), x, None)

    def activated(self, x, activation: str):
        """The same with an activation."""
        return call(*nnx.split(self.layer), x, activation)


def own_factors(linear, ratio: float, size: int, implementation: str | None):
    """A factored layer in the place of a dense one."""
    kernel, bias, rest = read_linear(linear)
    factors = TiledFactors(*tiled(size, ratio, *kernel.shape, 0), pad_in=0, pad_out=0)
    return TSVDLinear(factors, bias, **rest, implementation=implementation)


def common_factor(linear, ratio: float, size: int):
    kernel, bias, rest = read_linear(linear)
    factors = CommonFactors(*common("right", size, ratio, *kernel.shape, 0), pad=0, side="right")
    return TSVDCommonLinear(factors, bias, **rest)


def ways(args) -> dict:
    """How a dense layer is replaced, by name."""
    found = {}
    for ratio in args.ratios:
        own = lambda linear, which, ratio=ratio: own_factors(linear, ratio, args.tile, which)
        found["tsvd xla", ratio] = functools.partial(own, which="xla")
        if pallas.on_hopper():
            found["tsvd", ratio] = functools.partial(own, which=None)
        found["common", ratio] = functools.partial(common_factor, ratio=ratio, size=128)
    return {("dense", 1.0): None} | found


def build(args, replace) -> LanguageModel:
    features, heads, layers = SIZES[args.size]
    config = DecoderConfig.opt(
        vocab_size=args.vocabulary, length=max(args.length, args.tokens), features=features,
        hidden=4 * features, num_heads=heads, layers=args.layers or layers, activation="gelu",
        dtype=jnp.bfloat16,
    )  # fmt: skip
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    halve(model)
    use_flash(model, args.flash)
    if replace is not None:
        linear = {p: m for p, m in named_modules(model).items() if isinstance(m, LINEAR)}
        replace_modules(model, {p: Once(replace(m)) for p, m in linear.items() if "blocks" in p})
    return model


def prefill(model, tokens):
    """Logits of the last token."""
    x = model.tokens(tokens) + model.positions(jnp.arange(tokens.shape[1]))
    for block in model.blocks:
        x = block(x)
    return model.tokens.attend(model.norm(x[:, -1]))


def decode(model, tokens, count: int):
    """`count` greedy tokens after the given ones `[B]`."""

    def step(carry, place):
        token, cache = carry
        logits, cache = model.decode(token[:, None], cache, jnp.full(len(token), place))
        token = logits[:, 0].argmax(-1).astype(token.dtype)
        return (token, cache), token

    start = tokens, model.empty_cache(len(tokens), count)
    return jax.lax.scan(step, start, jnp.arange(count))[1]


class Programs(NamedTuple):
    """A model's compiled programs: one of prefill, one for each number of sequences."""

    state: nnx.State
    prefill: Future
    decode: dict[int, Future]

    @classmethod
    def of(cls, pool, args, replace) -> "Programs":
        """Those of one way to hold the weights; a pool compiles them."""
        graph, state = nnx.split(build(args, replace))
        run = jax.jit(lambda state, tokens: prefill(nnx.merge(graph, state), tokens))
        write = jax.jit(lambda state, first: decode(nnx.merge(graph, state), first, args.tokens))
        compiled = lambda function, *shape: pool.submit(
            function.lower(state, jax.ShapeDtypeStruct(shape, jnp.int32)).compile
        )
        decoding = {batch: compiled(write, batch) for batch in args.decode}
        return cls(state, compiled(run, args.batch, args.length), decoding)

    def measured(self, args) -> dict:
        """The parts of a row."""
        parameter_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.state))
        tokens, run = jnp.zeros((args.batch, args.length), jnp.int32), self.prefill.result()
        memory = run.memory_analysis()
        ms = milliseconds(run, self.state, tokens, calls=1)
        row = {
            "parameter_bytes": parameter_bytes,
            "prefill_bytes": memory.temp_size_in_bytes + memory.output_size_in_bytes,
            "prefill_ms": ms, "prefill_tokens_per_second": tokens.size / ms * 1e3, "decode": {},
            "prefill_kernels_ms": kernels(run, self.state, tokens, calls=2, most=16),
        }  # fmt: skip
        for batch, write in self.decode.items():
            first = jnp.zeros(batch, jnp.int32)
            ms = milliseconds(write.result(), self.state, first, calls=1, repeats=3)
            row["decode"][batch] = batch * args.tokens / ms * 1e3
        return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="medium")
    parser.add_argument("--layers", type=int, help="those of the size when not given")
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--ratios", type=float, nargs="+", default=[2, 4, 8])
    parser.add_argument("--tile", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--decode", type=int, nargs="+", default=[1, 16], help="sequences")
    parser.add_argument("--tokens", type=int, default=128, help="that each of them writes")
    parser.add_argument("--flash", default="cudnn", choices=["cudnn", "xla"])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--name", default="tsvd_decoder_gpu", help="of the result")
    args = parser.parse_args()
    if args.quick:
        args.ratios, args.decode = args.ratios[:1], args.decode[:1]
    done = Rows(args.name, ("way", "ratio", "size", "tile"), resume=args.resume)
    key = lambda way, ratio: {"way": way, "ratio": ratio, "size": args.size, "tile": args.tile}
    missing = {which: way for which, way in ways(args).items() if not done.has(**key(*which))}
    begin = time.perf_counter()
    with ThreadPoolExecutor() as pool:  # all are compiled before any runs: launches want the host
        programs = {
            which: Programs.of(pool, args, way)
            for which, way in tqdm(missing.items(), desc="compiling")
        }
    for (way, ratio), compiled in programs.items():
        row = done.add(begin, key(way, ratio) | compiled.measured(args))
        begin = time.perf_counter()
        told = "  ".join(f"B={b} {rate:,.0f}" for b, rate in row["decode"].items())
        print(
            f"{way:12s} {ratio:.0f}x {row['parameter_bytes'] / 1e6:6.0f} MB  prefill "
            f"{row['prefill_ms']:8.2f} ms  tokens/s {row['prefill_tokens_per_second']:9,.0f}  "
            f"decode {told}  {row['took']} s", flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
