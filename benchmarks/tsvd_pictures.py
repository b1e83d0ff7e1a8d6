"""Pictures of tiled factors: error over compression, speed over rows."""

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from tsvd_aims import CHAINED, KINDS, best

PICTURED = "gpt2-s up", "gpt2-m up", "llama-7b out", "llama-7b down"


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


def speed_picture(rows: list[dict], common_rows: list[dict]) -> Figure:
    """How many times as fast as dense over rows, for each layer, at 4x.

    Layers in a chain and single calls are lines of their own. `common_rows` are those of the run
    that has the kernel whose common factor stays, beside a dense time of its own.
    """
    rows, common_rows = ([r for r in x if r["ratio"] == 4] for x in (rows, common_rows))
    layers = [name for name in PICTURED if any(row["layer"] == name for row in rows)]
    figure = Figure(figsize=(4.2 * len(layers) + 1.6, 4), layout="constrained")
    axes = figure.subplots(1, len(layers), squeeze=False)[0]
    for layer, axis in zip(layers, axes, strict=True):
        of_layer = lambda rows, layer=layer: sorted(
            (r for r in rows if r["layer"] == layer), key=lambda r: r["rows"]
        )
        mine = of_layer(rows)
        for i, kind in enumerate(KINDS):
            own = of_layer(common_rows) if kind == "common-shared" else mine
            for few in (True, False):
                points = [(r["rows"], best(r, kind)) for r in own if (r["rows"] <= CHAINED) == few]
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
