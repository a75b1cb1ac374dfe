"""Tests that learner, vLLM and transformers compute the same logprobs from folders of all supported families and forms,
and that differences between folders are found."""

import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rl.learner.batch import Group
from rl.learner.packing import pack
from rl.model import hf_folder
from rl.model.hf_folder import image_token, read_config
from rl.model.packed import PolicyModel
from rl.model.qwen_vl import image_processor
from rl.model.weight_files import WEIGHTS
from rl.types import Completion, Request
from rollout.comparison import (
    Question,
    Setting,
    by_learner,
    by_transformers,
    by_vllm,
    compare_tensors,
    difference,
    programs_for,
    question,
    questions,
)
from rollout.vllm.engine import Engine
from tests.support import qwen_vl, stock_vllm, tiny, transformers_4
from tests.support.data_rows import jsonl
from tests.support.engine_process import vllm_process
from tests.support.models import transformers_name

FAMILIES: dict[str, tuple[Any, Any]] = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
}
SIZES = tiny.decoder() | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
SIZES |= {"sliding_window": None, "pad_token_id": 0, "tie_word_embeddings": False}
PARITY = 1e-4


def largest(one: list[list[float]], two: list[list[float]], asked: list[Question]) -> float:
    return difference(("one", one), ("two", two), asked).largest


