"""Reward `iou`: how well the boxes of an answer overlap the true boxes."""

from typing import Annotated

import numpy as np
from pydantic import Field

from rewards import Rollout, Score, reward
from rewards.geometry import (
    BOXES,
    Coordinates,
    best_pairs,
    box_ious,
    for_details,
    picture_size,
    shapes,
    true_shapes,
    usable,
)


@reward("iou", on_timeout="lowest", verifiable=True)
class IoU:
    """(Sum of IoU ** power over matched boxes) / max(number of given boxes, number of true boxes).

    The given boxes are matched one to one with the true boxes, so that the sum of the IoUs of the pairs is as large as
    possible (Hungarian method). A missing box costs as much as a superfluous box. So an answer with several boxes for
    one object never earns more than its best box would earn alone. A box counts as superfluous if it has no area, lies
    far outside the picture or has coordinates that are not finite.

    If there is one true box, only the last box of the answer counts. But if this box is part of a list, all boxes of
    the list count: "[...], no, [...]" gives one box, "[[...], [...]]" gives two boxes. If there are several true boxes,
    all boxes in one part of the answer count. This part is the last `\\boxed{...}`, else the text after the last
    "Answer:", else the whole answer.

    The STEP3-VL report mentions a reward that is computed from IoU and decays strictly, but gives no formula. Power 2
    is a reconstruction. The report cites Perception-R1. Perception-R1 describes IoU as the reward, but its released
    code uses the square of IoU. The division by the number of boxes is a reconstruction too.
    """

    def __init__(self, power: Annotated[float, Field(gt=0)] = 2, coordinates: Coordinates = "unit") -> None:
        self.power = power
        self.coordinates: Coordinates = coordinates

    def setup(self) -> None:
        best_pairs(np.ones((1, 1)))  # imports scipy now, so that the import does not count against a sample's limits

    def __call__(self, rollout: Rollout) -> Score:
        true = true_shapes(rollout, self.coordinates, 4, "[x1, y1, x2, y2], or a list of such boxes")
        found = shapes(BOXES, rollout.answer, last_list=len(true) == 1)
        if not found:
            return Score(0.0, {"why": "no box in the answer"})
        boxes, why = usable(found, picture_size(rollout, self.coordinates))
        if not boxes:
            return Score(0.0, {"why": why, "boxes": for_details(found)})
        overlaps = best_pairs(box_ious(boxes, true))
        value = float((overlaps**self.power).sum()) / max(len(found), len(true))
        return Score(
            value, {"iou": overlaps.tolist(), "given": len(found), "true": len(true), "boxes": for_details(found)}
        )
