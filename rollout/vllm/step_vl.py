"""vLLM's STEP3-VL, cured of its one-picture crash on CPU and of picture sizes fixed at the 10B's.

Registered by rollout/vllm/plugin.py under the architecture's own name; imported by vLLM when it loads such a
model. For a config with the 10B's sizes it computes exactly what vLLM's own class does.
"""

from torch import Tensor
from vllm.model_executor.models.interfaces import MultiModalEmbeddings
from vllm.model_executor.models.step3_vl import (
    Step3VLDummyInputsBuilder,
    Step3VLMultiModalProcessor,
    Step3VLProcessingInfo,
)
from vllm.model_executor.models.step_vl import StepVLForConditionalGeneration
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageSize
from vllm.transformers_utils.processors.step3_vl import (
    MAX_IMAGE_SIZE,
    ImagePatcher,
    Step3VLImageProcessor,
    Step3VLProcessor,
)

from rl.model.config import StepVLConfig

PUBLISHED_GLOBAL_SIZE = 728  # the global view that MAX_IMAGE_SIZE was chosen for


def largest_side(global_size: int) -> int:
    """Longer pictures are scaled down to this many pixels: 3,024 for 728-pixel views (scaling: reconstruction)."""
    return round(MAX_IMAGE_SIZE * global_size / PUBLISHED_GLOBAL_SIZE)


class ScaledPatcher(ImagePatcher):
    """vLLM's choice of crops with `global_size` in place of 728, `crop_size` of 504, and a limit to match."""

    def __init__(self, global_size: int, crop_size: int, enable_patch: bool = True) -> None:
        super().__init__(enable_patch=enable_patch)
        self.global_size = global_size
        self.crop_size = crop_size

    def determine_window_size(self, long: int, short: int) -> int:
        """Side of a crop in pixels for a picture of these sides; 0 means no crops."""
        if long < self.global_size:
            return short if long / short > 1.5 else 0
        return min(short, self.crop_size) if long / short > 4 else self.crop_size

    def get_image_size_for_preprocess(self, img_width: int, img_height: int) -> tuple[int, int]:
        """Width and height after scaling long pictures down to the limit."""
        limit = largest_side(self.global_size)
        if max(img_height, img_width) > limit:
            scale = limit / max(img_height, img_width)
            img_width, img_height = int(img_width * scale), int(img_height * scale)
        return img_width, img_height


class ScaledImageProcessor(Step3VLImageProcessor):
    """vLLM's picture processor with its sizes and token counts taken from the model's config."""

    def __init__(self, config: StepVLConfig, enable_patch: bool = True) -> None:
        super().__init__(
            image_size=config.global_size,
            patch_size=config.crop_size,
            num_image_feature_size=config.image_token_len,
            num_patch_feature_size=config.patch_token_len,
            enable_patch=enable_patch,
        )
        self.patcher = ScaledPatcher(config.global_size, config.crop_size, enable_patch)


class ScaledProcessingInfo(Step3VLProcessingInfo):
    """Tells vLLM how pictures are processed and how many tokens the largest takes."""

    def get_image_processor(self, **kwargs: object) -> ScaledImageProcessor:
        """Built from the config; refuses overrides, which the learner's preprocessing could not follow."""
        if kwargs:
            raise ValueError(f"mm_processor_kwargs {sorted(kwargs)} are refused: sizes are in the config")
        config = self.ctx.get_hf_config(StepVLConfig)
        return ScaledImageProcessor(config, getattr(config.vision_config, "enable_patch", True))

    def get_hf_processor(self, **kwargs: object) -> Step3VLProcessor:
        """Tokenizer and picture processor together."""
        return Step3VLProcessor(tokenizer=self.get_tokenizer(), image_processor=self.get_image_processor(**kwargs))

    def get_image_size_with_most_features(self) -> ImageSize:
        """The square that gets most crops, as in vLLM's own class."""
        side = largest_side(self.ctx.get_hf_config(StepVLConfig).global_size)
        return ImageSize(side, side)


@MULTIMODAL_REGISTRY.register_processor(
    Step3VLMultiModalProcessor, info=ScaledProcessingInfo, dummy_inputs=Step3VLDummyInputsBuilder
)
class PatchedStepVL(StepVLForConditionalGeneration):
    """vLLM's model with the two cures; weights, names and results are vLLM's."""

    pictures_encoded = 0  # that went through this process's tower

    def embed_multimodal(self, **kwargs: object) -> MultiModalEmbeddings:
        """vLLM's own; counts."""
        found = super().embed_multimodal(**kwargs)
        self.pictures_encoded += len(found)
        return found

    @property
    def patch_output_tokens(self) -> int:
        return self.config.patch_token_len

    def _process_image_features(self, image_features: Tensor) -> Tensor:
        # The tower returns a transposed view. vLLM's linear flattens it to a matrix, which copies it for two
        # pictures or more but not for one, and oneDNN on CPU refuses a transposed matrix.
        return super()._process_image_features(image_features.contiguous())
