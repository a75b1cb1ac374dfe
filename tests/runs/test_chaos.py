"""Tests that a run continues correctly after its processes were killed. The tests run `python -m tests.chaos` with few
faults."""

import json

import pytest

from tests.support.command import run


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "options",
    [
        ("--faults", 1, "--iterations", 4, "--kinds", "driver"),
        ("--faults", 10, "--kinds", "driver", "group", "--busy"),
    ],
)
def test_a_run_whose_driver_is_killed_ends_like_an_undisturbed_run(options: tuple[object, ...]) -> None:
    code, out, err = run("tests.chaos", *options, timeout=3000)
    assert code == 0, err
    report = json.loads(out.splitlines()[-1])
    assert report["exact"] is True and report["differences"] == []
    assert report["resumed"] == options[1]
