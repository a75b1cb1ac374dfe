"""Defines the exceptions that end a run or restart it from its last checkpoint. Tested in tests/stages/test_ahead.py,
tests/rollout/test_pool.py and tests/rl/record/test_checkpoints.py."""

from collections.abc import Callable
from functools import partial
from typing import Any, Self

GO_ON = "continue with --resume (a curation continues with the same command)"  # advice at the end of a Stop's message


class Stop(RuntimeError):
    """Ends the run. The message says why the run ends and what the user can do; finished iterations are kept.

    `saves` says whether the run writes a checkpoint before it ends. `saves` may be True only if the Stop is raised
    before the current iteration changes any weight.
    """

    def __init__(self, message: str, *, saves: bool) -> None:
        super().__init__(message)
        self.saves = saves

    def __reduce__(self) -> tuple[Callable[..., Self], tuple[Any, ...]]:
        """Makes it possible to raise a Stop in one process and to catch it in another one."""
        return partial(type(self), saves=self.saves), self.args


class WorkerDied(RuntimeError):
    """A process of the run died, or did not answer within its time limit. A new process can repeat the work."""


class SourceDied(WorkerDied):
    """The process that was called is alive, but it needed the result of another process, and that process died."""
