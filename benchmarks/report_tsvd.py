"""Writes docs/tsvd.md, docs/tsvd_error.png and docs/tsvd_gpu.png from what was measured.

    python benchmarks/tsvd_minilm.py --imdb FOLDER       # a CPU: results/tsvd_minilm.json
    python benchmarks/tsvd_gpu.py --name tsvd_all --profile dense "split 256" "xla 256"  # an H200
    python benchmarks/tsvd_gpu.py --backward --layers "llama-7b out" "gpt2-m up"   # a GPU
    python benchmarks/tsvd_gpu.py --name tsvd_common --ways common xla products fused resident
    python benchmarks/tsvd_decoder_gpu.py                # a GPU: results/tsvd_decoder_gpu.json
    python benchmarks/tsvd_decoder_gpu.py --tile 1024 --name tsvd_decoder_h200     # an H200
    uv run python benchmarks/report_tsvd.py              # anywhere (needs the `plots` extra)

A result that is not there has a sentence that says so.
"""

import argparse
from pathlib import Path

import numpy as np
from report import DOCS, number, origin, read, table
from tsvd_aims import (
    COMMON_WAYS,
    DETAILED,
    KINDS,
    RATIOS,
    TSVD,
    beside_tsvd,
    best,
    by_tile,
    fastest,
    find,
    section,
)
from tsvd_pictures import error_picture, speed_picture

