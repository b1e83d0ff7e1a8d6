"""Writes docs/routed.md and docs/grouped_gpu.png from what was measured on a GPU.

    python benchmarks/grouped_gpu.py                               # results/grouped_gpu.json
    ncu ... , of what `profile_gpu.py --grouped` runs               # results/profile_grouped.json
    python benchmarks/routed_ffn_gpu.py --torch --keep-hidden      # results/routed_ffn_gpu.json
    uv run python benchmarks/report_routed.py                      # anywhere (the `plots` extra)

A result that is not there has a sentence that says so; a dash is a figure that a result lacks.
`--keep-hidden` of routed_ffn_gpu.py adds rows, which the tables call kept.
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from report import DOCS, number, origin, read, table

PRODUCTS = ("gmm", "dx", "dw")
PEERS = {"dense": "cuBLAS", "torch": "PyTorch", "ragged_dot": "ragged_dot", "xla": "portable"}
PASSES = {"forward_ms": "forward", "both_ms": "forward + backward"}
ROUTED = """bfloat16, {tokens:,} tokens, GELU, a random router: choosing and sorting are in the
time. LoRA: rank 16 beside frozen matrices, of the dense layer as well. *Gated* is SwiGLU. PyTorch
is the same layer of its grouped products, run operation by operation. MiB are what XLA reserves for
both passes beside the arguments."""
LOST = """Beside the hidden units, which the backward pass computes again, the routed layer does the
products of the dense one, for k of G blocks: 7 products with both passes where the dense layer has
6, with LoRA 5 for 4. So it gains at most G / k times forward, 6 G / 7 k and 4 G / 5 k with both
passes (*at most*), were its products as quick and nothing else to do. TFLOP/s count these products,
repeated ones too, over the whole time; *of dense* are the dense layer's. *Products* is the share of
grouped products in the eight longest kernels of both passes, by the profiler."""
KEPT = """*Kept* is `recompute=False`: the products before the activation stay in memory for the
backward pass, beside the same peers as the row without."""
KEPT_LOST = """*Kept* rows repeat no product: 6 products for 6, with LoRA 4 for 4, so that they
gain at most G / k with both passes as well."""
GROUPED = """.9 of cuBLAS's speed, that of PyTorch and four times `ragged_dot`'s were aimed at.

- **cuBLAS** takes .87 to 1.04 times as long with 4 groups, .77 to 1.03 with 8, where it reads an
  eighth of the matrices: .9 in 10 and 5 of 12 cases. Of 64 groups the matrices alone take longer to
  read than half of its time: .38 to .71.
- **PyTorch** takes .99 to 1.29 times as long with 4 groups, .94 to 1.09 with 8 and 1.00 to 1.45
  with 64: 31 of 36 cases are at least as fast here. The other five are .94 and .97 (2,048 x 4,096,
  8 skewed groups), and three within 1.5 % of a tie.
- **`ragged_dot`** takes 3.2 to 3.9 times as long with 4 groups, 5.4 to 7.2 with 8. Four times its
  speed with 4 groups would be 630 to 820 TFLOP/s, where cuBLAS itself reaches 620 to 720.

What .9 of cuBLAS is missed by, in arithmetic. Tiles have 128 rows, and groups of other sizes do not
fill their last: in whole rounds of 132 multiprocessors, 8 skewed groups leave .91 and .86 (4,096 x
8,192), .86 and .78 (2,048 x 4,096) of the tiles' work for `gmm` and `dx`, where one matrix leaves
.97; 64 skewed ones leave .65. `dw` writes a matrix for each group: eight of 4,096 x 8,192 are .54
GB, .11 ms of .89, where cuBLAS writes one.

The thread blocks of a cluster share what both read: columns of a matrix where a group has two tiles
of rows, else rows of x. In earlier runs they shared rows alone, which takes a quarter more reads
from the L2 cache, and 20 of 36 cases were as fast as PyTorch, the others up to 10 % behind. Since
this run the warps of a warpgroup that skips a tile without rows meet at every step: not timed."""
COUNTERS = """Launch by launch the products take .91 to .98 of the time of PyTorch's. What a call
takes beside its product decides the rest: PyTorch prepares pointers in one kernel of 2.9 us; here
tables of rows, and rows in slabs that groups share, are three of 5 to 8 us together (`kernels_ms`
of `grouped_gpu.json`; up to 8 groups, `dw` four or five of 7 to 15), a part in forty of the shorter
products. A layer that makes several products of one plan computes tables once. In a loop of calls
clocks fall where the power limit is met, which single launches do not show."""
FINDINGS = """### What these tables say

