"""Writes docs/attention.md and docs/attention_gpu.png from what `attention_gpu.py` measured.

    python benchmarks/attention_gpu.py --flex 1024 2048 4096 8192 16384 32768 --flash4 16384   # GPU
    python benchmarks/attention_balance.py                 # anywhere: attention_balance.json
    python benchmarks/attention_schedule_gpu.py            # on the GPU: attention_schedule_gpu.json
    python benchmarks/score_map_gpu.py                     # on the GPU: results/score_map_gpu.json
    python benchmarks/profile_gpu.py                       # on the GPU: results/profile_gpu.json
    python benchmarks/training_curves_gpu.py --data FOLDER # on the GPU: training_curves_text.json
    uv run python benchmarks/report_attention.py           # anywhere (needs the `plots` extra)

A dash is a figure that the result lacks; a length or pattern that it lacks has a row that says so.
"""

import argparse
import itertools
import json
import re
from pathlib import Path

import kernel_waits
import launch_tables
import numpy as np
import schedule_tables
from gpu import BLOCK
from harness import RESULTS
from matplotlib.figure import Figure
from report import DOCS, number, origin, read, table

DENSITY = 0.1  # of the crossover and of the picture
SHARE = f"{100 * DENSITY:.0f} %"
PEERS = {"dense": "dense", "flex": "Flex", "flash4": "FA4"}
KINDS = {"forward_ms": ("forward", 2), "both_ms": ("forward + backward", 7)}  # products of each


def ratio(row: dict, peer: str, kind: str) -> float | None:
    """How many times as long as the row the peer takes."""
    found = row.get(peer, {}).get(kind)
    return None if found is None or row.get(kind) is None else found / row[kind]


def speed(rows: list[dict], heads: int) -> str:
    """The table of one number of head features."""
    head, cells = ["length", "pattern", "density"], []
    cards = len({row.get("device") for row in rows}) > 1  # each named in its rows
    head += ["GPU"] * cards
    peers = [peer for peer in PEERS if peer != "flash4" or any(peer in row for row in rows)]
    for name, _ in KINDS.values():
        head += [f"{name} ms", "TFLOP/s", *(f"x {PEERS[peer]}" for peer in peers)]
    lengths, patterns = (list(dict.fromkeys(row[x] for row in rows)) for x in ("length", "pattern"))
    for length, pattern in itertools.product(sorted(lengths), patterns):
        found = [r for r in rows if (r["length"], r["pattern"]) == (length, pattern)]
        if not found:
            cells.append([f"{length:,}", pattern, "not measured", *["-"] * (len(head) - 3)])
        # At short lengths several densities ask for the same blocks: the last one's times.
        for row in {r["density"]: r for r in sorted(found, key=lambda r: r["density"])}.values():
            line = [f"{length:,}", pattern, f"{100 * row['density']:.1f} %"]
            line += [row["device"].removeprefix("NVIDIA ").split()[0]] * cards
            for kind, (_, products) in KINDS.items():
                flop = products * 2 * heads * length**2 * row["features"] * row["density"]
                rate = None if row.get(kind) is None else flop / row[kind] / 1e9
                line += map(number, (row.get(kind), rate, *(ratio(row, x, kind) for x in peers)))
            cells.append(line)
    return table(head, cells)


def curve(rows: list[dict], pattern: str, kind: str) -> dict[int, tuple[float, float]]:
    """`(milliseconds, dense)` at `DENSITY` by length, between the nearest measured densities.

    Lengths whose densities lie all on one side are left out.
    """
    found = {}
    for length in sorted({row["length"] for row in rows}):
        points = sorted(
            (row["density"], row[kind], row["dense"][kind]) for row in rows
            if (row["length"], row["pattern"]) == (length, pattern)
            and row.get(kind) is not None and ratio(row, "dense", kind) is not None
        )  # fmt: skip
        if points and points[0][0] <= DENSITY <= points[-1][0]:
            density, time, dense = zip(*points, strict=True)
            found[length] = float(np.interp(DENSITY, density, time)), dense[0]
    return found


def crossover(points: dict[int, tuple[float, float]]) -> str:
    """The length from which on sparse is faster, between two measured ones."""
    if not points:
        return f"no length with densities around {SHARE}"
    lengths, gains = list(points), [np.log(dense / time) for time, dense in points.values()]
    slower = [i for i, gain in enumerate(gains) if gain <= 0]
    if not slower:
        return f"below {lengths[0]:,}"
    last = slower[-1]
    if last == len(lengths) - 1:
        return f"above {lengths[-1]:,}"
    ends = np.log(lengths[last : last + 2])
    return f"{np.exp(np.interp(0, gains[last : last + 2], ends)):,.0f}"


