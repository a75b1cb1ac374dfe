"""The scale model's tokenizer: one token for each word in the problems, each digit, and each byte of other text.

Tested in tests/recipes/scale/test_world.py.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from recipes.scale.world import COLORS, PLACES, SHAPES

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<im_patch>",
    "<im_start>",
    "<im_end>",
    "<patch_start>",
    "<patch_end>",
    "<patch_newline>",
)
THINK = ("<think>", "</think>")  # each is one token, but not a special token, so skip_special_tokens keeps it
WORDS = [
    *("Point", "at", "the", "Box", "How", "many", "What", "is", "maybe", "at", "first"),
    *("then", "system", "user", "assistant", "and", "in", "of", "there", "are", "I", "a", "things", "one", "by"),
]
# The "0." of a coordinate is one token, and so is "\boxed{". The token of a word includes the space before the word.
PIECES = r"\\boxed\{| ?0\.(?=\d)|\d| ?\p{L}+|, | [+-] |\n"

CHAT_TEMPLATE = Path(__file__).with_name("chat.jinja").read_text()


def words(more: Sequence[str] = ()) -> list[str]:
    """Returns the texts of all tokens that have more than one byte, except the tokens in SPECIAL and THINK. `more` has
    further words, which do not occur in the problems of world.py."""
    places = sorted({word for place in PLACES for word in place.split()})
    plain = dict.fromkeys([*WORDS, *COLORS, *SHAPES, *places, *more])
    marks = ["\\boxed{", "0.", " 0.", ", ", " + ", " - "]
    return marks + [form for word in plain for form in (word, f" {word}")]


def build(more: Sequence[str] = ()) -> Tokenizer:
    """Builds a byte-level BPE tokenizer without merges. Text that is not a known word is split into bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    known = [as_bytes.pre_tokenize_str(word)[0][0] for word in words(more)]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys([*alphabet, *known]))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    pieces = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in THINK])
    return tokenizer


def save(folder: Path, more: Sequence[str] = ()) -> Tokenizer:
    """Writes the files that AutoTokenizer loads: tokenizer.json, and tokenizer_config.json with the chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build(more)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return tokenizer
