"""A tiny Qwen-Image-Edit-Plus pipeline. Its VAE halves four times: sources of 1 megapixel are 1024 tokens."""

from typing import Any

from . import tiny_qwen_image

SIZES: dict[str, dict[str, Any]] = {name: size | {"halvings": 4} for name, size in tiny_qwen_image.SIZES.items()}


def pipeline(seed: int, **size: Any) -> Any:
    """The parts of `tiny_qwen_image`, and what its text encoder needs to see."""
    from diffusers import QwenImageEditPlusPipeline
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor

    parts = tiny_qwen_image.pipeline(seed, **size).components
    # Made without its part for videos, which needs torchvision; its folder is as published.
    processor = Qwen2VLProcessor.__new__(Qwen2VLProcessor)
    images = Qwen2VLImageProcessor()

    def save(folder: str, **options: Any) -> None:
        parts["tokenizer"].save_pretrained(folder)
        images.save_pretrained(folder)

    processor.save_pretrained = save
    return QwenImageEditPlusPipeline(**parts, processor=processor)
