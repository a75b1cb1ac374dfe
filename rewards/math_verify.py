"""1.0 when an answer's last result equals the ground truth as mathematics, else 0.0, says Math-Verify."""

import logging
from functools import lru_cache
from typing import Any

from rewards import Invalid, Rollout, Score, reward
from rewards.text import WINDOW, last_boxed, marked_answer, normalised

LONGEST_BOX = 2000  # characters; longer than any result, short enough for the library's slower patterns
LONGEST_PROSE = 1500
LONGEST_BARE = 200


def _boxed(truth: object) -> str:
    """A ground truth as a response; some are whole solutions that box their result."""
    return text if last_boxed(text := str(truth)) else f"\\boxed{{{text}}}"


@reward("math_verify", on_timeout="lowest", verifiable=_boxed)
class MathVerify:
    """Equality as mathematics: 1/2, 0.5 and \\frac{2}{4} are the same.

    Looks at the last `\\boxed{...}` of the answer; without one, at what the library finds last in the text,
    and at what follows the last "Answer:" (or a short answer as a whole) read as a formula. A ground truth
    that is plain text and no mathematics is compared as `exact` does; LaTeX that does not parse makes the row
    invalid.

    The library's own time limits rest on SIGALRM, which a long operation inside one bytecode ignores and
    which fails outside a main thread: they are off here, and the runner kills the process instead.
    """

    def setup(self) -> None:
        logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off
        self._truth = lru_cache(maxsize=256)(self._parse_truth)
        self._verify(self._formula("1"), self._formula("1"))  # the first call builds grammars

    def __call__(self, rollout: Rollout) -> Score:
        given, row = rollout.prompt.ground_truth, rollout.prompt.id
        if not isinstance(given, str | int | float):
            raise Invalid(f"math_verify needs LaTeX or a number as ground truth; row {row} has {given!r}")
        truth = self._truth(str(given), row)
        text, readings = self._readings(rollout.answer)
        if isinstance(truth, str):
            return Score(float(normalised(text) == truth), {"answer": text[:200]})
        if len(text) > LONGEST_BOX:
            return Score(0.0, {"why": f"a result of more than {LONGEST_BOX} characters"})
        parsed = [found for reading in readings if (found := self._parse(reading))]
        if not parsed:
            return Score(0.0, {"why": "no mathematics in the answer", "answer": text[:200]})
        return Score(float(any(self._verify(truth, found) for found in parsed)), {"answer": text[:200]})

    def _readings(self, answer: str) -> tuple[str, list[str]]:
        """The text that counts, and what of it the library shall parse."""
        if (boxed := last_boxed(answer[-WINDOW:])) is not None:
            return boxed, [f"\\boxed{{{boxed}}}"]
        prose = answer[-LONGEST_PROSE:]
        if len(prose) < len(answer):
            prose = prose.partition("\n")[2] or prose  # a cut inside a formula would swap inside and outside
        bare = (marked_answer(answer) or "").removesuffix(".").strip("* \n")
        if not bare or len(bare) > LONGEST_BARE or "$" in bare or "\n" in bare:
            return prose[-LONGEST_BARE:], [prose]
        return bare, [f"\\boxed{{{bare}}}", prose]

    def _parse_truth(self, truth: str, row: str) -> list[Any] | str:
        """What the library makes of a ground truth, or the text itself where it is no mathematics."""
        truth = last_boxed(truth) or truth.strip().strip("$").strip()
        parsed = self._formula(truth)
        if any(not isinstance(found, str) for found in parsed):
            return parsed
        if not normalised(truth) or any(c in truth for c in "\\{}"):
            raise Invalid(f"the ground truth of row {row} does not parse as mathematics: {truth[:200]!r}")
        return normalised(truth)

    def _formula(self, latex: str) -> list[Any]:
        return self._parse(f"\\boxed{{{latex}}}")

    def _parse(self, text: str) -> list[Any]:
        """Sympy expressions found in `text`, and the text of the first; [] if none looks like mathematics."""
        from math_verify import parse  # here: takes a second, and only the worker that scores needs it

        return parse(text, parsing_timeout=0)  # 0: none

    def _verify(self, truth: list[Any], found: list[Any]) -> bool:
        from math_verify import verify

        return verify(truth, found, timeout_seconds=0)
