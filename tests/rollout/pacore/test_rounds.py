"""Tests SeRe and PaCoRe with a scripted model: rounds, seeds, the order of requests, long prompts, token counts. Only
final answers may be shown in the next round."""

import asyncio
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from rl.types import Prompt
from rollout.generate import Settings, generate
from rollout.pacore.client import PrioritySemaphore
from rollout.pacore.prompt import Chat, SynthesisPrompt
from rollout.pacore.rounds import PacoreResult, PromptTooLong, Reply, parse_plan, run_rounds

PROBLEM: Chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}]


def reply(text: str, tokens: int = 5, finish: Any = "stop") -> Reply:
    return Reply(text, finish, tokens, 10)


class Model:
    """A scripted model. `script` maps the last message's text and the seed to a reply. `requests` records every
    request: (last message's text, seed, urgency)."""

    def __init__(self, script: Callable[[str, int], Reply]) -> None:
        self.script = script
        self.requests: list[tuple[str, int, int]] = []

    async def __call__(self, chat: Chat, seed: int, urgency: int, count: int = 1) -> list[Reply]:
        """Returns `count` replies. As in vLLM, their seeds are `seed`, `seed` + 1, and so on."""
        text = str(chat[-1]["content"])
        self.requests += [(text, seed + n, urgency) for n in range(count)]
        await asyncio.sleep(0)
        return [self.script(text, seed + n) for n in range(count)]


def result_of(model: Model, plan: Sequence[int], **options: Any) -> PacoreResult:
    return asyncio.run(run_rounds(PROBLEM, plan, model, SynthesisPrompt(), "0/a", **options))


def test_sere_is_one_trajectory_on_the_plain_problem() -> None:
    model = Model(lambda text, seed: reply("<think>hm</think>4"))
    result = result_of(model, ())
    assert [text for text, _, _ in model.requests] == ["What is 2 + 2?"]
    assert (result.reply.message, result.tokens, len(result.rounds)) == ("4", 5, 1)


def test_pacore_shows_final_answers_only_and_counts_all_tokens() -> None:
    model = Model(lambda text, seed: reply("<think>secret</think>four" if "Answer 1" not in text else "4"))
    result = result_of(model, (16,))
    *trajectories, (shown, _, _) = model.requests
    assert len(trajectories) == 16 and {text for text, _, _ in trajectories} == {"What is 2 + 2?"}
    assert shown.count("four") == 16 and "secret" not in shown and "What is 2 + 2?" in shown
    assert (result.reply.message, result.tokens) == ("4", 17 * 5)


def test_every_trajectory_has_a_different_seed_which_is_the_same_in_the_next_run() -> None:
    models = [Model(lambda text, seed: reply(f"{seed}")) for _ in range(2)]
    first, second = (result_of(model, (4, 2)) for model in models)
    assert first == second
    assert len({seed for _, seed, _ in models[0].requests}) == 4 + 2 + 1


def test_the_second_round_sees_the_answers_of_the_first() -> None:
    def script(text: str, seed: int) -> Reply:
        return reply("uno" if "Answer 1" not in text else "dos" if "uno" in text else "tres")

    model = Model(script)
    result = result_of(model, (32, 4))
    assert [len(one.replies) for one in result.rounds] == [32, 4, 1]
    assert [one.shown for one in result.rounds] == [0, 32, 4]
    assert result.reply.text == "tres"
    assert [urgency for _, _, urgency in model.requests] == [0] * 32 + [1] * 4 + [2]


def test_each_trajectory_of_a_later_round_sees_the_messages_in_another_order() -> None:
    model = Model(lambda text, seed: reply(f"message {seed}" if "Answer" not in text else "x"))
    result_of(model, (8, 4))
    later = [text for text, _, urgency in model.requests if urgency == 1]
    assert len(set(later)) == 4
    assert len({"".join(sorted(text)) for text in later}) == 1  # all prompts have the same messages