With half of the blocks the layer was to be 1.7 times as fast as the dense one at D = 4,096, 1.4
times at 2,048, and never slower from 1,024 on. With 2 of 4 blocks and no gate all of it is reached,
the hidden units kept. 4 of 8 miss it with LoRA and both passes (1.66 and 1.31), and forward at
4,096 by a hair (1.67 and 1.69); gated layers with both passes. Rows of 2,048, and of 4 of 8 blocks
at 4,096, are of a run before clusters shared columns.

- **4,096, 2 of 4 blocks:** 1.80 to 1.91 times forward; with both passes 1.75, with LoRA 1.74. Where
  they are computed again 1.54 and 1.47. 4 of 8 blocks: 1.67 to 1.75, 1.70, 1.66.
- **2,048, 2 of 4 blocks:** 1.65 and 1.73 forward; with both passes 1.63, with LoRA 1.53; computed
  again 1.45 and 1.35. 4 of 8 blocks: 1.47 to 1.59, 1.50, 1.31.
- **1,024, 2 of 4 blocks:** 1.33 to 1.44 forward; with both passes 1.31 and 1.21, with LoRA 1.14 and
  1.09. 4 of 8 blocks: 1.05 to 1.17, 1.13 and 1.05, with LoRA 1.01 and .95: the one case that is
  slower than the dense layer.
