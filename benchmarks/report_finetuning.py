"""Writes docs/finetuning.md and docs/finetuning.png from what the fine-tuning study measured.

    python benchmarks/finetune_e2e_gpu.py ...              # on a GPU: results/finetune_e2e.json
    uv run python benchmarks/e2e_metrics.py --data FOLDER  # anywhere: results/e2e_metrics.json
    ...                                     # the same with --name NAME_h200, on another GPU
    python benchmarks/spt_block_gpu.py                     # on a GPU: results/spt_block_gpu.json
    uv run python benchmarks/report_finetuning.py          # anywhere (needs the `plots` extra)

A dash is a figure that the results lack, and a section says so when its file does. Of several
learning rates a way has the row of the lowest validation loss, whose rate the table names; base is
what the model that it began with needs for the held-out reviews, in bits per byte. Milliseconds are
those of the quickest seed: with --beside other processes convert models on the same GPU meanwhile.
"""

import argparse
from pathlib import Path

import numpy as np
from harness import RESULTS
from matplotlib.figure import Figure
from report import DOCS, number, origin, read, table

INTRO = """Written by `benchmarks/report_finetuning.py`; ways and columns are explained in
`benchmarks/finetune_e2e_gpu.py` and `spt_block_gpu.py`. `x` says how many times as long another way
takes, `of` the share of its memory; times of different GPUs do not compare.

[What these tables say](finetuning_findings.md)."""
STRAIGHT_THROUGH = """The same with `coefficient="straight_through"`, which `RoutedFFN` had before
the gain. It goes wrong as soon as the learning rate is up, with 3 of 4 blocks active as much as
with 2, and one run met NaN."""
SCORES = ("BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr")


def best_rates(rows: list[dict]) -> dict[str, list[dict]]:
    """The rows of every way, one a seed, at the rate (batch, epochs) of the lowest mean loss."""
    settings = lambda row: (row["rate"], row["batch"], row["epochs"])
    found = {}
    for way in dict.fromkeys(row["way"] for row in rows):
        own = [row for row in rows if row["way"] == way]
        alike = [[r for r in own if settings(r) == s] for s in dict.fromkeys(map(settings, own))]
        found[way] = min(alike, key=lambda group: np.mean([ended(r) for r in group]))
    return found


def ended(row: dict) -> float:
    """The last validation loss; infinite where it was no number."""
    last = row["valid_loss"][-1]
    return last if last is not None and np.isfinite(last) else np.inf


def quickest(rows: list[dict]) -> float:
    """Milliseconds of a step in the seed where least came between."""
    return min(row["step_ms"] for row in rows)


