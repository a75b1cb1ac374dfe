"""Tests the commands `rollout.generate` and `rl.evaluate` and the proxy of rollout.serve, with the scale model in
vLLM."""

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from openai import AsyncOpenAI

from rl import evaluate
from rl.exits import FAILED, WRONG_INPUT
from rollout import generate
from rollout.generate import AnswerFile, Settings
from rollout.pacore import client as client_module
from rollout.pacore.client import EndpointClient
from rollout.pacore.prompt import SynthesisPrompt
from rollout.pacore.target import ModelTarget
from rollout.serve import PacoreProxy
from rollout.vllm.server import KEY_ENV, server_key
from tests.support.command import ROOT
from tests.support.judge_server import Reply, judge_server, text_of

MODEL, ROWS = ROOT / "recipes/scale/model", ROOT / "recipes/scale/data/heldout.jsonl"
OPEN = ROWS.with_name("open-heldout.jsonl")
TEMPLATE = ROOT / "recipes/scale/pacore.jinja"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The URL of a server with the scale model. The commands also start their servers with ModelTarget."""
    server_key()  # commands with --key-env find the server's key in the environment, also before the server starts
    with ModelTarget(str(MODEL), max_length=512).serve() as found:
        yield found


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with two held-out problems for each of four tasks. The folder of the file also has the pictures."""
    folder = tmp_path_factory.mktemp("problems")
    lines = ROWS.read_text().splitlines()
    folder.joinpath("rows.jsonl").write_text("\n".join(lines[i] for i in range(0, 1024, 128)) + "\n")
    shutil.copytree(ROWS.parent / "pictures", folder / "pictures")
    return folder / "rows.jsonl"


