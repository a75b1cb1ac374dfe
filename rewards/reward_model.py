"""Reward `reward_model`: the score that a local reward model (a Hugging Face classifier with one label) gives."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field

from rewards import Invalid, Rollout, Score, reward
from rewards.text import words_of

CHARACTERS_PER_TOKEN = 16
"""Only the last 16 * `max_length` characters of an answer are tokenized, because tokenizing a megabyte takes
seconds."""


@reward("reward_model", timeout_s=60)
class RewardModel:
    """The score (0 to 1) that a local reward model gives to prompt and answer. The model sees no pictures.

    path        the folder with a sequence classifier (one label), its tokenizer and the tokenizer's chat template
    max_length  maximum number of tokens that the model reads; the beginning of a longer chat is cut off
    squash      "sigmoid" maps the unbounded score s to 1 / (1 + exp(-s)). For a preference model, this is the
                probability that the answer beats an answer of score 0. "none" is for a model whose scores are between 0
                and 1; scores are clipped to this range
    device      torch device of the model

    The model reads a chat: the text of the row's messages, then `rollout.answer` (without the reasoning). Control
    tokens in the answer are replaced by blanks, so that the answer cannot end its message and start another message. An
    empty answer gets 0. The policy's text cannot make scoring slow, because the chat is cut to `max_length` tokens. So
    if a sample runs out of time, the policy is not the cause, and the sample is invalid. The STEP3-VL report has no
    such reward: its preference reward is a generative judge.
    """

    def __init__(
        self,
        path: str,
        max_length: Annotated[int, Field(gt=0)] = 4096,
        squash: Literal["sigmoid", "none"] = "sigmoid",
        device: str = "cpu",
    ) -> None:
        self.path, self.max_length, self.squash, self.device = path, max_length, squash, device

    def setup(self) -> None:
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

        from rl.model import config_file

        config_file.read(self.path)
        config = AutoConfig.from_pretrained(self.path, trust_remote_code=False)
        if config.num_labels != 1:
            raise ValueError(
                f"reward_model: {self.path} has {config.num_labels} labels (num_labels); a reward model must have 1"
            )
        tokenizer: Any = AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)
        self.tokenizer = tokenizer
        if not self.tokenizer.chat_template:
            raise ValueError(f"reward_model: the tokenizer of {self.path} has no chat template")
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(
            self.path, output_loading_info=True, trust_remote_code=False
        )
        model, report = loaded
        if report["missing_keys"]:
            missing = ", ".join(sorted(report["missing_keys"])[:3])
            raise ValueError(
                f"reward_model: {self.path} has no weights for {missing}; was the model saved as a classifier?"
            )
        self.model = model.to(self.device).eval()
        self.room = min(self.max_length, getattr(config, "max_position_embeddings", self.max_length))

    def __call__(self, rollout: Rollout) -> Score:
        if not rollout.answer:
            return Score(0.0, {"why": "no answer"})
        ids = self._ids(rollout)
        raw = self._score(ids)
        if not math.isfinite(raw):
            raise Invalid(f"reward_model: the score of row {rollout.prompt.id} is {raw}")
        if self.squash == "none":
            return Score(min(1.0, max(0.0, raw)), {"score": raw, "tokens": len(ids)})
        return Score(_sigmoid(raw), {"score": raw, "tokens": len(ids)})

    def _score(self, ids: list[int]) -> float:
        import torch

        with torch.inference_mode():
            batch = torch.tensor([ids], device=self.device)
            return self.model(input_ids=batch, attention_mask=torch.ones_like(batch)).logits[0, 0].float().item()

    def _ids(self, rollout: Rollout) -> list[int]:
        answer = rollout.answer[-CHARACTERS_PER_TOKEN * self.room :]
        for token in self.tokenizer.get_added_vocab():
            answer = answer.replace(token, " ")
        chat = [{"role": m["role"], "content": words_of(m)} for m in rollout.prompt.messages]
        chat.append({"role": "assistant", "content": answer})
        text = self.tokenizer.apply_chat_template(chat, tokenize=False)
        return self.tokenizer(text, add_special_tokens=False).input_ids[-self.room :]


def _sigmoid(score: float) -> float:
    """Returns 1 / (1 + exp(-score)), computed in a form that cannot overflow."""
    return 0.5 * (1 + math.tanh(score / 2))
