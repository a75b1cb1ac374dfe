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
    """Sum of IoU ** power over matched boxes / max(number of given boxes, number of true boxes).

    Given and true boxes are matched one to one so that the sum of IoU is the largest (Hungarian method). A missing box
    costs as much as a superfluous one, so that several guesses never earn more than the best guess alone. A box that
    cannot be used (not finite, far outside, no area) counts as superfluous.

    With one true box, only the last box of the answer counts, or the whole list if this box is part of a list:
    "[...], no, [...]" gives one box, "[[...], [...]]" gives two. With several true boxes, all boxes of one part count:
    of the last `\\boxed{...}`, else of the text after the last "Answer:", else of the whole answer.

    The report names IoU with a strict, decaying shape and gives no formula. Power 2 is a reconstruction: Perception-R1,
    which the report cites, describes IoU, and its released code squares IoU. The division by the number of boxes is a
    reconstruction too.
    """

    def __init__(self, power: Annotated[float, Field(gt=0)] = 2, coordinates: Coordinates = "unit") -> None:
        self.power = power
        self.coordinates: Coordinates = coordinates

    def setup(self) -> None:
        best_pairs(np.ones((1, 1)))  # the first call imports scipy, which must not count against the limits of a sample

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
