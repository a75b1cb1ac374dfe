"""How well the boxes of an answer cover the true ones."""

from typing import Annotated

import numpy as np
from pydantic import Field

from rewards import Rollout, Score, reward
from rewards.geometry import BOXES, Coordinates, box_ious, matched, readable, shapes, shown, true_shapes, units


@reward("iou", on_timeout="lowest", verifiable=True)
class IoU:
    """IoU ** power of boxes matched one to one: sum over pairs / max(boxes given, true boxes).

    The pairs are those with the largest sum of IoU (Hungarian matching). A missing box and a superfluous one
    cost the same, so that listing guesses never earns more than the best of them alone. A box that can't be
    used (not finite, far outside, no area) is a superfluous one.

    With one true box the answer is its last box, or the list that this is part of: "[...], no, [...]" gives
    one box, "[[...], [...]]" gives two. With several true boxes every box counts of the last `\\boxed{...}`,
    else of what follows the last "Answer:", else of the whole answer.

    The report names IoU with a strict, decaying shape and gives no formula. Power 2 is a reconstruction: the
    paper it cites, Perception-R1, describes IoU and its released code squares it. The count term is a
    reconstruction too.
    """

    def __init__(self, power: Annotated[float, Field(gt=0)] = 2, coordinates: Coordinates = "unit") -> None:
        self.power = power
        self.coordinates: Coordinates = coordinates

    def setup(self) -> None:
        matched(np.ones((1, 1)))  # its first call imports, which no sample's time and memory should pay for

    def __call__(self, rollout: Rollout) -> Score:
        true = true_shapes(rollout, self.coordinates, 4, "[x1, y1, x2, y2], or a list of such boxes")
        found = shapes(BOXES, rollout.answer, last_list=len(true) == 1)
        if not found:
            return Score(0.0, {"why": "no box in the answer"})
        boxes, why = readable(found, units(rollout, self.coordinates))
        if not boxes:
            return Score(0.0, {"why": why, "boxes": shown(found)})
        overlaps = matched(box_ious(boxes, true))
        value = float((overlaps**self.power).sum()) / max(len(found), len(true))
        return Score(value, {"iou": overlaps.tolist(), "given": len(found), "true": len(true), "boxes": shown(found)})
