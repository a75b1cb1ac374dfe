"""Tests the reward `verifier`: the texts that the judge sees, and the value that follows from the judge's verdicts."""

import base64
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rewards import Invalid
from rewards.endpoint import EndpointSpec, configure
from rl.types import Picture
from tests.support.judge_server import Reply
from tests.support.judging import RIGHT, WRONG, blocks, honest, judging, rollout, score
from tests.support.reward_samples import picture

pytestmark = pytest.mark.usefixtures("hurried")


def test_the_verifier_shows_question_truth_and_answer_and_counts_the_verdict() -> None:
    with judging(honest) as server:
        right, wrong = score("verifier", rollout("<think>6 * 7</think>It is 42"), rollout("It is 43"))
    assert (right.value, wrong.value) == (1.0, 0.0)
    assert right.details == {"votes": [True], "reason": "Same."}
    shown = blocks(server.prompts[0])
    assert shown["question"] == "(picture 1)\nWhat is 6 times 7?"
    assert shown["truth"] == "42"
    assert "6 * 7" not in server.prompts[0]  # the reasoning is sent only with process=True


def test_an_empty_answer_is_wrong_and_the_judge_is_not_asked() -> None:
    with judging([RIGHT]) as server:
        scores = score("verifier", rollout(""), rollout("<think>42"), rollout("<think>42</think> \0\n"))
        assert [s.value for s in scores] == [0.0, 0.0, 0.0]
        assert score("genrm", rollout("")).value == 0.0
    assert server.requests == []


@pytest.mark.parametrize(
    ("verdicts", "rule", "value"),
    [
        ([RIGHT, RIGHT, WRONG], "majority", 1.0),
        ([RIGHT, WRONG, WRONG], "majority", 0.0),
        ([RIGHT, WRONG], "majority", 0.0),
        ([RIGHT, RIGHT, WRONG], "all", 0.0),
        ([RIGHT, RIGHT, RIGHT], "all", 1.0),
    ],
)
def test_votes_count_by_the_rule_and_a_tie_is_wrong(verdicts: list[Any], rule: str, value: float) -> None:
    with judging(verdicts) as server:
        scored = score("verifier", rollout("42"), votes=len(verdicts), rule=rule)
    assert scored.value == value
    assert sum(scored.details["votes"]) == verdicts.count(RIGHT)
    assert len({request["seed"] for request in server.requests}) == len(verdicts)


def test_votes_are_asked_for_at_once() -> None:
    with judging([Reply(RIGHT, after_s=0.2)]) as server:
        score("verifier", rollout("42"), votes=4)
    assert server.peak == 4


def test_the_same_response_gives_the_same_request_with_the_same_seed() -> None:
    with judging([RIGHT]) as server:
        score("verifier", rollout("42"))
        configure({"judge": EndpointSpec("judge", server.url, "m")})
        score("verifier", rollout("42"))
    assert server.requests[0] == server.requests[1]


@pytest.mark.parametrize(
    ("verdict", "supported", "value"),
    [("correct", True, 1.0), ("correct", False, 0.0), ("incorrect", True, 0.0)],
)
def test_process_also_rejects_a_right_answer_whose_reasoning_does_not_support_it(
    verdict: str, supported: bool, value: float
) -> None:
    with judging([{"reasoning": "So.", "verdict": verdict, "reasoning_supported": supported}]) as server:
        assert score("verifier", rollout("<think>a guess</think>42"), process=True).value == value
    assert blocks(server.prompts[0])["reasoning"] == "a guess"
    schema = server.requests[0]["response_format"]["json_schema"]["schema"]
    assert list(schema["properties"]) == ["reasoning", "verdict", "reasoning_supported"]
    assert set(schema["required"]) == set(schema["properties"])


def test_pictures_are_sent_only_to_endpoints_that_take_them() -> None:
    seen = picture(4, 3)
    with judging([RIGHT], images=True) as server:
        score("verifier", rollout("42", images=(seen,)))
    parts = server.requests[0]["messages"][0]["content"]
    kind, data = parts[0]["image_url"]["url"].split(",")
    assert (kind, base64.b64decode(data)) == ("data:image/png;base64", seen.source)
    with judging([RIGHT]) as server:
        score("verifier", rollout("42", images=(seen,)))
    assert isinstance(server.requests[0]["messages"][0]["content"], str)


def test_a_picture_in_an_unusual_format_is_sent_as_png(tmp_path: Path) -> None:
    Image.new("RGB", (4, 3)).save(tmp_path / "scan.tiff")
    with judging([RIGHT], images=True) as server:
        score("verifier", rollout("42", images=(Picture.of(tmp_path / "scan.tiff"),)))
    assert server.requests[0]["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,iVBOR")


def test_a_row_without_ground_truth_is_invalid() -> None:
    with judging([RIGHT]) as server, pytest.raises(Invalid, match="row row-1 has no ground truth"):
        score("verifier", rollout("42", truth=None))
    assert server.requests == []


@pytest.mark.parametrize("relative", [False, True])
def test_a_recipe_may_set_its_own_prompt_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relative: bool
) -> None:
    own = tmp_path / "mine.jinja"
    own.write_text("Short check. {{ rules }} {{ truth }} {{ answer }} {{ question }}")
    monkeypatch.chdir(tmp_path)
    with judging(honest) as server:
        assert score("verifier", rollout("42"), template=own.name if relative else str(own)).value == 1.0
    assert server.prompts[0].startswith("Short check.")
    with judging([RIGHT]), pytest.raises(ValueError, match="has to use reasoning"):
        score("verifier", rollout("42"), template=str(own), process=True)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("{{ rules }} {{ truth }} {{ question }}", "has to use answer"),
        ("{{ rules }} {{ truth }} {{ question }} {{ answer }} {{ anwser }}", "anwser; it can use answer, process"),
        ("{{ answer", "can't be used: TemplateSyntaxError"),
        (None, "can't be used: FileNotFoundError"),
    ],
)
def test_a_broken_prompt_template_is_refused_at_setup(tmp_path: Path, body: str | None, said: str) -> None:
    own = tmp_path / "mine.jinja"
    if body is not None:
        own.write_text(body)
    with judging([RIGHT]), pytest.raises(ValueError, match=said):
        score("verifier", rollout("42"), template=str(own))


def test_several_votes_at_temperature_zero_are_refused() -> None:
    with pytest.raises(ValueError, match="3 votes at temperature 0"):
        score("verifier", rollout("42"), votes=3, temperature=0)
