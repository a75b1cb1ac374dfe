"""Rewards that behave like buggy plugins: the answer decides whether a reward hangs, dies or raises an exception. The
file also has tasks that use these rewards."""

from typing import Any

from rl.config import PenaltySpec, RewardSpec, ScorerSpec
from rl.types import Finish, Prompt, Rollout

PLUGINS = '''
import asyncio, os, signal, subprocess, sys, time
from rewards import Invalid, Score, penalty, reward, row_judge
from rewards.endpoint import Unreachable


@reward("obey")
def obey(rollout, gift: float = 1.0):
    """Executes the command in the answer. Most commands imitate bugs of rewards."""
    match rollout.answer.split():
        case ["hang"]:
            time.sleep(600)
        case ["spin"]:
            9 ** 9 ** 9 ** 9
        case ["die"]:
            os.kill(os.getpid(), signal.SIGKILL)
        case ["exit"]:
            sys.exit("enough")
        case ["eat"]:
            return float(len([bytearray(1 << 24) for _ in range(1 << 20)]))
        case ["raise"]:
            return {}["nothing"]
        case ["refuse"]:
            raise Invalid("the judge is away")
        case ["return", what]:
            return eval(what)
        case ["child"]:
            return Score(0.5, {"pid": subprocess.Popen(["sleep", "600"]).pid})
        case ["print"]:
            print("to stdout, which must not disturb anything")
    return Score(gift, {"pid": os.getpid(), "hash": hash("x")})


@reward("obey_lowest", lowest=-1.0, on_timeout="lowest")
def obey_lowest(rollout):
    return obey(rollout)


@reward("die_once", on_timeout="lowest")
def die_once(rollout):
    if not os.path.exists(rollout.answer):
        open(rollout.answer, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return 1.0


@reward("rank", group=True)
def rank(rollouts, unit: float = 0.1):
    if any(r.answer == "hang" for r in rollouts):
        time.sleep(600)
    order = sorted(range(len(rollouts)), key=lambda i: len(rollouts[i].text))
    return [unit * order.index(i) for i in range(len(rollouts) - ("short" in rollouts[0].answer))]


@reward("slow_to_set_up")
class SlowToSetUp:
    def setup(self):
        time.sleep(1.5)

    async def __call__(self, rollout):
        await asyncio.sleep(0.01)
        return 0.75


@reward("waits")
async def waits(rollout):
    """Executes the command in the answer. Other rewards can run while this reward waits."""
    match rollout.answer.split():
        case ["sleep", seconds]:
            await asyncio.sleep(float(seconds))
        case ["hang"]:
            await asyncio.sleep(600)
        case ["block"]:
            time.sleep(600)
        case ["die"]:
            os.kill(os.getpid(), signal.SIGKILL)
        case ["eat"]:
            return float(len([bytearray(1 << 24) for _ in range(1 << 20)]))
        case ["raise"]:
            return {}["nothing"]
        case ["tire"]:
            raise TimeoutError("its own patience is over")
        case ["patient" | "fragile" as kind, seen]:  # each call appends one character to the file `seen`
            with open(seen, "a") as file:
                file.write("x")
            if os.path.getsize(seen) == 1:
                raise Unreachable("judge", "not there yet")
            if kind == "fragile":
                os.kill(os.getpid(), signal.SIGKILL)
    return Score(0.25, {"pid": os.getpid()})


@penalty("rude")
def rude(rollout):
    return rollout.answer.count("!") / 2


@row_judge("judge_row")
def judge_row(row):
    """Executes the command in the ground truth."""
    match row.ground_truth.split():
        case ["hang"]:
            time.sleep(600)
        case ["raise"]:
            return {}["nothing"]
        case ["return", what]:
            return eval(what)
    return Score(0.25, {"id": row.id, "task": row.task})


@row_judge("wait_for_row")
async def wait_for_row(row):
    """Appends one character to the file that the ground truth names. Returns 1 if this is the only character."""
    with open(row.ground_truth, "a") as file:
        file.write("x")
    await asyncio.sleep(0.2)
    return float(os.path.getsize(row.ground_truth) == 1)


@reward("signed", lowest=-1.0)
def signed(rollout):
    return 1.0


@reward("never_set_up")
class NeverSetUp:
    def setup(self):
        raise OSError("no model there")

    def __call__(self, rollout):
        return 1.0
'''


def spec(use: str, params: dict[str, Any] | None = None, **more: Any) -> RewardSpec:
    return RewardSpec.model_validate({"use": use, "params": params or {}, "timeout_s": 1.0, "memory_mb": 256, **more})


def penalty_spec(use: str, magnitude: float = 1.0) -> PenaltySpec:
    return PenaltySpec(use=use, magnitude=magnitude, timeout_s=1.0, memory_mb=256)


def rollout(text: str, task: str = "obey", prompt: str = "p", finish: Finish = "stop", truth: Any = "5") -> Rollout:
    return Rollout(Prompt(prompt, task, (), ground_truth=truth), text, finish)


TASKS = {
    "obey": [spec("plugins.py:obey", {"gift": 0.25})],
    "obey_lowest": [spec("plugins.py:obey_lowest")],
    "die_once": [spec("plugins.py:die_once")],
    "rank": [spec("plugins.py:rank")],
    "slow": [spec("plugins.py:slow_to_set_up")],
    "waits": [spec("plugins.py:waits")],
    "math": [spec("math_verify", timeout_s=2.0)],
    "exact": [spec("exact")],
    "sum": [
        spec("plugins.py:obey", {"gift": 0.5}, weight=0.8, penalties=(penalty_spec("plugins.py:rude", 0.5),)),
        spec("exact", weight=0.2),
        spec("plugins.py:rank", {"unit": 1.0}, weight=-0.1),
    ],
    "signed": [spec("plugins.py:signed", penalties=(penalty_spec("plugins.py:rude"),))],
}

ROW_JUDGES = {
    name: ScorerSpec(use=f"plugins.py:{name}", timeout_s=1.0, memory_mb=256) for name in ("judge_row", "wait_for_row")
}
