"""Reward `point_distance`: how near the answer's point is to the true point, or whether it is in the true box."""

import json
import math
from typing import Annotated, Any

from pydantic import Field

from rewards import Invalid, Rollout, Score, reward
from rewards.geometry import (
    POINTS,
    Coordinates,
    Shape,
    centre,
    for_details,
    inside,
    is_shape,
    picture_size,
    shapes,
    true_shape,
    usable,
)


def _as_point(truth: Any) -> str:
    """Returns a right response: the middle of the true box, or the true point, as JSON."""
    return json.dumps(centre(truth) if is_shape(truth) else truth)


@reward("point_distance", on_timeout="lowest", verifiable=_as_point)
def point_distance(
    rollout: Rollout, radius: Annotated[float, Field(gt=0)] = 0.2, coordinates: Coordinates = "unit"
) -> Score:
    """If the ground truth is a point, max(0, 1 - d / radius). If it is a box, 1.0 for a point in the box, else 0.0.

    d is the Euclidean distance between the answer's point and the true point. A point that is exactly at the true point
    earns 1. A point farther away earns less, and a point at the distance `radius` or more earns 0. For every value of
    `coordinates`, d and `radius` are measured in picture widths (along x) and picture heights (along y). A point on the
    edge of a box is in the box.

    Only the last point of the answer counts. But if this point is part of a list, all points of the list count: "(...),
    no, (...)" gives one point, "[[...], [...]]" gives two points. A list of n points earns 1/n of the value that the
    best of these points would earn. An answer without a usable point earns 0.0.

    In the STEP3-VL report, the reward must decay strictly with the distance. The report gives no formula and no radius.
    The formula, the radius and the rule for lists are reconstructions.
    """
    given, row = rollout.prompt.ground_truth, rollout.prompt.id
    if isinstance(given, list | tuple) and any(isinstance(one, list | tuple | dict) for one in given):
        raise Invalid(
            f"row {row} has a list of points as ground truth, but point_distance takes one point; use the reward count"
        )
    true = true_shape(rollout, given, coordinates, (2, 4), "a point [x, y] or a box [x1, y1, x2, y2]")
    found = shapes(POINTS, rollout.answer, last_list=True)
    if not found:
        return Score(0.0, {"why": "no point in the answer"})
    points, why = usable(found, picture_size(rollout, coordinates))
    if not points:
        return Score(0.0, {"why": why, "points": for_details(found)})
    best = max(_value(point, true, radius) for point in points)
    distance = min(math.dist(point, centre(true)) for point in points)
    return Score(best / len(found), {"distance": distance, "given": len(found), "points": for_details(found)})


def _value(point: Shape, true: Shape, radius: float) -> float:
    if len(true) == 4:
        return float(inside(point, true))
    return max(0.0, 1 - math.dist(point, true) / radius)