def crossovers(rows: list[dict]) -> str:
    names = [name for name, _ in KINDS.values()]
    cells = []
    for features in sorted({row["features"] for row in rows}):
        own = [row for row in rows if row["features"] == features]
        for pattern in dict.fromkeys(row["pattern"] for row in own):
            if pattern not in ("full", "causal"):
                found = [crossover(curve(own, pattern, kind)) for kind in KINDS]
                cells.append([str(features), pattern, *found])
    return table(["head features", "pattern", *names], cells)


def memory(rows: list[dict], heads: int) -> str:
    """Bytes of forward and backward, arguments and all, at the longest length."""
    cells = []
    for features in sorted({row["features"] for row in rows}):
        own = [row for row in rows if row["features"] == features]
        length = max(row["length"] for row in own)
        measured = [row for row in own if row["length"] == length and "bytes" in row]
        line = [str(features), f"{length:,}"]
        if not measured:
            cells.append([*line, "not measured", *["-"] * 4])
            continue
        row, array = measured[0], 2 * heads * length * features  # an array of 16-bit numbers
        lists = 2 * 4 * heads * (length // BLOCK) ** 2  # of rows and of columns, a full capacity
        ideal = 8 * array + 4 * heads * length
        totals = [4 * array + more + x["bytes"] if "bytes" in x else None
                  for x, more in ((row, lists), (row.get("dense", {}), 0))]  # fmt: skip
        mib = [number(None if x is None else x / 2**20) for x in (ideal, *totals)]
        over = [number(None if x is None else x / ideal) for x in totals]
        cells.append([*line, f"{row['pattern']} {100 * row['density']:.1f} %", *mib, *over])
    head = ["head features", "length", "pattern", "ideal MiB", "sparse MiB", "dense MiB"]
    return table([*head, "sparse / ideal", "dense / ideal"], cells)


def score_maps(rows: list[dict]) -> str:
    """A row for each size, of what a probe costs."""
    head = ["head features", "length", "pairs", "whole map ms", "pooled ms", "dense step ms",
            "pooled / dense", "portable / whole", "whole MiB", "pooled MiB"]  # fmt: skip
    cells = []
    for row in rows:
        for name, pairs in (("bidirectional", "all"), ("causal", "causal")):
            full, pooled, dense = (row[name][x] for x in ("full", "pooled", "dense"))
            portable = row[name].get("xla", {}).get("ms")
            cells.append([
                str(row["features"]), f"{row['length']:,}", pairs,
                *(number(x["ms"]) for x in (full, pooled, dense)),
                number(pooled["ms"] / dense["ms"]), number(portable and portable / full["ms"]),
                *(number(x["bytes"] / 2**20) for x in (full, pooled)),
            ])  # fmt: skip
    return table(head, cells)


def training(rows: list[dict]) -> str:
    """Losses of the same model by what computes its attention, and how far they are apart."""
    size, *runs, found = rows
    cells = [
        [run["run"], number(run["step_ms"]), f"{run['loss'][-1]:.4f}", f"{run['test_loss']:.4f}"]
        for run in runs
    ]  # fmt: skip
    gaps = [[" - ".join(x["pair"]), f"{x['largest']:.5f}", f"{x['mean']:.5f}"]
            for x in found["differences"]]  # fmt: skip
    verdict = "agree" if found["agree"] else "do not agree"
    return "\n\n".join([
        f"A causal byte model of IMDB reviews, {size['layers']} layers of {size['features']} "
        f"features, {size['length']:,} bytes, {size['steps']} steps, from the same parameters on "
        f"the same batches. Kernels and portable XLA {verdict} within what rounding to bfloat16 "
        "does: differences are of the losses of every tenth step.",
        table(["attention", "ms a step", "last loss", "test loss"], cells),
        table(["pair", "largest difference", "mean"], gaps),
    ])  # fmt: skip


def picture(rows: list[dict]) -> Figure:
    """Milliseconds over length, a panel for each number of head features."""
    every = sorted({row["features"] for row in rows})
    figure = Figure(figsize=(4.2 * len(every), 4), layout="constrained")
    for features, axis in zip(every, figure.subplots(1, len(every), squeeze=False)[0], strict=True):
        own = [row for row in rows if row["features"] == features]
        axis.set(title=f"{features} head features", xlabel="length", ylabel="ms")
        if not any("dense" in row for row in own):
            axis.text(0.5, 0.5, "dense was not measured", ha="center")
            continue
        for kind, style in (("forward_ms", "--"), ("both_ms", "-")):
            # Dense causal attention is another curve.
            plain = [r for r in own if r["pattern"] != "causal" and kind in r.get("dense", {})]
            of_length = {r["length"]: r["dense"][kind] for r in plain}
            lengths = sorted(of_length)
            dense = [of_length[length] for length in lengths]
            label = lambda text, kind=kind: text if kind == "both_ms" else None
            axis.plot(lengths, dense, style, color="black", label=label("dense"))
            axis.plot(lengths, DENSITY * np.array(dense), style, color="silver",
                      label=label(f"ideal: {SHARE} of dense"))  # fmt: skip
            for i, pattern in enumerate(dict.fromkeys(row["pattern"] for row in own)):
                points = curve(own, pattern, kind)
                if points:
                    axis.plot(list(points), [time for time, _ in points.values()], style,
                              color=f"C{i}", marker=".", label=label(pattern))  # fmt: skip
        axis.set_yscale("log")
        axis.set_xscale("log", base=2)
        axis.legend(fontsize=8, title="solid: with backward", title_fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS / "attention_gpu.json")
    parser.add_argument("--docs", type=Path, default=DOCS)
    args = parser.parse_args()
    record = json.loads(args.results.read_text())
    rows, found = record["rows"], re.search(r"--heads (\d+)", record["command"])
    heads = int(found[1]) if found else 16
    text = [
        "# Block-sparse attention on a GPU",
        "Written by `benchmarks/report_attention.py` from " + origin(args.results.stem, record),
        f"bfloat16, batch 1, {heads} heads, patterns per head in blocks of 128. TFLOP/s count the "
        "listed blocks alone. `x dense`, `x Flex` and `x FA4` say how many times as long dense "
        "cuDNN, PyTorch's FlexAttention (autotuned, the same block mask) and FlashAttention-4's "
        "block-sparse kernels (the same lists) take, the last two replayed from CUDA graphs, so "
        "that none of it is the host's; a dash was not measured.",
        "[What these tables say](attention_findings.md).",
        f"![Milliseconds over length at density {SHARE}](attention_gpu.png)",
        f"## From which length on sparse is faster, at density {SHARE}", crossovers(rows),
        "Between the measured densities and lengths. A short sequence has so few blocks that a "
        "pattern cannot be that sparse: those lengths are left out.",
        "## Memory of forward and backward",
        "Ideal is q, k, v, o and their gradients, and the log-sum-exp, each once. Measured is what "
        "XLA reserves, and the arguments.", memory(rows, heads),
    ]  # fmt: skip
    if even := read("attention_balance", args.results.parent):
        text += [
            "## How evenly rows are dealt",
            origin("attention_balance", even), schedule_tables.BALANCE,
            schedule_tables.balance(even["rows"]),
        ]  # fmt: skip
    if stay := read("attention_schedule_gpu", args.results.parent):
        text += [
            "### Few rows stay",
            origin("attention_schedule_gpu", stay), schedule_tables.STAY,
            schedule_tables.stay(stay["rows"]),
        ]  # fmt: skip
    for features in sorted({row["features"] for row in rows}):
        own = [row for row in rows if row["features"] == features]
        text += [f"## {features} head features", speed(own, heads)]
    if profile := read("profile_gpu", args.results.parent):
        text += [
            "## What the kernels wait for",
            origin("profile_gpu", profile), kernel_waits.TEXT,
            kernel_waits.waits(profile["rows"]), kernel_waits.SAID,
        ]  # fmt: skip
    counted, before = (read(x, args.results.parent) for x in ("launches", "launches_before"))
    if counted and before:
        text += [
            "## Launches", origin("launches", counted),
            launch_tables.TEXT.format(commit=before["commit"][:7]),
            launch_tables.launches(counted, before),
        ]  # fmt: skip
    if beside := read("profile_flash4", args.results.parent):
        text += [
            origin("profile_flash4", beside), kernel_waits.FLASH4,
            kernel_waits.waits(beside["rows"]), kernel_waits.SAID_OF_FLASH4,
        ]  # fmt: skip
    if curves := read("training_curves_text", args.results.parent):
        text += [
            "## Training on the kernels",
            origin("training_curves_text", curves), training(curves["rows"]),
        ]  # fmt: skip
    if maps := read("score_map_gpu", args.results.parent):
        text += [
            "## The score map, which a search reads",
            origin("score_map_gpu", maps),
            "bfloat16, batch 1, 16 heads: the probabilities averaged over heads, of every pair or "
            "of blocks of 64 (pooled). A dense step is cuDNN's attention, forward and backward: "
            "what a probe delays. Portable is the implementation `xla`, at short lengths alone. "
            "MiB are what XLA reserves beside the arguments.", score_maps(maps["rows"]),
        ]  # fmt: skip
    (args.docs / "attention.md").write_text("\n\n".join(text) + "\n")
    picture(rows).savefig(args.docs / "attention_gpu.png", dpi=120)
    print(args.docs / "attention.md")


if __name__ == "__main__":
    main()
