"""Compares model folders: the tensors of two folders, and the logprobs that several programs compute from a folder.

The programs are our learner, vLLM, and transformers' own class. vLLM runs in a process of its own, because it changes
torch for the whole process.
"""

import io
import math
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from transformers import AutoTokenizer

from rl.config import Source
from rl.model import hf_folder
from rl.model.architecture import ImageToken
from rl.model.weight_files import Stored, open_tensors, stored_tensors
from rl.types import Picture, Prompt
from rollout.chat import Chat
from rollout.data.rows import read

Program = Literal["learner", "vllm", "transformers"]
PROGRAMS: tuple[Program, ...] = ("learner", "vllm", "transformers")
PICTURES = ((224, 224), (1600, 900), (300, 1500))  # (width, height) in pixels of random pictures
CONTINUATION = 32  # number of random tokens that continue a prompt without a known response


@dataclass(frozen=True)
class Question:
    """A sequence whose logprobs are compared. `prompt_ids` has one image token per picture, `expanded_ids` has all
    tokens of each picture. Only the logprobs of `response_ids` are compared."""

    name: str
    prompt_ids: tuple[int, ...]
    expanded_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Setting:
    """How the logprobs are computed. The device is "cpu" or "cuda", the dtype is float32, bfloat16 or float16."""

    device: str = "cpu"
    dtype: str = "float32"


def questions(folder: Path, rows: str | None, limit: int, seed: int = 0) -> list[Question]:
    """Returns sequences for a comparison.

    Args:
        folder: the model folder whose tokenizer and template are used.
        rows: a file with data rows. The prompt is the row's chat. It continues with the row's reference or ground
            truth, or with random tokens if the row has neither as text. None: one sequence of random tokens, and
            pictures of several sizes if the model accepts pictures.
        limit: only the first rows are used.
    Raises: ValueError if the rows cannot be used.
    """
    rng = np.random.default_rng(seed)
    if rows is None:
        return _random_questions(folder, rng)
    chat = Chat(folder)
    found = read([Source(path=rows, limit=limit)], reserved=chat.reserved).checked().prompts
    return [_question_of(chat, prompt, rng) for prompt in found]


def _question_of(chat: Chat, prompt: Prompt, rng: np.random.Generator) -> Question:
    text = prompt.reference or (prompt.ground_truth if isinstance(prompt.ground_truth, str) else "")
    ids = tuple(chat.tokenizer.encode(text, add_special_tokens=False)) if text else ()
    response = ids or _random_ids(len(chat.tokenizer), set(chat.tokenizer.all_special_ids), CONTINUATION, rng)
    return question(prompt.id, chat.prompt_ids(prompt), response, prompt.images, chat.image, chat.tokenizer)


def question(
    name: str,
    prompt_ids: Sequence[int],
    response_ids: Sequence[int],
    pictures: Sequence[Picture] = (),
    image: ImageToken | None = None,
    tokenizer: Any = None,
) -> Question:
    """Makes a Question. `image` and `tokenizer` are needed if the prompt shows pictures."""
    following, expanded = iter(pictures), list[int]()
    for token in prompt_ids:
        if image and token == image.id:
            expanded += tokenizer.convert_tokens_to_ids(image.words(next(following).size))
        else:
            expanded.append(token)
    return Question(name, tuple(prompt_ids), tuple(expanded), tuple(response_ids), tuple(pictures))


def _random_questions(folder: Path, rng: np.random.Generator) -> list[Question]:
    """Returns sequences of random tokens. Only a model that accepts pictures needs a tokenizer."""
    config = hf_folder.read_config(folder)
    image, text = hf_folder.image_token(config), config.get_text_config()
    known = [getattr(part, name, None) for part in (config, text) for name in ("eos_token_id", "bos_token_id")]
    special = {i for ids in known if ids is not None for i in (ids if isinstance(ids, list) else [ids])}
    if image is None:
        prompt, response = (_random_ids(text.vocab_size, special, CONTINUATION, rng) for _ in range(2))
        return [question("random tokens", prompt, response)]
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    special |= set(tokenizer.all_special_ids)

    def words() -> tuple[int, ...]:
        return _random_ids(min(text.vocab_size, len(tokenizer)), special, CONTINUATION, rng)

    asked = [question("random tokens", words(), words())]
    for width, height in PICTURES:
        noise = picture_of(Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)))
        name = f"picture of {width} x {height}"
        asked.append(question(name, (*words(), image.id, *words()), words(), [noise], image, tokenizer))
    return asked


def picture_of(image: Image.Image) -> Picture:
    """Returns an image as the picture of a row."""
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    return Picture.of(encoded.getvalue())


def _random_ids(vocabulary: int, special: set[int], count: int, rng: np.random.Generator) -> tuple[int, ...]:
    usable = np.setdiff1d(np.arange(vocabulary), list(special))
    return tuple(rng.choice(usable, count).tolist())


# Tensors


@dataclass(frozen=True)
class TensorDifferences:
    """How the tensors of two folders differ. Shapes and dtypes are given as (name, in A, in B). `values` gives the
    largest absolute difference of each tensor that both folders have in the same shape, if it is not 0."""

    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    shapes: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    dtypes: tuple[tuple[str, str, str], ...]
    values: dict[str, float] = field(default_factory=dict)
    common: int = 0

    @property
    def fit(self) -> bool:
        """True if both folders have the same tensors in the same shapes."""
        return not (self.only_a or self.only_b or self.shapes)