def test_trajectories_without_a_final_answer_give_no_message() -> None:
    def script(text: str, seed: int) -> Reply:
        if "Answer" in text:
            return reply("done")
        return [reply("<think>still", finish="length"), reply("cut", finish="length"), reply("<think>a</think>b")][
            seed % 3
        ]

    model = Model(script)
    result = result_of(model, (30,))
    assert set(result.rounds[0].messages) == {"b"}
    assert result.rounds[1].shown == len(result.rounds[0].messages) < 30


def test_without_any_message_the_last_round_gets_the_plain_problem() -> None:
    model = Model(lambda text, seed: reply("<think>no end", finish="length"))
    result = result_of(model, (3,))
    assert {text for text, _, _ in model.requests} == {"What is 2 + 2?"}
    assert result.rounds[-1].shown == 0 and result.reply.message == ""


def test_messages_that_do_not_fit_into_the_prompt_are_left_out_and_counted() -> None:
    def script(text: str, seed: int) -> Reply:
        if text.count("Answer ") > 10:
            raise PromptTooLong("too long")
        return reply("m" if "Answer" not in text else "4")

    result = result_of(Model(script), (16,))
    assert (result.rounds[-1].shown, result.rounds[-1].left_out) == (10, 6)


def test_a_problem_that_is_too_long_by_itself_is_refused() -> None:
    def script(text: str, seed: int) -> Reply:
        raise PromptTooLong("too long")

    with pytest.raises(PromptTooLong):
        result_of(Model(script), (4,))


def test_trajectories_without_messages_are_sampled_by_one_request() -> None:
    requests: list[tuple[int, int]] = []

    class Counting(Model):
        async def __call__(self, chat: Chat, seed: int, urgency: int, count: int = 1) -> list[Reply]:
            requests.append((urgency, count))
            return await super().__call__(chat, seed, urgency, count)

    result_of(Counting(lambda text, seed: reply(f"{seed}")), (16, 2))
    assert requests == [(0, 16), (1, 1), (1, 1), (2, 1)]


def test_rounds_of_an_earlier_run_are_not_sampled_again() -> None:
    first = result_of(Model(lambda text, seed: reply("m")), (4,), answers=0)
    model = Model(lambda text, seed: reply("4"))
    result = result_of(model, (), first_rounds=first.rounds, answers=3)
    assert len(model.requests) == 3 and [len(one.replies) for one in result.rounds] == [4, 3]


@pytest.mark.parametrize(("text", "plan"), [("16", (16,)), ("32,4", (32, 4)), (" 8, 2", (8, 2))])
def test_a_plan_is_parsed_to_the_number_of_trajectories_per_round(text: str, plan: tuple[int, ...]) -> None:
    assert parse_plan(text) == plan


@pytest.mark.parametrize("text", ["", "0", "16;4", "-1", "many", "100000"])
def test_an_invalid_plan_is_refused(text: str) -> None:
    with pytest.raises(
        ValueError, match="not a plan of trajectories; write the number of trajectories per round, such as 16 or 32,4"
    ):
        parse_plan(text)


def test_the_synthesis_of_a_problem_does_not_wait_for_trajectories_of_other_problems() -> None:
    problems = [Prompt(f"{n}", "t", ({"role": "user", "content": f"problem {n}"},)) for n in range(8)]
    slots, order = PrioritySemaphore(8), list[str]()  # room for the trajectories of two problems

    async def ask(chat: Chat, seed: int, urgency: int, count: int = 1) -> list[Reply]:
        async with slots.acquire(urgency, count):
            await asyncio.sleep(0.001)
            (which,) = re.findall(r"problem \d", str(chat[-1]["content"]))
            order.append(f"synthesis {which}" if urgency else which)
            return [reply("m")] * count

    done: list[str] = []
    settings = Settings("m", (4,))
    asyncio.run(generate(problems, settings, ask, SynthesisPrompt(), lambda problem, result: done.append(problem.id)))
    assert sorted(done) == [problem.id for problem in problems]
    assert order.index("synthesis problem 0") < order.index("problem 4")
    assert max(place for place, one in enumerate(order) if one.startswith("problem")) > order.index(
        "synthesis problem 5"
    )