ROPE = {"rope_theta": 1e4, "original_max_position_embeddings": 128, "factor": 4.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "linear": {"rope_parameters": ROPE | {"rope_type": "linear"}},
    "llama3": {"rope_parameters": ROPE | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    "yarn": {"rope_parameters": ROPE | {"rope_type": "yarn"}},
    "odd vocabulary": {"vocab_size": tiny.VOCABULARY + 1},
    "one key-value head for all": {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 1},
}


def make_text_folder(family: str, folder: Path, **options: Any) -> None:
    config, cls = FAMILIES[family]
    model = cls(config(**{**SIZES, "architectures": None, **options})).float().eval()
    tiny.randomize(model, 3)
    model.save_pretrained(folder)
    tiny.save_tokenizer(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_learner_engine_and_transformers_agree_on_every_text_family(family: str, tmp_path: Path) -> None:
    assert_programs_agree(family, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_learner_engine_and_transformers_agree_on_variants_of_every_text_family(
    family: str, variant: str, tmp_path: Path
) -> None:
    if family == "phi3" and "rope_parameters" in VARIANTS[variant]:
        pytest.skip("transformers' Phi-3 accepts only longrope, which this project does not support")
    assert_programs_agree(family, tmp_path, **VARIANTS[variant])


def assert_programs_agree(family: str, tmp_path: Path, **options: Any) -> None:
    make_text_folder(family, tmp_path, **options)
    asked = questions(tmp_path, None, 1)
    assert programs_for(tmp_path) == ("learner", "vllm", "transformers")
    ours, theirs = (score(tmp_path, asked, Setting()) for score in (by_learner, by_transformers))
    with vllm_process() as process:
        engines = process.run(by_vllm, tmp_path, asked, Setting())
    assert largest(ours, theirs, asked) < PARITY and largest(ours, engines, asked) < PARITY


def test_learner_and_engine_agree_on_a_folder_in_the_form_of_transformers(tmp_path: Path) -> None:
    """The folder has everything in which such folders differ from the published one."""
    tiny.make_step_vl(tmp_path / "published", seed=5)
    odd = tmp_path / "odd"
    odd.mkdir()
    for file in (tmp_path / "published").iterdir():
        (odd / file.name).write_bytes(file.read_bytes())
    config = json.loads((odd / "config.json").read_text())
    config |= {"hidden_size": config["text_config"]["hidden_size"], "architectures": ["Step3VL10BForCausalLM"]}
    config |= {"projector_bias": "false", "auto_map": {"AutoConfig": "configuration_step_vl.StepVLConfig"}}
    (odd / "config.json").write_text(json.dumps(config))
    (odd / "configuration_step_vl.py").write_text("raise SystemExit('this code was run')")
    tensors = {transformers_name(name): tensor for name, tensor in load_file(odd / WEIGHTS).items()}
    (odd / WEIGHTS).unlink()
    names = sorted(tensors)
    half = len(names) // 2
    save_file({name: tensors[name] for name in names[:half]}, odd / "model-00001-of-00002.safetensors")
    extra = {"model.language_model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    save_file({name: tensors[name] for name in names[half:]} | extra, odd / "model-00002-of-00002.safetensors")
    assert compare_tensors(tmp_path / "published", odd).fit
    image = image_token(read_config(odd))
    tokenizer = AutoTokenizer.from_pretrained(odd)
    shown = [tiny.picture(tiny.NO_CROP), tiny.picture(tiny.FOUR_CROPS, 1)]
    prompt = (*tiny.word_ids(3), tiny.IMAGE, *tiny.word_ids(2), tiny.IMAGE)
    asked = [
        question("words", tiny.word_ids(8), tiny.word_ids(12, 1)),
        question("pictures", prompt, tiny.word_ids(12, 2), shown, image, tokenizer),
    ]
    ours, plain = (by_learner(folder, asked, Setting()) for folder in (odd, tmp_path / "published"))
    with vllm_process() as process:
        engines = process.run(by_vllm, odd, asked, Setting())
    assert ours == plain and largest(ours, engines, asked) < PARITY


@pytest.fixture(scope="module")
def transformers_4_57(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transformers")
    transformers_4.install(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("yarn", [None, 2.0])
@pytest.mark.parametrize("family", [*FAMILIES, "step_vl"])
def test_saved_folders_have_the_same_logprobs_in_transformers_4(
    family: str, yarn: float | None, transformers_4_57: Path, tmp_path: Path
) -> None:
    """Positions with a base of 1,000,000 show whether transformers 4 reads them. It would use 10,000 by default."""
    if family == "phi3" and yarn:
        pytest.skip("Phi-3 has no YaRN; tests/rl/model/test_rope.py checks the message")
    source = tmp_path / "source"
    tiny.make_step_vl(source) if family == "step_vl" else make_text_folder(family, source)
    config = json.loads((source / "config.json").read_text())
    config.get("text_config", config)["rope_parameters"]["rope_theta"] = 1e6
    config.get("text_config", config).pop("rope_theta", None)
    (source / "config.json").write_text(json.dumps(config))
    hf_folder.save(hf_folder.load(source, yarn=yarn), tmp_path / "saved", source=source)
    ids = tiny.word_ids(300, 4)
    (ours,) = by_learner(tmp_path / "saved", [question("words", ids[:1], ids[1:])], Setting())
    theirs = transformers_4.logprobs_of(transformers_4_57, tmp_path / "saved", list(ids), decoder=family == "step_vl")
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < PARITY


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAMILIES, "step_vl"])
def test_saved_folders_have_the_same_logprobs_in_stock_vllm(family: str, tmp_path: Path) -> None:
    """vLLM without our plugin. Its STEP3-VL needs the Python file of the published folder, so this file is kept."""
    source, saved = tmp_path / "source", tmp_path / "saved"
    if family == "step_vl":
        published_size(source)
        stock_vllm.add_remote_config(source)
    else:
        make_text_folder(family, source)
    hf_folder.save(hf_folder.load(source), saved, source=source)
    ids = tiny.word_ids(60, 4)
    (ours,) = by_learner(saved, [question("words", ids[:1], ids[1:])], Setting())
    theirs = stock_vllm.logprobs_of(saved, list(ids))
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < PARITY


def published_size(folder: Path) -> None:
    """Makes a STEP3-VL folder with the published sizes of views, because stock vLLM has no others."""
    tiny.make_step_vl(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"image_token_len": 169, "patch_token_len": 81}
    config["vision_config"] |= {"image_size": 728, "patch_size": 14}
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    model = hf_folder.build(hf_folder.read_config(folder), device="cpu").float()
    tiny.randomize(model, 5)
    hf_folder.save(model, folder)
    tiny.save_tokenizer(folder)


SHOWN = {
    "one picture": [(120, 90)],
    "several pictures": [(120, 90), (300, 60), (120, 90)],
    "a tall strip": [(40, 900)],
    "a wide strip": [(1200, 30)],
    "one pixel": [(1, 1)],
    "a large picture": [(2000, 1500)],
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", qwen_vl.FAMILIES)
def test_learner_engine_and_transformers_agree_on_qwens_vision_language_models(
    family: str, tied: bool, tmp_path: Path
) -> None:
    model = qwen_vl.make(family, tmp_path, seed=2, tied=tied)
    asked = [question("words", qwen_vl.words(8), qwen_vl.words(12, 1))]
    config = read_config(tmp_path)
    image, tokenizer = image_token(config), AutoTokenizer.from_pretrained(tmp_path)
    for number, (name, sizes) in enumerate(SHOWN.items()):
        prompt = [*qwen_vl.words(3, number)]
        for _ in sizes:
            prompt += [qwen_vl.START, qwen_vl.IMAGE, qwen_vl.END]
        shown = [tiny.picture(size, number + k) for k, size in enumerate(sizes)]
        asked.append(question(name, prompt, qwen_vl.words(12, number), shown, image, tokenizer))
    ours = by_learner(tmp_path, asked, Setting())
    assert largest(ours, [own_logprobs(model, one, config) for one in asked], asked) < PARITY
    with vllm_process() as process:
        engines = process.run(by_vllm, tmp_path, asked, Setting())
    assert largest(ours, engines, asked) < PARITY


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_placeholders_are_never_sampled_and_logprobs_are_those_without_them(temperature: float, tmp_path: Path) -> None:
    """The head prefers the image token, so an engine without the bias would sample it all the time."""
    model = qwen_vl.make("qwen3_vl", tmp_path)
    with torch.no_grad():
        model.lm_head.weight[qwen_vl.IMAGE] = 30 * model.lm_head.weight.mean(0)
    model.save_pretrained(tmp_path)
    ask = [Request(qwen_vl.words(6, n), (), 16, seed=n, temperature=temperature) for n in range(4)]
    with vllm_process() as process:
        answers = process.run(sampled_by_vllm, tmp_path, ask)
    ours = hf_folder.load(tmp_path)
    decoder = PolicyModel(ours.model, ours.lm_head, ours.never_sampled(ours.config))
    for answer in answers:
        assert not {qwen_vl.IMAGE, qwen_vl.VIDEO} & set(answer.response_ids)
        group = Group(answer.prompt_ids, (), (answer.response_ids,), (0,))
        (row,) = pack([group], 512, ours.image_token_id, partial(ours.positions, ours.config))
        with torch.no_grad():
            expected, _ = decoder(row, {}, 1.0)
        torch.testing.assert_close(torch.tensor(answer.logprobs), expected, atol=PARITY, rtol=0)


def sampled_by_vllm(folder: Path, ask: list[Request]) -> list[Completion]:
    return Engine(str(folder), dtype="float32", max_sequence_length=512).generate(ask)


def own_logprobs(model: Any, one: Question, config: Any) -> list[float]:
    """The logprobs of the response, computed by transformers' own class."""
    ids = torch.tensor([[*one.expanded_ids, *one.response_ids]])
    shown: dict[str, Any] = {}
    if one.pictures:
        inputs: Any = image_processor(config)(images=[p.load() for p in one.pictures], return_tensors="pt")
        shown = {"mm_token_type_ids": (ids == qwen_vl.IMAGE).int(), **inputs}
    with torch.no_grad():
        table = model(input_ids=ids, **shown).logits[0, :-1].log_softmax(-1)
    return table.gather(1, ids[0, 1:, None])[-len(one.response_ids) :, 0].tolist()


def test_tensors_of_two_folders_are_compared(tmp_path: Path) -> None:
    for name in ("a", "b"):
        tiny.make_text_model(tmp_path / name, tied=False)
    assert compare_tensors(tmp_path / "a", tmp_path / "b").values == {}
    tensors = load_file(tmp_path / "b" / WEIGHTS)
    tensors["model.norm.weight"] += 0.5
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.bfloat16)
    tensors["stray"] = tensors.pop("model.layers.0.self_attn.q_norm.weight")
    tensors["model.layers.1.self_attn.q_norm.weight"] = torch.ones(3)
    save_file(tensors, tmp_path / "b" / WEIGHTS)
    found = compare_tensors(tmp_path / "a", tmp_path / "b")
    assert not found.fit
    assert (found.only_a, found.only_b) == (("model.layers.0.self_attn.q_norm.weight",), ("stray",))
    assert found.shapes == (("model.layers.1.self_attn.q_norm.weight", (32,), (3,)),)
    assert found.dtypes == (("lm_head.weight", "F32", "BF16"),)
    assert found.values["model.norm.weight"] == pytest.approx(0.5) and 0 < found.values["lm_head.weight"] < 0.01


def test_rows_become_sequences_that_continue_with_the_truth_or_with_random_tokens(tmp_path: Path) -> None:
    tiny.make_text_model(tmp_path, tied=False)
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    rows = jsonl(
        tmp_path,
        {"id": "1", "task": "t", "messages": "w1 w2", "ground_truth": "w3 w4"},
        {"id": "2", "task": "t", "messages": "w1", "ground_truth": 7},
    )
    known, unknown = questions(tmp_path, str(rows), 2)
    assert (len(known.prompt_ids), len(known.response_ids)) == (2, 2)
    assert len(unknown.response_ids) == 32
    assert len(questions(tmp_path, str(rows), 1)) == 1


def test_a_difference_that_is_no_number_is_not_hidden() -> None:
    asked = [question("a", (1,), (2, 3)), question("b", (1,), (2,))]
    found = difference(("x", [[-1.0, -2.0], [-1.0]]), ("y", [[-1.5, -2.0], [-1.0]]), asked)
    assert (found.tokens, found.mean, found.largest, found.question) == (3, pytest.approx(0.5 / 3), 0.5, "a")
    broken = difference(("x", [[-1.0, -2.0], [math.nan]]), ("y", [[-1.5, -2.0], [-1.0]]), asked)
    assert math.isnan(broken.largest) and math.isnan(broken.mean) and broken.question == "b"