def spread(values: list[float | None], digits: int) -> str:
    """The mean, and the lowest and highest where there are several."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    text = f"{np.mean(known):.{digits}f}"
    ends = [f"{end:.{digits}f}" for end in (min(known), max(known))]
    return text if ends[0] == ends[1] else f"{text} ({ends[0]}-{ends[1]})"


def study(ways: dict[str, list[dict]]) -> str:
    """What every way trains and costs."""
    times = lambda way, ms: quickest(ways[way]) / ms if way in ways else None
    cells = []
    for way, rows in ways.items():
        take = lambda name, rows=rows: [row.get(name) for row in rows]
        ms, size = quickest(rows), rows[0]["bytes"]
        losses = [row["valid_loss"][-1] for row in rows]
        cells.append([
            way, str(len(rows)), f"{rows[0]['rate']:g}", spread(take("base"), 4),
            f"{rows[0]['valid_loss'][0]:.3f}",
            spread(losses, 4) + " and NaN" * losses.count(None), f"{rows[0]['trained']:,}",
            number(ms), number(times("full", ms)), number(times("lora", ms)), number(size / 2**20),
            spread(take("greedy_s"), 2), spread(take("beam_s"), 2),
        ])  # fmt: skip
    head = ["way", "seeds", "rate", "base", "loss before", "after", "trained", "ms a step",
            "x full", "x lora", "MiB", "greedy s", "beam s"]  # fmt: skip
    return table(head, cells)


def quality(ways: dict[str, list[dict]], scores: list[dict]) -> str:
    """The scores of the sentences, means over seeds."""
    cells = []
    for way, rows in ways.items():
        keys = ("way", "rate", "batch", "epochs")
        same = [s for s in scores if all(s[key] == rows[0][key] for key in keys)]
        for search in ("greedy", "beam"):
            found = [s for s in same if s["search"] == search]
            if found:
                cells.append([way, search, *(spread([s.get(name) for s in found], 4)
                                             for name in SCORES)])  # fmt: skip
    return table(["way", "search", *SCORES], cells)


def blocks(record: dict) -> str:
    """One block: milliseconds and memory, and how they stand to those of dense layers."""
    beside = [(way, kind) for kind in ("materialised", "flash") for way in ("full", "LoRA")]
    cells = []
    for row in record["rows"]:
        alike = lambda r, row=row: all(r.get(x) == row.get(x) for x in ("features", "length"))
        dense = {(r["way"], r["attention"]): r for r in record["rows"] if alike(r)}
        faster = [number(dense[x]["ms"] / row["ms"]) if x in dense else "-" for x in beside]
        memory = [f"{100 * row['bytes'] / dense[x]['bytes']:.0f} %" if x in dense else "-"
                  for x in beside]  # fmt: skip
        cells.append([
            f"{row['features']:,}", f"{row.get('length', 512):,}", row["way"], row["attention"],
            number(row["ms"]), *faster, number(row["bytes"] / 2**20), *memory,
        ])  # fmt: skip
    named = [f"{way}, {kind}" for way, kind in beside]
    head = ["features", "length", "way", "attention", "ms", *(f"x {name}" for name in named),
            "MiB", *(f"of {name}" for name in named)]  # fmt: skip
    return table(head, cells)


def picture(ways: dict[str, list[dict]]) -> Figure:
    """Loss over epochs, and loss against time of a step."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (way, rows) in enumerate(ways.items()):
        color, mark = f"C{i % 10}", "o^s"[i // 10]
        if np.inf in map(ended, rows):
            continue
        curve = np.mean([row["valid_loss"] for row in rows], 0)
        left.plot(range(1, len(curve)), curve[1:], color=color, marker=mark, label=way)
        ms, loss = quickest(rows), curve[-1]
        right.plot(ms, loss, mark, color=color)
        right.annotate(f" {way}", (ms, loss), fontsize=7)
    left.set(xlabel="epoch", ylabel="validation loss, nats a token")
    right.set(xlabel="ms a step", ylabel="validation loss after fine-tuning")
    left.legend(fontsize=7, ncol=2)
    return figure


def of_model(name: str, record: dict | None) -> list[str]:
    """What the ways began with."""
    if record is None:
        return []
    facts = record["rows"][0]
    speeds = [row["tflops"] for row in record["rows"][1:] if not row["first"]]
    speed = f", {np.median(speeds):.0f} TFLOP/s" if speeds else ""
    return [
        f"The model: {facts['parameters']:,} parameters in {facts['style']}'s style, pre-trained "
        f"for {facts['step']} steps on IMDB reviews ({facts['valid_bits_per_byte']:.4f} bits per "
        f"byte of held-out ones{speed}): {origin(name, record)}"
    ]


def of_study(name: str, record: dict, scores: tuple[str, dict | None], shown: str) -> list[str]:
    """A study's picture and tables."""
    ways = best_rates(record["rows"])
    bases = sorted({row["base"] for row in record["rows"] if row.get("base")})
    several = [] if len(bases) < 2 else [
        "The ways began from models of several pre-trainings, alike but for the bits: "
        f"{', '.join(f'{x:.4f}' for x in bases)} bits per byte."
    ]  # fmt: skip
    named, found = scores
    written = ["Not scored yet."] if found is None else [
        origin(named, found), quality(ways, found["rows"])]  # fmt: skip
    return [
        *several, origin(name, record), *([shown] if shown else []), study(ways),
        "### Sentences of the test set", *written,
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--name", default="finetune_e2e", help="of the study's result")
    parser.add_argument("--docs", type=Path, default=DOCS)
    args = parser.parse_args()
    found = lambda name: read(name, args.results)
    text = ["# Fine-tuning", INTRO]
    for card, title in (("", "E2E: one model, many ways"), ("_h200", "E2E on an H200")):
        name, scores, model = args.name + card, f"e2e_metrics{card}", f"pretrain_lm{card}"
        if (record := found(name)) is None:
            text += [f"## {title}", "Not measured yet."]
            continue
        shown = "" if card else "![Losses, and loss against time](finetuning.png)"
        models = [x for x in (model, f"{model}_2", f"{model}_3") if found(x)]
        text += [f"## {title}", *(line for x in models for line in of_model(x, found(x))),
                 *of_study(name, record, (scores, found(scores)), shown)]  # fmt: skip
        if shown:
            picture(best_rates(record["rows"])).savefig(args.docs / "finetuning.png", dpi=120)
    if (before := found("finetune_e2e_straight_through")) is not None:
        text += ["## E2E with a straight-through coefficient", STRAIGHT_THROUGH,
                 origin("finetune_e2e_straight_through", before),
                 study(best_rates(before["rows"]))]  # fmt: skip
    for name, title in (("spt_block_gpu", "One block, 16 sequences of 512"),
                        ("spt_block_long_gpu", "One block, long sequences")):  # fmt: skip
        text.append(f"## {title}")
        if (measured := found(name)) is None:
            text.append("Not measured yet.")
        else:
            text += [origin(name, measured), blocks(measured)]
    (args.docs / "finetuning.md").write_text("\n\n".join(text) + "\n")
    print(args.docs / "finetuning.md")


if __name__ == "__main__":
    main()
