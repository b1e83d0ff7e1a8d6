"""Compound attention on this machine's GPU against dense cuDNN and block masks, in one run.

    python benchmarks/compound_gpu.py --peers dense block_mask huggingface flex
    python benchmarks/compound_gpu.py --resume --only qds --peers flex     # one more peer of a row
    python benchmarks/compound_gpu.py --quick --implementation xla --dense xla    # without a GPU

bfloat16, heads of 64 features. Milliseconds are medians over runs of calls inside one jitted loop,
the positions of global tokens being data. Beside ours: dense attention without a mask; our own
block-sparse kernel over the blocks of 64 that hold a pair (what a block mask can do at best; the
first sample's for all); FlexAttention with exactly these pairs, autotuned; Hugging Face's
Longformer self-attention, which projects, too, and stands beside our whole layer. "tiles" and
"blocks" are the shares of all tiles of 64 x 64 that ours and a block mask compute.

`qds`: queries of 16 tokens and documents of 2048, window 64 to either side, the query and a token
before every sentence of 22 +- 8 tokens global, another document in every sample. `longformer`:
window 256 to either side, so many global tokens, contiguous or scattered. `bigbird`: blocks of 64.
"""

import argparse
import importlib.metadata
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flex import flex_compound
from gpu import Programs
from huggingface import longformer_attention
from resumed import Results, need
from timing import milliseconds, repeated

import sparsax
from sparsax.patterns import compound

FEATURES, BLOCK = 64, 64
PEERS = ("dense", "block_mask", "flex", "huggingface")
PARTS = ("ours", "kernels", "dense", "block_mask", "flex", "layer", "huggingface")  # of a row
PACKAGES = {"flex": ("torch",), "huggingface": ("torch", "transformers")}


