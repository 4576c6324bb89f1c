"""Tiny networks of every family, a fixed question to each, and adapters with values: for tests of LoRA files."""

from functools import partial

import torch
from parity import rounded_otherwise

import sciflow_hf as sf
from sciflow_hf.adapters.layers import adapter_parameters
from sciflow_hf.demo import make_tiny

FAMILIES = ("flux2_klein", "qwen_image", "z_image", "ernie_image", "sd3", "flux", "sdxl")


def tiny_family(name, folder):
    """The family on the smallest pipeline, which is made in `folder`."""
    path = make_tiny(folder / name, name, size="test")
    options = {} if name == "ernie_image" else {"max_sequence_length": 12}
    return sf.load_family(name)(pretrained_model_name_or_path=str(path), **options)


def _question(family, config):
    """Inputs of the network for 4 x 6 tokens and 12 of text."""
    randn = partial(torch.randn, generator=torch.Generator().manual_seed(5))
    ids = [torch.arange(1), torch.arange(4), torch.arange(6)]
    if family == "sdxl":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        sizes = {"text_embeds": randn(1, pooled), "time_ids": torch.tensor([[48.0, 32.0, 0.0, 4.0, 32.0, 48.0]])}
        text = randn(1, 12, config.cross_attention_dim)
        return dict(
            sample=randn(1, 4, 8, 12), timestep=torch.tensor([400]), encoder_hidden_states=text, added_cond_kwargs=sizes
        )
    if family == "sd3":
        return dict(
            hidden_states=randn(1, config.in_channels, 8, 12),
            encoder_hidden_states=randn(1, 12, config.joint_attention_dim),
            pooled_projections=randn(1, config.pooled_projection_dim),
            timestep=torch.tensor([400.0]),
        )
    if family == "z_image":
        text = randn(1, 12, config.cap_feat_dim)
        return dict(x=[*randn(1, config.in_channels, 1, 8, 12)], t=torch.tensor([0.6]), cap_feats=[*text])
    if family == "ernie_image":
        text = randn(1, 12, config.text_in_dim)
        latents = randn(1, config.in_channels, 4, 6)
        return dict(hidden_states=latents, timestep=torch.tensor([400.0]), text_bth=text, text_lens=torch.tensor([12]))
    inputs = dict(
        hidden_states=randn(1, 24, config.in_channels),
        encoder_hidden_states=randn(1, 12, config.joint_attention_dim),
        timestep=torch.tensor([0.4]),
    )
    if family == "qwen_image":
        return inputs | {"img_shapes": [[(1, 4, 6)]]}
    if family == "flux":
        return inputs | {
            "pooled_projections": randn(1, config.pooled_projection_dim),
            "guidance": torch.ones(1),
            "img_ids": torch.cartesian_prod(*ids),
            "txt_ids": torch.zeros(12, 3),
        }
    return inputs | {
        "img_ids": torch.cartesian_prod(*ids, torch.arange(1))[None],
        "txt_ids": torch.cartesian_prod(*[torch.arange(1)] * 3, torch.arange(12))[None],
        "guidance": None,
    }


def answer(model, family):
    """The network's output for one fixed, non-square input, computed in float64: only its weights are rounded."""
    model.double()
    with torch.no_grad():
        found = model(**_double(_question(family.name, model.config)), return_dict=False)[0]
    model.float()
    return torch.stack(found) if isinstance(found, list) else found


def _double(value):
    if isinstance(value, dict):
        return {name: _double(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_double(part) for part in value]
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def rounding(model, family):
    """What the network's answer changes by if every weight is rounded otherwise."""
    expected = answer(model, family)
    with rounded_otherwise(model):
        return (answer(model, family) - expected).abs().max()


def apart(found, model, family):
    """How far the answers of two networks lie apart, in roundings: below `parity.FEW` if they have the same weights."""
    return (answer(found, family) - answer(model, family)).abs().max() / rounding(model, family)


def trained_adapter(family, **options):
    """A network with an adapter that has learnt something: every parameter drawn anew."""
    model = family.load_model(dtype=torch.float32)
    sf.add_adapter(model, sf.AdapterArguments(**options), family=family, seed=1)
    rng = torch.Generator().manual_seed(0)
    for name, parameter in adapter_parameters(model).items():
        noise = torch.randn(parameter.shape, generator=rng) * (0.25 if "hada" in name else 0.1)
        # The magnitudes of DoRA are norms: positive, and near those of the base.
        parameter.data = parameter.data * (1 + noise) if "magnitude" in name else noise
    return model


def read_back(family, file):
    """A network with the adapter of a file."""
    model = family.load_model(dtype=torch.float32)
    return sf.add_adapter(model, sf.AdapterArguments(adapter_path=str(file)), family=family)
