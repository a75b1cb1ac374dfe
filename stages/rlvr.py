"""The stage RLVR: rows as they are, and no numbers of its own."""

from collections.abc import Mapping, Sequence

from rl.types import Prompt, Scored


class Rlvr:
    """A stages.loop.Stage."""

    def prompts_for_iteration(self, prompts: Sequence[Prompt], iteration: int) -> list[Prompt]:
        return list(prompts)

    def held_out(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        return list(prompts)

    def metrics(self, scored: Sequence[Scored]) -> Mapping[str, float]:
        return {}

    def evaluation(self, scored: Sequence[Scored]) -> Mapping[str, float]:
        return {}
