"""The table of docs/attention.md about what the kernels wait for, from `profile_gpu.py`."""

from report import number, table

KERNELS = {
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
TEXT = (
    "Counters of Nsight Compute for one launch: `spion`, the pattern of the tables at 16,384 "
    "tokens and a density of 10 %; `qds` and `longformer`, compound attention of 64 features "
    "([docs/compound.md](compound.md)), QDS of 2,048 tokens and Longformer of 4,096 with 64 "
    "scattered tokens; and dense cuDNN. Shares are of a pipe's peak while the kernel ran; cycles "
    "are what an average warp, the copying ones among them, spends on each reason from one "
    "instruction to the next."
)
SAID = (
    "With 64 features the forward kernel keeps exponentials and tensor cores as busy as dense "
    "cuDNN's does (49 and 46 % against 52 and 50): two teams of warpgroups hide each other's "
    "waits. Its warps wait 1.0 cycles for what they loaded and for barriers, of which dense has "
    "half; a list is short, and each row tile begins and ends one. With 128 features dQ has the "
    "tensor cores at 83 %, more than dense cuDNN's backward pass with its 65; dK and dV, at 68 %, "
    "wait for shared memory: 2.4 cycles, five times as long as dense; they read lse and delta "
    "of a tile only after they have awaited its products, which may be why. Compound attention's "
    "forward kernels have no pipe busy for more than 34 %. Most of their tiles need a mask, and "
    "lists of three to six tiles leave little between a row's first and last product. The tables' "
    "own run, longer and warmer, has 389 us for the forward kernel of 128 features."
)


def share(pipes: dict[str, float], name: str) -> float:
    """Of a pipe's peak: cycles in which it was busy, or else instructions."""
    return pipes.get(name, pipes.get(f"{name} instructions", float("nan")))


def waits(rows: list[dict]) -> str:
    """A line for every launch."""
    cells = []
    for row in rows:
        kernel = next(name for key, name in KERNELS.items() if key in row["kernel"])
        cells.append([
            row["case"], kernel, number(row["microseconds"]),
            *(f"{share(row['pipes'], x):.0f} %" for x in PIPES), f"{row['memory']:.0f} %",
            *(f"{row['waits'].get(x, 0.0):.1f}" for x in WAITS),
        ])  # fmt: skip
    head = ["case, head features", "kernel", "us", *PIPES.values(), "memory",
            *(f"cycles: {x}" for x in WAITS.values())]  # fmt: skip
    return table(head, cells)
