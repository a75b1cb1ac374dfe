"""Fixtures that several test files use. Tests share engines of vLLM."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from rewards.running.runner import RewardRunner
from tests.support import tiny
from tests.support.command import end_all
from tests.support.engine_process import RemoteEngine, engine
from tests.support.judge_server import hurry
from tests.support.reward_plugins import PLUGINS, ROW_JUDGES, TASKS

# The same inputs in every run. There is no time limit for one input, because the machine may be busy.
hypothesis.settings.register_profile("ours", derandomize=True, deadline=None, max_examples=150, database=None)
hypothesis.settings.load_profile("ours")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Moves the longest tests, which make complete runs, to the beginning. `make test` distributes the test files to
    two processes. With this order, both processes end at about the same time."""
    items.sort(key=lambda item: "runs" not in item.path.parts)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Ends the commands that a test has started. Runs after each test, whether the test has passed or failed."""
    end_all()


@dataclass(frozen=True)
class Served:
    """A model folder, the model saved in this folder, and an engine that serves the model."""

    folder: Path
    model: Any
    engine: RemoteEngine


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A Qwen3 model with tied embeddings. Tests share the engine, so the engine may have weights that an earlier test
    has loaded."""
    folder = tmp_path_factory.mktemp("tied")
    model = tiny.make_text_model(folder, tied=True)
    with engine(folder) as started:
        yield Served(folder, model, started)


@pytest.fixture(scope="session")
def step_vl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A STEP3-VL model. Tests share the engine. A test that loads other weights must load the original weights again at
    its end."""
    folder = tmp_path_factory.mktemp("step_vl")
    model = tiny.make_step_vl(folder)
    with engine(folder, max_images_per_prompt=3) as started:
        yield Served(folder, model, started)


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file plugins.py. The text of the file is PLUGINS from tests/support/reward_plugins.py."""
    path = tmp_path_factory.mktemp("recipe")
    path.joinpath("plugins.py").write_text(PLUGINS)
    return path


@pytest.fixture(scope="module")
def runner(plugins: Path) -> Iterator[RewardRunner]:
    """A reward runner with the tasks and the row judges of tests/support/reward_plugins.py."""
    with RewardRunner(TASKS, plugins, workers=2, row_judges=ROW_JUDGES) as made:
        yield made


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """With this fixture, the clients of endpoints retry almost without delay."""
    hurry(monkeypatch)
