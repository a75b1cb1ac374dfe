"""Tests docs/writing_rewards.md (the guide). The tests write the files that the guide shows, run the commands of the
guide in order, and compare the output with the guide."""

import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from rewards.__main__ import main as rewards_command
from tests.support.command import NOTHING, ROOT, metrics, run
from tests.support.judge_server import judge_server, text_of

GUIDE = ROOT / "docs/writing_rewards.md"
EXAMPLE = ROOT / "examples/brief_rewards"
TRAINING, PACKAGE, JUDGE = "Train with it", "A package of rewards", "Asking a judge"


@dataclass(frozen=True)
class Block:
    """A fenced code block of the guide, with its language, its section, and the line before it."""

    language: str
    section: str
    before: str
    text: str

    @property
    def file(self) -> str | None:
        """The file name of the code block if the line before the block is a file name, else None."""
        named = re.fullmatch(r"`([\w./]+)`:", self.before)
        return named[1] if named else None


@dataclass(frozen=True)
class Step:
    """A command of the guide, and the lines of the command's output that the guide shows."""

    section: str
    command: str
    shown: Sequence[str] = ()


def blocks() -> list[Block]:
    found, section, before, lines = [], "", "", iter(GUIDE.read_text().splitlines())
    for line in lines:
        if line.startswith("```"):
            inside = "".join(f"{one}\n" for one in iter(lambda: next(lines), "```"))
            found.append(Block(line.removeprefix("```"), section, before, inside))
            before = line
        elif line.strip():
            section = line.removeprefix("## ") if line.startswith("## ") else section
            before = line
    return found


def steps(*sections: str) -> list[Step]:
    """Returns the commands of the given sections. If no section is given, the result contains the commands of all
    sections except TRAINING, PACKAGE and JUDGE, which have their own tests."""
    found: list[Step] = []
    for block in blocks():
        if block.language == "sh":
            lines = block.text.replace("\\\n", " ").splitlines()
            found += [Step(block.section, line) for line in lines]
        elif block.language == "text" and block.before == "```sh":
            found[-1] = Step(block.section, found[-1].command, block.text.splitlines())
    if sections:
        return [one for one in found if one.section in sections]
    return [one for one in found if one.section not in (TRAINING, PACKAGE, JUDGE)]


def follow(step: Step, folder: Path, *more: object, environment: Mapping[str, str] = NOTHING) -> str:
    """Runs a command of the guide in `folder`, checks that it prints the lines that the guide shows, and returns all of
    the output."""
    words = shlex.split(step.command)
    if words[:2] == ["python", "-m"]:
        code, out, err = run(*words[2:], *more, folder=folder, environment=environment)
    else:
        done = subprocess.run(step.command, shell=True, cwd=folder, capture_output=True, text=True, timeout=60)
        code, out, err = done.returncode, done.stdout, done.stderr
    assert code == 0, f"{step.command}\n{out[-2000:]}\n{err[-2000:]}"
    printed = [plain(line) for line in out.splitlines()]
    for line in step.shown:
        pattern = ".*".join(re.escape(part) for part in plain(line).split("..."))
        assert any(re.fullmatch(pattern, one) for one in printed), f"{step.command} does not print {line!r}:\n{out}"
    return out


