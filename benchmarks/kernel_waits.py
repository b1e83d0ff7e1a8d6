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
    "Counters of Nsight Compute for one launch, at 16,384 tokens: `spion`, the pattern of the "
    "tables at a density of 10 %, and dense cuDNN (the run ended before dense attention of 128 "
    "features and compound attention). Shares are of a pipe's peak while the kernel ran; cycles "
    "are what an average warp, the copying ones among them, spends on each reason from one "
    "instruction to the next. The busiest pipe is at 42 to 60 % with 64 features and at 66 to 83 "
    "% with 128: a forward warp of 64 features waits 2.2 of 7 cycles for what it loaded or for a "
    "barrier, where dense attention's waits .5 of 4. A row of 13 tiles costs the time of two to "
    "three more, in which nothing of its own runs beside its first and last product, and a "
    "quarter of the rows begin a thread block."
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