ALL = (
    "All ways were timed one after another, few rows in a run of their own. A gain is over the "
    "median of the three dense times of its line; ways are at their best tile, see the next "
    "tables. Tiles of 512 and 1,024 divide none of GPT-2 small's and large's layers nor of "
    "Llama's up and down, where TSVD has 256 alone; TSVD-common, with tiles of 128 and one "
    "factor for all of them, is ahead of it there with 4,096 rows and more but in two of 42 "
    "cases, here still without the kernel whose common factor stays, which has a table of its "
    "own. Several processes compiled at once on the same GPU, where XLA tries algorithms: a few "
    "of its times are those of a bad choice (tiles of 256 of gpt2-l up at 2x took 7 times as "
    "long as dense)."
)
CHOICE = (
    "With tiles of 256 and ranks of 32 and 64 the kernel for few rows is ahead of XLA's in every "
    "layer with one row, by up to 1.7 times; with 16 rows where the ranks of all tiles add up to "
    "1,728, by up to 1.9, but 5 % behind in one case and 1 % in two. With 64 rows it is with ranks "
    "of 64, by up to 1.9, and with ranks of 32 where there are more rows of tiles than columns, by "
    "up to 1.35. With tiles of 512 it is where one row meets 64 tiles. None runs it there from "
    "ranks of 1,728 in all on, of one row from 64 tiles on, too, where nothing is differentiated. "
    "Of 16 and 64 rows TSVD-common is often faster yet."
)
NONE = (
    "Where nothing is differentiated, by the table of every layer. Up to 64 rows: the kernel for "
    "few rows where the last table has it ahead, else XLA. From 512 rows on: the other kernels for "
    "matrices of 2^22 numbers and more, or of 2^20 with tiles of 256 and ranks of 32 and more. "
    "From 4,096 rows on: the kernels for 2^20 numbers and more. The two products are what runs, "
    "but for three cases. Tiles of 256, 4,096 rows, ranks of 64 and more, an odd number of columns "
    "of tiles: the fused kernel, as the products' tiles would be narrow. Tiles of 256, fewer rows, "
    "fewer rows of tiles than columns: the fused kernel, with ranks of 64 and more, or of 32 if "
    "all its tiles run at once. 4,096 rows and one row of tiles, or two of 512: the kernel that "
    "keeps `x u`. Over all layers and tiles, 57 cases for each number of rows, what None runs "
    "takes 1.03, 1.01, 1.04, 1.01, 1.01 and 1.01 times as long in the mean as the fastest way with "
    "the same factors, with 1, 16, 64, 512, 4,096 and 8,192 rows, and nowhere more than 1.06 times "
    "as long as XLA. What is missed most, up to 2.0 times, are few rows that are left to XLA."
)
SHARED = (
    "In one run with TSVD's ways: tiles of 1,024 where they divide the matrix, else of 256. "
    "Tiles of TSVD-common are 128 and 256. The kernel whose common factor stays takes .62 to "
    "1.04 of XLA's time with a common right factor where None runs it, .80 in the mean, and is "
    "the fastest of TSVD-common's ways in 28 of 43 cases. It takes ranks that fill whole lines "
    "of 64 columns of `x u`, which at 8x those of GPT-2's small down and qkv and large down and "
    "of Llama's up do not, and has a tile of 128 x 128 for three of four multiprocessors at "
    "least where it is chosen. Most layers were not reached with 4,096 rows in the time there "
    "was."
)
DECODER = (
    "Prefill is 8,192 tokens, all dense layers of the blocks factored. 'tsvd' and 'common' are "
    "what None ran: kernels in prefill, GELU in the same pass. With tiles of 1,024, one of a "
    "square layer and four of the others, TSVD is 1.15, 1.33 and 1.25 times as fast as XLA's in "
    "prefill, and 1.18, 1.53 and 1.47 times as the dense model at 2x, 4x and 8x. TSVD-common "
    "has tiles of 128 and one factor; its prefill is 1.06, 1.31 and 1.30 times as fast as the "
    "dense model's, with attention's square layers through XLA, which at 2x and 4x are the "
    "kernel's since. Decoding is a chain of short launches, more of them than the dense model "
    "has: 16 sequences are slower, one is 1.1 times as fast at 4x and 8x."
)
SMALL_TILES = (
    "With tiles of 256 one sequence decodes 1.5 to 1.6 times as fast as the dense model, "
    "through XLA as through the kernel for few rows: XLA joins the first products of queries, "
    "keys and values, and biases and sums with what follows. Prefill is 1.45, 1.67 and 1.60 "
    "times as fast as XLA's, and .96, 1.41 and 1.54 times as the dense model's, at 2x on the "
    "fused kernel, where None runs the two products since. By the profiler, which tells the 16 "
    "longest kernels of a pass, TSVD's take 6.8, 4.3 and 3.5 ms of it, attention 1.4. XLA's "
    "products take 7.7, 5.4 and 4.1, its transposes and conversions 6.1, 4.3 and 3.8, of which "
    ".7 is left beside TSVD's kernels."
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
        "layer in a chain of 16, more as a call in a loop inside one program; runs queue up. Cards "
        "are not compared with each other: each has dense times of its own.",
    ]
    new, shared, old = read("tsvd_all"), read("tsvd_common"), read("tsvd_gpu")
    if new is None:
        text.append(missing("tsvd_gpu"))
    else:
        rows = sorted(new["rows"], key=lambda row: (row["layer"], row["rows"], row["ratio"]))
        detailed = [row for row in rows if row["layer"] in DETAILED]
        speed_picture(rows, shared["rows"] if shared else []).savefig(
            docs / "tsvd_gpu.png", dpi=120
        )
        text += [f"### {new['device']}, every layer, forward", origin("tsvd_all", new), ALL,
                 "![Speed over rows at 4x on an H200](tsvd_gpu.png)", grid(rows),
                 f"### {new['device']}, two layers, every way", speed(detailed, "ms"),
                 f"### {new['device']}, few rows by size of the tiles", CHOICE,
                 by_tile(rows), "### What None runs", NONE]  # fmt: skip
    if shared is not None:
        shared["rows"].sort(key=lambda row: (row["layer"], row["rows"], row["ratio"]))
        text += [f"### {shared['device']}, TSVD-common beside TSVD", origin("tsvd_common", shared),
                 SHARED, beside_tsvd(shared["rows"])]  # fmt: skip
    if old is not None:
        text += [f"### {old['device']}, forward and all gradients", origin("tsvd_gpu", old),
                 speed(old["rows"], "both_ms")]  # fmt: skip
    if new is not None and shared is not None:
        text += section(new["rows"], shared["rows"])
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
        text += [origin("tsvd_decoder_gpu", record), SMALL_TILES, decoder(record["rows"])]
    (docs / "tsvd.md").write_text("\n\n".join(text) + "\n")
    print(docs / "tsvd.md")


if __name__ == "__main__":
    main()
