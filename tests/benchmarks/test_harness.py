"""Tests the harness of the benchmarks and the command `python -m benchmarks`, with benchmarks that measure nothing."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import harness
from benchmarks.__main__ import main
from benchmarks.harness import RESULTS, Result, benchmark, entries, interleaved, max_abs_diff
from benchmarks.rewards import pairs

KEYS = ["name", "ours_s", "other_s", "ratio", "ceiling", "max_abs_diff"]


@pytest.fixture
def trivial(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Registers the benchmarks "test/one" and "test/two". Yields a list. A benchmark that runs adds its name to this
    list."""
    ran: list[str] = []
    monkeypatch.setattr(harness, "_ENTRIES", dict(entries()))

    @benchmark("test/one")
    def one() -> Result:
        """Measures nothing. Returns a constant result."""
        ran.append("one")
        return Result(2.0, 3.0, 1.5, more={"goal": "none"})

    @benchmark("test/two")
    def two() -> Result:
        """Measures nothing. Returns another constant result."""
        ran.append("two")
        return Result(0.123456, 1 / 3, 2.7, 2.0, 1e-7)

    yield ran


def test_every_benchmark_has_a_docstring() -> None:
    found = entries()
    shapes = {"demo", "rlvr", "pacore", "judge"}
    learner = {f"learner/{side}{shape}" for side in ("", "padded/", "verl/") for shape in shapes}
    others = {
        "async/one_step_off",
        "curation",
        "gae",
        "growth",
        "inference/ngram",
        "inference/parallel",
        "inference/prefix_cache",
        "iteration/trl",
        "laptop/busy",
        "logits",
        "rewards/hung",
        "rewards/math",
        "sync",
    }
    assert set(found) == learner | others
    assert [name for name, entry in found.items() if not (entry.__doc__ or "").strip()] == []


def test_a_benchmark_without_a_docstring_or_with_the_name_of_another_is_refused(trivial: list[str]) -> None:
    with pytest.raises(ValueError, match="has no docstring"):
        benchmark("test/silent")(lambda: Result(1.0, 1.0, 1.0))

    def again() -> Result:
        """A benchmark with the same name as a benchmark in another file."""
        return Result(1.0, 1.0, 1.0)

    with pytest.raises(ValueError, match="two benchmarks are called 'rewards/hung'"):
        benchmark("rewards/hung")(again)


def test_both_sides_run_in_turns_and_the_result_is_the_median() -> None:
    turns: list[str] = []
    times = {"ours": iter([5.0, 1.0, 2.0]), "other": iter([4.0, 40.0, 6.0])}

    def side(name: str) -> float:
        turns.append(name)
        return next(times[name])

    assert interleaved(lambda: side("ours"), lambda: side("other"), repeats=3) == (2.0, 6.0)
    assert turns == ["ours", "other", "other", "ours", "ours", "other"]
    assert max_abs_diff([1.0, 2.0], [1.0, 2.5]) == 0.5
    with pytest.raises(ValueError, match="shorter"):
        max_abs_diff([1.0, 2.0], [1.0])


def test_named_benchmarks_run_and_the_others_keep_their_lines(
    trivial: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results.jsonl"
    assert main(["test/two", "test/one", "test/two", "--results", str(file)]) == 0
    assert trivial == ["two", "one"]
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table] == ["name", "test/two", "test/one"]
    assert table[1].split() == ["test/two", "0.1235", "0.3333", "2.7", "2.0", "1e-07"]
    assert table[2].split()[4] == "-"
    old, two = map(json.loads, file.read_text().splitlines())
    assert list(old) == [*KEYS, "goal"]
    assert (list(two), two["ours_s"], two["other_s"]) == (KEYS, 0.1235, 0.3333)
    file.write_text(json.dumps({**old, "ours_s": 9.0}) + "\n" + json.dumps({**two, "ratio": 0.0}) + "\n")
    assert main(["test/two", "--results", str(file)]) == 0
    kept, new = map(json.loads, file.read_text().splitlines())
    assert (kept["ours_s"], new["ratio"]) == (9.0, 2.7)


def test_for_an_unknown_name_the_nearest_name_is_suggested_and_nothing_runs(
    trivial: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results.jsonl"
    assert main(["test/one", "test/tow", "--results", str(file)]) == 2
    said = capsys.readouterr().err
    assert "no benchmark is called 'test/tow' (did you mean 'test/two'?); there are: " in said
    assert "rewards/hung" in said
    assert (trivial, file.exists()) == ([], False)


def test_a_failed_benchmark_is_reported_and_the_others_still_run(
    trivial: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    @benchmark("test/needy")
    def needy() -> Result:
        """A benchmark that needs a package that is not installed."""
        raise RuntimeError("pip install something first")

    file = tmp_path / "results.jsonl"
    assert main(["test/needy", "test/one", "--results", str(file)]) == 1
    said = capsys.readouterr()
    assert "pip install something first" in said.err and "failed benchmarks (errors above): test/needy" in said.err
    assert trivial == ["one"] and "test/one" in said.out
    assert [json.loads(line)["name"] for line in file.read_text().splitlines()] == ["test/one"]


def test_the_results_file_has_one_line_per_measured_benchmark() -> None:
    records = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    names = [record["name"] for record in records]
    assert names == sorted(set(names))
    assert set(names) <= set(entries())
    for record in records:
        assert list(record)[: len(KEYS)] == KEYS
        assert record["ours_s"] > 0
        assert record["other_s"] > 0


def test_the_answers_to_score_are_the_same_every_time() -> None:
    made = pairs(200)
    assert made == pairs(200)
    assert len({truth for truth, _ in made}) > 150
    assert all("\\boxed{" in answer for _, answer in made)
