"""Tests that timeline.json is complete after every write, and that no write waits for a busy process."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.record.timeline import Span, Timeline


class ScriptedSource:
    """A scripted process that has the given spans. Counts how often the spans are read."""

    def __init__(self, *spans: Span) -> None:
        self.unread, self.waited = list(spans), 0

    def spans(self) -> Any:
        return self

    def result(self) -> list[Span]:
        self.waited += 1
        unread, self.unread = self.unread, []
        return unread


def test_spans_of_all_processes_are_in_one_file_in_microseconds(tmp_path):
    timeline = Timeline(tmp_path / "t.json", {"engine 0": ScriptedSource(("stream", 10.5, 12.0))})
    timeline.add("loop", "rollout", 10.0, 12.5)
    timeline.write()
    timeline.add("loop", "sync", 13.0, 13.25)
    timeline.write()
    events = json.loads((tmp_path / "t.json").read_text())
    names = {e["pid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    assert [(names[e["pid"]], e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"] == [
        ("loop", "rollout", 10_000_000, 2_500_000),
        ("engine 0", "stream", 10_500_000, 1_500_000),
        ("loop", "sync", 13_000_000, 250_000),
    ]


def test_the_spans_of_a_busy_process_are_requested_at_once_and_read_later(tmp_path):
    busy = ScriptedSource(("stream", 1.0, 2.0))
    timeline = Timeline(tmp_path / "t.json", {"engine 0": busy})
    timeline.write(busy=["engine 0"])
    assert busy.waited == 0 and not (tmp_path / "t.json").exists()
    timeline.write()
    assert busy.waited == 1 and "stream" in (tmp_path / "t.json").read_text()


def test_a_resumed_run_continues_the_file_under_the_same_process_ids(tmp_path):
    for moment in (1.0, 5.0):
        timeline = Timeline(tmp_path / "t.json", {})
        timeline.add("loop", "rollout", moment, moment + 1)
        timeline.write()
    events = json.loads((tmp_path / "t.json").read_text())
    assert len(events) == 4 and len({event["pid"] for event in events}) == 1


@pytest.mark.parametrize("kept", [0, 1, 40, -1, -20])
def test_a_file_that_a_crash_has_cut_keeps_its_complete_events(tmp_path: Path, kept: int) -> None:
    file = tmp_path / "t.json"
    whole = Timeline(file, {})
    for number in range(3):
        whole.add("loop", "rollout", number, number + 1)
    whole.write()
    before = json.loads(file.read_text())
    file.write_bytes(file.read_bytes()[:kept])
    resumed = Timeline(file, {})
    resumed.add("loop", "after", 5, 6)
    resumed.write()
    *old, _, new = json.loads(file.read_text())
    assert old == before[: len(old)] and new["name"] == "after"
    assert len(old) >= (len(before) - 1 if kept < 0 else 0)


@given(content=st.binary(max_size=60) | st.text(alphabet='[]{}",:\n0e ', max_size=40).map(str.encode))
def test_a_file_with_any_content_becomes_a_valid_timeline(content: bytes, tmp_path_factory) -> None:
    file = tmp_path_factory.mktemp("fuzz") / "t.json"
    file.write_bytes(content)
    resumed = Timeline(file, {})
    resumed.add("loop", "after", 5, 6)
    resumed.write()
    assert json.loads(file.read_text())[-1]["name"] == "after"