- **Gated, blocks of 2,752 units** (Llama-7B's size): 1.71 to 1.81 forward, 1.37 and 1.47 with both
  passes. A block is 10.75 tiles of 256 units here, and 21.5 of 128.

A repeated product puts the ceiling of both passes at 1.71 times, and at 1.6 with LoRA; kept, at 2.
The rest is lost around the products: gathering rows, the activation and its gradient, summing each
token's choices, and choosing. By the profiler products are 80 to 94 % of the time of the longest
kernels at 4,096, 70 to 85 % at 2,048 and 63 to 76 % at 1,024. 4 of 8 blocks gather twice as many
rows as 2 of 4. LoRA slows the dense layer, too, which the better ratios forward owe something to.

PyTorch takes 1.05 to 1.63 times as long at 4,096, 1.5 to 4.7 times at 2,048 and 3.3 to 4.9 times
at 1,024; no compiler joined its operations here. Memory is at most that of the dense layer, 64 to
100 % of it where all is trained and 46 to 79 % with LoRA."""


def times(row: dict, who: str, product: str) -> float | None:
    """Milliseconds; None where they were not measured."""
    return row.get(f"{who}_ms", {}).get(product)


def grouped(rows: list[dict]) -> str:
    """A row for each shape, way to deal and product."""
    head = [
        "D x F",
        "groups",
        "rows",
        "product",
        "ms",
        "TFLOP/s",
        *map("x {}".format, PEERS.values()),
    ]
    cells = []
    for row in rows:
        flop = 2 * row["rows"] * row["features"] * row["columns"]
        for product in PRODUCTS:
            mine = row["pallas_ms"][product]
            theirs = [times(row, peer, product) for peer in PEERS]
            shape = f"{row['features']:,} x {row['columns']:,}"
            cells.append([
                shape, str(row["groups"]), row["sizes"], product, number(mine),
                number(flop / mine / 1e9), *(number(t and t / mine) for t in theirs),
            ])  # fmt: skip
    return table(head, cells)


def counted(rows: list[dict]) -> str:
    """A line for each launch."""
    head = ["D x F, groups", "rows", "product", "whose", "us", "tensor cores", "GB from L2",
            "GB of memory"]  # fmt: skip
    cells = [
        [f"{r['features']:,} x {r['columns']:,}, {r['groups']}", r["sizes"], r["product"],
         r["who"], number(r["microseconds"]), f"{r['tensor']:.0f} %",
         number(r["l2_bytes"] / 1e9), number(r["dram_bytes"] / 1e9)]
        for r in rows if "prepare" not in r["kernel"]
    ]  # fmt: skip
    return table(head, cells)


def picture(rows: list[dict]) -> Figure:
    """TFLOP/s of ours and of its peers, a panel for each product."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    labels = [f"{r['features']}x{r['columns']}, {r['groups']} {r['sizes']}" for r in rows]
    at = np.arange(len(rows))
    for axis, product in zip(figure.subplots(1, 3, sharey=True), PRODUCTS, strict=True):
        for i, who in enumerate(("pallas", "dense", "torch", "ragged_dot")):
            of = lambda row, who=who, product=product: times(row, who, product) or np.nan
            flop = [2 * row["rows"] * row["features"] * row["columns"] for row in rows]
            rate = [f / of(row) / 1e9 for f, row in zip(flop, rows, strict=True)]
            axis.plot(rate, at, "o", color=f"C{i}", label=PEERS.get(who, "sparsax"))
        axis.set(title=product, xlabel="TFLOP/s", yticks=at)
        axis.set_yticklabels(labels, fontsize=8)
    axis.invert_yaxis()
    axis.legend(fontsize=8)
    return figure


def repeats(row: dict) -> bool:
    """Whether the backward pass computes the hidden units again, as it always did at first."""
    return row.get("recompute", True)


def shape(row: dict) -> list[str]:
    """The cells that say what a row of the layer is of."""
    trained = "all" if row["way"] == "trained" else "LoRA"
    said = [trained, *["gated"] * row["gated"], *["kept"] * (not repeats(row))]
    return [f"{row['features']:,}", f"{row['hidden']:,}", f"{row['active']} of {row['blocks']}",
            ", ".join(said)]  # fmt: skip


def routed(rows: list[dict]) -> str:
    """A row for each shape, share of blocks and way to train."""
    head = ["D", "F", "blocks", "trained", *(
        x for kind in PASSES.values() for x in (f"{kind} ms", "x dense", "x PyTorch", "x portable")
    ), "MiB", "dense MiB"]  # fmt: skip
    cells = []
    for row in rows:
        line = shape(row)
        for kind in PASSES:
            mine = row["routed"][kind]
            theirs = (row.get(peer, {}).get(kind) for peer in ("dense", "torch", "xla"))
            line += [number(mine), *(number(t and t / mine) for t in theirs)]
        found = (row[x].get("bytes") for x in ("routed", "dense"))
        cells.append(line + [number(x and x / 2**20) for x in found])
    return table(head, cells)


def products(row: dict) -> tuple[int, int]:
    """Products as large as a matrix in both passes: of the dense layer, of the routed one."""
    matrices = 3 if row["gated"] else 2
    dense = matrices * (3 if row["way"] == "trained" else 2)
    return dense, dense + (matrices - 1 if repeats(row) else 0)


def lost(rows: list[dict]) -> str:
    """What the routed layer could gain, and what of it is left."""
    columns = "at most", "x dense", "TFLOP/s", "of dense"
    head = ["D", "F", "blocks", "trained",
            *(f"{kind}: {x}" for kind in PASSES.values() for x in columns), "products"]  # fmt: skip
    cells = []
    for row in rows:
        share = row["active"] / row["blocks"]
        flop = 2 * row["tokens"] * row["features"] * row["hidden"]
        line = shape(row)
        forward = (3 if row["gated"] else 2,) * 2
        for kind, (whole, chosen) in zip(PASSES, (forward, products(row)), strict=True):
            mine, dense = row["routed"][kind], row["dense"][kind]
            line += [number(whole / chosen / share), number(dense / mine),
                     number(chosen * share * flop / mine / 1e9),
                     number(whole * flop / dense / 1e9)]  # fmt: skip
        kernels = row.get("kernels_ms", {})
        grouped = sum(ms for name, ms in kernels.items() if "gmm" in name)
        cells.append([*line, f"{100 * grouped / sum(kernels.values()):.0f} %" if kernels else "-"])
    return table(head, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", type=Path, default=DOCS)
    args = parser.parse_args()
    missing = "Not measured yet."
    text = [
        "# Grouped products and the routed feed-forward layer",
        "Written by `benchmarks/report_routed.py`. `x` says how many times as long a peer takes.",
        "## Grouped products",
    ]
    if found := read("grouped_gpu"):
        text += [
            origin("grouped_gpu", found),
            f"bfloat16, {found['rows'][0]['rows']:,} rows, dealt to the groups evenly or by random "
            "shares with an empty group (skewed). `gmm` is `x w`, `dx` and `dw` its gradients. "
            "cuBLAS multiplies all rows with one matrix: as many FLOPs, and no groups to read. "
            "PyTorch is `torch._grouped_mm`, ragged_dot `jax.lax.ragged_dot`, portable the "
            "implementation `xla`. The more groups, the more matrices must be read: 64 of 4,096 x "
            "8,192 are 4.3 GB, which takes 0.9 ms at the 4.8 TB/s of an H200, whoever reads them.",
            "![TFLOP/s](grouped_gpu.png)", grouped(found["rows"]), GROUPED,
        ]  # fmt: skip
        picture(found["rows"]).savefig(args.docs / "grouped_gpu.png", dpi=120)
        if profile := read("profile_grouped"):
            text += [
                "### Launch by launch", origin("profile_grouped", profile),
                counted(profile["rows"]), COUNTERS,
            ]  # fmt: skip
    else:
        text.append(missing)
    text.append("## The routed layer beside the dense one")
    if found := read("routed_ffn_gpu"):
        rows = found["rows"]
        text += [
            origin("routed_ffn_gpu", found), ROUTED.format(tokens=rows[0]["tokens"]), KEPT,
            routed(rows), "### What is lost", LOST, KEPT_LOST, lost(rows), FINDINGS,
        ]  # fmt: skip
    else:
        text.append(missing)
    (args.docs / "routed.md").write_text("\n\n".join(text) + "\n")
    print(args.docs / "routed.md")


if __name__ == "__main__":
    main()
