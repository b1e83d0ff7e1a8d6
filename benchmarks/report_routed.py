"""Writes docs/routed.md and docs/grouped_gpu.png from what was measured on a GPU.

    python benchmarks/grouped_gpu.py                 # results/grouped_gpu.json
    python benchmarks/routed_ffn_gpu.py --torch      # results/routed_ffn_gpu.json
    uv run python benchmarks/report_routed.py        # anywhere (needs the `plots` extra)

A result that is not there has a sentence that says so; a dash is a figure that a result lacks.
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from report import DOCS, number, origin, read, table

PRODUCTS = ("gmm", "dx", "dw")
PEERS = {"dense": "cuBLAS", "torch": "PyTorch", "ragged_dot": "ragged_dot", "xla": "portable"}
PASSES = {"forward_ms": "forward", "both_ms": "forward + backward"}


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


def routed(rows: list[dict]) -> str:
    """A row for each shape, share of blocks and way to train."""
    head = ["D", "F", "blocks", "trained", *(
        x for kind in PASSES.values() for x in (f"{kind} ms", "x dense", "x PyTorch", "x portable")
    ), "MiB", "dense MiB"]  # fmt: skip
    cells = []
    for row in rows:
        line = [f"{row['features']:,}", f"{row['hidden']:,}", f"{row['active']} of {row['blocks']}",
                "all" if row["way"] == "trained" else "LoRA"]  # fmt: skip
        for kind in PASSES:
            mine = row["routed"][kind]
            theirs = (row.get(peer, {}).get(kind) for peer in ("dense", "torch", "xla"))
            line += [number(mine), *(number(t and t / mine) for t in theirs)]
        cells.append(line + [number(row[x]["bytes"] / 2**20) for x in ("routed", "dense")])
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
            "![TFLOP/s](grouped_gpu.png)", grouped(found["rows"]),
        ]  # fmt: skip
        picture(found["rows"]).savefig(args.docs / "grouped_gpu.png", dpi=120)
    else:
        text.append(missing)
    text.append("## The routed layer beside the dense one")
    if found := read("routed_ffn_gpu"):
        text += [
            origin("routed_ffn_gpu", found),
            f"bfloat16, {found['rows'][0]['tokens']:,} tokens, GELU, a random router: choosing and "
            "sorting are in the time. LoRA: rank 16 beside frozen matrices, of the dense layer as "
            "well. PyTorch is the same layer of its grouped products. MiB are what XLA reserves "
            "for both passes beside the arguments.", routed(found["rows"]),
        ]  # fmt: skip
    else:
        text.append(missing)
    (args.docs / "routed.md").write_text("\n\n".join(text) + "\n")
    print(args.docs / "routed.md")


if __name__ == "__main__":
    main()
