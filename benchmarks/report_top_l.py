"""Writes docs/top_l.md: what top-L attention costs, and what it keeps of dense attention.

python benchmarks/topl_quality.py --imdb FOLDER    # results/topl_quality.json
python benchmarks/top_l_gpu.py                     # on a GPU: results/top_l_gpu.json
python benchmarks/report_top_l.py
"""

import argparse
from pathlib import Path

import numpy as np
from harness import RESULTS
from report import DOCS, number, origin, read, table

INTRO = """Written by `benchmarks/report_top_l.py`. Every query keeps its L = T / 8 best keys, by
their codes: exactly these (`top_l_attention`, memory linear in the length), or the blocks of keys
that most of them lie in, by vote (`top_l_blocks`, time by the number of blocks).

[What these tables say](top_l_findings.md)."""

QUALITY = """Mass is the share of dense attention's probabilities that the kept keys hold, recall
the share of the L most probable keys among them; means over seeds or layers. *exact* keeps the most
probable keys themselves, *window* the nearest ones. Blocks of 16 tokens; *few voters*: two of them
vote."""

SPEED = """bfloat16, causal, 16 heads of 64 features, 32,768 tokens a call or one sequence; scores
are those of equal codes (`score="match"`). `x dense` says how many times as long dense causal flash
attention (cuDNN) takes, whose milliseconds are *dense*. *Best keys* and *blocks* (of 64, 8 queries
voting) hold their choice, which stands alone beside them. Codes are given; making them of queries
and keys, once for both passes, takes a layer as long as *codes* says. MiB are what XLA reserves for
both passes beside the arguments."""


def speed(record: dict) -> str:
    head = ["length", "batch", "codes", "dense", "best keys", "choice", "x dense", "blocks",
            "choice", "x dense", "dense, both passes", "best keys", "x dense", "blocks", "x dense",
            "MiB dense", "best keys", "blocks"]  # fmt: skip
    rows = []
    for row in record["rows"]:
        dense, ours, blocks = (row.get(name, {}) for name in ("dense", "ours", "blocks"))
        times = lambda x, key, dense=dense: number(dense[key] / x[key]) if x and dense else "-"
        ms = lambda x, key="ms": number(x.get(key))
        rows.append([
            f"{row['length']:,}", str(row["batch"]), ms(row.get("encode", {})),
            ms(dense, "forward_ms"),
            ms(ours, "forward_ms"), ms(row.get("select", {})), times(ours, "forward_ms"),
            ms(blocks, "forward_ms"), ms(row.get("vote", {})), times(blocks, "forward_ms"),
            ms(dense, "both_ms"), ms(ours, "both_ms"), times(ours, "both_ms"),
            ms(blocks, "both_ms"), times(blocks, "both_ms"),
            *(number(x["bytes"] / 2**20) if x else "-" for x in (dense, ours, blocks)),
        ])  # fmt: skip
    return table(head, rows)


def quality(record: dict) -> str:
    rows = []
    for data in dict.fromkeys(row["data"] for row in record["rows"]):
        found = [row["choices"] for row in record["rows"] if row["data"] == data]
        for choice in found[0]:
            cells = []
            for key in ("mass", "recall"):
                values = [x[choice][key] for x in found]
                cells.append(f"{np.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})")
            rows.append([data, choice, *cells])
    return table(["data", "keys", "mass", "recall"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=DOCS)
    args = parser.parse_args()
    text = ["# Top-L attention", INTRO]
    parts = ("top_l_gpu", "Time and memory", SPEED, speed), (
        "topl_quality", "What is kept", QUALITY, quality)  # fmt: skip
    for name, title, intro, show in parts:
        text += [f"## {title}", intro]
        record = read(name, args.results)
        text += ["Not measured yet."] if record is None else [origin(name, record), show(record)]
    (args.docs / "top_l.md").write_text("\n\n".join(text) + "\n")
    print(args.docs / "top_l.md")


if __name__ == "__main__":
    main()