def plain(line: str) -> str:
    """Removes times and column widths from a line of output, because they can change each time a command is run."""
    line = re.sub(r'"seconds": [^,}]+|\b\d+\.\d{3}(?=  )', "seconds", line)
    return " ".join(line.split())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with only the files that the guide shows."""
    for block in blocks():
        if block.file:
            (tmp_path / block.file).write_text(block.text)
    return tmp_path


def scores(target: str, *arguments: object, folder: Path, environment: Mapping[str, str] = NOTHING) -> list[float]:
    code, out, err = run("rewards", "try", target, *arguments, "--json", folder=folder, environment=environment)
    assert code == 0, err
    return [round(json.loads(line)["score"], 4) for line in out.splitlines()]


# The guide


def test_a_reward_in_a_file_is_tried_and_named_by_a_recipe_as_the_guide_says(folder: Path) -> None:
    assert len(steps()) == 5
    for step in steps():
        follow(step, folder)


def test_a_run_trains_with_the_guides_reward_and_its_rollouts_can_be_scored_again(folder: Path) -> None:
    train, look, again, by_recipe = steps(TRAINING)
    follow(train, folder)
    lines = metrics(folder / "runs/first")
    assert [line["iteration"] for line in lines] == [0, 1, 2, 3]
    assert all(line["reward/invalid_fraction"] == 0 for line in lines[1:])
    for step in (look, again):
        follow(step, folder)
    tried = [json.loads(line)["score"] for line in follow(by_recipe, folder).splitlines()]
    with gzip.open(folder / "runs/first/rollouts/000001.jsonl.gz", "rt") as file:
        stored = [json.loads(line) for line in file]
    assert tried and tried == [sample["reward"] for sample in stored if sample["task"] == "arithmetic"]
    _compared_after_a_change(folder)


def _compared_after_a_change(folder: Path) -> None:
    """The scores of the run in `folder` are compared with those of the same reward, and of a changed reward."""
    again = ("rewards", "try", "my_recipe.yaml:arithmetic", "runs/first/rollouts/000001.jsonl.gz", "--compare")
    code, _, err = run(*again, folder=folder)
    assert code == 0 and "scores are as expected" in err
    recorded = json.loads((folder / "runs/first/rewards.json").read_text())
    assert [entry["first_iteration"] for entry in recorded] == [1]
    assert "right_and_short" in recorded[0]["rewards"]["arithmetic"]
    file = folder / "my_reward.py"
    file.write_text(file.read_text().replace("return 0.0", "return 0.25"))
    code, _, err = run(*again, folder=folder)
    assert code == 2 and "0.25, not 0" in err


WRONG_CASES = {
    '{"reward": "exact", "ground_truth": "a", "response": "b", "expected": 1}': "1 of 1 scores differ (100.0%)",
    '{"reward": "exact", "ground_truth": "a", "response": "b"}': "a case needs `expected`",
    '{"reward": "exact", "ground_truth": "a", "response": "b", "expected": [1, 0]}': "expected is [1, 0]",
    '{"ground_truth": "a", "response": "b", "expected": 1}': "a case needs `reward`",
    '{"reward": "exat", "ground_truth": "a", "response": "b", "expected": 1}': "no reward is called 'exat'",
}


@pytest.mark.parametrize(("line", "said"), WRONG_CASES.items())
def test_a_case_with_another_score_and_a_case_that_cannot_be_read_end_with_code_2(
    line: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cases.jsonl"
    file.write_text(line + "\n")
    assert rewards_command(["try", "--cases", str(file)]) == 2
    assert said in capsys.readouterr().err


def test_invalid_can_be_expected(tmp_path: Path) -> None:
    file = tmp_path / "cases.jsonl"
    file.write_text('{"reward": "iou", "ground_truth": "x", "response": "b", "expected": "invalid"}\n')
    assert rewards_command(["try", "--cases", str(file)]) == 0


def test_a_judge_is_asked_as_the_guide_says(folder: Path) -> None:
    dry_run, trial = steps(JUDGE)
    assert "genrm" in (folder / "judged.yaml").read_text()
    follow(dry_run, folder)

    def verdict(request: dict) -> dict[str, object]:
        if "understand this answer" in text_of(request):
            return {"reasoning": "plain", "clear": True}
        return {"reasoning": "equal", "verdict": "incorrect" if "Answer: 12" in text_of(request) else "correct"}

    with judge_server(verdict) as server:
        recipe = folder / "judged.yaml"
        recipe.write_text(recipe.read_text().replace("http://127.0.0.1:8000/v1", server.url))
        _, *lines, last = follow(trial, folder).splitlines()
    found = dict(re.findall(r"^(.+?)  +([\d.]+) ", "\n".join(lines), re.MULTILINE))
    assert found == {"short": "1.0000", "long": "1.0000", "wrong": "0.3000", "no end": "0.0000"}
    assert last == "4 samples, mean 0.5750, 0 invalid"


def test_code_that_the_guide_quotes_is_code_of_the_example(folder: Path) -> None:
    sources = {
        "python": (EXAMPLE / "brief_rewards/__init__.py").read_text(),
        "yaml": (EXAMPLE / "my_recipe.yaml").read_text(),
        "toml": (EXAMPLE / "pyproject.toml").read_text(),
    }
    quoted = [block for block in blocks() if block.language in sources and not block.file]
    assert len(quoted) == 6
    for block in quoted:
        assert block.text in sources[block.language], block.text


def test_the_guides_tables_name_every_reward_that_ships() -> None:
    code, out, err = run("rewards", "list")
    assert code == 0, err
    listed = {line.split(":")[0].removesuffix(" (sees the group)") for line in out.splitlines() if line[0] != " "}
    _, rewards, penalties, judges = re.split(r"^\| (?:reward|penalty|row judge) \|", GUIDE.read_text(), flags=re.M)
    tables = {*re.findall(r"^\| `(\w+)`", rewards, re.M)}
    tables |= {f"{name} (penalty)" for name in re.findall(r"^\| `(\w+)`", penalties, re.M)}
    tables |= {f"{name} (row judge)" for name in re.findall(r"^\| `(\w+)`", judges, re.M)}
    examples = {"no_filler", "repeated_lines (penalty)", "right_and_brief", "shortest_right"}
    assert tables == listed - examples


# The example package


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A copy of the example's folder, and the environment variables that make the installed example importable."""
    copy, target = tmp_path_factory.mktemp("theirs") / "copy", tmp_path_factory.mktemp("installed")
    built = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
    shutil.copytree(EXAMPLE, copy, ignore=built)
    install, *_ = steps(PACKAGE)
    assert "pip install" in install.command
    follow(install, copy, "--no-deps", "--no-index", "--target", target)
    return copy, {"PYTHONPATH": os.pathsep.join([str(target), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}


def test_an_installed_package_works_in_every_command_of_the_guide(
    installed: tuple[Path, dict[str, str]],
) -> None:
    copy, environment = installed
    for step in steps(PACKAGE)[1:]:
        follow(step, copy, environment=environment)


def test_entry_points_are_found_from_any_folder(installed: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    shutil.copy(EXAMPLE / "samples.jsonl", tmp_path)
    shorter = scores(
        "right_and_brief", "samples.jsonl", "--param", "limit=31", folder=tmp_path, environment=installed[1]
    )
    # Three right responses are longer than the limit of 31 characters: they have 62, 116 and 58 characters, and score
    # 31 divided by their length. The other right responses are shorter and score 1. Wrong and truncated responses score
    # 0.
    assert shorter == [1.0, 0.5, round(31 / 116, 4), 0.0, 1.0, round(31 / 58, 4), 0.0, 0.0]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("right_and_brief", [1, 1, 1, 0, 1, 1, 0, 0]),
        # In two responses, more than a fifth of the words are filler words: 7 of 23, and 4 of 11. These two score 0.
        ("no_filler", [1, 1, 0, 1, 1, 0, 1, 0]),
        # In a group, the shortest right response scores 1, and the longest right response scores 0.5. The first group
        # has three right responses, and the second group has two.
        ("shortest_right", [1, 0.75, 0.5, 0, 1, 0.5, 0, 0]),
        # The score is 1 minus the penalty. In the third response, two of five lines are repeated: the penalty is 0.4.
        ("repeated_lines", [1, 1, 0.6, 1, 1, 1, 1, 0]),
        # The score is 0.8 * right_and_brief + 0.1 * shortest_right + 0.1 * no_filler. right_and_brief has a limit of 60
        # characters. The penalty repeated_lines lowers right_and_brief, with the magnitude 0.5. no_filler is 0 if half
        # of the words are filler words.
        # The second response: 0.8 * 60/62 + 0.1 * 0.75 + 0.1.
        # The third response: 0.8 * 60/116 * (1 - 0.5 * 0.4) + 0.1 * 0.5 + 0.1 * (1 - 7/23 / 0.5).
        # The sixth response: 0.8 + 0.1 * 0.5 + 0.1 * (1 - 4/11 / 0.5).
        ("my_recipe.yaml:arithmetic", [1, 0.9492, 0.4202, 0.1, 1, 0.8773, 0.1, 0]),
    ],
)
def test_the_examples_rewards_score_its_samples(
    installed: tuple[Path, dict[str, str]], target: str, expected: list[float]
) -> None:
    assert scores(target, "samples.jsonl", folder=installed[0], environment=installed[1]) == expected


def test_the_examples_recipe_uses_every_name_of_its_package() -> None:
    recipe = yaml.safe_load((EXAMPLE / "my_recipe.yaml").read_text())
    parts = [part for one in recipe["rewards"]["arithmetic"] for part in (one, *one.get("penalties", []))]
    named = re.findall(r"^(\w+) = \"brief_rewards:", (EXAMPLE / "pyproject.toml").read_text(), re.M)
    assert sorted(part["use"] for part in parts) == sorted(named)


# Row judges


def test_row_judges_are_tried_on_the_rows_of_samples(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from rewards import Prompt, row_judge\n\n\n"
        '@row_judge("short_truth")\n'
        "def short_truth(row: Prompt, most: int = 1) -> float:\n"
        "    return float(len(str(row.ground_truth)) <= most)\n"
    )
    samples = [{"id": str(truth), "ground_truth": truth, "response": "unread"} for truth in (5, 12)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    assert scores("mine.py:short_truth", "samples.jsonl", folder=tmp_path) == [1.0, 0.0]
    assert scores("mine.py:short_truth", "samples.jsonl", "--param", "most=2", folder=tmp_path) == [1.0, 1.0]


def test_the_judges_of_a_curation_recipe_are_tried_by_filter_and_pass(tmp_path: Path) -> None:
    sample = {"id": "a", "messages": [{"role": "user", "content": "2 + 3?"}], "ground_truth": 5, "response": "unread"}
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    with judge_server([{"reasoning": "fine", "verdict": "valid"}]) as server:
        endpoints = {"checker": {"url": server.url, "model": "m"}}
        recipe = {"base": "curate", "endpoints": endpoints, "model": {"path": "none"}}
        (tmp_path / "mine.yaml").write_text(json.dumps(recipe))
        assert scores("mine.yaml:checkability/1", "samples.jsonl", folder=tmp_path) == [1.0]
