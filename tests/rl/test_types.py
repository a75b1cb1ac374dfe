"""Tests pictures and the parts of a response."""

import base64
import io

import pytest
from PIL import Image

from rl.types import Picture, Prompt, Rollout
from tests.support.learner import PICTURES


def test_the_digest_of_a_picture_depends_on_its_content_only(tmp_path):
    (tmp_path / "a.png").write_bytes(PICTURES[0].source)
    assert Picture.of(tmp_path / "a.png").digest == PICTURES[0].digest != PICTURES[1].digest


def test_a_data_url_has_the_picture_in_a_format_that_servers_can_read():
    tiff = io.BytesIO()
    Image.new("RGB", (3, 2), "red").save(tiff, "TIFF")
    kind, _, data = Picture.of(tiff.getvalue()).data_url.partition(",")
    assert kind == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).getpixel((0, 0)) == (255, 0, 0)
    png = PICTURES[0].source
    assert isinstance(png, bytes)
    assert PICTURES[0].data_url == f"data:image/png;base64,{base64.b64encode(png).decode()}"


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("<think> a </think> b ", "a", "b"),
        ("a</think>b</think>c", "a</think>b", "c"),  # the text is split at the last tag
        ("<think>cut", "cut", ""),  # </think> is missing
        (" no tag ", "", "no tag"),
    ],
)
def test_a_response_is_split_into_reasoning_and_answer(text, reasoning, answer):
    rollout = Rollout(Prompt("p", "t", ()), text)
    assert (rollout.reasoning, rollout.answer) == (reasoning, answer)


def test_steps_are_the_pieces_of_a_response_or_one_piece_for_all_of_it():
    assert Rollout(Prompt("p", "t", ()), "", response_ids=(1, 2), policy_step=3).steps == ((3, 2),)
    assert Rollout(Prompt("p", "t", ()), "", response_ids=(1, 2), pieces=((3, 1), (4, 1))).steps == ((3, 1), (4, 1))
