"""Validation without a diffusion model: a family that draws one colour an image, and its callback."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from sciflow_hf.training.callbacks.validation import ValidationCallback

SIZE = (48, 64)  # (height, width)
PROMPTS = ["A bar chart.", "A scatter plot."]


class Network(torch.nn.Module):
    """A weight and two layers, one of which was put into evaluation mode by its owner."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.moving, self.fixed = torch.nn.Dropout(), torch.nn.Dropout()
        self.train()
        self.fixed.eval()


class StubFamily:
    """Draws one colour: red is the seed's noise, green the prompt, blue the network's weight."""

    name = "stub"

    def __init__(self, fail_at: tuple[str, Exception] | None = None) -> None:
        self.encoded: list[list[str]] = []
        self.drawn = 0
        self.networks: list[torch.nn.Module] = []
        self.fail_at = fail_at

    def bucket_step(self) -> int:
        return 16

    def load_pipeline(self, model: torch.nn.Module, *, device: Any) -> Any:
        self.networks.append(model)
        torch.rand(3), np.random.rand(3), random.random()  # loading may draw initial weights
        return SimpleNamespace(transformer=model)

    def encode_validation_prompts(self, prompts: list[str], *, device: Any, dtype: torch.dtype) -> list[dict]:
        self.encoded.append(list(prompts))
        return [{"prompt_embeds": torch.full((1, 1, 1), float(len(prompt)), dtype=dtype)} for prompt in prompts]

    def generate(self, pipeline: Any, prompt_inputs: dict, **options: Any) -> list[Image.Image]:
        network, generator = pipeline.transformer, options["generator"]
        assert not network.moving.training and not torch.is_grad_enabled()
        assert options["num_inference_steps"] == 7 and options["guidance_scale"] == 2.0
        if self.fail_at is not None:
            raise self.fail_at[1]
        self.drawn += 1
        torch.rand(3), np.random.rand(3), random.random()
        red = torch.randint(256, (1,), generator=generator).item()
        colour = red, int(prompt_inputs["prompt_embeds"].item()), int(network.weight.item())
        return [Image.new("RGB", (options["width"], options["height"]), colour)]


def callback(tmp_path: Path, family: StubFamily | None = None, **options: Any) -> ValidationCallback:
    settings = {"prompts": PROMPTS, "seeds": [42, 7], "steps": 10, "size": SIZE, "num_inference_steps": 7}
    return ValidationCallback(
        **{
            "family": family or StubFamily(),
            "guidance_scale": 2.0,
            "output_dir": tmp_path,
            **settings,
            **options,
        }
    )
