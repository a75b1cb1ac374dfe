"""Saves a small model in a folder. The tests of policy and critic load the model from this folder."""

import pytest

from rl.model import hf_folder
from tests.support.models import step_vl


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a small STEP3-VL model. Tests must not write to it."""
    path = tmp_path_factory.mktemp("step_vl")
    hf_folder.save(step_vl(), path)
    return str(path)
