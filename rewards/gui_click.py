"""Reward `gui_click`: scores clicks on the elements of a screen, and declarations that the task is done."""

# ruff: noqa: RUF001, RUF003  # punctuation and words of several scripts

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
_CLICK = frozenset({"click", "leftclick", "singleclick", "tap", "singletap", "点击", "单击", "轻点"})
_DONE = frozenset({"done", "stop", "finish", "finished", "terminate", "complete", "completed", "status"})
_SUCCESS = r"success\w*|succeeded|(?:task_)?completed?|finish(?:ed)?|satisfied|done|ok|true"
_FAILURE = r"fail\w*|not\b|not_\w*|infeasible|impossible|unsuccessful|error|abort\w*|false|interrupt\w*|need_feedback"
_KNOWN = (
    r"(?:left_?|right_?|double_?|middle_?|triple_?|single_?)?(?:click|tap)|done|stop|finish(?:ed)?|terminate|completed?|scroll"
    r"|swipe|drag(?:_?to)?|type|write|input(?:_text)?|wait|back|home|hotkey|key|long_?press|open(?:_app)?|press(?:_\w{1,20})?"
    r"|move(?:_?to)?|mouse_?move|hover|left_double|right_single|select|enter|fail|abort|call_user|zoom|pinch"
)
# An action: a value in JSON, a word after "Action:"; a call, or a line that begins with a verb in
# capitals, as in OS-Atlas.
_ACTION = re.compile(
    r"(?<![a-z_])action(?:_type|s)?[\"']?\s{0,8}+[:=]\s{0,8}+(?:[\[(]?[\"'](?P<quoted>[^\"'\n]{0,40})[\"']"
    r"|[\[(]?(?:[a-z]{1,20}\.)?(?P<named>[a-z\u4e00-\u9fff][a-z_/\u4e00-\u9fff]{0,30}))"
    rf"|[\"'](?:name|type|function|op|tool)[\"']\s?:\s?[\"'](?P<key>{_KNOWN})[\"']"
    rf"|\b(?:pyautogui|computer)\.(?P<library>[a-z_]{{1,30}})\(|\b(?P<called>{_KNOWN})\("
    r"|(?<![\w.])(?P<other>[a-z_]{1,30})\((?=\s?(?:x\s?=|start_box|point|coordinate|[\[(]?[.\d]))"
    r"|^[ \t]{0,8}(?P<line>(?-i:[A-Z]{2}[A-Z_]{1,20}))(?=\s{0,3}(?:<point>|\[|\(|[A-Z]{0,9}$|$))",
    re.IGNORECASE | re.MULTILINE,
)
_FAILED = re.compile(
    rf"(?:status|success|result|outcome)[\"']?\s{{0,4}}[:=]\s{{0,4}}[\"']?(?:{_FAILURE})\b|\(\s?[\"']?(?:{_FAILURE})\b",
    re.IGNORECASE,
)
_ENDED = re.compile(rf"(?:goal_)?status[\"']?\s{{0,4}}[:=]\s{{0,4}}[\"']?(?:{_SUCCESS})\b", re.IGNORECASE)
_AGENT_CPM = re.compile(r"[\"'](POINT|TYPE|PRESS|STATUS|to|duration|CLEAR)[\"']\s?:\s?[\"']?(\w{0,20})")
_BARE_DONE = re.compile(r"\W{0,8}+(?:done|stop|finish(?:ed)?|terminate|completed?)\W{0,8}+", re.IGNORECASE)
# Free text inside an action: what is typed, a reason, a summary. It may contain words that look like actions.
_FREE_TEXT = re.compile(
    r"((?<![a-z])(?:text|content|input_text|value|thought|explain|summary|reason|message|return)[\"']?\s?[:=]\s?)"
    r"(?:\"(?:\\.|[^\"\\])*+\"|'(?:\\.|[^'\\])*+')|^(\s{0,8}TYPE )\[[^\n]*\]|((?<!\w)return:)[^\n]*+",
    re.IGNORECASE | re.MULTILINE,
)
_OTHER_BUTTON = re.compile(r"button[\"']?\s?[:=]\s?[\"']?(?:right|middle)|clicks[\"']?\s?[:=]\s?[2-9]", re.IGNORECASE)
_OPTIONS = re.compile(r",\s?(?:clicks|button|duration|interval)\s?=\s?[^,()\n]{1,20}", re.IGNORECASE)
# Words near a point, for answers that name no action in an action language.
_SAYS_CLICK = re.compile(r"\b(?:click|tap|press)|点击|单击|轻点|点按", re.IGNORECASE)
_SAYS_OTHER = re.compile(
    r"\b(?:double|right|middle|long)[-_ ]?(?:click|tap|press)|\bpress and hold|(?:右键|双击|长按|右击)|悬停"
    r"|\b(?:do not|don['’]t|(?:should|must|can)(?: not|n['’]t)) (?:click|tap)|(?:不要|别|勿|不应?该?)\s?(?:点击|单击)",
    re.IGNORECASE,
)
_SAYS_MOVE = re.compile(
    r"\b(?:mov(?:e|ed|ing)|mouse_move|moveto|hover(?:ing)?|drag(?:ging)?|swip(?:e|ing)|scroll(?:ing)?|typ(?:e|ing))\b"
    r"|滑动|拖动|拖拽|移动|移到|移至|输入",
    re.IGNORECASE,
)
_NEAR = 60  # number of characters before a point in which words are looked for
_AFTER = 12  # the same after a point: "在（500，300）处双击"


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
    part = answer_part(answer)
    if part is None:
        return None
    if _BARE_DONE.fullmatch(part):
        return "done"
    text = _OPTIONS.sub("", _FREE_TEXT.sub(r"\1\2\3", part))
    verb, rest = None, ""
    for match in _ACTION.finditer(text):
        verb, rest = next(one for one in match.groups() if one is not None), text[match.start() :]
    verb = _without_verb(text) if verb is None else re.sub(r"[\s_-]", "", verb.lower()) or "no action"
    if verb in _DONE:
        failed = _FAILED.search(text) or (verb == "status" and not _ENDED.search(text))
        return "an end that is no success" if failed else "done"
    if verb and verb not in _CLICK:
        return verb
    if _OTHER_BUTTON.search(part[-len(rest) - _NEAR :] if rest else part):
        return "another click than a single left click"
    found = shapes(EITHER, text, last_list=True)
    return found[-1] if found else None


def _without_verb(text: str) -> str:
    """Returns the verb of an answer that names none: AgentCPM-GUI's keys stand for verbs, and the words near a point
    may tell that it is no click. Returns "" for a plain point."""
    keys = dict(_AGENT_CPM.findall(text))
    if "POINT" in keys:
        return "swipe" if "to" in keys else "long press" if "duration" in keys else ""
    if key := next(iter(sorted(keys.keys() & {"TYPE", "PRESS", "CLEAR"})), ""):
        return key.lower()
    last = None
    for last in EITHER.finditer(text):  # noqa: B007  # only the last match is used
        pass
    if last is None:
        return "status" if _ENDED.search(text) or _FAILED.search(text) else ""
    before = re.split(r"[.;。；\n]", text[max(0, last.start() - _NEAR) : last.start()])[-1]
    if other := _SAYS_OTHER.search(before) or _SAYS_OTHER.search(text, last.end(), last.end() + _AFTER):
        return other[0]
    moved = _SAYS_MOVE.search(before)
    return moved[0] if moved and not _SAYS_CLICK.search(before) else ""


def _area(box: Shape) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