@pytest.fixture(scope="module")
def answered(url: str, problems: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output file of `rollout.generate` with `--mode pacore --trajectories 6`."""
    out = tmp_path_factory.mktemp("answers") / "out.jsonl"
    assert generate.main(arguments(problems, out, url)) == generate.DONE
    return out


def arguments(problems: Path, out: Path, url: str, *more: str) -> list[str]:
    return [
        *("--model", str(MODEL), "--url", url, "--key-env", KEY_ENV, "--mode", "pacore", "--trajectories", "6"),
        *("--template", str(TEMPLATE), "--max-tokens", "60", *more, str(problems), str(out)),
    ]


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("path", ["/v1/models", "/invocations", "/tokenize", "/metrics", "/v1/chat/completions"])
def test_a_server_answers_nothing_without_its_key(url: str, path: str) -> None:
    async def status(method: str) -> int:
        address = url.removesuffix("/v1") + path
        async with aiohttp.ClientSession() as session, session.request(method, address, json={}) as answer:
            return answer.status

    assert {asyncio.run(status(method)) for method in ("GET", "POST", "OPTIONS")} == {401}


def test_each_line_has_trajectories_synthesis_and_tokens(answered: Path) -> None:
    found = records(answered)
    assert len(found) == 8
    for record in found:
        first, last = record["rounds"]
        assert (len(first["replies"]), len(last["replies"]), first["shown"]) == (6, 1, 0)
        assert 0 < last["shown"] <= 6
        assert record["tokens"] == sum(r["tokens"] for one in record["rounds"] for r in one["replies"])
        assert last["replies"][0]["prompt_tokens"] > first["replies"][0]["prompt_tokens"]
    assert any(len({r["text"] for r in record["rounds"][0]["replies"]}) > 3 for record in found)  # seeds differ
    places = [r["answer"] for r in found if "pointing" in r["id"] or "grounding" in r["id"]]
    assert any("[0." in answer for answer in places)


def test_the_same_command_again_sends_no_requests(
    answered: Path, problems: Path, capsys: pytest.CaptureFixture
) -> None:
    before = answered.read_bytes()
    nowhere = "http://127.0.0.1:9/v1"
    assert generate.main(arguments(problems, answered, nowhere)) == generate.DONE
    assert answered.read_bytes() == before
    assert "8 of 8 problems are answered already" in capsys.readouterr().err


def test_a_problem_with_an_incomplete_line_is_answered_again(
    answered: Path, problems: Path, url: str, tmp_path: Path
) -> None:
    cut = tmp_path / "out.jsonl"
    cut.write_bytes(answered.read_bytes()[:-20])
    assert generate.main(arguments(problems, cut, url)) == generate.DONE
    assert sorted(r["id"] for r in records(cut)) == sorted(r["id"] for r in records(answered))


def test_an_out_file_with_other_settings_is_refused(
    answered: Path, problems: Path, url: str, capsys: pytest.CaptureFixture
) -> None:
    assert generate.main(arguments(problems, answered, url, "--seed", "5")) == WRONG_INPUT
    assert "was started with seed = 0, not 5; give another OUT file" in capsys.readouterr().err


def test_a_problem_that_the_endpoint_never_answers_fails_alone(
    problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(client_module, "RETRY_S", (0.01, 0.02))

    def script(request: dict[str, Any]) -> Reply:
        return Reply("broken", status=500) if "How many" in text_of(request) else Reply("4")

    with judge_server(script) as server:
        command = ["--model", "m", "--url", server.url, str(problems), str(tmp_path / "out.jsonl")]
        assert generate.main(command) == FAILED
    found = records(tmp_path / "out.jsonl")
    failed = [one["error"] for one in found if "error" in one]
    assert len(found) == 8 and len(failed) == 2
    assert all("answers other requests, but not this one after 7 tries" in error for error in failed)
    assert "2 problems have no answer" in capsys.readouterr().err


def test_an_endpoint_that_comes_back_late_answers_every_problem(
    problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "RETRY_S", (0.01, 0.02))
    command = ["--model", "m", str(problems), str(tmp_path / "out.jsonl"), "--limit", "1"]
    with judge_server([*[Reply("starting", status=503)] * 6, Reply("4")]) as server:
        assert generate.main([*command, "--url", server.url]) == generate.DONE
    assert [one["answer"] for one in records(tmp_path / "out.jsonl")] == ["4"]


def test_an_endpoint_that_answers_nothing_ends_the_command_and_no_problem_counts_as_answered(
    problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(client_module, "RETRY_S", (0.01, 0.02))
    with judge_server([Reply("down", status=503)]) as server:
        command = ["--model", "m", "--url", server.url, str(problems), str(tmp_path / "out.jsonl")]
        assert generate.main(command) == FAILED
    assert records(tmp_path / "out.jsonl") == []
    assert "does not answer after 6 tries" in capsys.readouterr().err


def test_an_evaluation_measures_cached_trajectories(
    answered: Path, problems: Path, url: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    code = evaluate.main(
        [
            *("--model", str(MODEL), "--url", url, "--key-env", KEY_ENV, "--data", str(problems)),
            *("--recipe", "rlvr", "--profile", "cpu"),
            *("--trajectories", str(answered), "--syntheses", "2", "--cache", str(tmp_path / "cache.jsonl"), "--json"),
        ]
    )
    output = capsys.readouterr()
    assert code == 0, output.err
    report = json.loads(output.out)
    found = {(line["task"], line["mode"]): line for line in report["results"]}
    for task in ("arithmetic", "counting", "grounding", "pointing", "all"):
        one, every = found[task, "SeRe pass@1"], found[task, "SeRe pass@6"]
        assert 0 <= one["accuracy"]["mean"] <= every["accuracy"]["mean"] <= 1
        assert one["accuracy"]["low"] <= one["accuracy"]["mean"] <= one["accuracy"]["high"]
        assert one["tokens"] < every["tokens"] < found[task, "PaCoRe@6"]["tokens"]
        assert 0 <= found[task, "majority@6"]["accuracy"]["mean"] <= every["accuracy"]["mean"]
    assert report["rows"] == 8 and 0 < report["synthesis"]["pacore/messages_mean"] <= 6
    assert all(len(record["rounds"][-1]["replies"]) == 2 for record in records(tmp_path / "cache.jsonl"))


def test_modes_without_a_synthesis_need_no_model_if_trajectories_are_given(
    answered: Path, problems: Path, capsys: pytest.CaptureFixture
) -> None:
    options = ["--model", "m", "--url", "http://127.0.0.1:9/v1", "--data", str(problems), "--profile", "cpu"]
    code = evaluate.main([*options, "--trajectories", str(answered), "--modes", "sere,majority"])
    output = capsys.readouterr()
    assert code == 0, output.err
    assert "SeRe pass@6" in output.out and "majority@6" in output.out and "PaCoRe" not in output.out


def test_given_trajectories_must_cover_all_rows(answered: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--model", "m", "--url", "http://127.0.0.1:9/v1", "--profile", "cpu"]
    assert evaluate.main([*options, "--trajectories", str(answered), "--modes", "sere"]) == WRONG_INPUT
    assert "has no trajectories of row heldout-pointing-001 (1272 rows are missing)" in capsys.readouterr().err


def test_a_cache_with_other_settings_is_refused(
    answered: Path, problems: Path, url: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    cache = tmp_path / "cache.jsonl"
    options = ["--model", str(MODEL), "--url", url, "--data", str(problems), "--profile", "cpu", "--cache", str(cache)]
    with judge_server(lambda request: Reply("[0.5, 0.5]")) as server:
        scripted = [one if one != url else server.url for one in options]
        assert evaluate.main([*scripted, "--trajectories", str(answered)]) == 0
        assert evaluate.main([*scripted, "--trajectories", str(answered), "--syntheses", "2"]) == WRONG_INPUT
        assert "was started with answers = 1, not 2" in capsys.readouterr().err
        assert evaluate.main([*scripted, "--attempts", "2"]) == WRONG_INPUT
        assert "was started with trajectories = [], not [2]" in capsys.readouterr().err


def test_rows_without_an_answer_are_left_out_and_counted(
    problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def script(request: dict[str, Any]) -> Reply:
        return Reply("no", status=400) if "How many" in text_of(request) else Reply("[0.5, 0.5]")

    with judge_server(script) as server:
        options = ["--model", "m", "--url", server.url, "--data", str(problems), "--profile", "cpu", "--attempts", "2"]
        assert evaluate.main([*options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["rows"], report["left_out"]) == (6, 2)


@pytest.mark.slow
def test_an_evaluation_serves_its_judge_and_a_policy_that_sees_another_picture_does_not_win(
    url: str, capsys: pytest.CaptureFixture
) -> None:
    policy = ("--model", str(MODEL), "--url", url, "--key-env", KEY_ENV)
    modes = ("--modes", "sere", "--attempts", "2", "--limit", "16", "--blind")
    assert evaluate.main(["--recipe", "rlhf", "--profile", "cpu", *policy, *modes, "--json", f"data.eval={OPEN}"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["blind"] and report["rows"] == 16 and report["preference"]["genrm/win_rate"] < 0.1
    assert report["preference"]["genrm/order_agreement"] > 0.5


def test_an_unknown_mode_is_refused(capsys: pytest.CaptureFixture) -> None:
    assert evaluate.main(["--model", "m", "--data", "x.jsonl", "--modes", "best"]) == WRONG_INPUT
    assert "--modes: 'best' is none of sere, majority, pacore" in capsys.readouterr().err


def test_openais_client_gets_a_stream_from_the_proxy_of_a_real_endpoint(url: str) -> None:
    async def scenario() -> tuple[str, int]:
        async with EndpointClient(url, str(MODEL), key_env=KEY_ENV) as asks:
            runner = web.AppRunner(PacoreProxy(asks, "scale", (4,), "pacore", SynthesisPrompt(TEMPLATE)).app())
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            address = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
            async with AsyncOpenAI(base_url=address, api_key="none") as client:
                stream = await client.chat.completions.create(
                    model="scale:pacore",
                    messages=[{"role": "user", "content": "What is 5 + 3 - 2?"}],
                    stream=True,
                    stream_options={"include_usage": True},
                    max_tokens=60,
                    seed=1,
                )
                chunks = [chunk async for chunk in stream]
            await runner.cleanup()
        pieces = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
        assert len([piece for piece in pieces if piece]) > 1
        usage = chunks[-1].usage
        assert usage is not None
        return "".join(pieces), usage.completion_tokens

    text, tokens = asyncio.run(scenario())
    assert "boxed{" in text and tokens > 5 * 5


# Without a model


def scripted(tmp_path: Path, script: Any, *more: str, rows: int = 2) -> tuple[int, Path]:
    data, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    lines = [{"id": f"{n}", "messages": [{"role": "user", "content": f"problem {n}"}]} for n in range(rows)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with judge_server(script) as server:
        code = generate.main(["--model", "m", "--url", server.url, *more, str(data), str(out)])
    return code, out


def test_a_problem_that_is_too_long_is_reported_and_the_others_are_answered(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def script(request: dict[str, Any]) -> Reply:
        if "problem 0" in text_of(request):
            return Reply("This model's maximum context length is 10 tokens.", status=400)
        return Reply("<think>hm</think>4")

    code, out = scripted(tmp_path, script)
    assert code == generate.FAILED
    failed, found = sorted(records(out), key=lambda record: record["id"])
    assert "leaves no room for a response" in failed["error"] and found["answer"] == "4"
    assert "1 problems have no answer; the first is 0" in capsys.readouterr().err
    code, _ = scripted(tmp_path, [Reply("5")])  # the repeated command sends only problem 0
    assert code == generate.DONE
    assert {r["id"]: r["answer"] for r in records(out) if "error" not in r} == {"0": "5", "1": "4"}


def test_a_changed_problem_with_the_same_id_is_answered(tmp_path: Path) -> None:
    code, out = scripted(tmp_path, [Reply("4")], rows=1)
    assert code == generate.DONE
    data = tmp_path / "rows.jsonl"
    data.write_text(data.read_text().replace("problem 0", "another one"))
    with judge_server([Reply("6")]) as server:
        assert generate.main(["--model", "m", "--url", server.url, str(data), str(out)]) == generate.DONE
    assert [r["answer"] for r in records(out)] == ["4", "6"]


def test_an_endpoint_that_refuses_the_model_ends_the_command_and_earlier_answers_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def script(request: dict[str, Any]) -> Reply:
        return Reply("4") if "problem 0" in text_of(request) else Reply("no such model", status=404, after_s=0.3)

    code, out = scripted(tmp_path, script)
    assert code == generate.FAILED and [r["id"] for r in records(out)] == ["0"]
    stderr = capsys.readouterr().err
    assert "answers 404" in stderr and "The same command continues from the results in" in stderr


def test_temporary_errors_of_the_endpoint_are_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "RETRY_S", (0.01, 0.02))
    replies = [Reply("busy", status=503), Reply(None, closes=True), Reply("", status=429), Reply("4")]
    code, out = scripted(tmp_path, replies, rows=1)
    assert code == generate.DONE and records(out)[0]["answer"] == "4"


def test_a_file_that_another_program_wrote_is_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text('{"text": "mine"}\n')
    with pytest.raises(ValueError, match=r"notes.jsonl:1 was not written by this command; give another OUT file"):
        AnswerFile(path, Settings("m", ()))
    assert path.read_text() == '{"text": "mine"}\n'


@pytest.mark.parametrize("text", ['{"id": "a", "text": "mine"}', "notes", '{"id": "a", "problem": 3}', "\n{}"])
def test_a_file_without_a_last_newline_that_another_program_wrote_is_not_changed(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match="not written by this command; give another OUT file"):
        AnswerFile(path, Settings("m", ()))
    assert path.read_text() == text


def test_two_commands_cannot_write_to_one_file(tmp_path: Path) -> None:
    first = AnswerFile(tmp_path / "out.jsonl", Settings("m", ()))
    with pytest.raises(ValueError, match="another command is writing to"):
        AnswerFile(tmp_path / "out.jsonl", Settings("m", ()))
    first.close()
    AnswerFile(tmp_path / "out.jsonl", Settings("m", ())).close()


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (("--mode", "pacore", "--trajectories", "x"), "'x' is not a plan of trajectories"),
        (("--yarn", "2"), "leave out --url"),
        (("--key-env", "NO_SUCH_KEY"), "the environment variable NO_SUCH_KEY is not set"),
    ],
)
def test_invalid_arguments_are_refused(
    tmp_path: Path, more: tuple[str, ...], why: str, capsys: pytest.CaptureFixture
) -> None:
    code, _ = scripted(tmp_path, [Reply("4")], *more)
    assert code == WRONG_INPUT and why in capsys.readouterr().err
