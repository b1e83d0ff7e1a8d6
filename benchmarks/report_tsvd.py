"""Writes docs/tsvd.md, docs/tsvd_error.png and docs/tsvd_gpu.png from what was measured.

    python benchmarks/tsvd_minilm.py --imdb FOLDER       # a CPU: results/tsvd_minilm.json
    python benchmarks/tsvd_gpu.py                        # a GPU: results/tsvd_gpu.json
    python benchmarks/tsvd_gpu.py --name tsvd_h200       # an H200: results/tsvd_h200.json
    python benchmarks/tsvd_gpu.py --name tsvd_h100       # an H100: results/tsvd_h100.json
    python benchmarks/tsvd_gpu.py --name tsvd_queued     # an H200: results/tsvd_queued.json
    python benchmarks/tsvd_decoder_gpu.py                # a GPU: results/tsvd_decoder_gpu.json
    python benchmarks/tsvd_decoder_gpu.py --tile 1024 --name tsvd_decoder_h200     # an H200
    uv run python benchmarks/report_tsvd.py              # anywhere (needs the `plots` extra)

A result that is not there has a sentence that says so.
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from report import DOCS, number, origin, read, table
from tsvd_aims import (
    CHAINED,
    COMMON_WAYS,
    KINDS,
    RATIOS,
    TSVD,
    best,
    by_tile,
    fastest,
    find,
    section,
)

ENDED = (
    "These runs were ended before they were through; the next card has every layer. Of GPT-2 "
    "small and medium there are 8,192 rows, which that one lacks. The gradients were not timed "
    "here."
)
LOOP = (
    "No single call took less than 14 us, whatever it computes, while a layer in a chain takes 5 "
    "and more: the rest is the step of the loop around it. So 64 rows, and 512 rows of 1,024 x "
    "4,096, tell of launches more than of products: the same dense product took 0.052, 0.028 and "
    "0.027 ms in the three rows of 64. Nothing is chosen by them, and the picture leaves 64 rows "
    "out."
)
CHOICE = (
    "With tiles of 256 the kernel for few rows takes the least time in all 8 cases, 4 % less "
    "than XLA in the closest; with tiles of 512 XLA is ahead in 3 of 8. On the H100 below, with "
    "more layers, XLA is ahead of it with 16 rows at a rank of 16, and where a matrix has few "
    "tiles of small rank. So None runs it, where nothing is differentiated, with tiles of 256: for "
    "one row of a matrix of 64 tiles or more, and for up to 16 rows where ranks are 32 to 64 and "
    'the ranks of all tiles add up to 1,728; `implementation="pallas"` prefers it there to the '
    "other kernels. Of 16 rows at 8x XLA with tiles of 1,024 is faster yet (7.4 us), and "
    "TSVD-common (5.8 us)."
)
EVERY = (
    "Several layers were compiled at once, and timed one after another. A gain is over the median "
    "of the three dense times of its line; ways are at their best tile. Tiles of 512 and 1,024 "
    "divide none of Llama's up and down, where TSVD has 256 alone; TSVD-common, with tiles of 128 "
    "and one factor for all of them, is ahead of it there from 512 rows on, but for ties of up at "
    "2x: at 8x and 4,096 rows it takes 1 / 4.7 of dense's time where TSVD takes 1 / 2.9. Plain SVD "
    "is ahead of TSVD in GPT-2 large's layers from 4,096 rows on and in Llama's square one at 4x "
    "and 8x of 8,192, and behind it wherever there is one row. A layer of GPT-2 has little to gain "
    "with 512 rows, 14 to 28 us dense, since no call in a loop takes less than 12 to 14."
)
QUEUED = (
    "Runs queue up for 50 ms, and a loop's step is four calls: what the host takes for either "
    "is in no time. 8,192 rows of GPT-2 were asked for and not reached. The kernel that keeps "
    "`x u` had branches among its second products then, also where its first product is 128 "
    "columns wide or less, and its warps did not meet before `x u` takes x's place: with these two "
    "changes it was not timed."
)
DECODER = (
    "Prefill is 8,192 tokens, all dense layers of the blocks factored. With tiles of 1,024, "
    "one of a square layer and four of the others, prefill of TSVD on the kernels is 1.06, "
    "1.23 and 1.36 times as fast as the dense model's at 2x, 4x and 8x, and 1.06 to 1.21 times as "
    "XLA's; other programs compiled on the same host meanwhile. Decoding is a chain of short "
    "launches, more of them than the dense model has: 16 sequences are slower, one is 1.04 to 1.07 "
    "times as fast at 4x and 8x through XLA. Tiles of 1,024 have no kernel for few rows, and "
    '"tsvd pallas" forces the two products, where None takes XLA\'s. '
    "TSVD-common has tiles of 128 and one factor. Its 8x was not reached."
)
EARLIER = (
    'With tiles of 256, on an H100, before few rows had a kernel of their own: "tsvd pallas" '
    "decodes with the two products, which None did not choose there. In prefill the kernels are "
    "ahead of XLA's and, of dense layers, at 4x and 8x; decoding one sequence XLA's are the "
    "fastest, 1.4 to 1.5 times the dense model."
)


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


def speed(rows: list[dict], times: str) -> str:
    """A row for each layer, number of rows and compression; the best tile of each way."""
    cells = []
    for row in (row for row in rows if times in row):
        own = {k: ms for k, ms in row[times].items() if k != "dense"}
        cells.append([
            f"{row['layer']} {row['features'][0]} x {row['features'][1]}", f"{row['rows']:,}",
            f"{row['ratio']:.0f}x", number(row[times]["dense"]),
            *(number(best(row, kind, times=times)) for kind in KINDS), min(own, key=own.get),
        ])  # fmt: skip
    head = ["layer", "rows", "compression", "dense ms", *KINDS.values()]
    return table([*head, "fastest"], cells)


def speed_picture(rows: list[dict]) -> Figure:
    """How many times as fast as dense over rows, for each layer, at 4x.

    Layers in a chain and single calls are lines of their own; calls of 64 rows, which tell of the
    loop around them, are left out.
    """
    rows = [r for r in rows if r["ratio"] == 4 and not CHAINED < r["rows"] < 512]
    layers = list(dict.fromkeys(row["layer"] for row in rows))[:4]
    figure = Figure(figsize=(4.2 * len(layers) + 1.6, 4), layout="constrained")
    axes = figure.subplots(1, len(layers), squeeze=False)[0]
    for layer, axis in zip(layers, axes, strict=True):
        mine = sorted((r for r in rows if r["layer"] == layer), key=lambda r: r["rows"])
        for i, kind in enumerate(KINDS):
            for few in (True, False):
                points = [(r["rows"], best(r, kind)) for r in mine if (r["rows"] <= CHAINED) == few]
                points = [point for point in points if point[1] is not None]
                if points:
                    axis.plot(*zip(*points, strict=True), "o-", color=f"C{i}")
        axis.axhline(1, color="black", lw=0.8)
        axis.axhline(4, color="silver", lw=0.8)
        counts = sorted({r["rows"] for r in mine})
        axis.set(xscale="log", xlabel="rows", title=f"{layer}, 4x", ylabel="x dense")
        axis.set_xticks(counts, [f"{x:,}" for x in counts], rotation=30)
        axis.minorticks_off()
    lines = [Line2D([], [], marker="o", color=f"C{i}") for i in range(len(KINDS))]
    figure.legend(lines, list(KINDS.values()), loc="outside right center", fontsize=8)
    return figure


def grid(rows: list[dict]) -> str:
    """Every layer and number of rows in one line: the best of each kind, by compression.

    Dense times are the median of those measured beside each compression.
    """
    kinds = {"SVD": ("svd",), "TSVD": TSVD, "common": COMMON_WAYS}
    body = []
    for layer, count in dict.fromkeys((row["layer"], row["rows"]) for row in rows):
        found = [find(rows, layer, count, ratio) for ratio in RATIOS]
        dense = np.median([row["ms"]["dense"] for row in found if row])
        took = [row and (row["ms"].get(fastest(row, *x))) for x in kinds.values() for row in found]
        gains = (ms and dense / ms for ms in took)
        body.append([layer, f"{count:,}", number(1e3 * dense), *map(number, gains)])
    head = ["layer", "rows", "dense us"]
    return table([*head, *(f"{kind} {ratio}x" for kind in kinds for ratio in RATIOS)], body)


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


def one_layer(docs: Path) -> list[str]:
    """What was measured of one layer, on either card."""
    text = [
        "## Speed of one layer",
        "bfloat16. Columns of a way say how many times as long the dense matmul (cuBLAS, or what "
        "XLA found faster) takes, for the best size of its tiles. Up to 16 rows are timed as a "
        "layer in a chain of 16, more as a call in a loop inside one program. Cards are not "
        "compared with each other: each has dense times of its own.",
    ]
    if (queued := read("tsvd_queued")) is not None:
        queued["rows"].sort(key=lambda row: (row["layer"], row["rows"], row["ratio"]))
        head = f"### {queued['device']}, forward, many rows"
        text += [head, origin("tsvd_queued", queued), QUEUED, speed(queued["rows"], "ms")]
    new, old = read("tsvd_h200"), read("tsvd_gpu")
    if new is None:
        text.append(missing("tsvd_gpu"))
    else:
        new["rows"].sort(key=lambda row: (row["layer"], row["rows"], row["ratio"]))
        speed_picture(new["rows"]).savefig(docs / "tsvd_gpu.png", dpi=120)
        text += [f"### {new['device']}, forward, earlier", origin("tsvd_h200", new), ENDED,
                 "![Speed over rows at 4x on an H200](tsvd_gpu.png)", speed(new["rows"], "ms"),
                 LOOP, f"### {new['device']}, few rows by size of the tiles", CHOICE,
                 by_tile(new["rows"])]  # fmt: skip
    if old is not None:
        text += [f"### {old['device']}, forward", origin("tsvd_gpu", old), speed(old["rows"], "ms"),
                 f"### {old['device']}, forward and all gradients",
                 speed(old["rows"], "both_ms")]  # fmt: skip
    if (every := read("tsvd_h100")) is not None:
        every["rows"].sort(key=lambda row: (row["layer"], row["rows"], row["ratio"]))
        text += [f"### {every['device']}, every layer, forward", origin("tsvd_h100", every), EVERY,
                 grid(every["rows"])]  # fmt: skip
    if queued is not None and new is not None and old is not None:
        text += section(queued, new, old)
    return text


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
    text += one_layer(docs)
    text.append("## A decoder of GPT-2's sizes")
    if (record := read("tsvd_decoder_gpu")) is None:
        text.append(missing("tsvd_decoder_gpu"))
    else:
        if (large := read("tsvd_decoder_h200")) is not None:
            text += [origin("tsvd_decoder_h200", large), DECODER, decoder(large["rows"])]
        text += [origin("tsvd_decoder_gpu", record), EARLIER, decoder(record["rows"])]
    (docs / "tsvd.md").write_text("\n\n".join(text) + "\n")
    print(docs / "tsvd.md")


if __name__ == "__main__":
    main()
