"""Reward `gui_click`: scores clicks on the elements of a screen, and declarations that the task is done."""

import re
from collections.abc import Mapping
from typing import Any

from rewards import Invalid, Rollout, Score, reward
from rewards.geometry import (
    EITHER,
    Coordinates,
    Shape,
    answer_part,
    box_iou,
    centre,
    inside,
    picture_size,
    shapes,
    true_shape,
    usable_shape,
)

HIT, NEAR, MISS, COMPLETED, STOPPED_EARLY = 1.0, 0.5, -1.0, 2.0, -0.5
NEAR_IOU = 0.5

_CLICK = ("click", "left_click", "tap", "press", "select")
_DONE = ("done", "stop", "finish", "finished", "terminate", "complete", "completed")
_OTHER = ("scroll", "swipe", "drag", "type", "write", "input", "wait", "back", "home", "hotkey", "long_press", "open")
_VERB = "|".join(sorted((*_CLICK, *_DONE, *_OTHER), key=len, reverse=True))
_ACTION = re.compile(
    rf"(?<![a-z])action(?:_type)?[\"']?\s{{0,8}}+[:=]\s{{0,8}}+[\"']?(?P<named>{_VERB})\b|\b(?P<called>{_VERB})\(",
    re.IGNORECASE,
)
_BARE_DONE = re.compile(rf"\W{{0,8}}+(?:{'|'.join(_DONE)})\W{{0,8}}+", re.IGNORECASE)


# The reward is not declared `verifiable`, because a right click gets 1, and the highest value is 2.
@reward("gui_click", on_timeout="lowest", lowest=MISS, highest=COMPLETED, needs="ground_truth")
def gui_click(rollout: Rollout, coordinates: Coordinates = "unit") -> Score:
    """For a click: 1 (hit), 0.5 (near) or -1 (miss). For declaring the task done: 2 if it is done, -0.5 if it is not.

    If there is an element to click, the ground truth is {"box": [x1, y1, x2, y2]}. It may also have "elements", a list
    with the boxes of all elements on the screen. If nothing is left to do, the ground truth is {"done": true}.

    The last action of the answer counts. A click is a point or a box, in any usual notation, such as `click(x, y)` or
    {"action": "click", "point": [x, y]}. A box counts as a click on its middle. The task is declared done by `done()`,
    `DONE`, {"action": "terminate"} and similar texts. A click is a hit if it is in the true box or on its edge. If a
    click is no hit, the smallest element that contains the click is compared with the true box. The click is near if
    the IoU of this element and the true box is above 0.5. If the row has no "elements", no click is near. (A box in the
    answer that has an IoU above 0.5 with the true box is always a hit, because its middle is then in the true box.)
    Anything else, such as unreadable text, is a miss.

    The values, the threshold, the definition of a near click and the rules for reading answers are reconstructions.
    """
    target, elements = _truth(rollout, coordinates)
    action = _action(rollout.answer)
    if action is None:
        return Score(MISS, {"why": "the answer has no click and does not declare the task done"})
    if action == "done":
        return Score(COMPLETED if target is None else STOPPED_EARLY, {"outcome": "declared done"})
    if isinstance(action, str):
        return Score(MISS, {"why": f"the action is {action}, not a click"})
    clicked = usable_shape(action, picture_size(rollout, coordinates))
    if isinstance(clicked, str):
        return Score(MISS, {"why": clicked})
    if target is None:
        return Score(MISS, {"outcome": "a click, although the task was already done"})
    point = centre(clicked)
    if inside(point, target):
        return Score(HIT, {"outcome": "hit"})
    containing = [box for box in elements if inside(point, box)]
    if containing and box_iou(min(containing, key=_area), target) > NEAR_IOU:
        return Score(NEAR, {"outcome": "near"})
    return Score(MISS, {"outcome": "miss"})


def _truth(rollout: Rollout, coordinates: Coordinates) -> tuple[Shape | None, list[Shape]]:
    """Returns the box to click (None if the task is done) and the boxes of all elements."""
    truth, row = rollout.prompt.ground_truth, rollout.prompt.id
    if isinstance(truth, Mapping) and truth.get("done") is True and truth.get("box") is None:
        return None, []
    if not isinstance(truth, Mapping) or truth.get("box") is None or truth.get("done"):
        raise Invalid(f'gui_click needs {{"box": [x1, y1, x2, y2]}} or {{"done": true}}; row {row} has {truth!r}'[:500])
    elements: Any = truth.get("elements") or []
    if not isinstance(elements, list | tuple):
        raise Invalid(f'"elements" of row {row} is {elements!r}, which is no list of boxes'[:500])
    box, *others = (true_shape(rollout, b, coordinates, [4], "[x1, y1, x2, y2]") for b in (truth["box"], *elements))
    return box, others


def _action(answer: str) -> Shape | str | None:
    """Returns the answer's last action: the clicked point or box, "done", the name of another action, or None."""
    text = answer_part(answer)
    if text is None:
        return None
    if _BARE_DONE.fullmatch(text):
        return "done"
    verb = ""
    for match in _ACTION.finditer(text):
        verb = (match["named"] or match["called"]).lower()
    if verb in _DONE:
        return "done"
    if verb in _OTHER:
        return verb
    found = shapes(EITHER, answer, last_list=True)
    return found[-1] if found else None


def _area(box: Shape) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
