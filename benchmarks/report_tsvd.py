"""Writes docs/tsvd.md, docs/tsvd_error.png and docs/tsvd_gpu.png from what was measured.

    python benchmarks/tsvd_minilm.py --imdb FOLDER       # a CPU: results/tsvd_minilm.json
    python benchmarks/tsvd_gpu.py                        # a GPU: results/tsvd_gpu.json
    python benchmarks/tsvd_decoder_gpu.py                # a GPU: results/tsvd_decoder_gpu.json
    uv run python benchmarks/report_tsvd.py              # anywhere (needs the `plots` extra)

A result that is not there has a sentence that says so.
"""

import argparse
from pathlib import Path

from matplotlib.figure import Figure
from report import DOCS, number, origin, read, table


def missing(name: str) -> str:
    return f"Not measured yet: `python benchmarks/{name}.py` on a Hopper GPU."


def quality(rows: list[dict]) -> str:
    """Error and what is still found, by compression and method."""
    cells = [
        [f"{row['ratio']:.0f}x", row["method"], "yes" if row["weighted"] else "no",
         *(f"{row[x]:.3f}" for x in ("error", "cosine", "top_10"))]
        for row in rows
    ]  # fmt: skip
    head = ["compression", "method", "calibrated", "error", "cosine", "10 nearest found"]
    return table(head, cells)


def error_picture(rows: list[dict]) -> Figure:
    """Relative error over compression, of weights and of outputs."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axis, weighted in zip(figure.subplots(1, 2, sharey=True), (False, True), strict=True):
        for method in dict.fromkeys(row["method"] for row in rows):
            mine = [r for r in rows if (r["method"], r["weighted"]) == (method, weighted)]
            axis.plot([r["ratio"] for r in mine], [r["error"] for r in mine], "o-", label=method)
        title = "of the outputs, calibrated" if weighted else "of the weights"
        axis.set(xscale="log", xlabel="compression", title=title)
        axis.set_xticks([2, 4, 8], ["2x", "4x", "8x"])
        axis.minorticks_off()
    axis.legend(fontsize=8)
    figure.axes[0].set_ylabel("relative error")
    return figure


def best(row: dict, kind: str, times: str = "ms") -> float | None:
    """Dense time over that of the fastest way of a kind."""
    found = [ms for name, ms in row[times].items() if name.split()[0] == kind]
    return row[times]["dense"] / min(found) if found else None


KINDS = ("svd", "xla", "products", "fused", "split", "common")


def speed(rows: list[dict], times: str) -> str:
    """A row for each layer, number of rows and compression; the best tile of each way."""
    cells = []
    for row in (row for row in rows if times in row):
        own = {k: ms for k, ms in row[times].items() if k != "dense"}
        cells.append([
            f"{row['layer']} {row['features'][0]} x {row['features'][1]}", f"{row['rows']:,}",
            f"{row['ratio']:.0f}x", number(row[times]["dense"]),
            *(number(best(row, kind, times)) for kind in KINDS), min(own, key=own.get),
        ])  # fmt: skip
    head = ["layer", "rows", "compression", "dense ms", "SVD", "TSVD, XLA", "TSVD, two products"]
    return table([*head, "TSVD, fused", "TSVD, few rows", "TSVD-common", "fastest"], cells)


def speed_picture(rows: list[dict]) -> Figure:
    """How many times as fast as dense over rows, for each layer that has all ways, at 4x."""
    layers = list(dict.fromkeys(row["layer"] for row in rows if row["ratio"] == 4))[:4]
    figure = Figure(figsize=(4.2 * max(1, len(layers)), 4), layout="constrained")
    axes = figure.subplots(1, max(1, len(layers)), squeeze=False)[0]
    for layer, axis in zip(layers, axes, strict=False):
        mine = sorted(
            (r for r in rows if (r["layer"], r["ratio"]) == (layer, 4)), key=lambda r: r["rows"]
        )
        for kind in KINDS:
            points = [(r["rows"], best(r, kind)) for r in mine if best(r, kind) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), "o-", label=kind)
        axis.axhline(1, color="black", lw=0.8)
        axis.axhline(4, color="silver", lw=0.8)
        axis.set(xscale="log", xlabel="rows", title=layer, ylabel="x dense")
        axis.legend(fontsize=8)
    return figure


def decoder(rows: list[dict]) -> str:
    batches = list(dict.fromkeys(b for row in rows for b in row["decode"]))
    cells = [
        [row["way"], f"{row['ratio']:.0f}x", number(row["parameter_bytes"] / 1e6),
         number(row["prefill_bytes"] / 1e6), number(row["prefill_tokens_per_second"]),
         *(number(row["decode"].get(b)) for b in batches)]
        for row in rows
    ]  # fmt: skip
    head = ["layers", "compression", "MB parameters", "MB prefill", "prefill tokens/s"]
    return table([*head, *(f"decode tokens/s, {b} at a time" for b in batches)], cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", type=Path, default=DOCS)
    docs = parser.parse_args().docs
    text = [
        "# TSVD: dense layers as factors of their tiles",
        "Written by `benchmarks/report_tsvd.py`. A matrix cut into tiles of T x T, each of rank r, "
        "has T / 2r times fewer numbers; plain SVD is one tile.",
        "## Error against compression, a sentence encoder with real weights",
    ]
    if (record := read("tsvd_minilm")) is None:
        text.append("Not measured yet: `benchmarks/tsvd_minilm.py`.")
    else:
        error_picture(record["rows"]).savefig(docs / "tsvd_error.png", dpi=120)
        text += [origin("tsvd_minilm", record), "![Error over compression](tsvd_error.png)",
                 quality(record["rows"])]  # fmt: skip
    text.append("## Speed of one layer")
    if (record := read("tsvd_gpu")) is None:
        text.append(missing("tsvd_gpu"))
    else:
        speed_picture(record["rows"]).savefig(docs / "tsvd_gpu.png", dpi=120)
        text += [
            origin("tsvd_gpu", record),
            "bfloat16. Columns of a way say how many times as long the dense matmul (cuBLAS) "
            "takes, for the best size of its tiles. Few rows are timed as a layer in a chain of "
            "16.",
            "![Speed over rows at 4x](tsvd_gpu.png)", "### Forward", speed(record["rows"], "ms"),
        ]  # fmt: skip
        if any("both_ms" in row for row in record["rows"]):
            text += ["### Forward and all gradients", speed(record["rows"], "both_ms")]
    text.append("## A decoder of GPT-2's sizes")
    if (record := read("tsvd_decoder_gpu")) is None:
        text.append(missing("tsvd_decoder_gpu"))
    else:
        text += [origin("tsvd_decoder_gpu", record), decoder(record["rows"])]
    (docs / "tsvd.md").write_text("\n\n".join(text) + "\n")
    print(docs / "tsvd.md")


if __name__ == "__main__":
    main()
