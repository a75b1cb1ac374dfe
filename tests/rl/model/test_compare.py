"""Tests the command that compares model folders."""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from rl.model.compare import main
from rl.model.weight_files import WEIGHTS
from tests.support import tiny
from tests.support.data_rows import jsonl


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("a", "b"):
        tiny.make_text_model(tmp_path / name, tied=False)
        (tmp_path / name / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    return tmp_path / "a", tmp_path / "b"


def change(folder: Path, name: str, by: float) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors[name] = tensors[name] + by
    save_file(tensors, folder / WEIGHTS)


def test_two_folders_are_compared_in_tensors_and_logprobs(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = map(str, folders)
    rows = str(jsonl(folders[0].parent, {"id": "row 1", "task": "t", "messages": "w1 w2", "ground_truth": "w3 w4"}))
    assert main([a, b, rows]) == 0
    shown = capsys.readouterr().out
    assert "all values are equal" in shown and "row 1" in shown and "agree" in shown
    change(folders[1], "model.norm.weight", 0.5)
    assert main([a, b, rows]) == 2
    shown = capsys.readouterr().out
    assert "1 differ in values, most: model.norm.weight by 0.5" in shown and "DIFFER" in shown
    assert main([a, b, rows, "--limit", "10"]) == 0


def test_folders_whose_tensors_do_not_fit_are_not_run(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(folders[1] / WEIGHTS)
    tensors["stray"] = tensors.pop("model.norm.weight")
    save_file(tensors, folders[1] / WEIGHTS)
    assert main(list(map(str, folders))) == 2
    shown = capsys.readouterr().out
    assert "1 only in A: model.norm.weight" in shown and "1 only in B: stray" in shown


def test_wrong_input_is_named(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    a, b = map(str, folders)
    assert main([a, b, a]) == 2
    assert "give one or two model folders" in capsys.readouterr().err
    assert main([a, str(folders[0] / "absent")]) == 2
    assert "absent is not a folder" in capsys.readouterr().err


def test_the_programs_are_compared_on_one_folder(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(folders[0])]) == 0
    shown = capsys.readouterr().out
    for pair in (("learner", "vllm"), ("learner", "transformers"), ("vllm", "transformers")):
        assert any(pair[0] in line and pair[1] in line and "agree" in line for line in shown.splitlines())
