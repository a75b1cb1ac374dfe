"""Makes evaluated rows with scripted answers, for tests of evaluations."""

from rl.types import Prompt, Rollout, Scored
from rollout.pacore.rounds import PacoreResult, Reply, Round
from stages.evaluation.scores import EvaluatedRow
from tests.support.configs import config

CONFIG = config()


def evaluated_row(
    task: str, attempts: list[tuple[str, float]], answers: list[tuple[str, float]], tokens: int = 10
) -> EvaluatedRow:
    prompt = Prompt("a", task, ())

    def scored(said: list[tuple[str, float]]) -> list[Scored]:
        return [Scored(Rollout(prompt, text), reward) for text, reward in said]

    rounds = [Round(tuple(Reply(text, "stop", tokens, 5) for text, _ in said)) for said in (attempts, answers) if said]
    return EvaluatedRow(prompt, PacoreResult(tuple(rounds)), scored(attempts), scored(answers))


def boxed(value: int) -> str:
    return rf"<think>hm</think>it is \boxed{{{value}}}"


SPLIT = [(boxed(5), 0.0), (boxed(4), 1.0), (boxed(5), 0.0), (boxed(6), 0.0)]