def compare_tensors(a: Path, b: Path) -> TensorDifferences:
    """Compares the tensors of two folders under their published names. Raises CheckpointError if a folder cannot be
    read."""
    of_a, of_b = stored_tensors(a), stored_tensors(b)
    names = [name for name in of_a if name in of_b]
    same_shape = [name for name in names if of_a[name].shape == of_b[name].shape]
    largest = {name: _largest_difference(of_a[name], of_b[name]) for name in same_shape}
    return TensorDifferences(
        tuple(sorted(of_a.keys() - of_b.keys())),
        tuple(sorted(of_b.keys() - of_a.keys())),
        tuple((n, of_a[n].shape, of_b[n].shape) for n in names if of_a[n].shape != of_b[n].shape),
        tuple((n, of_a[n].dtype, of_b[n].dtype) for n in names if of_a[n].dtype != of_b[n].dtype),
        {name: value for name, value in largest.items() if value != 0},
        len(names),
    )


def _largest_difference(a: Stored, b: Stored) -> float:
    with open_tensors(a.file) as in_a, open_tensors(b.file) as in_b:
        difference = (in_a.get_tensor(a.name).float() - in_b.get_tensor(b.name).float()).abs()
    return float(difference.max()) if difference.numel() else 0.0


# Logprobs


@dataclass(frozen=True)
class LogprobDifference:
    """How much the logprobs of two programs, or of two folders, differ: mean and maximum of the absolute difference in
    nats per token, and the question with the maximum."""

    first: str
    second: str
    tokens: int
    mean: float
    largest: float
    question: str


def logprobs(program: Program, folder: Path, asked: Sequence[Question], setting: Setting) -> list[list[float]]:
    """Returns the logprob in nats of each response token, one list per question.

    Raises: ValueError if the program cannot load the folder.
    """
    if program == "learner":
        return by_learner(folder, asked, setting)
    if program == "transformers":
        return by_transformers(folder, asked, setting)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(by_vllm, folder, asked, setting).result()


def difference(
    first: tuple[str, Sequence[Sequence[float]]],
    second: tuple[str, Sequence[Sequence[float]]],
    asked: Sequence[Question],
) -> LogprobDifference:
    """Compares the logprobs of two programs or folders, each given as (name, result of `logprobs`)."""
    each = [np.abs(np.subtract(a, b)) for a, b in zip(first[1], second[1], strict=True)]
    # NaN must not be hidden by a smaller number
    largest = [float(part.max()) if not np.isnan(part).any() else math.nan for part in each]
    worst = max(range(len(each)), key=lambda n: math.inf if math.isnan(largest[n]) else largest[n])
    together = np.concatenate(each)
    return LogprobDifference(
        first[0], second[0], together.size, float(together.mean()), largest[worst], asked[worst].name
    )


def by_learner(folder: Path, asked: Sequence[Question], setting: Setting) -> list[list[float]]:
    """The result of `logprobs` for our learner, computed in this process."""
    import torch

    from rl.learner.batch import Group
    from rl.learner.packing import pack
    from rl.model.packed import PolicyModel

    model = hf_folder.load(folder, dtype=getattr(torch, setting.dtype), device=setting.device)
    result = []
    for question in asked:
        digests = tuple(picture.digest for picture in question.pictures)
        sizes = tuple(picture.size for picture in question.pictures)
        group = Group(question.expanded_ids, digests, (question.response_ids,), (0,), sizes)
        (row,) = pack([group], group.tokens, model.image_token_id, partial(model.positions, model.config))
        with torch.no_grad():
            features = {one.digest: model.features([one.load()])[0] for one in question.pictures}
            found, _ = PolicyModel(model.model, model.lm_head)(row, features, 1.0)
        result.append(found.tolist())
    return result


def by_vllm(folder: Path, asked: Sequence[Question], setting: Setting) -> list[list[float]]:
    """The result of `logprobs` for vLLM. This process must not have started vLLM before."""
    from rollout.vllm.engine import Engine

    engine: Any = Engine(
        str(folder),
        max_sequence_length=max(len(one.expanded_ids) + len(one.response_ids) for one in asked) + 1,
        dtype=setting.dtype,  # pyrefly: ignore[bad-argument-type]
        device=setting.device,  # pyrefly: ignore[bad-argument-type]
        max_images_per_prompt=max(1, *(len(one.pictures) for one in asked)),
    )
    scored = [engine.score((*one.prompt_ids, *one.response_ids), one.pictures) for one in asked]
    engine.close()
    return [found[-len(one.response_ids) :] for found, one in zip(scored, asked, strict=True)]


def by_transformers(folder: Path, asked: Sequence[Question], setting: Setting) -> list[list[float]]:
    """The result of `logprobs` for transformers' own class, computed in this process."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=False, dtype=getattr(torch, setting.dtype)
    )
    model = loaded.to(setting.device).eval()
    result = []
    for one in asked:
        ids = torch.tensor([[*one.prompt_ids, *one.response_ids]], device=setting.device)
        with torch.no_grad():
            table = model(ids).logits[0, :-1].float().log_softmax(-1)
        found = table.gather(1, ids[0, 1:, None])[:, 0]
        result.append(found[-len(one.response_ids) :].tolist())
    return result


def programs_for(folder: Path) -> tuple[Program, ...]:
    """Returns the programs that can load the folder without code of its own. transformers has no class for a model that
    accepts pictures here."""
    image = hf_folder.image_token(hf_folder.read_config(folder))
    return tuple(program for program in PROGRAMS if not (image and program == "transformers"))
