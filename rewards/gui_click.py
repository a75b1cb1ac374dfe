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

# The verbs of the action languages that are read: Qwen's computer_use and mobile_use, UI-TARS, GUI-R1, OS-Atlas,
# AndroidWorld, AgentCPM-GUI, StepFun's GELab, pyautogui and OSWorld. Lower case, without underscores.
_CLICK = frozenset({"click", "leftclick", "singleclick", "tap", "singletap", "点击", "单击"})
_DONE = frozenset({"done", "stop", "finish", "finished", "terminate", "complete", "completed", "status"})
_SUCCESS = frozenset(
    {"success", "successful", "succeeded", "complete", "completed", "finish", "finished", "satisfied", "done"}
)
_KNOWN_CALLS = (
    r"click|left_?click|tap|done|stop|finish(?:ed)?|terminate|completed?|scroll|swipe|drag|type|write|input|wait|back|home"
    r"|hotkey|long_?press|open(?:_app)?|press(?:_\w+)?|move(?:_?to)?|mouse_move|double_?click|right_?click|left_double"
    r"|right_single|select|enter|fail|abort|call_user"
)
# An action in JSON or after "Action:"; a call; a line that begins with a verb in capitals, as in OS-Atlas.
_ACTION = re.compile(
    r"(?<![a-z_])action(?:_type|s)?[\"']?\s{0,8}+[:=]\s{0,8}+[\"'\[(]{0,2}(?:[a-z]{1,20}\.)?"
    r"(?P<named>[a-z][a-z_/]{0,30})"
    rf"|\b(?:pyautogui|computer)\.(?P<library>[a-z_]{{1,30}})\(|\b(?P<called>{_KNOWN_CALLS})\("
    r"|\b(?P<other>[a-z_]{1,30})\((?=\s?(?:x\s?=|start_box|point|coordinate|[\[(]?[.\d]))"
    r"|^[ \t]{0,8}(?P<line>(?-i:CLICK|TAP|TYPE|SCROLL|SWIPE|DRAG|LONG_?PRESS|OPEN_APP|PRESS_[A-Z]+|ENTER|WAIT|COMPLETE"
    r"|DONE|FAIL|SELECT))\b",
    re.IGNORECASE | re.MULTILINE,
)
_STATUS = re.compile(r"status[\"']?\s{0,4}[:=]\s{0,4}[\"']?([a-z_]{1,20})", re.IGNORECASE)
_AGENT_CPM = re.compile(r"[\"'](POINT|TYPE|PRESS|STATUS|to|duration|CLEAR)[\"']\s?:\s?[\"']?(\w{0,20})")
_BARE_DONE = re.compile(r"\W{0,8}+(?:done|stop|finish(?:ed)?|terminate|completed?)\W{0,8}+", re.IGNORECASE)
# Words directly before a point that name another action than a click.
_NO_CLICK = re.compile(
    r"(?:\b(?:mov(?:e|ing)|hover(?:ing)?|drag(?:ging)?|swip(?:e|ing)|scroll(?:ing)?|long[- ]press"
    r"|double[- ](?:click|tap)|right[- ]click|type|typing)\b|双击|长按|滑动|拖动|拖拽|移动|输入|右击)[^.,;:\n]{0,25}$",
    re.IGNORECASE,
)


# The reward is not declared `verifiable`, because a right click gets 1, and the highest value is 2.
@reward("gui_click", on_timeout="lowest", lowest=MISS, highest=COMPLETED, needs="ground_truth")
def gui_click(rollout: Rollout, coordinates: Coordinates = "unit") -> Score:
    """For a click: 1 (hit), 0.5 (near) or -1 (miss). For declaring the task done: 2 if it is done, -0.5 if it is not.

    If there is an element to click, the ground truth is {"box": [x1, y1, x2, y2]}. It may also have "elements", a list
    with the boxes of all elements on the screen. If nothing is left to do, the ground truth is {"done": true}.

    The last action of the answer counts. These action languages are read by their verbs: Qwen's computer_use and
    mobile_use, UI-TARS, GUI-R1, OS-Atlas, AndroidWorld, AgentCPM-GUI, StepFun's GELab and pyautogui. Only a single
    click or tap is a click. Any other verb is none, for example a move, a double click, a long press or an unknown
    verb. A point or a box without a verb is a click. A box counts as a click on its middle. The task is declared done
    by `done()`, `DONE`, {"action": "terminate"} and similar texts, but not if the status in this text is a failure. A
    click is a hit if it is in the true box or on its edge. If a click is no hit, the smallest element that contains the
    click is compared with the true box. The click is near if the IoU of this element and the true box is above 0.5. If
    the row has no "elements", no click is near. (A box in the answer that has an IoU above 0.5 with the true box is
    always a hit, because its middle is then in the true box.) Anything else, such as unreadable text, is a miss.

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
    verb, rest = "", text
    for match in _ACTION.finditer(text):
        verb, rest = next(filter(None, match.groups())), text[match.end() :]
    if not verb:
        verb = _without_verb(text)
    if verb.lower().replace("_", "") in _DONE:
        status = _STATUS.search(rest)
        return "done" if status is None or status[1].lower() in _SUCCESS else f"an end with the status {status[1]!r}"
    if verb and verb.lower().replace("_", "") not in _CLICK:
        return verb
    found = shapes(EITHER, answer, last_list=True)
    return found[-1] if found else None


def _without_verb(text: str) -> str:
    """Returns the verb of an answer that names none: AgentCPM-GUI's keys stand for verbs, and the words before a point
    may tell that it is no click. Returns "" for a plain point."""
    keys = dict(_AGENT_CPM.findall(text))
    if "POINT" in keys and keys.keys() & {"to", "duration"}:
        return "swipe" if "to" in keys else "long_press"
    if "POINT" not in keys and (key := next(iter(keys.keys() & {"TYPE", "PRESS", "CLEAR"}), "")):
        return key.lower()
    if "POINT" not in keys and keys.get("STATUS", "continue") != "continue":
        return "status"
    last = None
    for last in EITHER.finditer(text):  # noqa: B007  # only the last match is used
        pass
    other = _NO_CLICK.search(text, max(0, last.start() - 60), last.start()) if last else None
    return other[0][:20].strip() if other else ""


def _area(box: Shape) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
