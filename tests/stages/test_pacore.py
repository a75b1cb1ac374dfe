"""Tests the stage PaCoRe: which messages a prompt contains, which options are refused, and the metrics of synthesis."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rewards.voting import majority, vote
from rl.config import Accept, SynthesisOptions
from rl.recipe.resolve import load
from rl.recipe.stages import option_problems
from rl.record.metrics import describe
from rl.stop import Stop
from rl.types import PooledAnswers, Prompt, Rollout, Scored
from rollout.pacore.prompt import synthesis_template
from stages.base import StageTools
from stages.pacore import (
    Pacore,
    longest_with_messages,
    referred_fraction,
    repeats_majority,
    synthesis_metrics,
    with_pool,
    within_bounds,
)
from tests.support.configs import config
from tests.support.judging import blocks, honest, judging, score

RECIPE = Path(__file__).parents[2] / "recipes" / "pacore.yaml"
ROW = Prompt("a", "sums", ({"role": "user", "content": "2 + 2?"},), ground_truth="4")


class Chat:
    """A chat without a model. The length of a prompt is 10 plus the number of characters of its pooled answers."""

    reserved = ("<im_patch>",)

    def length(self, prompt: Prompt) -> int:
        return 10 + sum(len(text) for text in (prompt.shown.texts if prompt.shown else ()))

    class tokenizer:  # takes the place of a real tokenizer: one token per character
        def __init__(self, text: str) -> None:
            self.input_ids = text


def row_with_pool(size: int = 24, right: int = 12, **more: Any) -> Prompt:
    return replace(
        ROW,
        messages_pool=tuple(f"message {n}" for n in range(size)),
        pool_accepted=tuple(n < right for n in range(size)),
        pool_accuracy=right / size if size else None,
        **more,
    )


def no_attempts(prompts: Sequence[Prompt], per_prompt: int, iteration: int) -> list[Scored]:
    raise AssertionError("cached pools need no attempts")


def stage(attempts: Any = no_attempts, longest: int = 10_000, **options: Any) -> Pacore:
    chat: Any = Chat()
    made = config().model_copy(update={"max_sequence_length": longest, "synthesis": SynthesisOptions(**options)})
    return Pacore(StageTools(made, chat, frozenset(), attempts))


# Cached pools


def test_every_prompt_shows_16_to_24_messages_of_the_pool_without_repeats() -> None:
    counts = set()
    for iteration in range(1, 60):
        for prompt in stage().prompts_for_iteration([row_with_pool(), row_with_pool(id="b")], iteration):
            assert prompt.shown is not None
            counts.add(len(prompt.shown.texts))
            assert len(set(prompt.shown.texts)) == len(prompt.shown.texts)
            assert set(prompt.shown.texts) <= set(prompt.messages_pool)
    assert counts == set(range(16, 25))


def test_an_iteration_shows_the_same_messages_again_and_the_next_one_other_messages() -> None:
    prompts = [row_with_pool()]
    assert (
        stage().prompts_for_iteration(prompts, 3)
        == stage().prompts_for_iteration(prompts, 3)
        != stage().prompts_for_iteration(prompts, 4)
    )


def test_shown_messages_keep_whether_they_were_accepted() -> None:
    (prompt,) = stage().prompts_for_iteration([row_with_pool(right=5)], 1)
    assert prompt.shown is not None and prompt.shown.accepted is not None
    for text, right in zip(prompt.shown.texts, prompt.shown.accepted, strict=True):
        assert right == (int(text.split()[1]) < 5)


def test_rewards_see_the_problem_without_messages() -> None:
    (prompt,) = stage().prompts_for_iteration([row_with_pool()], 1)
    assert prompt.shown is not None
    with judging(honest) as server:
        assert score("verifier", Rollout(prompt, "4")).value == 1.0
    (seen,) = server.prompts
    assert blocks(seen)["question"] == "2 + 2?"
    assert not any(text in seen for text in prompt.shown.texts)


def test_an_evaluation_shows_the_same_messages_every_time_and_none_without_a_pool() -> None:
    rows = [row_with_pool(), ROW, row_with_pool(size=3)]
    first, plain, small = stage().held_out(rows)
    assert [first, plain, small] == stage().held_out(rows)
    assert first.shown is not None and plain.shown is None
    assert small.shown is not None and len(small.shown.texts) == 3


@pytest.mark.parametrize(
    ("accuracy", "bounds", "inside"),
    [
        (None, {}, True),
        (None, {"accuracy_over": 0.0}, False),
        (0.0, {"accuracy_over": 0.0}, False),
        (1 / 24, {"accuracy_over": 0.0}, True),
        (8 / 24, {"accuracy_under": 9 / 24}, True),
        (9 / 24, {"accuracy_under": 9 / 24}, False),
        (1.0, {"accuracy_over": 0.0}, True),
    ],
)
def test_the_papers_bounds_on_message_accuracy_are_strict(
    accuracy: float | None, bounds: dict[str, Any], inside: bool
) -> None:
    assert within_bounds(SynthesisOptions(**bounds), accuracy) == inside


def test_longest_with_messages_is_the_largest_length_that_can_be_drawn() -> None:
    prompt = replace(ROW, messages_pool=("x" * 5, "y" * 100, "z" * 50, "w"))
    chat: Any = Chat()
    assert longest_with_messages(prompt, chat, 2) == 10 + 100 + 50


# Online pools


def attempts_saying(*texts: str, invalid: Sequence[int] = ()) -> Any:
    """Returns a scripted sampler that gives the same attempts for every prompt. An attempt whose text contains "right"
    gets the reward 1."""

    def made(prompts: Sequence[Prompt], per_prompt: int, iteration: int) -> list[Scored]:
        assert per_prompt == len(texts)
        return [
            Scored(Rollout(p, text), float("right" in text), "as scripted" if n in invalid else None)
            for p in prompts
            for n, text in enumerate(texts)
        ]

    return made


def online(*texts: str, invalid: Sequence[int] = (), **options: Any) -> Pacore:
    made = attempts_saying(*texts, invalid=invalid)
    return stage(made, pool="online", online_rollouts=len(texts), least_messages=1, **options)


def test_online_pools_are_the_final_answers_of_new_attempts() -> None:
    texts = ("<think>a</think>right", "<think>never", "<im_patch>", "<think>b</think>wrong", "gone")
    (prompt,) = online(*texts, invalid=[4]).prompts_for_iteration([ROW], 1)
    assert (prompt.messages_pool, prompt.pool_accepted, prompt.pool_accuracy) == (
        ("right", "wrong"),
        (True, False),
        0.5,
    )
    assert prompt.shown is not None and set(prompt.shown.texts) <= {"right", "wrong"}


def test_online_prompts_outside_the_bounds_are_left_out_of_the_iteration() -> None:
    def made(prompts: Sequence[Prompt], per_prompt: int, iteration: int) -> list[Scored]:
        return [Scored(Rollout(p, "x"), float(p.id == "b" and n == 0)) for p in prompts for n in range(per_prompt)]

    found = stage(made, pool="online", accuracy_over=0.0).prompts_for_iteration([ROW, replace(ROW, id="b")], 1)
    assert [prompt.id for prompt in found] == ["b"]


def test_an_iteration_without_any_prompt_stops_the_run_with_advice() -> None:
    with pytest.raises(Stop, match=r"iteration 7: no prompt has 1 new messages .* Loosen the bounds"):
        online("wrong", "wrong", accuracy_over=0.0).prompts_for_iteration([ROW], 7)


def test_new_messages_that_leave_no_room_are_removed_from_the_prompt() -> None:
    (prompt,) = online(*["x" * 30] * 8, longest=100, most_messages=8).prompts_for_iteration([ROW], 1)
    assert prompt.shown is not None and 10 + 30 * len(prompt.shown.texts) < 100
    assert len(prompt.shown.texts) > 0


def test_prompts_with_too_few_new_messages_are_left_out_and_evaluated_without_messages() -> None:
    def made(prompts: Sequence[Prompt], per_prompt: int, iteration: int) -> list[Scored]:
        return [Scored(Rollout(p, "4" if p.id == "b" else "<think>"), 1.0) for p in prompts for _ in range(per_prompt)]

    several = stage(made, pool="online")
    assert [prompt.id for prompt in several.prompts_for_iteration([ROW, replace(ROW, id="b")], 1)] == ["b"]
    assert several.held_out([ROW])[0].shown is None


def test_an_answer_with_a_control_token_is_not_a_message() -> None:
    found = with_pool(
        ROW, [Scored(Rollout(ROW, "<im_patch> 4"), 1.0), Scored(Rollout(ROW, "4"), 1.0)], Accept(), ("<im_patch>",)
    )
    assert found.messages_pool == ("4",)


# Metrics


def shown(text: str, reward: float, *messages: tuple[str, bool]) -> Scored:
    texts, right = (tuple(one) for one in zip(*messages, strict=True))
    return Scored(Rollout(replace(ROW, shown=PooledAnswers(texts, right)), text), reward)


def test_emergent_correctness_is_the_accuracy_where_every_message_is_wrong() -> None:
    wrong, right = ("3", False), ("4", True)
    samples = [
        shown("4", 1.0, wrong, wrong),
        shown("5", 0.0, wrong, wrong),
        shown("4", 1.0, right, wrong, wrong),
        shown("4", 1.0, right, right, wrong),
        shown("3", 0.0, right, wrong),
    ]
    found = synthesis_metrics(samples, Accept())
    assert found["pacore/accuracy/none"] == 0.5
    assert found["pacore/accuracy/under_half"] == 1.0
    assert found["pacore/accuracy/half_or_more"] == 0.5
    assert found["pacore/accuracy"] == pytest.approx(3 / 5)
    assert found["pacore/messages_mean"] == pytest.approx(12 / 5)
    assert found["pacore/message_accuracy"] == pytest.approx((0 + 0 + 1 / 3 + 2 / 3 + 1 / 2) / 5)
    assert found["pacore/repeats_majority"] == pytest.approx(1 / 5)
    assert found["pacore/prompts"] == 1
    assert all(describe(name) for name in found)


def test_metrics_without_samples_are_left_out() -> None:
    assert synthesis_metrics([Scored(Rollout(ROW, "4"), 1.0)], Accept()) == {}
    invalid = replace(shown("4", 1.0, ("3", False)), invalid="broken")
    assert synthesis_metrics([invalid], Accept()) == {}
    unknown = Scored(Rollout(replace(ROW, shown=PooledAnswers(("3", "4"))), "4"), 1.0)
    assert "pacore/accuracy/none" not in synthesis_metrics([unknown], Accept())
    assert synthesis_metrics([unknown], Accept())["pacore/accuracy"] == 1.0


def test_a_vote_is_the_boxed_answer_without_case_and_space() -> None:
    assert vote(r"so \boxed{ 4 }, surely") == vote(r"\boxed{4}") == "4"
    assert vote(" [0.1,  0.2]\n") == "[0.1, 0.2]"
    assert majority(["a", "b", "b", "a", ""]) == "a"  # if two votes are equally frequent, the first one wins
    assert majority(["", ""]) is None


def test_a_response_repeats_the_majority_if_its_vote_equals_the_majority_vote() -> None:
    messages = (r"it is \boxed{5}", False), (r"\boxed{5}", False), (r"\boxed{4}", True)
    assert repeats_majority(shown(r"<think>4?</think>\boxed{5}", 0.0, *messages).rollout)
    assert not repeats_majority(shown(r"\boxed{4}", 1.0, *messages).rollout)


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("Answer 2 forgets to carry.", 1 / 4),
        ("References 1, 3 and 4 agree; attempt #2 does not.", 1.0),
        ("<think>one says 1200</think>4", 1 / 4),  # the reasoning quotes the second message
        # 7 is too short for a quote. 1200 is in the answer, but only the reasoning is searched for quotes.
        ("<think>it is 7</think>1200", 0.0),
        ("Answer 9", 0.0),
    ],
)
def test_messages_are_referred_to_by_number_or_by_quoting_their_answer(text: str, share: float) -> None:
    messages = ("7", False), (r"\boxed{1200}", False), ("8", False), ("9", True)
    assert referred_fraction(shown(text, 0.0, *messages).rollout) == pytest.approx(share)


# The recipe


def test_the_recipe_has_the_reports_numbers() -> None:
    made = load(RECIPE, overrides=["data.train=x.jsonl", "model.path=o/n"]).config
    assert (made.stage, made.iterations, made.prompts_per_iteration, made.rollouts_per_prompt) == (
        "pacore",
        500,
        64,
        16,
    )
    assert (made.max_sequence_length, made.ppo.minibatches) == (65_536, 1)
    assert (made.synthesis.least_messages, made.synthesis.most_messages) == (16, 24)


@pytest.mark.parametrize(
    "key, value",
    [("ppo__minibatches", 2), ("rollout__max_staleness", 1), ("rollout__partial", {})],
)
def test_options_that_make_the_stage_off_policy_are_refused(key: str, value: Any) -> None:
    made = config(stage="pacore", **{"ppo__minibatches": 1, key: value})
    (problem,) = option_problems(made)
    assert problem.key == key.replace("__", ".") and "the stage pacore is strictly on-policy" in str(problem)


def test_fewer_attempts_than_messages_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"synthesis.online_rollouts = 8 is less than synthesis.least_messages"):
        config(synthesis__pool="online", synthesis__online_rollouts=8)
    with pytest.raises(ValidationError, match=r"synthesis.most_messages = 3 is less than least_messages, which is 4"):
        config(synthesis__least_messages=4, synthesis__most_messages=3)


def test_the_template_in_the_models_folder_is_used_unless_the_recipe_names_one(tmp_path: Path) -> None:
    named = tmp_path / "named.jinja"
    assert (synthesis_template(tmp_path, None), synthesis_template(tmp_path, named)) == (None, named)
    carried = tmp_path / "pacore.jinja"
    carried.write_text("{{ problem }}{{ messages }}")
    assert (synthesis_template(tmp_path, None), synthesis_template(tmp_path, named)) == (carried, named)
