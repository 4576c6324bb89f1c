"""For tests of adapters: each family's smallest network with a batch, and stock libraries that load what we saved."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

import sciflow_hf as sf
from sciflow_hf.adapters.layers import adapter_parameters
from sciflow_hf.demo import make_tiny

FAMILIES = ("flux2_klein", "qwen_image", "z_image", "ernie_image", "sd3", "flux", "sdxl")

# Shapes of what the smallest networks take, beside latents (2, 4, 12, 8): widths of the text, of the pooled text.
_TEXT = {
    "flux2_klein": (48, 0),
    "qwen_image": (16, 0),
    "z_image": (16, 0),
    "ernie_image": (16, 0),
    "sd3": (32, 20),
    "flux": (32, 8),
    "sdxl": (20, 12),
}


def make_tiny_family(name: str, folder: Path) -> Any:
    """The family with its smallest pipeline."""
    return sf.load_family(name)(pretrained_model_name_or_path=str(make_tiny(folder / name, name, size="test")))


def batch_of(family: Any) -> dict[str, torch.Tensor]:
    """Two random samples of non-square images, with keys."""
    rng = torch.Generator().manual_seed(0)
    width, pooled = _TEXT[family.name]
    shape = (2, 4, 1, 12, 8) if family.name == "qwen_image" else (2, 4, 12, 8)
    batch = {"latents": torch.randn(shape, generator=rng), "prompt_embeds": torch.randn(2, 12, width, generator=rng)}
    if pooled:
        batch["pooled_prompt_embeds"] = torch.randn(2, pooled, generator=rng)
    if family.pads_text:
        batch["prompt_embeds_mask"] = torch.arange(12) < torch.tensor([[12], [7]])
    return batch | {"noise_key": torch.tensor([1, 2])}


def arguments(folder: Path, **options: Any) -> sf.DiffusionTrainingArguments:
    return sf.DiffusionTrainingArguments(output_dir=str(folder), use_cpu=True, weighting_scheme="none", **options)


class Bench:
    """One family: its networks, one input for all of them, and readers that are not ours."""

    def __init__(self, family: Any, folder: Path) -> None:
        self.family, self.batch, self.args = family, batch_of(family), arguments(folder / "args")
        network, self.inputs = self.load(), {}
        hook = network.register_forward_pre_hook(lambda _, args, inputs: self.inputs.update(inputs), with_kwargs=True)
        self.loss(network)
        hook.remove()
        self.base = self.output(network)

    def load(self, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
        return self.family.load_model(dtype=dtype, **options)

    def adapted(self, *, dtype: torch.dtype = torch.float32, seed: int = 1, **options: Any) -> Any:
        args = sf.AdapterArguments(**options)
        return sf.add_adapter(self.load(dtype), args, family=self.family, seed=seed)

    def loss(self, model: Any) -> torch.Tensor:
        return self.family.compute_loss(model, self.batch, self.args)[0]

    def output(self, model: Any) -> torch.Tensor:
        """What a float32 network answers to a fixed input."""
        with torch.no_grad():
            return as_tensor(model(**self.inputs)[0])

    def exact_output(self, model: Any) -> torch.Tensor:
        """The same computed in float64, where the order of sums does not matter."""
        model.double()
        with torch.no_grad():
            answer = as_tensor(model(**_double(self.inputs))[0])
        model.float()
        return answer

    def stock_pipeline(self) -> Any:
        """diffusers' pipeline with nothing but the untouched network."""
        cls, part = self.family.pipeline_class(), self.family.component
        parts = [n for n in self.family.config() if not n.startswith("_") and n not in (part, "scheduler")]
        parts = [n for n in parts if isinstance(self.family.config()[n], list)]
        return cls.from_pretrained(self.family.pretrained_model_name_or_path, **dict.fromkeys(parts))

    def stock_output(self, folder: Path, adapter_type: str) -> torch.Tensor:
        """`exact_output` of diffusers' own network with a saved adapter, loaded as the model card says."""
        pipeline = self.stock_pipeline()
        network = getattr(pipeline, self.family.component)
        assert torch.equal(self.output(network), self.base)
        if adapter_type in ("lora", "dora"):
            pipeline.load_lora_weights(folder)
        else:
            PeftModel.from_pretrained(network, str(folder))
        return self.exact_output(network)


def as_tensor(answer: Any) -> torch.Tensor:
    """What a network answers, of a list one tensor."""
    return torch.stack(answer) if isinstance(answer, list) else answer


def _double(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _double(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_double(part) for part in value]
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def randomise(model: Any) -> Any:
    """An adapter begins without effect, which would hide errors: any values."""
    rng = torch.Generator().manual_seed(0)
    for parameter in adapter_parameters(model).values():
        parameter.data += torch.randn(parameter.shape, generator=rng) * 0.1
    return model


def values(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in adapter_parameters(model).items()}


def adapted(family, *, dtype=torch.float32, seed=1, meta=False, **options):
    model = family.load_model(dtype=dtype, meta=meta)
    return sf.add_adapter(model, sf.AdapterArguments(**options), family=family, seed=seed)


def klein_output(model):
    """The tiny klein's answer to one fixed input."""
    rng = torch.Generator().manual_seed(5)
    dtype = next(p for n, p in model.named_parameters() if "lora_" not in n).dtype
    zero = torch.arange(1)
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(1, 24, 16, generator=rng).to(dtype),
            encoder_hidden_states=torch.randn(1, 12, 48, generator=rng).to(dtype),
            timestep=torch.tensor([0.4]),
            img_ids=torch.cartesian_prod(zero, torch.arange(4), torch.arange(6), zero)[None],
            txt_ids=torch.cartesian_prod(zero, zero, zero, torch.arange(12))[None],
            guidance=None,
            return_dict=False,
        )[0]
