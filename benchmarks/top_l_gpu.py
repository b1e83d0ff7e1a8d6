"""Top-L attention on this machine's GPU: the choice of keys and attention, beside its peers.

    python benchmarks/top_l_gpu.py
    python benchmarks/top_l_gpu.py --resume --peers dense    # one more peer, or a stopped run
    python benchmarks/top_l_gpu.py --quick --implementation xla --dense xla    # without a GPU

bfloat16, causal, 16 heads of 64 features, 8 codes each, L = T / 8 keys kept; 32,768 tokens a call
or one sequence. Milliseconds are medians over runs of calls inside one jitted loop; those of "ours"
hold the choice, which "select" times alone. Beside ours: dense causal attention; our portable
implementation up to `--xla-until` tokens, as long as its scores fit; and blocks of 64 by vote on
the block-sparse kernels, 8 queries of a block voting; their choice, "vote", again within and alone.
Codes are random bits: only the vote's blocks, not their number, follow from them. They are given: a
layer makes them from queries and keys, which "encode" times and no other part holds; "encode_adc"
does so with the tables of the other score. MiB: what XLA reserves for forward and backward beside
the arguments.
"""

import argparse
import functools
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
from gpu import Programs
from resumed import Results
from timing import milliseconds, repeated

import sparsax
from sparsax import pallas
from sparsax.patterns import topl
from sparsax.quantise import Codes, Score

FEATURES, BLOCK = 64, 64
PEERS = ("dense", "xla", "blocks")


def random_codes(batch: int, length: int, heads: int) -> Codes:
    """One word of eight codes for every token and head."""
    words = lambda seed: jax.random.bits(jax.random.key(seed), (batch, length, heads, 1))
    return Codes(words(1), words(2), num_codes=8)


def encode(q, k, books, score: Score = "match") -> Codes:
    """Codes of a layer whose centroids are these."""
    return sparsax.ProductQuantizer(books, jnp.ones(books.shape[:3])).codes(q, k, score=score)


def choose(codes: Codes, keep: int, implementation: str):
    """The two integers of every query."""
    if implementation == "pallas":
        return pallas.top_l.select(codes, None, keep=keep, causal=True)
    kept = topl.tokens(codes, keep=keep, causal=True)
    return kept.tau, kept.first


def vote(codes: Codes, *, keep: int, implementation: str) -> sparsax.BlockPattern:
    """The blocks of every sample, in kernels or without."""
    return sparsax.top_l_blocks(
        codes, keep=keep, block=BLOCK, causal=True, implementation=implementation
    )


def over_blocks(q, k, v, codes: Codes, *, keep: int, implementation: str):
    """As `sparsax.nn.TopLAttention(select="blocks")`: heads of all samples as if of one."""
    heads = lambda x: x.swapaxes(0, 1).reshape(1, x.shape[1], -1, x.shape[-1])
    pattern = vote(codes, keep=keep, implementation=implementation)
    pattern = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), pattern)
    o = sparsax.block_sparse_attention(
        heads(q), heads(k), heads(v), pattern, causal=True, implementation=implementation
    )
    return o.reshape(q.shape[1], q.shape[0], *q.shape[2:]).swapaxes(0, 1)


def parts(batch: int, length: int, args) -> dict:
    """What measures ours and its peers at one length, by name."""
    shape = batch, length, args.heads, FEATURES
    arrays = jax.random.normal(jax.random.key(0), (4, *shape), jnp.bfloat16)
    codes, keep = random_codes(batch, length, args.heads), max(1, length // 8)
    books = jax.random.normal(jax.random.key(5), (args.heads, 8, 16, FEATURES // 8))
    calls = 2 if args.quick else max(2, min(50, 2**18 // (batch * length)))

    def start(attend, *rest):
        with ThreadPoolExecutor() as pool:
            return Programs.start(pool, attend, arrays, *rest, calls=calls)

    def alone(function, *given):
        return {"ms": milliseconds(repeated(function, calls), *given, calls=calls)}

    def attend(implementation):
        return lambda q, k, v, codes: sparsax.top_l_attention(
            q, k, v, codes, keep=keep, causal=True, implementation=implementation
        )

    ours = functools.cache(lambda: start(attend(args.implementation), codes))
    blocks = functools.partial(over_blocks, keep=keep, implementation=args.implementation)
    dense = functools.partial(
        jax.nn.dot_product_attention, is_causal=True, implementation=args.dense
    )
    found = {
        "ours": lambda: ours().time(arrays, codes),
        "encode": lambda: alone(encode, *arrays[:2], books),
        "encode_adc": lambda: alone(functools.partial(encode, score="adc"), *arrays[:2], books),
        "select": lambda: alone(lambda codes: choose(codes, keep, args.implementation), codes),
        "kernels": lambda: {"ms": ours().kernels(arrays, codes)},
        "dense": lambda: start(dense).time(arrays),
        "blocks": lambda: start(blocks, codes).time(arrays, codes),
        "vote": lambda: alone(
            functools.partial(vote, keep=keep, implementation=args.implementation), codes
        ),
        "xla": lambda: start(attend("xla"), codes).time(arrays, codes),
    }
    if length > args.xla_until:
        del found["xla"]
    return found


def show(row: dict, seconds: float) -> None:
    get = lambda part, kind: row.get(part, {}).get(kind, float("nan"))
    line = f"{row['length']:6d} {row['batch']:3d} | {get('select', 'ms'):8.3f}"
    for kind in ("forward_ms", "both_ms"):
        mine = get("ours", kind)
        line += f" | {mine:8.3f}" + "".join(f" {get(peer, kind) / mine:6.2f}" for peer in PEERS)
    memory = (get(part, "bytes") / 2**20 for part in ("ours", *PEERS))
    print(f"{line} | {' '.join(f'{x:7.0f}' for x in memory)} | {seconds:4.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**n for n in range(10, 16)])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=2**15, help="of a call, or one sequence")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--xla-until", type=int, default=8192, help="length of the peer xla")
    parser.add_argument("--implementation", default="pallas", choices=["pallas", "xla"])
    parser.add_argument("--dense", default="cudnn", choices=["cudnn", "xla"])
    parser.add_argument("--quick", action="store_true", help="small rows, to see that it runs")
    parser.add_argument("--resume", action="store_true", help="keep what the result has")
    parser.add_argument("--name", default="top_l_gpu", help="of the result")
    args = parser.parse_args()
    if args.quick:
        args.lengths, args.heads, args.tokens = [256, 512], 2, 512
    results = Results(args.name + "_quick" * args.quick, resume=args.resume)
    peers = ", x ".join(PEERS)
    print(f"length, batch | select ms | forward ms, x {peers} | and backward | MiB of each")
    for length in args.lengths:
        begin, batch = time.perf_counter(), max(1, args.tokens // length)
        key = f"{args.heads} x {FEATURES}, {batch} x {length}"
        row = results.row(
            key, length=length, batch=batch, heads=args.heads, features=FEATURES,
            keep=max(1, length // 8),
        )  # fmt: skip
        for part, measured in parts(batch, length, args).items():
            peer = "blocks" if part == "vote" else part
            if peer not in PEERS or peer in args.peers:
                results.measure(key, part, measured)
        show(row, time.perf_counter() - begin)
    results.end("ours", "encode", "encode_adc", "select", "kernels")


if __name__ == "__main__":
    main()