def qds(batch: int, length: int = 2048, query: int = 16):
    """Documents of sentences of random lengths, behind a query."""
    gaps = np.random.default_rng(0).integers(14, 31, (batch, length // 14))
    starts = query + np.cumsum(gaps, 1) - gaps
    counts = (starts < length).sum(1)
    return compound.qds(
        length, window=64, query_lens=np.full(batch, query), max_query_len=query,
        sentence_starts=np.minimum(starts, length - 1)[:, : counts.max()], num_sentences=counts,
    )  # fmt: skip


def longformer(length: int, count: int, scattered: bool):
    """Global tokens in front, or anywhere."""
    drawn = np.random.default_rng(0).choice(length, count, replace=False)
    positions = np.sort(drawn) if scattered else np.arange(count)
    return compound.longformer(length, window=256, positions=positions[None])


def cases(args):
    """`(name, batch, heads, pattern)` of every row."""
    if args.quick:
        yield "qds", 2, 2, qds(2, 256)
        yield "longformer 9 scattered", 1, 2, longformer(1024, 9, True)
        yield "bigbird", 1, 2, compound.bigbird(1024, block=BLOCK)
        return
    yield "qds", 8, 12, qds(8)
    for length in args.lengths:
        batch = max(1, 8192 // length)
        for count, scattered in ((1, False), (32, False), (64, True), (256, True)):
            name = f"longformer {count}{' scattered' if scattered else ''}"
            yield name, batch, 16, longformer(length, count, scattered)
        yield "bigbird", batch, 16, compound.bigbird(length, block=BLOCK)


def rounded(pattern) -> sparsax.BlockPattern:
    """The blocks that hold a pair of the first sample."""
    length = pattern.seq_len
    first = np.arange(0, length, BLOCK)
    gap = first - first[:, None]  # of keys to queries, by BLOCK - 1 more or less within a block
    mask = np.zeros(gap.shape, bool)
    for band in pattern.bands:
        mask |= (gap + BLOCK > -band.left) & (gap - BLOCK < band.right)
    holds = lambda chosen: np.asarray(chosen)[0].reshape(-1, BLOCK).any(1)
    mask |= holds(pattern.is_column()) | holds(pattern.is_row())[:, None]
    if pattern.blocks is not None:
        mask |= np.asarray(pattern.blocks.to_block_mask()[0])
    return sparsax.BlockPattern.from_block_mask(mask, q_len=length, block_q=BLOCK)


def start_layer(pool, pattern, batch: int, heads: int, implementation: str, calls: int):
    """A function that gives the milliseconds of our layer with its projections.

    Gradients are those of input and parameters. It is compiled in the pool.
    """
    (band,) = pattern.bands
    layer = sparsax.nn.LongformerSelfAttention(
        heads, heads * FEATURES, window=band.left, max_global=pattern.rows.shape[-1],
        implementation=implementation, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16,
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    graph, state = nnx.split(layer)
    shape = batch, pattern.seq_len, heads * FEATURES
    x, dy = jax.random.normal(jax.random.key(1), (2, *shape), jnp.bfloat16)
    forward = lambda x, state, pattern: nnx.merge(graph, state).attend(x, pattern)

    def step(x, dy, state, pattern):
        y, pull = jax.vjp(lambda x, state: forward(x, state, pattern), x, state)
        return y, pull(dy)

    loop = lambda run, *args: (pool.submit(repeated(run, calls).lower(*args).compile), args)
    loops = {
        "forward_ms": loop(forward, x, state, pattern),
        "both_ms": loop(step, x, dy, state, pattern),
    }
    return lambda: {
        name: milliseconds(run.result(), *args, calls=calls) for name, (run, args) in loops.items()
    }


def parts(batch: int, heads: int, pattern, wanted: set[str], args) -> dict:
    """What measures the wanted parts, ours and its peers, at one pattern, by name.

    All that XLA compiles for them is compiled together, before any is measured.
    """
    length = pattern.seq_len
    arrays = jax.random.normal(jax.random.key(0), (4, batch, length, heads, FEATURES), jnp.bfloat16)
    calls = 2 if args.quick else max(2, min(50, 2**18 // (batch * length)))
    ours = partial(sparsax.compound_attention, implementation=args.implementation)
    block = partial(sparsax.block_sparse_attention, implementation=args.implementation)
    dense = partial(jax.nn.dot_product_attention, implementation=args.dense)
    attentions = {"ours": (ours, pattern), "dense": (dense,), "block_mask": (block,)}
    found, programs = {}, {}
    with ThreadPoolExecutor() as pool:
        for name, (attend, *rest) in attentions.items():
            if name in wanted or (name == "ours" and "kernels" in wanted):
                rest = rest or ([rounded(pattern)] if name == "block_mask" else [])
                programs[name] = Programs.start(pool, attend, arrays, *rest, calls=calls), rest
        if pattern.bands and "layer" in wanted:
            found["layer"] = start_layer(pool, pattern, batch, heads, args.implementation, calls)
    for name, (program, rest) in programs.items():
        found[name] = partial(program.time, arrays, *rest)
    if "kernels" in wanted:  # those of what was timed
        program, rest = programs["ours"]
        found["kernels"] = lambda: {"ms": program.kernels(arrays, *rest)}
    found["flex"] = lambda: dict(zip(
        ("forward_ms", "both_ms"), flex_compound(batch, heads, FEATURES, pattern), strict=True
    )) | {"versions": {"torch": importlib.metadata.version("torch")}}  # fmt: skip
    if pattern.bands:  # Longformer's
        chosen = np.broadcast_to(np.asarray(pattern.is_row()), (batch, length))
        found["huggingface"] = lambda: longformer_attention(
            chosen, heads, FEATURES, pattern.bands[0].left
        )
    return {name: found[name] for name in PARTS if name in found and name in wanted}


def beside(peer: str) -> str:
    """The part of ours that a peer stands beside."""
    return "layer" if peer == "huggingface" else "ours"


def ratio(row: dict, peer: str, kind: str) -> float:
    """How many times as long as ours the peer takes; NaN where one is missing."""
    get = lambda part: row.get(part, {}).get(kind, float("nan"))
    return get(peer) / get(beside(peer))


def show(row: dict, seconds: float) -> None:
    line = f"{row['name']:24s} {row['length']:6d} {row['tiles']:6.3f} {row['blocks']:6.3f}"
    for kind in ("forward_ms", "both_ms"):
        line += f" | {row['ours'].get(kind, float('nan')):8.3f}"
        line += "".join(f" {ratio(row, peer, kind):6.2f}" for peer in PEERS)
    print(f"{line} | {seconds:4.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 16384])
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=["dense", "block_mask"])
    parser.add_argument("--implementation", default="pallas", choices=["pallas", "xla"])
    parser.add_argument("--dense", default="cudnn", choices=["cudnn", "xla"])
    parser.add_argument("--quick", action="store_true", help="small rows, to see that it runs")
    parser.add_argument("--resume", action="store_true", help="keep what the result has")
    parser.add_argument("--name", default="compound_gpu", help="of the result")
    args = parser.parse_args()
    need(*{name for peer in args.peers for name in PACKAGES.get(peer, ())})
    results = Results(args.name + "_quick" * args.quick, resume=args.resume)
    asked = {"ours", "kernels", *args.peers} | ({"layer"} if "huggingface" in args.peers else set())
    print(f"pattern, length, tiles, blocks | forward ms, x {', x '.join(PEERS)} | and backward")
    for name, batch, heads, pattern in cases(args):
        if args.only not in name:
            continue
        begin, plan = time.perf_counter(), sparsax.slice_plan(pattern, head_dim=FEATURES)
        key = f"{name}, {pattern.seq_len}"
        row = results.row(
            key, name=name, length=pattern.seq_len, batch=batch, heads=heads,
            tiles=plan.tiles / plan.dense_tiles,
            blocks=plan.block_mask_tiles / plan.dense_tiles,
        )  # fmt: skip
        wanted = {part for part in asked if results.lacks(key, part)}
        for part, measured in parts(batch, heads, pattern, wanted, args).items():
            results.measure(key, part, measured)
        show(row, time.perf_counter() - begin)
    results.end("ours", "kernels", "layer")


if __name__ == "__main__":
    main()
