"""Tests the pages README, CONTRIBUTING and docs/. The commands in these pages must work. The files, options, metrics
and messages that the pages name must exist.

The tests of this file run the commands. Commands that would train are run with --dry-run. ELSEWHERE lists the test
files for commands without a dry run. docs/writing_rewards.md has its own test file, test_reward_guide.py.
"""

import ast
import gzip
import importlib
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import zeros

from rl.config import Config
from rl.recipe.chain import load_chain, saved_chain
from rl.recipe.errors import declared
from rl.recipe.resolve import load
from rl.record.metrics import describe
from tests.support.command import ROOT

PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))]
TESTED_HERE = [page for page in PAGES if page != "docs/writing_rewards.md"]
PROGRAMS = ("python", ".venv/bin/python", "make", "ray", "zcat")
FREE = ("rewards.NAME.params", "endpoints.NAME.serve")  # sections whose options may have any name
SCALE = ROOT / "recipes/scale"
DRY_RUNS = ("rl.run", "stages.curate")

ELSEWHERE = {  # first words of a command -> test files that run this command with all its options
    "ray": ["tests/runs/test_ray_job.py"],
    "python -m benchmarks": ["tests/benchmarks/test_harness.py"],
    "python -m rl.model.compare": ["tests/rl/model/test_compare.py"],
    "python -m rl.evaluate": ["tests/rollout/test_generate.py", "tests/stages/evaluation/test_scores.py"],
    "python -m rollout.generate": ["tests/rollout/test_generate.py"],
    "python -m rollout.serve": ["tests/rollout/test_serve.py"],
    "python -m tests.chaos": ["tests/runs/test_chaos.py"],
}


@dataclass(frozen=True)
class Block:
    """A fenced code block of a page."""

    language: str
    text: str


def blocks(page: str) -> list[Block]:
    pairs = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", (ROOT / page).read_text(), re.M | re.S)
    return [Block(language, text) for language, text in pairs]


def prose(page: str) -> str:
    """Returns the text of a page without the fenced code blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", (ROOT / page).read_text(), flags=re.M | re.S)


def commands(page: str) -> Iterator[str]:
    """Yields the commands in a page's shell code blocks, without comments."""
    for block in blocks(page):
        if block.language == "sh":
            for line in re.sub(r" *\\\n +", " ", block.text).splitlines():
                if line.lstrip().startswith(PROGRAMS):
                    yield re.sub(r"\s+#.*", "", line).strip()


