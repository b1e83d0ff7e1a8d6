"""How even the work of the block-sparse kernels is, by how row tiles are dealt; nothing is timed.

    python benchmarks/attention_balance.py          # anywhere, a minute or two

For patterns whose rows or columns differ in length, 16,384 tokens in blocks of 128, a GPU of 132
multiprocessors is played through: a thread block goes to the first one that is free, and a row tile
takes as long as its list, and `OF_ROW` units more. "in order" is a thread block for each row tile,
head after head; "longest first" the same, sorted; "dealt" is what the kernels do (`Schedule`,
`deal`), which cut what would outlast everything else. "busy" is the mean work of a multiprocessor
over that of the last one to end: 1 is even. The forward pass and dQ walk rows, dK and dV columns.
"""

import heapq
from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np
from gpu import BLOCK, bigbird, spion_like
from harness import save
from tqdm import tqdm

import sparsax
from sparsax import pallas
from sparsax.pallas.block_sparse.deal import deal
from sparsax.pallas.block_sparse.schedule import OF_ROW, Schedule, units
from sparsax.pallas.hopper import multiprocessors

LENGTH, HEADS = 16384, 16


def verticals(heads: int, blocks: int, count: int) -> np.ndarray:
    """A band of three blocks, and full columns: keys that all attend to, as SPION finds them."""
    i = np.arange(blocks)
    return np.repeat(((abs(i - i[:, None]) <= 1) | (i < count))[None], heads, 0)


PATTERNS = {
    "SPION-like, 10 %": spion_like(HEADS, LENGTH // BLOCK, 0.1),
    "BigBird, 10 %": bigbird(HEADS, LENGTH // BLOCK, 0.1),
    "band and one full column, 16 heads": verticals(HEADS, LENGTH // BLOCK, 1),
    "band and one full column, one head": verticals(1, LENGTH // BLOCK, 1),
    "band and four full columns, one head": verticals(1, LENGTH // BLOCK, 4),
}


def busy(blocks: Iterable[float]) -> float:
    """How even thread blocks that take so long make it, each handed to who is free first."""
    ends = [0.0] * multiprocessors()
    total = 0.0
    for time in blocks:
        heapq.heapreplace(ends, ends[0] + time)
        total += time
    return total / len(ends) / max(ends)


def dealt(work: np.ndarray) -> list[float]:
    """How long each thread block of the kernels takes, in the order of their numbers."""
    plan = Schedule(*work.shape, copies=1, longest=LENGTH // BLOCK)
    with pallas.interpreted():
        table, _ = deal(plan, jnp.asarray(work), interpret=pallas.interpret())
    table, times = np.asarray(table), []
    header = plan.header(table)
    for block in range(plan.thread_blocks):
        items = (
            plan.item(*plan.read(np.int32(block), np.int32(slot), None, table, header, ()))
            for slot in range(int(plan.slots(np.int32(block), header)))
        )
        lengths = [int(i.last) - int(i.first) for i in items if int(i.row) >= 0]
        times.append(sum(lengths) + OF_ROW * len(lengths))
    return times


def main() -> None:
    rows = []
    for name, mask in tqdm(PATTERNS.items(), desc="patterns"):
        pattern = sparsax.BlockPattern.from_block_mask(mask, q_len=LENGTH, block_q=BLOCK)
        lists = {"rows": pattern.kv_num_blocks, "columns": pattern.q_num_blocks}
        for walked, counts in lists.items():
            work = np.asarray(units(counts, BLOCK), np.int32)
            times = work.ravel() + OF_ROW
            rows.append({
                "pattern": name, "heads": len(work), "walked": walked,
                "longest": int(work.max()), "median": float(np.median(work)),
                "in_order": busy(times), "longest_first": busy(sorted(times)[::-1]),
                "dealt": busy(dealt(work)),
            })  # fmt: skip
    for row in rows:
        told = "  ".join(f"{x} {row[x]:.2f}" for x in ("in_order", "longest_first", "dealt"))
        print(f"{row['pattern']:38s} {row['walked']:8s} {row['longest']:4d}  {told}")
    print(save("attention_balance", rows))


if __name__ == "__main__":
    main()
