"""Compound attention on this machine's GPU against dense cuDNN and block masks, in one run.

    python benchmarks/compound_gpu.py            # --flex: PyTorch's FlexAttention as well

bfloat16, heads of 64 features. Milliseconds are medians over runs of calls inside one jitted loop,
the positions of global tokens being data. Beside ours: dense attention without a mask; our own
block-sparse kernel over the blocks of 64 that hold a pair (what a block mask can do at best; the
first sample's for all); FlexAttention with exactly these pairs. "tiles" and "blocks" are the shares
of all tiles of 64 x 64 that ours and a block mask compute.

`qds`: queries of 16 tokens and documents of 2048, window 64 to either side, the query and a token
before every sentence of 22 +- 8 tokens global, another document in every sample. `longformer`:
window 256 to either side, so many global tokens, contiguous or scattered. `bigbird`: blocks of 64.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flex import flex_compound
from gpu import both, kernels, time_both
from harness import save

import sparsax
from sparsax.patterns import compound

FEATURES, BLOCK = 64, 64


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


def cases(lengths: list[int]):
    """`(name, batch, heads, pattern)` of every row."""
    yield "qds", 8, 12, qds(8)
    for length in lengths:
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


def compare(name: str, batch: int, heads: int, pattern, args) -> dict:
    """Ours and its peers at one pattern."""
    length = pattern.seq_len
    arrays = jax.random.normal(jax.random.key(0), (4, batch, length, heads, FEATURES), jnp.bfloat16)
    calls = max(2, min(50, 2**18 // (batch * length)))
    time = lambda attend, *rest: time_both(attend, arrays, *rest, calls=calls)
    ours = partial(sparsax.compound_attention, implementation="pallas")
    plan, blocks = sparsax.slice_plan(pattern, head_dim=FEATURES), rounded(pattern)
    row = {
        "name": name, "length": length, "batch": batch, "heads": heads,
        "tiles": plan.tiles / plan.dense_tiles,
        "blocks": plan.block_mask_tiles / plan.dense_tiles,
        **time_both(ours, arrays, pattern, calls=calls, count_bytes=True),
        "dense": time(partial(jax.nn.dot_product_attention, implementation="cudnn")),
        "block_mask": time(
            partial(sparsax.block_sparse_attention, implementation="pallas"), blocks
        ),
        "kernels_ms": kernels(jax.jit(both(ours)), *arrays, pattern),
    }  # fmt: skip
    if args.flex:
        found = flex_compound(batch, heads, FEATURES, pattern)
        row["flex"] = dict(zip(("forward_ms", "both_ms"), found, strict=True))
    return row


def show(row: dict) -> None:
    line = f"{row['name']:24s} {row['length']:6d} {row['tiles']:6.3f} {row['blocks']:6.3f}"
    for which in ("forward_ms", "both_ms"):
        peers = [row[x][which] / row[which] for x in ("dense", "block_mask", "flex") if x in row]
        line += f" | {row[which]:8.3f} {' '.join(f'{x:6.2f}' for x in peers)}"
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--flex", action="store_true", help="also PyTorch's FlexAttention")
    parser.add_argument("--name", default="compound_gpu", help="of the result")
    args = parser.parse_args()
    print(
        "pattern, length, tiles, blocks | forward ms, x dense, x blocks (, x flex) | and backward"
    )
    rows = []
    for name, *case in cases(args.lengths):
        if args.only in name:
            rows.append(compare(name, *case, args))
            show(rows[-1])
            save(args.name, rows)  # what there is, should the run be stopped


if __name__ == "__main__":
    main()