def spans(page: str) -> list[str]:
    """Returns the texts between single backticks in the prose of a page, without line breaks."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


ROOMS = ("rl", "rewards", "rollout", "stages", "recipes", "tests", "tools", "docs")
COMMANDS = sorted({command for page in TESTED_HERE for command in commands(page)})
MENTIONED = sorted({span for page in TESTED_HERE for span in spans(page) if span.startswith(("python -m ", "make "))})


# Commands


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all files that the commands use: recipes, models, rows, a run, a chain, and the README's
    reward."""
    folder = tmp_path_factory.mktemp("desk")
    for name in ("recipes", "tools"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("rlvr", "pacore"):
        (folder / name).mkdir()
        (folder / name / "policy").symlink_to(SCALE / "model")
    write_critic(folder / "rlvr/checkpoints/000600/critic")
    chats = rows("open-train.jsonl", "describing")
    for chat in chats:
        picture = folder / chat["messages"][0]["content"][0]["image"]  # a path relative to the rows
        picture.parent.mkdir(exist_ok=True)
        shutil.copy(SCALE / "data" / picture.relative_to(folder), picture)
    sums = rows("train.jsonl", "arithmetic")
    pools = [{**row, "messages_pool": ["7"] * 24, "pool_accuracy": 0.5} for row in sums]
    samples = [{"id": "1", "ground_truth": "11", "response": "11"}]
    for name, lines in {
        "chats.jsonl": chats, "heldout.jsonl": chats, "sums.jsonl": sums, "curated/rows/00000.jsonl": pools,
        "samples.jsonl": samples,
    }.items():  # fmt: skip
        write(folder / name, lines)
    (reward,) = (block.text for block in blocks("README.md") if block.language == "python")
    (folder / "my_reward.py").write_text(reward)
    (folder / "my_recipe.yaml").write_text("base: rlvr\nrewards: {arithmetic: {use: my_reward.py:right_and_short}}\n")
    write_run(folder / "RUN_DIR", sums)
    rows_of = {"rlvr": folder / "sums.jsonl", "rlhf": folder / "chats.jsonl"}
    overrides = ["data.eval=[]", *(f"{stage}.data.train={path}" for stage, path in rows_of.items())]
    chain = load_chain(ROOT / "recipes/step3_vl.yaml", folder / "all", profile="cpu", overrides=overrides)
    for name, text in saved_chain(chain).items():
        (folder / "all" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "all" / name).write_text(text)
    return folder


def rows(file: str, task: str) -> list[dict]:
    """Returns the first two rows of a task from the scale model's data."""
    all_rows = map(json.loads, (SCALE / "data" / file).read_text().splitlines())
    return [row for row in all_rows if row["task"] == task][:2]


def write_critic(folder: Path) -> None:
    """Writes a critic: the scale model's decoder with a value head."""
    tensors = load_file(SCALE / "model/model.safetensors")
    trunk = {name: tensor for name, tensor in tensors.items() if name.startswith("model.")}
    folder.mkdir(parents=True)
    width = trunk["model.norm.weight"].shape[0]
    save_file({**trunk, "value_head.weight": zeros(1, width)}, folder / "model.safetensors")


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_run(folder: Path, rows: list[dict]) -> None:
    """Writes the folder of a run with a recipe, metrics and two samples. One of the samples is invalid."""
    (folder / "rollouts").mkdir(parents=True)
    few_rows = [f"data.train={folder.parent / 'sums.jsonl'}", "data.eval=[]"]
    (folder / "recipe.yaml").write_text(load(ROOT / "recipes/rlvr.yaml", profile="cpu", overrides=few_rows).yaml())
    numbers = {"reward/arithmetic": 0.5, "response/tokens_mean/arithmetic": 9.0}
    write(folder / "metrics.jsonl", [{"iteration": 1, "stage": "rlvr", **numbers}])
    samples = [{**row, "response": "7", "invalid": why} for row, why in zip(rows, (None, "KeyError: 'x'"), strict=True)]
    with gzip.open(folder / "rollouts/000001.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(sample) + "\n" for sample in samples))


def filled_in(command: str) -> str:
    """Returns a command in which the placeholders, such as POLICY, are replaced by values."""
    for name, value in {
        "POLICY": SCALE / "model", "GENRM": SCALE / "judge", "TASK": "arithmetic", "/my/model": SCALE / "model",
        "/my/train.jsonl": "sums.jsonl", "/my/heldout.jsonl": "sums.jsonl",
    }.items():  # fmt: skip
        command = command.replace(name, str(value))
    return command


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith(tuple(ELSEWHERE))])
def test_a_command_works(
    command: str, desk: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(desk)
    words = shlex.split(filled_in(command))
    if words[0] == "make":
        shell(f"{command} --dry-run", ROOT)
    elif words[1:3] == ["-m", "pytest"]:
        assert (ROOT / words[-1]).is_file()
    elif words[:2] == ["python", "-m"]:
        module, arguments = words[2], words[3:]
        if module in DRY_RUNS:
            arguments += [] if "--dry-run" in arguments else ["--dry-run"]
            arguments += [] if {"--profile", "--resume"} & set(arguments) else ["--profile", "cpu"]
        assert entry(module).main(arguments) == 0, capfd.readouterr().err
    else:
        shell(filled_in(command).replace("python ", f"{sys.executable} ", 1), desk)


def shell(command: str, folder: Path) -> None:
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", command], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def entry(module: str) -> Any:
    """Returns the module that `python -m` runs."""
    return importlib.import_module(f"{module}.__main__" if (ROOT / module).is_dir() else module)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith(tuple(ELSEWHERE))])
def test_a_command_without_a_dry_run_has_a_test_that_runs_it(command: str) -> None:
    (tests,) = (tests for start, tests in ELSEWHERE.items() if command.startswith(start))
    source = "".join((ROOT / test).read_text() for test in tests)
    own, _, inner = command.partition(" -- ")  # in `ray job submit ... -- inner`, `inner` is one of the other commands
    for option in re.findall(r"(?<= )--[a-z][a-z-]*", own):
        assert f'"{option}"' in source, f"{option} is in no test of {tests}"
    assert any(c.startswith(inner.partition(" --output")[0]) for c in COMMANDS)
    if own.startswith("python -m") and hasattr(entry(own.split()[2]), "parser"):
        entry(own.split()[2]).parser().parse_intermixed_args(shlex.split(own)[3:])


