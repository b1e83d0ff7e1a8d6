"""Writes docs/spion.md and its pictures from what the spion_*_gpu.py scripts measured.

python benchmarks/spion_image_gpu.py --data FOLDER --out OUT     # and the other tasks
cp OUT/spion_*.json OUT/spion_*.npz benchmarks/results/
uv run python benchmarks/report_spion.py                         # needs the `plots` extra
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np
from report_attention import number, table
from spion_overview import PUBLISHED, gains, long

from sparsax.plots import curve_figure, pattern_figure

HERE = Path(__file__).parent
SHOWN = (
    "weighted",
    "weighted-heads",
    "square",
    "budget",
    "heads",
    "layer",
    "oracle",
    "CF",
    "CF-paper",
    "F",
    "C",
    "window",
    "bigbird",
    "random",
)
INTRO = """Written by `benchmarks/report_spion.py`. A model is trained densely until its score maps
settle (or a number of steps has passed); from that very state every method goes on for as many
steps, with the same batches and learning rates. All methods list equally many blocks, the diagonal
and its neighbours among them, but for those whose density says otherwise:

- **budget**: one budget over all layers, by captured mass (`patterns.mass.search` with
  `objective="mass"`); **square**: by the squared mass that rows lose, **weighted** by what the loss
  minds of each layer (`patterns.layer_weights`); **square-layer**: as many in every layer;
  **heads**: budget over all heads, **weighted-heads** by weighted squares; **layer**: budget, as
  many blocks in every layer; **cover**: as few as hold 90 % of the mass; **again**: searched once
  more in the middle of the sparse phase; **oracle**: budget, in the maps of the dense model at the
  end of its training.
- **CF, F, C**: SPION's variants at equal density and with the forced neighbours; **-paper** as
  published, with its own quantile or density and only the diagonal forced. **zero** counts a pruned
  key as logit 0, as SPION does; all others drop it.
- **diagonal, random, window, bigbird, longformer** look at no map.

*Over dense* is how much better than dense a method is, seed by seed (below 0: worse); where rows
have fewer seeds than others, it alone compares them. Scores are of test samples, *before* is that
of validation samples right after the switch. *Mass* is the share of the dense model's attention
that the listed blocks hold, on held-out samples when the pattern was chosen, layer by layer; *best*
is the most that as many blocks can hold; random blocks beside the band hold as large a share of
what the band leaves as they are of the blocks there. *Search* is the time of one search, and with
all probes its share of the training time. MFLOP are those of attention, forward, for one sample.
Times are the least of the seeds.

[What these tables say](spion_findings.md)."""

GAINS = f"""## A step, beside dense attention as it was and as it is

A training step with SPION's own pattern ({PUBLISHED}), beside attention that keeps its scores, the
baseline of the papers, and flash attention. Memory is that of a step beside parameters and data,
the sparse one's that of any pattern."""
LONG = """## Longer sequences

The language model at one size of a step, 32,768 bytes, first seed, on H100s. *Lost* are the bits
per byte above those of dense attention. Memory is that of a step beside parameters and data, the
sparse one's by compiling for an H200 without one (`lm_memory.py`; a GPU's compiler said the same at
2,048 bytes, and .1 % less at 8,192).

![Milliseconds of a step](spion_lengths.png)"""


def order(path: Path) -> tuple[list[int], str]:
    """Tasks by name, the lengths of one task by number."""
    return [int(x) for x in re.findall("[0-9]+", path.stem)], path.stem


def cell(values: list[float | None], digits: int = 3) -> str:
    """The mean, and the range of several seeds."""
    found = [x for x in values if x is not None]
    if not found:
        return "-"
    mean = f"{np.mean(found):.{digits}f}"
    ends = [f"{x:.{digits}f}" for x in (min(found), max(found))]
    return mean if ends[0] == ends[1] else f"{mean} ({ends[0]} to {ends[1]})"


def least(values: list[float | None]) -> float | None:
    """Of those that are there: what else a machine does can only add to a time."""
    return min((x for x in values if x is not None), default=None)


def layers(rows: list[dict], name: str) -> str:
    """Means over the seeds, layer by layer."""
    found = [row[name] for row in rows if name in row]
    return ", ".join(f"{x:.3f}" for x in np.mean(found, 0)) if found else "-"


