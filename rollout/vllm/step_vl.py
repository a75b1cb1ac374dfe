"""vLLM's STEP3-VL model with three changes, which PatchedStepVL describes.

rollout/vllm/plugin.py registers PatchedStepVL under the name of STEP3-VL's architecture, so vLLM uses it for all
STEP3-VL models. With the sizes of STEP3-VL-10B, PatchedStepVL computes exactly the same results as vLLM's own class.
Tested in tests/rollout/vllm/test_engine.py and tests/rollout/vllm/test_parity.py.
"""

from collections.abc import Iterable

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
from rl.model.weight_files import UNNEEDED, published_name

PUBLISHED_GLOBAL_SIZE = 728  # vLLM's MAX_IMAGE_SIZE is for a global view with sides of this many pixels


def largest_side(global_size: int) -> int:
    """Returns the maximum length of a picture's longer side in pixels. Larger pictures are scaled down to this length.

    The limit is 3,024 for views of 728 pixels. For other view sizes, the limit is scaled in proportion. This scaling is
    our assumption.
    """
    return round(MAX_IMAGE_SIZE * global_size / PUBLISHED_GLOBAL_SIZE)


class ScaledPatcher(ImagePatcher):
    """Chooses crops like vLLM's class, but uses `global_size` instead of 728, `crop_size` instead of 504, and
    `largest_side` as the limit."""

    def __init__(self, global_size: int, crop_size: int, enable_patch: bool = True) -> None:
        super().__init__(enable_patch=enable_patch)
        self.global_size = global_size
        self.crop_size = crop_size

    def determine_window_size(self, long: int, short: int) -> int:
        """Returns a crop's side length for a picture with the sides `long` and `short`, in pixels. 0 means no crops."""
        if long < self.global_size:
            return short if long / short > 1.5 else 0
        return min(short, self.crop_size) if long / short > 4 else self.crop_size

    def get_image_size_for_preprocess(self, img_width: int, img_height: int) -> tuple[int, int]:
        """Returns the width and height of a picture after scaling. Only pictures above the limit are scaled down."""
        limit = largest_side(self.global_size)
        if max(img_height, img_width) > limit:
            scale = limit / max(img_height, img_width)
            img_width, img_height = int(img_width * scale), int(img_height * scale)
        return img_width, img_height


class ScaledImageProcessor(Step3VLImageProcessor):
    """vLLM's picture processor, but with sizes and token counts from the model's config."""

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
    """Gives vLLM the picture processor, and the picture size that takes the most tokens."""

    def get_image_processor(self, **kwargs: object) -> ScaledImageProcessor:
        """Returns the picture processor. Raises ValueError if `kwargs` are given, because the learner could not apply
        them."""
        if kwargs:
            raise ValueError(f"mm_processor_kwargs {sorted(kwargs)} are not supported: sizes come from the config")
        config = self.ctx.get_hf_config(StepVLConfig)
        return ScaledImageProcessor(config, getattr(config.vision_config, "enable_patch", True))

    def get_hf_processor(self, **kwargs: object) -> Step3VLProcessor:
        """Returns one object with the tokenizer and the picture processor."""
        return Step3VLProcessor(tokenizer=self.get_tokenizer(), image_processor=self.get_image_processor(**kwargs))

    def get_image_size_with_most_features(self) -> ImageSize:
        """Returns the size of the largest square picture, which has the most crops. vLLM's own class does the same."""
        side = largest_side(self.ctx.get_hf_config(StepVLConfig).global_size)
        return ImageSize(side, side)


@MULTIMODAL_REGISTRY.register_processor(
    Step3VLMultiModalProcessor, info=ScaledProcessingInfo, dummy_inputs=Step3VLDummyInputsBuilder
)
class PatchedStepVL(StepVLForConditionalGeneration):
    """vLLM's STEP3-VL model with three changes. Results are the same as in vLLM's class.

    1. Picture sizes and token counts come from the config. vLLM's class only has the values of the 10B model.
    2. A batch with one picture does not crash on CPU. vLLM's class crashes, for a reason that `_process_image_features`
       explains.
    3. Tensors may have all names that rl/model/weight_files.py knows, and tensors that are not needed are left out.
    """

    pictures_encoded = 0  # number of pictures that the vision tower of this process has encoded

    def embed_multimodal(self, **kwargs: object) -> MultiModalEmbeddings:
        """Calls vLLM's method and counts the pictures that it encodes."""
        features = super().embed_multimodal(**kwargs)
        self.pictures_encoded += len(features)
        return features

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Loads weights, like vLLM's method, but under any known names."""
        needed = ((published_name(name), tensor) for name, tensor in weights if not name.endswith(UNNEEDED))
        return super().load_weights(needed)

    @property
    def patch_output_tokens(self) -> int:
        return self.config.patch_token_len

    def _process_image_features(self, image_features: Tensor) -> Tensor:
        # The vision tower returns a transposed view, and vLLM's linear layer flattens the view to a matrix. For two or
        # more pictures, flattening makes a copy. For one picture, the matrix stays transposed, and oneDNN on CPU
        # refuses a transposed matrix.
        return super()._process_image_features(image_features.contiguous())
