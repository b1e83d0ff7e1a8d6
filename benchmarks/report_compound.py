"""Writes docs/compound.md and docs/compound_gpu.png from what has been measured so far.

    python benchmarks/compound_gpu.py --peers dense block_mask flex huggingface    # on the GPU
    python benchmarks/longformer_gpu.py
    PYTHONPATH=. python benchmarks/longformer_parity.py real
    uv run python benchmarks/report_compound.py       # anywhere (needs the `plots` extra)

A result that is not there yet has a line that says so; a dash is a figure that a result lacks, and
one that failed says so.
"""

import argparse
from pathlib import Path

import numpy as np
from compound_gpu import PEERS, beside, qds, ratio
from compound_gpu import longformer as drawn
from matplotlib.figure import Figure
from report import DOCS, number, origin, read, table

import sparsax
from sparsax.patterns import compound

KINDS = {"forward_ms": "forward", "both_ms": "forward + backward"}
NAMES = {"dense": "dense cuDNN", "block_mask": "block mask", "flex": "FlexAttention",
         "huggingface": "Hugging Face"}  # fmt: skip


def told(x: float, *parts: dict) -> str:
    """A figure made of parts of a row; a dash where one was not measured."""
    if not all(parts):
        return "-"
    return "failed" if any("error" in part for part in parts) else number(x)


def counted() -> str:
    """Tiles of slices beside those of any block mask; nothing is timed."""
    patterns = {
        "QDS, L = 2,048, window 64, query and sentence starts": qds(8),
        "Longformer, L = 4,096, window 256, 64 scattered": drawn(4096, 64, True),
        "Longformer, L = 4,096, window 256, 32 in front": drawn(4096, 32, False),
        "Longformer, L = 16,384, window 256, 256 scattered": drawn(16384, 256, True),
        "BigBird, L = 4,096, blocks of 64": compound.bigbird(4096),
    }
    cells = []
    for name, pattern in patterns.items():
        plan = sparsax.slice_plan(pattern)
        own, mask = plan.tiles / plan.dense_tiles, plan.block_mask_tiles / plan.dense_tiles
        cells.append([name, f"{own:.3f}", f"{mask:.3f}", f"{mask / own:.2f}"])
    return table(["pattern", "sliced", "block mask", "block mask / sliced"], cells)


def speed(rows: list[dict]) -> str:
    head = ["pattern", "length", "batch x heads", "tiles", "in a block mask"]
    for kind in KINDS.values():
        head += [f"{kind} ms", *(f"x {NAMES[peer]}" for peer in PEERS)]
    cells = []
    for row in rows:
        line = [row["name"], f"{row['length']:,}", f"{row['batch']} x {row['heads']}",
                f"{row['tiles']:.3f}", f"{row['blocks']:.3f}"]  # fmt: skip
        part = lambda name, row=row: row.get(name, {})
        for kind in KINDS:
            line.append(told(part("ours").get(kind, np.nan), part("ours")))
            line += [told(ratio(row, peer, kind), part(peer), part(beside(peer)))
                     for peer in PEERS]  # fmt: skip
        cells.append(line)
    return table(head, cells)


def model(rows: list[dict]) -> str:
    peers = ["block_mask", "dense", "sdpa", "sdpa_compiled", "huggingface", "huggingface_compiled"]
    head = ["length", "batch", "ms", *(f"x {peer}" for peer in peers), "GiB", "dense GiB"]
    cells = []
    for row in rows:
        part = lambda name, row=row: row.get(name, {})
        get = lambda name, key, part=part: part(name).get(key, np.nan)
        mine = get("ours", "forward_ms")
        line = [f"{row['length']:,}", str(row["batch"]), told(mine, part("ours"))]
        line += [told(get(x, "forward_ms") / mine, part(x), part("ours")) for x in peers]
        cells.append(line + [told(get(x, "bytes") / 2**30, part(x)) for x in ("ours", "dense")])
    return table(head, cells)


def parity(rows: list[dict]) -> str:
    runs = ("ours_float32", "ours_bfloat16", "hugging_face_bfloat16")
    cells = [
        [row["size"], f"{row['length']:,}", run.replace("_", " "),
         f"{max(row[run]['relative']):.1e}", f"{row[run]['relative'][-2]:.1e}",
         f"{max(row[run]['largest']):.1e}"]
        for row in rows for run in runs
    ]  # fmt: skip
    return table(["size", "length", "run", "worst layer", "last layer", "largest entry"], cells)