def test_make_demo_is_the_command_that_the_docs_show_and_test_learning_runs() -> None:
    done = subprocess.run(["make", "--dry-run", "demo"], cwd=ROOT, capture_output=True, text=True)
    assert "-m rl.run recipes/rlvr.yaml --profile cpu --output runs/demo-" in done.stdout
    assert "python -m rl.run recipes/rlvr.yaml --profile cpu" in COMMANDS
    tested = (ROOT / "tests/runs/test_learning.py").read_text()
    assert '("rl.run", ROOT / "recipes/rlvr.yaml", "--profile", "cpu"' in tested


@pytest.mark.parametrize("mention", MENTIONED)
def test_a_command_that_prose_names_exists(mention: str) -> None:
    program, *words = mention.split()
    if program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.M)
    else:
        assert importlib.util.find_spec(words[1]), mention


# Code blocks, links, files, options, metrics, messages


@pytest.mark.parametrize("page", PAGES)
def test_every_fenced_block_has_a_language(page: str) -> None:
    assert all(block.language for block in blocks(page))


@pytest.mark.parametrize("page", [*PAGES, "recipes/README.md", "recipes/scale/README.md"])
def test_every_file_and_heading_that_a_page_links_to_is_there(page: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not link.startswith("http"):
            target, _, heading = link.partition("#")
            file = (ROOT / page).parent / target if target else ROOT / page
            assert file.exists(), f"{page} links to {link}"
            assert not heading or heading in anchors(file), f"{page} links to {link}"


def anchors(file: Path) -> set[str]:
    """Returns the anchors of a page's headings, which GitHub uses in links to the headings."""
    headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_a_link_to_a_file_shows_the_files_path(page: str) -> None:
    for text, link in re.findall(r"\[(\w+/[\w./]+)\]\(([\w./]+)\)", prose(page)):
        file = ((ROOT / page).parent / link).resolve()
        assert file == ROOT / text or file.parent == ROOT / text, f"{page}: {text} links to {link}"


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_is_there(page: str) -> None:
    paths = [span for span in spans(page) if re.fullmatch(rf"({'|'.join(ROOMS)})/[\w/.]+", span)]
    missing = [path for path in paths if not (ROOT / path).exists() and not is_metric(path) and "NAME" not in path]
    assert missing == [], page


def is_metric(name: str) -> bool:
    try:
        return bool(describe(name.replace("<task>", "sums").replace("<part>", "exact")))
    except ValueError:
        return False


@pytest.mark.parametrize("page", TESTED_HERE)
def test_every_option_and_metric_that_a_page_names_exists(page: str) -> None:
    sections = "|".join(Config.model_fields)
    options = declared({"rewards": {"NAME": {}}, "endpoints": {"NAME": {}}}).keys() | {"rewards.NAME"}
    for span in spans(page):
        option = re.match(rf"(?:(?:rlvr|rlhf|pacore)\.)?((?:{sections})(?:\.\w+)+)", span)
        if option and not (ROOT / "/".join(span.split(".")[:2])).exists():  # skips a package such as rewards.running
            name = re.sub(r"^(rewards|endpoints)\.\w+", r"\1.NAME", option[1])
            assert name in options or name.startswith(tuple(f"{free}." for free in FREE)), f"{page}: {span}"
        if re.fullmatch(r"(reward|eval|response|pacore|genrm|penalty|policy|value|time|checkpoint)/[\w/<>]+", span):
            assert is_metric(span), f"{page}: {span}"


def messages() -> str:
    """Returns all strings in the source. In f-strings, each value is replaced by `...`."""
    texts = []
    for room in ("rl", "rewards", "rollout", "stages"):
        for file in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = (part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
                    texts.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
    return "\n".join(texts)


def test_every_message_that_debugging_quotes_is_in_the_code() -> None:
    source = messages()
    quoted = [" ".join(quote.split()) for quote in re.findall(r'"([^"]+)"', prose("docs/debugging.md"))]
    assert len(quoted) > 20
    parts = [part.strip() for quote in quoted if "`" not in quote for part in quote.split("...")]
    assert [part for part in parts if part and part not in source] == []


def test_the_glossary_is_sorted_and_has_each_term_once() -> None:
    terms = re.findall(r"^\*\*(.+?)\.\*\*", (ROOT / "docs/glossary.md").read_text(), re.M)
    assert len(terms) > 50 and terms == sorted(set(terms), key=str.lower)


def test_the_readme_is_short_and_its_picture_is_small_and_it_gives_the_size_of_the_wheel() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 160
    (size,) = re.findall(r"The wheel is\s+(\d+ MB) large", text)
    # test_installed.py checks the size in recipes/README.md with a real wheel.
    assert f"The wheel is {size} large" in (ROOT / "recipes/README.md").read_text()
    assert (ROOT / "docs/learning_curve.svg").stat().st_size < 60_000
