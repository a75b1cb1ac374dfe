"""How well the last box of an answer covers the true one."""

from typing import Annotated

from pydantic import Field

from rewards import Rollout, Score, reward
from rewards.geometry import Coordinates, last_box, read, truth, units


@reward("iou", on_timeout="lowest")
def iou(rollout: Rollout, power: Annotated[float, Field(gt=0)] = 2, coordinates: Coordinates = "unit") -> Score:
    """IoU ** power of one box; 0.0 if the answer has no usable box.

    The report names IoU with a strict, decaying shape and gives no formula. Power 2 is a reconstruction: the
    paper it cites, Perception-R1, describes IoU and its released code squares it.
    """
    true = truth(rollout, coordinates, 4)
    numbers = last_box(rollout.answer)
    if numbers is None:
        return Score(0.0, {"why": "no box in the answer"})
    box = read(numbers, units(rollout, coordinates))
    if isinstance(box, str):
        return Score(0.0, {"why": box, "box": [repr(n) for n in numbers]})
    overlap = box_iou(box, true)
    return Score(overlap**power, {"iou": overlap, "box": list(numbers)})


def box_iou(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Intersection over union, 0 to 1, of two boxes (x1, y1, x2, y2) with x1 < x2 and y1 < y2, same units."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    inside = width * height
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return min(1.0, inside / (areas - inside))