def picture(rows: list[dict]) -> Figure:
    """How many times as long the peers take, a panel for each kind of pass."""
    figure = Figure(figsize=(11, 0.34 * len(rows) + 1.4), layout="constrained")
    for axis, (kind, title) in zip(figure.subplots(1, 2, sharey=True), KINDS.items(), strict=True):
        for i, peer in enumerate(PEERS):
            times = [ratio(row, peer, kind) for row in rows]
            if np.isnan(times).all():
                continue
            axis.plot(times, np.arange(len(rows)), "o", color=f"C{i}", label=NAMES[peer])
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set(title=title, xlabel="times as long as ours", xscale="log",
                 yticks=range(len(rows)))  # fmt: skip
        axis.set_yticklabels([f"{row['name']}, {row['length']:,}" for row in rows], fontsize=8)
    axis.invert_yaxis()
    axis.legend(fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", type=Path, default=DOCS)
    args = parser.parse_args()
    text = [
        "# Compound attention",
        "Written by `benchmarks/report_compound.py`.",
        "A block mask must compute every block that holds one pair, so a few scattered global "
        "tokens make it dense. `compound_attention` slices the pattern instead: tiles of the band "
        "without a mask, tiles at its edges masked by index, the columns' keys gathered into "
        "tiles of their own, global rows dense; one softmax joins them. Contiguous global tokens "
        "and BigBird leave nothing to win: a tie is right there.",
        "[What these tables say](compound_findings.md).",
        "![The first 512 tokens of a text whose sentences' starts are global]"
        "(compound_slices.png)",
        "The picture is that of `examples/longformer.py`.",
        "## Tiles of 64 x 64, counted as shares of all", counted(),
        "## Attention on a GPU",
    ]  # fmt: skip
    if found := read("compound_gpu"):
        text += [
            origin("compound_gpu", found),
            "bfloat16, heads of 64 features; Longformer's window is 256 to either side, QDS's 64. "
            "`x` says how many times as long a peer takes: dense cuDNN without a mask; our "
            "block-sparse kernel over the blocks of 64 that hold a pair; FlexAttention with "
            "exactly these pairs, autotuned; Hugging Face's self-attention beside our layer, "
            "projections of queries, keys and values included in both. Hugging Face's and "
            "FlexAttention, but for QDS's, are of earlier runs, call by call, and so is the layer "
            "that stands beside Hugging Face's: x FlexAttention has its earlier times over ours of "
            "now. A dash was not measured; "
            "where it says failed, one of the two ran out of memory or could not be compiled, as "
            "the result's file tells.",
            "![Times as long as ours](compound_gpu.png)", speed(found["rows"]),
        ]  # fmt: skip
        picture(found["rows"]).savefig(args.docs / "compound_gpu.png", dpi=120)
    else:
        text.append("Not measured yet.")
    text.append("## Longformer-large, end to end")
    if found := read("longformer_gpu"):
        text += [
            origin("longformer_gpu", found),
            "Inference in bfloat16 with 64 scattered global tokens; `x` says how many times as "
            "long the same model takes with attention over blocks of 64 that hold a pair "
            "(`block_mask`, which stands for DeepSpeed), with dense cuDNN attention (`dense`), "
            "PyTorch's dense encoder (`sdpa`) and Hugging Face's Longformer. At 4,096 tokens our "
            "three models are of the later commit, and all else is of the earlier ones, when runs "
            "did not queue up, which is little of these times. GiB are what XLA "
            "reserves beside the parameters. A dash was not measured; where it says failed, one "
            "of the two ran out of memory or could not be compiled.", model(found["rows"]),
        ]  # fmt: skip
    else:
        text.append("Not measured yet.")
    text.append("## Parity with Hugging Face's Longformer")
    if found := read("longformer_parity"):
        text += [
            origin("longformer_parity", found),
            "Relative L2 of hidden states against Hugging Face's in float32; random weights, "
            "scattered global tokens, the second document padded.", parity(found["rows"]),
        ]  # fmt: skip
    else:
        text.append("Not measured yet.")
    (args.docs / "compound.md").write_text("\n\n".join(text) + "\n")
    print(args.docs / "compound.md")


if __name__ == "__main__":
    main()
