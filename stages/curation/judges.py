"""Names the row judges that the filters of a curation recipe use.

Tested in tests/runs/test_reward_guide.py.
"""

from rl.config import Config, ScorerSpec


def pass_name(filter_name: str, number: int) -> str:
    """Returns the name of the row judge for one pass, for example "checkability/0"."""
    return f"{filter_name}/{number}"


def row_judges(config: Config) -> dict[str, ScorerSpec]:
    """Returns the row judges that the recipe's filters use: name of the pass, such as "checkability/0" -> judge."""
    judges: dict[str, ScorerSpec] = {}
    if "checkability" in config.curate.filters:
        options = config.curate.checkability
        for number in range(options.passes):
            params = {**options.params, "endpoint": options.endpoint, "vote": number}
            judges[pass_name("checkability", number)] = ScorerSpec(use="checkable", params=params)
    if "relevance" in config.curate.filters:
        options = config.curate.relevance
        params = {**options.params, "endpoint": options.endpoint}
        judges[pass_name("relevance", 0)] = ScorerSpec(use="relevant", params=params)
    return judges
