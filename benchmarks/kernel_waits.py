"""The table of docs/attention.md about what the kernels wait for, from `profile_gpu.py`."""

from report import number, table

KERNELS = {
    "per_fused_flex": "before the backward",
    "flex_attention_backward": "backward",
    "flex_attention": "forward",
    "FlashAttentionForward": "forward",
    "BackwardPreprocess": "before the backward",
    "BackwardPostprocess": "after the backward",
    "FlashAttentionBackward": "backward",
    "forward": "forward",
    "fprop": "forward",
    "dq": "dQ",
    "dkv": "dK, dV",
    "bprop": "backward",
}
# Pipes and reasons by Nsight Compute's names, those of most instructions.
PIPES = {"tensor": "tensor cores", "xu": "exponentials", "alu": "ALU", "fma": "FMA"}
WAITS = {
    "selected": "issuing",
    "long_scoreboard": "global memory and barriers",
    "wait": "fixed latency",
    "barrier": "other warps",
    "short_scoreboard": "shared memory",
    "not_selected": "issue slot",
}
ISSUED = "instructions a cycle of each scheduler"
TEXT = (
    "Counters of Nsight Compute for one launch: `spion`, the pattern of the tables at 16,384 "
    "tokens and a density of 10 %; `few`, its band of three blocks alone, 2 %; `qds`, compound "
    "attention of 64 features and 2,048 tokens ([docs/compound.md](compound.md)); and dense cuDNN. "
    "`short` is such a band of 1,024 tokens, 34 %, `middle` `spion` of 4,096, 9 %; `flex` is "
    "FlexAttention of the same; ours of 4,096 are from before few rows stayed (see above). "
    "Shares are of a pipe's peak while the kernel ran, and of the cycles in which a scheduler "
    "could issue an instruction; cycles are what an average warp, the copying ones among them, "
    "spends on each reason from one instruction to the next. Lesser reasons have no column."
)
SAID = (
    "With 64 features the forward kernel does what dense cuDNN's does: exponentials busy for 50 %, "
    "tensor cores for 46 (52 and 50), an instruction in 57 % of the issue slots (53). By its "
    "machine code a tile of 64 keys is some 275 instructions of a warp: 70 scale and exponentiate, "
    "120 are maxima, sums, rounding and the scaling of what was summed before. At a density of 2 % "
    "it stays at 55 % of the issue slots while the tensor cores fall to 33: a row tile's own "
    "beginning and end are instructions, too, and there FlexAttention is level with it. With 128 "
    "features dQ has the tensor cores at 83 %, more than dense cuDNN's backward pass with its 65. "
    "dK and dV, four tenths of both passes, have them at 59 and 69 %: with 128 features their "
    "warps wait 2.5 of 8.6 cycles for tiles to arrive, of which shared memory had room for two; it "
    "has for four since, and the next table has 72 %. "
    "Compound attention's kernels want masks for most tiles: ALU, exponentials and tensor cores of "
    "its forward kernel are each a third busy, and 60 % of the issue slots."
)
FLASH4 = (
    "FlashAttention-4's kernels on the same lists as `spion`, by the same counters, and ours of "
    "128 features since dK and dV have slots for four tiles; why warps wait was not kept."
)
SAID_OF_FLASH4 = (
    "With 128 features both forward kernels take 353 to 355 us, and keep tensor cores, "
    "exponentials and schedulers equally busy. FlashAttention-4's backward pass takes 1,340 us in "
    "three kernels, five products, and has the tensor cores busy for 48 % of the longest; ours "
    "takes 1,102 in two, seven products, with 72 and 85 %. With 64 features it takes 772, with 40 "
    "%, and ours, by the table above, 667. So launch by launch ours are ahead, and in the tables "
    "of times a tie is left: both passes with 128 features take 1.17 times what our kernels do "
    "here, with those that deal rows out, join pieces and compute delta as the tables' own run has "
    "them, and 1.04 times FlashAttention-4's. Gaps between our nine launches are a part of that; "
    "clocks that fall where tensor cores are busy for longer may be the rest, and were not read."
)


def share(pipes: dict[str, float], name: str) -> float:
    """Of a pipe's peak: cycles in which it was busy, or else instructions."""
    return pipes.get(name, pipes.get(f"{name} instructions", float("nan")))


def waits(rows: list[dict]) -> str:
    """A line for every launch; without what warps wait for where the rows lack it."""
    cells, reasons = [], WAITS if all("waits" in row for row in rows) else {}
    for row in rows:
        kernel = next(name for key, name in KERNELS.items() if key in row["kernel"])
        cells.append([
            row["case"], kernel, number(row["microseconds"]),
            *(f"{share(row['pipes'], x):.0f} %" for x in PIPES), f"{row['memory']:.0f} %",
            f"{100 * row[ISSUED]:.0f} %",
            *(f"{row['waits'].get(x, 0.0):.1f}" for x in reasons),
        ])  # fmt: skip
    head = ["case, head features", "kernel", "us", *PIPES.values(), "memory", "issue slots",
            *(f"cycles: {x}" for x in reasons.values())]  # fmt: skip
    return table(head, cells)
