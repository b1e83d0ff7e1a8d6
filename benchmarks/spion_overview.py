"""What report_spion.py says of all tasks together: time and memory, and longer sequences."""

from pathlib import Path

from matplotlib.figure import Figure
from report_attention import number, table
from spion_methods import CONTROLS
from spion_peers import MATERIALISED

PUBLISHED = "CF-paper"  # SPION as it is in the paper
LENGTHS = (2048, 4096, 8192, 16384, 32768)


def gains(records: dict[str, dict]) -> str:
    """The table of a step with SPION's own pattern, beside dense attention of both kinds."""
    cells = []
    for name, record in records.items():
        rows = record["rows"][1:]
        peers = {row["peer"]: row for row in rows if "peer" in row}
        by_method = {row["method"]: row for row in rows if row.get("seed") == 0}
        timed = (peers.get(x, {}).get("ms") for x in (MATERIALISED, "dense"))
        if None in timed or "diagonal" not in peers or not {"dense", PUBLISHED} <= {*by_method}:
            continue
        old, flash, ours = peers[MATERIALISED], peers["dense"], by_method[PUBLISHED]
        ratio = by_method["dense"]["attention_mflop"] / ours["attention_mflop"]
        cells.append([
            name, *(number(x) for x in (old["ms"], flash["ms"], ours["sparse_ms"])),
            number(old["ms"] / ours["sparse_ms"]), number(flash["ms"] / ours["sparse_ms"]),
            *(number(peers[x]["bytes"] / 2**20) for x in (MATERIALISED, "dense", "diagonal")),
            number(old["bytes"] / peers["diagonal"]["bytes"]), number(ratio),
        ])  # fmt: skip
    head = ["task", "materialised ms", "flash ms", "sparse ms", "faster than materialised",
            "faster than flash", "materialised MiB", "flash MiB", "sparse MiB",
            "less memory than materialised", "fewer operations of attention"]  # fmt: skip
    return table(head, cells)


def long(records: dict[str, dict], memory: dict[int, int], picture: Path) -> str:
    """The table of the language model by length, its picture, all of the first seed.

    Args:
        records: results by task.
        memory: bytes of a sparse step by length.
        picture: where it goes.
    """
    cells, measured, drawn = [], [], {"dense, flash": [], "window": [], "weighted": []}
    for length in LENGTHS:
        rows = records.get(f"lm{length}", {"rows": [{}]})["rows"]
        by_method = {row["method"]: row for row in rows if row.get("seed") == 0}
        if not {"dense", "window", "weighted"} <= {*by_method}:
            continue
        size, measured = rows[0]["size"], [*measured, length]
        peers = {row["peer"]: row["bytes"] for row in rows if "peer" in row}
        mebibytes = (peers.get("dense"), memory.get(length))
        dense, *sparse = (by_method[x] for x in ("dense", "window", "weighted"))
        others = [row for name, row in by_method.items() if name not in ("dense", *CONTROLS)]
        best = max(others, key=lambda row: row["score"])
        lost = lambda row, dense=dense: f"{1e3 * (dense['score'] - row['score']):.2f}"
        times = [dense["dense_ms"], *(row["sparse_ms"] for row in sparse)]
        for line, ms in zip(drawn.values(), times, strict=True):
            line.append(ms)
        cells.append([
            f"{length:,} x {size['batch_size']}", f"{size['density']:.0%}",
            *(number(ms) for ms in times), number(times[0] / times[2]),
            *(number(x / 2**20) if x else "-" for x in mebibytes),
            number(dense["attention_mflop"] / sparse[1]["attention_mflop"]),
            f"{-dense['score']:.4f}", *(lost(row) for row in sparse),
            f"{lost(best)} ({best['method']})",
        ])  # fmt: skip
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axis = figure.subplots()
    for name, line in drawn.items():
        axis.plot(measured, line, "o-", label=name)
    axis.set(xscale="log", yscale="log", xlabel="bytes of a sequence", ylabel="ms of a step")
    axis.set_xticks(LENGTHS, [f"{x:,}" for x in LENGTHS])
    axis.minorticks_off()
    axis.set_yticks([5, 10, 20], ["5", "10", "20"])
    axis.legend()
    figure.savefig(picture, dpi=110)
    head = ["bytes x batch", "density", "dense ms", "window ms", "weighted ms",
            "x dense, weighted", "dense MiB", "sparse MiB", "fewer operations of attention",
            "bits per byte, dense", "window: lost x 1000", "weighted: lost x 1000",
            "best that looked"]  # fmt: skip
    return table(head, cells)
