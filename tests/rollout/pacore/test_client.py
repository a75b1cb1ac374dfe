"""Tests the client of an endpoint: the order of requests, and the parsing of replies.

tests/rollout/test_serve.py and test_generate.py test the client's requests, retries and errors.
"""

import asyncio
from typing import Any

from rollout.pacore.client import PrioritySemaphore, parse_replies


def test_the_most_urgent_request_is_next_and_a_cancelled_request_returns_its_slot() -> None:
    async def scenario() -> list[str]:
        slots, order = PrioritySemaphore(1), list[str]()

        async def use(name: str, urgency: int) -> None:
            async with slots.acquire(urgency):
                order.append(name)
                await asyncio.sleep(0.001)

        tasks = [asyncio.create_task(use(*one)) for one in (("a", 0), ("b", 0), ("c", 2), ("d", 1))]
        gone = asyncio.create_task(use("gone", 3))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.gather(*tasks)
        async with asyncio.timeout(1), slots.acquire(0):  # times out if a slot was lost
            order.append("last")
        return order

    assert asyncio.run(scenario()) == ["a", "c", "d", "b", "last"]


def test_a_request_for_several_replies_takes_one_slot_per_reply_or_all_slots() -> None:
    async def scenario() -> list[str]:
        slots, events = PrioritySemaphore(4), list[str]()

        async def use(name: str, count: int) -> None:
            async with slots.acquire(0, count):
                events.append(f"+{name}")
                await asyncio.sleep(0.001)
                events.append(f"-{name}")

        await asyncio.gather(use("a", 3), use("b", 2), use("c", 1), use("d", 100))
        return events

    # There are 4 slots. While "a" uses 3 slots, "b" must wait for 2 slots. "c" needs only 1 slot, but it must not start
    # before "b". "d" takes all slots.
    assert asyncio.run(scenario()) == ["+a", "-a", "+b", "+c", "-b", "-c", "+d", "-d"]


def test_thinking_that_a_reasoning_parser_removed_is_put_back() -> None:
    message = {"content": "4", "reasoning_content": "2 + 2"}
    answer = {"choices": [{"message": message, "finish_reason": "stop"}], "usage": {"completion_tokens": 7}}
    (reply,) = parse_replies(answer)
    assert (reply.text, reply.message, reply.tokens) == ("<think>2 + 2</think>4", "4", 7)
    cut = {"content": None, "reasoning_content": "2 +"}
    answer = {"choices": [{"message": cut, "finish_reason": "length"}], "usage": {}}
    assert parse_replies(answer)[0].message == ""


def test_each_reply_has_its_token_count_or_the_mean_if_the_endpoint_only_reports_the_sum() -> None:
    def choice(index: int, **more: Any) -> dict[str, Any]:
        return {"index": index, "message": {"content": f"{index}"}, "finish_reason": "stop", **more}

    usage = {"completion_tokens": 6, "prompt_tokens": 9}
    replies = parse_replies({"choices": [choice(1, token_ids=[1, 2, 3, 4, 5]), choice(0, token_ids=[1])],
                                       "usage": usage})  # fmt: skip
    assert [(one.text, one.tokens, one.prompt_tokens) for one in replies] == [("0", 1, 9), ("1", 5, 9)]
    counted = parse_replies({"choices": [choice(0), choice(1)], "usage": usage})
    assert [one.tokens for one in counted] == [3, 3]
