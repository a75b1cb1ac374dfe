"""Adapters of public data sets. Each adapter is a function that converts a row of one data set to the columns of
rollout/data/rows.py.

The adapters follow the data sets' cards and loaders. If card and loader do not document a detail, the docstring of the
adapter says so. The task of the rows comes from the recipe (`{path: ..., adapter: ..., task: math}`). The id of a
row is made of its file name and line.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rl.types import Prompt, Rollout

Row = Mapping[str, Any]
Adapter = Callable[[Row], dict[str, Any]]
EMPTY_PROMPT = Prompt("", "", ())
THOUSAND = 1000  # Perception-R1's coordinates go from 0 to 1000 along each side of the picture


def get_adapter(name: str) -> Adapter:
    """Returns the adapter with this name.

    Raises: ValueError if there is no such adapter. The error message contains the names of all adapters.
    """
    if name not in ADAPTERS:
        raise ValueError(f"there is no adapter {name!r}; adapters are {', '.join(ADAPTERS)}")
    return ADAPTERS[name]


def open_reasoner_zero(row: Row) -> dict[str, Any]:
    """Converts a row of Open-Reasoner-Zero's training files, such as orz_math_57k_collected.json.

    A row is a list of two messages: {from, value} and {from, ground_truth: {value, pass_at_n}}. The library `datasets`
    converts the two messages to the columns "0" and "1". Some files have no pass_at_n.
    """
    question, answer = row["0"]["value"], row["1"]["ground_truth"]
    meta = {name: answer[name] for name in ("pass_at_n",) if answer.get(name) is not None}
    return {"messages": question, "ground_truth": answer["value"], "meta": meta}


def perception_r1_grounding(row: Row) -> dict[str, Any]:
    """Converts a row of PR1-Datasets-Grounding.

    A row has `image`, `problem` (a phrase that names the object) and `solution` (the object's box: x1, y1, x2, y2 in
    thousandths of the picture's width and height, as text or as a list). The wording of the question is ours.
    """
    question = f"Where is this in the picture: {row['problem']}? Answer with its bounding box as [x1, y1, x2, y2]"
    return {
        "messages": f"{question}, in fractions of the picture's width and height.",
        "images": [row["image"]],
        "ground_truth": _fractions(_numbers(row["solution"], 4)),
    }


def perception_r1_counting(row: Row) -> dict[str, Any]:
    """Converts a row of PR1-Datasets-Counting, which is made from PixMo.

    A row has `image`, `problem` (the objects to count) and `clicks` (a point on each object, in thousandths). As in
    Perception-R1, the answer is the list of points. The length of the list is the count. The wording of the question is
    ours.
    """
    points = [_fractions(_numbers(point, 2)) for point in row["clicks"]]
    return {
        "messages": f"Point at each of these in the picture: {row['problem']}. Answer with one [x, y] for each, in "
        "fractions of the picture's width and height.",
        "images": [row["image"]],
        "ground_truth": points,
        "meta": {"count": len(points)},
    }


def pacore_train(row: Row) -> dict[str, Any]:
    """Converts a row of PaCoRe-Train-8k.

    A row has `conversation`, `responses` (the cached messages) and `ground_truth`. The card does not document
    three details. Messages may have the keys role/content or from/value; this function reads both. Responses may
    contain thinking, which is removed. The ground truth may be a value, {answer: value} or {value: value}; this
    function reads all three. Coding problems have test cases in a format that is not documented. So this function
    accepts only texts and numbers as ground truth.
    """
    truth = row["ground_truth"]
    if isinstance(truth, Mapping):
        inside = [truth[name] for name in ("answer", "value") if truth.get(name) is not None]
        if not inside:
            raise ValueError(f"its ground truth has the keys {', '.join(truth)}, whose meaning is not documented")
        truth = inside[0]
    if not isinstance(truth, str | int | float):
        raise ValueError(f"its ground truth has the type {type(truth).__name__}, whose meaning is not documented")
    answers = [Rollout(EMPTY_PROMPT, response).answer for response in row["responses"]]
    pool = [answer for answer in answers if answer]
    return {"messages": _messages(row["conversation"]), "ground_truth": truth, "messages_pool": pool}


def vision_arena_chat(row: Row) -> dict[str, Any]:
    """Converts a row of VisionArena-Chat.

    A row has `conversation` (a list of lists, each with one {role, content}) and `images`. The prompt is the first
    question with all pictures. Later messages are not used, because some are answers of the models that the arena
    compared.
    """
    return _arena(row, "conversation", ("conversation_id", "language", "categories"))


def vision_arena_battle(row: Row) -> dict[str, Any]:
    """Converts a row of VisionArena-Battle.

    A row is like a row of VisionArena-Chat, but has `winner` and the conversations of two models. Both conversations
    begin with the same question.
    """
    return _arena(row, "conversation_a", ("question_id", "language", "categories", "winner", "model_a", "model_b"))


def geometry3k(row: Row) -> dict[str, Any]:
    """Converts a row of hiyouga/geometry3k.

    A row has `images` (one picture), `problem` (a text with the mark `<image>`) and `answer` (a number or a LaTeX
    expression).
    """
    return {"messages": row["problem"], "images": row["images"], "ground_truth": row["answer"]}


def clevr_count(row: Row) -> dict[str, Any]:
    """Converts a row of the CLEVR data sets of R1-V, such as leonardPKU/clevr_cogen_a_train.

    A row has `image`, `problem` (a question with a number as its answer) and `solution`, such as
    `<answer> 3 </answer>`.
    """
    return {"messages": row["problem"], "images": [row["image"]], "ground_truth": _in_answer_tag(row["solution"])}


def refcoco(row: Row) -> dict[str, Any]:
    """Converts a row of lmms-lab/RefCOCO, RefCOCO+ or RefCOCOg.

    A row has `image`, `answer` (a list of phrases that name one object) and `bbox` (the object's box: x, y, width and
    height in pixels). The prompt uses the first phrase. The box becomes [x1, y1, x2, y2] in pixels, so the reward needs
    `coordinates: pixel`. The wording of the question is ours.
    """
    phrases = [phrase for phrase in row["answer"] if phrase.strip()]
    if not phrases:
        raise ValueError("its column answer has no phrase")
    x, y, width, height = _numbers(row["bbox"], 4)
    question = (
        f"Where is this in the picture: {phrases[0]}? Answer with its bounding box as [x1, y1, x2, y2], in pixels."
    )
    return {
        "messages": question,
        "images": [row["image"]],
        "ground_truth": [x, y, x + width, y + height],
        "meta": {"phrases": phrases},
    }


def multimodal_open_r1(row: Row) -> dict[str, Any]:
    """Converts a row of lmms-lab/multimodal-open-r1-8k-verified.

    A row has `image`, `problem` and `solution`, which contains `<think>...</think> <answer>...</answer>`. The columns
    `original_question` and `original_answer` are not used.
    """
    return {"messages": row["problem"], "images": [row["image"]], "ground_truth": _in_answer_tag(row["solution"])}


ADAPTERS: Mapping[str, Adapter] = {
    function.__name__: function
    for function in (
        open_reasoner_zero,
        perception_r1_grounding,
        perception_r1_counting,
        pacore_train,
        vision_arena_chat,
        vision_arena_battle,
        geometry3k,
        clevr_count,
        refcoco,
        multimodal_open_r1,
    )
}


def _in_answer_tag(solution: Any) -> str:
    """Returns the text between `<answer>` and `</answer>` of a solution."""
    found = re.findall(r"<answer>(.*?)</answer>", solution, re.DOTALL)
    if len(found) != 1 or not found[0].strip():
        raise ValueError(f"its column solution has {len(found)} parts <answer>...</answer>; it must have one with text")
    return found[0].strip()


def _arena(row: Row, conversation: str, meta: Sequence[str]) -> dict[str, Any]:
    first = _messages(row[conversation])[0]
    if first["role"] != "user":
        raise ValueError(
            f"the first message of its conversation has the role {first['role']!r}, but must have the role user"
        )
    pictures = row["images"]
    return {
        "messages": first["content"],
        "images": pictures if isinstance(pictures, list) else [pictures],
        "meta": {name: row[name] for name in meta if row.get(name) is not None},
    }


def _messages(conversation: Any) -> list[dict[str, str]]:
    """Returns all messages as {role, content}. In `conversation`, a message may have the keys from/value instead of
    role/content, and messages may be in nested lists."""
    if isinstance(conversation, str):
        return [{"role": "user", "content": conversation}]
    if isinstance(conversation, list):
        return [message for part in conversation for message in _messages(part)]
    role = conversation["role"] if "role" in conversation else conversation["from"]
    names = {"human": "user", "gpt": "assistant"}
    text = conversation["content"] if "content" in conversation else conversation["value"]
    return [{"role": names.get(role, role), "content": text}]


def _numbers(value: Any, count: int) -> list[float]:
    numbers = json.loads(value) if isinstance(value, str) else value
    if not isinstance(numbers, list) or len(numbers) != count:
        raise ValueError(f"{value!r} is not a list of {count} numbers")
    return [float(number) for number in numbers]


def _fractions(thousandths: Sequence[float]) -> list[float]:
    if not all(0 <= number <= THOUSAND for number in thousandths):
        raise ValueError(f"the coordinates {list(thousandths)} must be between 0 and {THOUSAND}")
    return [number / THOUSAND for number in thousandths]
