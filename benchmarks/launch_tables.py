"""The table of launches in docs/attention.md, of what `launches.py` counted."""

from report import table

TEXT = (
    "Kernels of ours, and what XLA makes of the arrays around them: lists, identifiers, delta. A "
    "launch takes 1 to 2 us and more even if there is next to nothing to do, and short attention "
    "10 to 30. Counted in the programs that XLA compiles for an H200, without one; bfloat16, 16 "
    "heads, one pattern for all (`blocks`: one each), 64 features. In brackets: at commit "
    "{commit}, which made lists by scatters and scans, looked through them in passes of XLA's, and "
    "dealt rows out once more for dQ."
)


def launches(record: dict, before: dict) -> str:
    """Launches of forward, and of both passes, by length."""
    old = {(row["case"], row["length"]): row for row in before["rows"]}
    lengths = sorted({row["length"] for row in record["rows"]})
    cases = dict.fromkeys(row["case"] for row in record["rows"])
    found = {(row["case"], row["length"]): row for row in record["rows"]}
    cell = lambda key, name: f"{found[key][name]} ({old[key][name]})"
    head = ["pattern"] + [f"{n:,} {name}" for n in lengths for name in ("forward", "both")]
    rows = [
        [case] + [cell((case, n), name) for n in lengths for name in ("forward", "both")]
        for case in cases
    ]
    return table(head, rows)
