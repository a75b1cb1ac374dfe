"""Tests the report of a curation: its counts, and that texts of rows cannot change a terminal or a page."""

from dataclasses import replace
from pathlib import Path

from rollout.data.decontamination import Benchmarks
from stages.curation.filters import (
    CandidateRow,
    DecontaminationFilter,
)
from stages.curation.folder import CurationFolder
from stages.curation.report import make_report
from stages.curation.run import run_blocks
from tests.support.curation import prompt_with_text, row


def test_a_report_for_a_terminal_has_no_control_characters(tmp_path: Path) -> None:
    out = CurationFolder(tmp_path)
    asked = prompt_with_text("What is \x1b[2J leaked?", "x\x07")
    filters = {"decontamination": DecontaminationFilter(Benchmarks([replace(asked, id="b")], 64))}
    run_blocks([[CandidateRow(asked, 0)]], filters, out, ["s"], lambda message: None)
    text = make_report([out.decisions(0)], ["decontamination"], ["s"]).text()
    assert "What is [2J leaked?" in text and not set("\x1b\x07") & set(text)


def test_a_report_counts_each_source_separately(tmp_path: Path) -> None:
    out = CurationFolder(tmp_path)
    rows = [CandidateRow(row("leaked").prompt, 0), CandidateRow(row("fine").prompt, 1)]
    filters = {"decontamination": DecontaminationFilter(Benchmarks([prompt_with_text("What is leaked?", "b")], 64))}
    run_blocks([rows], filters, out, ["one.jsonl", "two.jsonl"], lambda message: None)
    report = make_report([out.decisions(0)], ["decontamination"], ["one.jsonl", "two.jsonl"])
    assert [(one.source, one.before, one.after) for one in report.counts] == [
        ("", 2, 1),
        ("one.jsonl", 1, 0),
        ("two.jsonl", 1, 1),
    ]


def test_texts_of_models_are_escaped_in_the_html_report(tmp_path: Path) -> None:
    out = CurationFolder(tmp_path)
    bad = CandidateRow(prompt_with_text("<script>alert(1)</script>", "x"), 0)
    filters = {"decontamination": DecontaminationFilter(Benchmarks([bad.prompt], 64))}
    run_blocks([[bad]], filters, out, ["s"], lambda message: None)
    page = make_report([out.decisions(0)], ["decontamination"], ["s"]).html()
    assert "<script>" not in page and "&lt;script&gt;" in page
