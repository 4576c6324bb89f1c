"""Steps of a family on its tiny pipeline: an adapter with values, a network that answers as told, what is right."""

import json
import shutil

import torch

import sciflow_hf as sf
from sciflow_hf.demo import make_tiny

FAMILIES = ("flux2_klein", "qwen_image", "z_image", "ernie_image", "sd3", "flux", "sdxl")
PATCHED = ("flux2_klein", "ernie_image")
PACKED = ("flux2_klein", "qwen_image", "flux")


def make_pipelines(folder):
    """The smallest pipeline of each family, by its name."""
    return {name: make_tiny(folder / name, name, size="test") for name in FAMILIES}


def with_adapter(family, **options):
    """The network with a LoRA that does something: B starts at zero, which would hide errors in A's gradient."""
    model = family.load_model(dtype=torch.float32)
    sf.add_adapter(model, sf.AdapterArguments(rank=4, lora_alpha=8, **options), family=family, seed=1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model


class Spy(torch.nn.Module):
    """Stands for the network: answers with `answer`, whatever it is asked."""

    def __init__(self, answer=0.0):
        super().__init__()
        self.answer, self.weight, self.calls = answer, torch.nn.Parameter(torch.zeros(())), []

    def forward(self, **inputs):
        self.calls.append(inputs)
        return (self.answer + self.weight * inputs["hidden_states"],)


def edited(folder, tmp_path, file, **changes):
    """A copy of a pipeline folder with one JSON file changed; None takes a line away."""
    copy = shutil.copytree(folder, tmp_path / "edited", dirs_exist_ok=True)
    values = json.loads((copy / file).read_text()) | changes
    (copy / file).write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
    return copy


class Step:
    """A family's step: what the network was given, for which batch, and what the perfect answer is."""

    def __init__(self, name, path, args):
        options = {"max_sequence_length": 7} if "max_sequence_length" in vars(sf.load_family(name)) else {}
        self.family = sf.load_family(name)(pretrained_model_name_or_path=str(path), posterior="mode", **options)
        self.default = sf.load_family(name)(pretrained_model_name_or_path=str(path))
        self.model = self.family.load_model(dtype=torch.float32)
        widths, rng = self.family.widths(self.model.config), torch.Generator().manual_seed(0)
        self.channels = widths["latents"]
        sizes = {"latents": (2, self.channels, 12, 8), "prompt_embeds": (2, 7, widths["prompt_embeds"])}
        if "pooled_prompt_embeds" in widths:
            sizes["pooled_prompt_embeds"] = (2, widths["pooled_prompt_embeds"])
        self.batch = {key: torch.randn(size, generator=rng) for key, size in sizes.items()}
        shape = (2, 4 * self.channels, 6, 4) if name in PATCHED else sizes["latents"]
        self.noise = torch.randn(shape, generator=rng)
        self.levels = torch.tensor([100, 900]) if name == "sdxl" else torch.tensor([0.25, 0.75])
        self.seen = {}
        hook = self.model.register_forward_pre_hook(lambda m, a, k: self.seen.update(k), with_kwargs=True)
        self.args = args
        self.loss, self.found = self.run(self.model)
        hook.remove()

    def run(self, model, **options):
        return self.family.compute_loss(model, self.batch, self.args, noise=self.noise, levels=self.levels, **options)

    @property
    def image(self):
        """What the network sees of the noised latents, of lists one tensor."""
        if self.family.name == "z_image":
            return torch.stack(self.seen["x"])
        return self.seen["sample"] if self.family.name == "sdxl" else self.seen["hidden_states"]

    @property
    def timestep(self):
        """The network's input for the levels."""
        return self.seen["t"] if self.family.name == "z_image" else self.seen["timestep"]

    def answered(self, answer):
        """Losses where the network answers that, Z-Image's with the other sign."""
        network, as_list = self.model, self.family.name == "z_image"

        class Answers(torch.nn.Module):
            config = network.config

            def __init__(self):
                super().__init__()
                self.weight = torch.nn.Parameter(torch.zeros(()))

            def forward(self, **inputs):
                told = answer + 0 * self.weight
                return (list(-told) if as_list else told,)

        return self.run(Answers())[0]
