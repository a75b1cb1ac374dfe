"""vLLM's STEP3-VL model with two fixes; see PatchedStepVL.

rollout/vllm/plugin.py registers it under the architecture's own name, and vLLM imports it when it loads such a model.
For a config with the sizes of STEP3-VL-10B it computes exactly the same as vLLM's own class.
Tested in tests/rollout/vllm/test_engine.py and tests/rollout/vllm/test_parity.py.
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

PUBLISHED_GLOBAL_SIZE = 728  # side in pixels of the global view for which MAX_IMAGE_SIZE was chosen


def largest_side(global_size: int) -> int:
    """The most pixels of a picture's longer side; longer pictures are scaled down. 3,024 for views of 728 pixels; for
    other views scaled in proportion, which is a reconstruction."""
    return round(MAX_IMAGE_SIZE * global_size / PUBLISHED_GLOBAL_SIZE)


class ScaledPatcher(ImagePatcher):
    """vLLM's choice of crops, with `global_size` in place of 728, `crop_size` in place of 504, and `largest_side`."""

    def __init__(self, global_size: int, crop_size: int, enable_patch: bool = True) -> None:
        super().__init__(enable_patch=enable_patch)
        self.global_size = global_size
        self.crop_size = crop_size

    def determine_window_size(self, long: int, short: int) -> int:
        """Returns the side of a crop in pixels for a picture with these sides; 0 means no crops."""
        if long < self.global_size:
            return short if long / short > 1.5 else 0
        return min(short, self.crop_size) if long / short > 4 else self.crop_size

    def get_image_size_for_preprocess(self, img_width: int, img_height: int) -> tuple[int, int]:
        """Returns width and height after a long picture is scaled down to the limit."""
        limit = largest_side(self.global_size)
        if max(img_height, img_width) > limit:
            scale = limit / max(img_height, img_width)
            img_width, img_height = int(img_width * scale), int(img_height * scale)
        return img_width, img_height


class ScaledImageProcessor(Step3VLImageProcessor):
    """vLLM's picture processor, with sizes and token counts from the model's config."""

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
    """Gives vLLM the picture processor and the size of the picture that takes most tokens."""

    def get_image_processor(self, **kwargs: object) -> ScaledImageProcessor:
        """Returns the picture processor. Raises ValueError for overrides: the learner could not apply them."""
        if kwargs:
            raise ValueError(f"mm_processor_kwargs {sorted(kwargs)} are not supported: sizes come from the config")
        config = self.ctx.get_hf_config(StepVLConfig)
        return ScaledImageProcessor(config, getattr(config.vision_config, "enable_patch", True))

    def get_hf_processor(self, **kwargs: object) -> Step3VLProcessor:
        """Returns tokenizer and picture processor in one object."""
        return Step3VLProcessor(tokenizer=self.get_tokenizer(), image_processor=self.get_image_processor(**kwargs))

    def get_image_size_with_most_features(self) -> ImageSize:
        """Returns the square with the most crops, as vLLM's own class does."""
        side = largest_side(self.ctx.get_hf_config(StepVLConfig).global_size)
        return ImageSize(side, side)


@MULTIMODAL_REGISTRY.register_processor(
    Step3VLMultiModalProcessor, info=ScaledProcessingInfo, dummy_inputs=Step3VLDummyInputsBuilder
)
class PatchedStepVL(StepVLForConditionalGeneration):
    """vLLM's STEP3-VL with two fixes. Weights, tensor names and results are those of vLLM's class.

    1. Picture sizes and token counts come from the config; vLLM's class has those of the 10B model only.
    2. One picture alone no longer crashes on CPU; see `_process_image_features`.
    """

    pictures_encoded = 0  # by the vision tower of this process

    def embed_multimodal(self, **kwargs: object) -> MultiModalEmbeddings:
        """Calls vLLM's method and counts the pictures."""
        features = super().embed_multimodal(**kwargs)
        self.pictures_encoded += len(features)
        return features

    @property
    def patch_output_tokens(self) -> int:
        return self.config.patch_token_len

    def _process_image_features(self, image_features: Tensor) -> Tensor:
        # The vision tower returns a transposed view. vLLM's linear layer flattens it to a matrix. That copies it for
        # two or more pictures, but not for one, and oneDNN on CPU refuses a transposed matrix.
        return super()._process_image_features(image_features.contiguous())
