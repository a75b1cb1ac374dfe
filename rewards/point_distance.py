"""How near the last point of an answer is to the true one."""

import math
from typing import Annotated

from pydantic import Field

from rewards import Rollout, Score, reward
from rewards.geometry import Coordinates, last_point, read, truth, units


@reward("point_distance", on_timeout="lowest")
def point_distance(
    rollout: Rollout, radius: Annotated[float, Field(gt=0)] = 0.2, coordinates: Coordinates = "unit"
) -> Score:
    """max(0, 1 - d / radius): 1 at the target, falling with every step away, 0 from `radius` on.

    d is the Euclidean distance with x in picture widths and y in picture heights, whatever `coordinates` the
    row and the answer use; `radius` is in the same fractions. The report asks for strict distance decay and
    gives neither formula nor radius: both are a reconstruction. 0.0 if the answer has no usable point.
    """
    true = truth(rollout, coordinates, 2)
    numbers = last_point(rollout.answer)
    if numbers is None:
        return Score(0.0, {"why": "no point in the answer"})
    point = read(numbers, units(rollout, coordinates))
    if isinstance(point, str):
        return Score(0.0, {"why": point, "point": [repr(n) for n in numbers]})
    distance = math.dist(point, true)
    return Score(max(0.0, 1 - distance / radius), {"distance": distance, "point": list(numbers)})
