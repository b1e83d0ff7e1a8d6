"""Every report is written from the results that are committed."""

import importlib
import sys
from pathlib import Path

import pytest
import report
import report_routed

REPORTS = sorted((Path(__file__).parents[1] / "benchmarks").glob("report_*.py"))


@pytest.mark.parametrize("name", [path.stem for path in REPORTS])
def test_report_is_written_from_what_is_committed(name, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, "--docs", str(tmp_path)])
    importlib.import_module(name).main()
    written = list(tmp_path.glob("*.md"))
    assert written
    for path in written:
        committed = REPORTS[0].parents[1] / "docs" / path.name
        assert path.read_text() == committed.read_text(), f"run benchmarks/{name}.py again"


@pytest.mark.parametrize(
    ("way", "gated", "again", "kept"),
    [("trained", False, 7, 6), ("lora", False, 5, 4), ("trained", True, 11, 9),
     ("lora", True, 8, 6)],
)  # fmt: skip
def test_rows_that_keep_their_products_are_told_apart(way, gated, again, kept):
    rows = report_routed.read("routed_ffn_gpu")["rows"]
    old = next(row for row in rows if row["way"] == way) | {"gated": gated}
    del old["recompute"]  # as in results from before there was a choice
    rows = [old, old | {"recompute": True}, old | {"recompute": False}]
    found = [(report_routed.shape(row)[3], *report_routed.products(row)) for row in rows]
    name = ("all" if way == "trained" else "LoRA") + ", gated" * gated
    assert found == [(name, kept, again)] * 2 + [(f"{name}, kept", kept, kept)]


def test_the_report_says_what_kept_rows_are(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report_routed", "--docs", str(tmp_path)])
    report_routed.main()
    text = (tmp_path / "routed.md").read_text()
    rows = [
        line.split(" | ")
        for line in text.splitlines()
        if "2,048 | 8,192 | 4 of 8 | all, kept |" in line
    ]
    measured = next(
        row["routed"]["both_ms"] for row in report.read("routed_ffn_gpu")["rows"]
        if (row["features"], row["blocks"], row["way"]) == (2048, 8, "trained")
        and not row["recompute"]
    )  # fmt: skip
    # Milliseconds in one table, in the other G / k at most.
    assert [row[8] for row in rows] == [report.number(measured), "2.00"]
