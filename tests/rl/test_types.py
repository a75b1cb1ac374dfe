"""Tests pictures and the parts of a response."""

import base64
import io
import pickle
import random
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rl.stop import Stop
from rl.types import FORMATS, BadPicture, LostPicture, Picture, Prompt, Rollout
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


def test_a_picture_that_vanished_or_changed_stops_the_run_and_is_named(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(PICTURES[0].source)
    picture = Picture.of(file)
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(LostPicture, match=rf"{file}\) cannot be read") as caught:
        picture.load()
    file.unlink()
    with pytest.raises(Stop, match=rf"{file}\) cannot be read"):
        picture.load()
    copy = pickle.loads(pickle.dumps(caught.value))  # it crosses from the engine's process to the run
    assert (type(copy), str(copy), copy.saves) == (LostPicture, str(caught.value), False)


@pytest.mark.parametrize("kind", FORMATS)
@given(data=st.data())
def test_damaged_bytes_are_a_picture_or_a_bad_picture_and_nothing_else(kind, data):
    encoded = io.BytesIO()
    Image.frombytes("RGB", (24, 17), random.Random(0).randbytes(24 * 17 * 3)).save(encoded, kind)
    damaged = bytearray(encoded.getvalue())
    for _ in range(data.draw(st.integers(0, 6))):
        place = data.draw(st.integers(0, len(damaged) - 1))
        damaged[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    damaged = bytes(damaged[: data.draw(st.integers(1, len(damaged)))])
    with suppress(BadPicture):
        picture = Picture.of(damaged)
        picture.check()
        assert picture.load().size == picture.size


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
