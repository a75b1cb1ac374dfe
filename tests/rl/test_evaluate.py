"""Tests the command line of rl.evaluate. tests/rollout/test_generate.py runs the command."""

from pathlib import Path

from rl.evaluate import config_of, parser


def test_the_command_line_gives_the_recipes_mandatory_model_and_rows() -> None:
    given = ["--recipe", "rlhf", "--model", "owner/name", "--data", "rows.jsonl", "endpoints.judge.model=owner/judge"]
    config = config_of(parser().parse_intermixed_args(given))
    assert config.model.path == "owner/name" and [source.path for source in config.data.eval] == [
        str(Path("rows.jsonl").absolute())
    ]
