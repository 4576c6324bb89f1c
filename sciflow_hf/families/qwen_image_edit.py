"""Qwen-Image-Edit-Plus (Alibaba Qwen team): Qwen-Image that edits images, which its text encoder also reads."""

import importlib.util
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.nn.utils.rnn import pad_sequence

from ..errors import SciflowError
from ..options import arguments
from .loading import explain_loading
from .qwen_image import QwenImage

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURE = "<|image_pad|>"


@arguments
class QwenImageEdit(QwenImage):
    """Qwen-Image-Edit-Plus: `Qwen/Qwen-Image-Edit-2509` or `Qwen/Qwen-Image-Edit-2511`."""

    name: ClassVar[str] = "qwen_image_edit"
    task: ClassVar[str] = "image-to-image"
    max_sources: ClassVar[int] = 3  # what the model's page says it was trained for
    text_reads_sources: ClassVar[bool] = True
    exact_pipeline: ClassVar[bool] = True
    max_sequence_length: ClassVar[None] = None  # type: ignore[misc, assignment]  # no option: the pipeline reads every token
    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer", "processor")

    def pipeline_class(self) -> Any:
        """`QwenImageEditPlusPipeline`."""
        from diffusers import QwenImageEditPlusPipeline

        return QwenImageEditPlusPipeline

    def source_size(self, height: int, width: int) -> tuple[int, int]:
        """As the pipeline: about 1024 x 1024 pixels of the same aspect ratio, in multiples of 32."""
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit_plus

        width, height = edit_plus.calculate_dimensions(edit_plus.VAE_IMAGE_SIZE, width / height)
        return height, width

    def check_source(self, height: int, width: int) -> str:
        """Refuses aspect ratios above 200 of `_read_size`, as the text encoder's image processor does."""
        short, long = sorted(self._read_size(height, width))
        return f"{height} x {width} pixels: too narrow for the text encoder" if long > 200 * short else ""

    def _read_size(self, height: int, width: int) -> tuple[int, int]:
        """The size at which the text encoder reads a source: about 384 x 384 pixels."""
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit_plus

        width, height = edit_plus.calculate_dimensions(edit_plus.CONDITION_IMAGE_SIZE, width / height)
        return height, width

    def unread_parts(self) -> tuple[str, ...]:
        """The processor, whose part for videos needs torchvision; see `Pictures`."""
        return ("processor",)

    def shorten_text_encoder(self, pipeline: Any) -> None:
        """Without the vocabulary projection; and with `Pictures` for a processor."""
        from transformers import AutoImageProcessor

        pipeline.text_encoder.lm_head = torch.nn.Identity()
        with explain_loading(self.pretrained_model_name_or_path, "processor"):
            found = AutoImageProcessor.from_pretrained(self.source, subfolder="processor", revision=self.revision)
        pipeline.processor = Pictures(found, pipeline.tokenizer)

    def load_pipeline(self, *args: Any, with_text_encoder: bool = False, **options: Any) -> Any:
        """As `PipelineFamily.load_pipeline`; SciflowError where its processor needs torchvision and that is missing."""
        if with_text_encoder and importlib.util.find_spec("torchvision") is None:
            raise SciflowError(
                f"{self.pipeline_class().__name__} with its text encoder needs torchvision: `pip install torchvision`."
            )
        return super().load_pipeline(*args, with_text_encoder=with_text_encoder, **options)

    def draw(
        self,
        pipeline: Any,
        encoded: Mapping[str, torch.Tensor] | Sequence[Mapping[str, torch.Tensor]],
        *,
        generators: Sequence[torch.Generator],
        **options: Any,
    ) -> tuple[torch.Tensor, list["Image"]]:
        """As `PipelineFamily.draw`, but one by one: the pipeline takes one image a call."""
        rows = [encoded] * len(generators) if isinstance(encoded, Mapping) else encoded
        drawn = [
            super(QwenImageEdit, self).draw(pipeline, row, generators=[generator], **options)
            for row, generator in zip(rows, generators, strict=True)
        ]
        return torch.cat([latents for latents, _ in drawn]), [image for _, images in drawn for image in images]

    def encode_prompts(
        self, prompts: Sequence[str], encoders: Any, sources: Sequence[Sequence["Image"]] | None = None
    ) -> dict[str, torch.Tensor]:
        """`prompt_embeds` (B, L, D), padded with zeros to the longest, and where any is padded its mask (B, L).

        Args:
            prompts: captions.
            encoders: of `load_encoders`.
            sources: the RGB images that each caption edits, read at about 384 x 384 pixels; [] for one without.
        """
        sources = sources or [()] * len(prompts)
        with torch.no_grad():
            rows = [self._encoded(prompt, read, encoders) for prompt, read in zip(prompts, sources, strict=True)]
        mask = pad_sequence([row.new_ones(len(row), dtype=torch.int64) for row in rows], batch_first=True)
        embeds = {"prompt_embeds": pad_sequence(rows, batch_first=True)}
        return embeds if mask.all() else embeds | {"prompt_embeds_mask": mask}

    def _encoded(self, prompt: str, sources: Sequence["Image"], encoders: Any) -> torch.Tensor:
        """(L, D) of one caption and its sources: the pipeline takes one at a time."""
        resize = encoders.image_processor.resize
        read = [resize(image, *self._read_size(image.height, image.width)) for image in sources]
        row: torch.Tensor = encoders.encode_prompt([prompt], image=read or None)[0][0]
        return row

    def count_tokens(self, prompts: Sequence[str]) -> None:
        """None: no prompt is cut."""

    def source_options(self, source_images: Sequence["Image"]) -> dict[str, Any]:
        """`image`, without which the pipeline draws nothing."""
        if not source_images:
            raise SciflowError(
                f"`{self.name}` draws edits alone, since its pipeline needs a reference image: give each prompt one."
            )
        return super().source_options(source_images)


class Pictures:
    """A `Qwen2VLProcessor` without its part for videos, which needs torchvision."""

    def __init__(self, image_processor: Any, tokenizer: Any) -> None:
        self.image_processor, self.tokenizer = image_processor, tokenizer

    def __call__(self, *, text: Sequence[str], images: Sequence["Image"] | None, **options: Any) -> Any:
        """Token ids of the texts, with as many tokens for each picture as the encoder makes of it, and its patches."""
        from transformers import BatchFeature

        seen: dict[str, Any] = {**self.image_processor(images=images, return_tensors="pt")} if images else {}
        counts = iter(
            [int(grid.prod()) // self.image_processor.merge_size**2 for grid in seen.get("image_grid_thw", [])]
        )
        expanded = [re.sub(re.escape(PICTURE), lambda _: PICTURE * next(counts, 1), words) for words in text]
        return BatchFeature({**self.tokenizer(expanded, **options), **seen})