def methods(rows: list[dict], metric: str) -> str:
    """The table of the trained methods, best first."""
    sign = -1 if metric.startswith("bits") else 1
    by_name: dict[str, list[dict]] = {}
    for row in rows:
        by_name.setdefault(row["method"], []).append(row)
    dense = {row["seed"]: row["score"] for row in by_name.get("dense", [])}
    ordered = sorted(by_name.items(), key=lambda x: -np.mean([row["score"] for row in x[1]]))
    cells, most = [], max(map(len, by_name.values()))
    for name, own in ordered:
        every = lambda key, own=own: [row.get(key) for row in own]
        middle = lambda key, own=own: cell([least([row[key] for row in own])], 2)
        signed = lambda key, own=own: cell([sign * row[key] for row in own])
        gained = [row["score"] - dense[row["seed"]] for row in own if row["seed"] in dense]
        share = [100 * row["search_share"] for row in own if row["search_share"] is not None]
        searched = "search_ms" in own[0]
        seeds = f"{name}, {len(own)} of {most} seeds" if len(own) < most else name
        cells.append([
            seeds, signed("score"), cell(gained, 4), signed("before"),
            *(layers(own, x) for x in ("density", "mass", "best_mass", "final_mass")),
            middle("dense_ms"), middle("sparse_ms"),
            number(float(np.mean(every("attention_mflop")))),
            f"{middle('search_ms')} ({cell([least(share)], 2)} %)" if searched else "-",
            cell(every("transition"), 0),
        ])  # fmt: skip
    head = ["method", metric, "over dense", "before", "density", "mass", "best", "mass in the end",
            "dense ms", "sparse ms", "MFLOP", "search ms", "transition"]  # fmt: skip
    return table(head, cells)


def peers(rows: list[dict]) -> str:
    """The table of times and memory of a step."""
    base = next((row.get("ms") for row in rows if row["peer"] == "dense"), None)
    cells = [
        [row["peer"], number(row.get("ms")),
         number(base / row["ms"] if base and row.get("ms") else None),
         number(row["bytes"] / 2**20)]
        for row in rows
    ]  # fmt: skip
    return table(["attention", "ms of a step", "x dense", "MiB"], cells)


def curves(rows: list[dict]) -> dict[str, dict[str, tuple[list, list]]]:
    """Training loss and validation score of the first seed."""
    first = [row for row in rows if row["seed"] == 0]
    line = lambda row, key: tuple(map(list, zip(*row[key], strict=True)))
    return {
        title: {row["method"]: line(row, key) for row in first if row[key]}
        for title, key in (("training loss", "loss"), ("validation score", "valid"))
    }


def section(path: Path, docs: Path) -> list[str]:
    """What is known of a task."""
    record = json.loads(path.read_text())
    facts, rows = record["rows"][0], record["rows"][1:]
    size, trained = facts["size"], [row for row in rows if "method" in row]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    text = [
        f"## {path.stem.removeprefix('spion_')}",
        f"`{record['command']}` on one {record['device']}, commit {record['commit']}, {versions}; "
        f"{facts['dtype']}, dense attention by {facts['dense']}. {size['layers']} layers, "
        f"{size['features']} features, {size['heads']} heads, {size['length']:,} tokens in blocks "
        f"of {size['block']}, batches of {size['batch_size']}; {size['steps']:,} steps after the "
        f"transition; density {size['density']} where a method's own is not another.",
    ]  # fmt: skip
    if trained:
        text.append(methods(trained, facts["metric"]))
        name = f"{path.stem}_curves.png"
        curve_figure(curves(trained)).savefig(docs / name, dpi=110)
        text.append(f"![Learning curves]({name})")
    if any("peer" in row for row in rows):
        text += ["Time and memory of a training step (memory beside parameters and data):",
                 peers([row for row in rows if "peer" in row])]  # fmt: skip
    if path.with_suffix(".npz").exists():
        kept = np.load(path.with_suffix(".npz"))
        maps = {label: kept[key] for key, label in (("maps", "maps"), ("final", "final maps"))
                if key in kept}  # fmt: skip
        masks = {x: kept[f"mask {x}"] for x in SHOWN if f"mask {x}" in kept}
        pattern_figure(maps, masks).savefig(docs / f"{path.stem}.png", dpi=110)
        text.append(f"![Maps and patterns of every layer]({path.stem}.png)")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs")
    args = parser.parse_args()
    paths = sorted(args.results.glob("spion_*.json"), key=order)
    names = [path.stem.removeprefix("spion_") for path in paths]
    records = {name: json.loads(path.read_text()) for name, path in zip(names, paths, strict=True)}
    text = ["# SPION: does the pattern search earn its keep?", INTRO, GAINS, gains(records)]
    held = json.loads((args.results / "lm_memory.json").read_text())["rows"]
    memory = {row["length"]: row["sparse_bytes"] for row in held}
    text += [LONG, long(records, memory, args.docs / "spion_lengths.png")]
    for path in paths:
        text += section(path, args.docs)
    (args.docs / "spion.md").write_text("\n\n".join(text) + "\n")
    print(args.docs / "spion.md")


if __name__ == "__main__":
    main()
