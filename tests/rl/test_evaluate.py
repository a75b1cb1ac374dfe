"""The command line of rl.evaluate. tests/rollout/test_generate.py runs the command."""

from pathlib import Path

from rl.evaluate import config_of, parser


def test_mandatory_model_and_rows_of_a_recipe_are_those_of_the_command_line() -> None:
    given = ["--recipe", "rlhf", "--model", "owner/name", "--data", "rows.jsonl", "endpoints.judge.model=owner/judge"]
    config = config_of(parser().parse_intermixed_args(given))
    assert config.model.path == "owner/name" and [source.path for source in config.data.eval] == [
        str(Path("rows.jsonl").absolute())
    ]
