"""The shared cases in shapes that the Hopper kernels take, and more of what only they must pass."""

import dataclasses
from collections.abc import Callable, Iterable

import pytest

from tests.helpers import CASES, Case

FEATURES = {8: 32, 16: 64, 32: 96, 64: 128}


def for_kernels(c: Case, grow: int) -> Case:
    """The case with lengths, blocks and window grown, in 16 bits, with features of a kernel."""
    window = c.window and tuple(x if x is None else grow * x for x in c.window)
    return dataclasses.replace(
        c, T=grow * c.T, S=grow * c.S, block_q=_block(c.block_q, grow),
        block_kv=_block(c.block_kv, grow), H=FEATURES[c.H], window=window,
        dtype="bfloat16" if c.dtype == "float32" else c.dtype,
    )  # fmt: skip


def cells(every: Iterable[tuple], kept: Callable[..., bool]) -> list:
    """All cells of a matrix, of which CI runs those `kept`: the rest are marked `exhaustive`."""
    rest = pytest.mark.exhaustive
    return [cell if kept(*cell) else pytest.param(*cell, marks=rest) for cell in every]


def _block(block: int, grow: int) -> int:
    return min(max(32, grow * block), 128)


# Every head dim, every block; lengths that no tile divides; more tiles than the ring has slots.
KERNEL_CASES = (
    Case(name="h32", T=256, S=256, block_q=128, block_kv=128, H=32, dtype="float16"),
    Case(name="h96_ragged", T=203, S=331, block_q=64, block_kv=32, H=96, dtype="bfloat16"),
    Case(name="h128_mqa", T=256, S=512, N=4, K=1, block_q=128, block_kv=128, H=128,
         dtype="bfloat16", blocks="cross"),
    Case(name="h256_gqa", B=1, T=192, S=256, N=2, K=1, block_q=64, block_kv=64, H=256, P=2,
         dtype="bfloat16", causal=True),
    Case(name="blocks_32_128", T=256, S=384, block_q=32, block_kv=128, H=64, P=2,
         dtype="bfloat16", window=(100, 40), segments=True, blocks="full"),
    Case(name="negative_scale", T=128, S=256, block_q=128, block_kv=64, H=64, dtype="bfloat16",
         scale=-0.2, padding="some"),
)  # fmt: skip

SMALL = tuple(for_kernels(c, grow=2) for c in CASES)
# On a GPU; it has fewer multiprocessors than the last two have row tiles, which are dealt out.
LARGE = (
    *(for_kernels(c, grow=8) for c in CASES),
    Case(name="many_rows", B=8, T=1000, S=1000, N=8, K=4, P=1, block_q=128, block_kv=64, H=64,
         dtype="bfloat16", causal=True),
    Case(name="many_rows_per_head", B=4, T=1024, S=768, N=16, K=16, P=16, block_q=64, block_kv=64,
         H=128, dtype="bfloat16"),
)  # fmt: skip
