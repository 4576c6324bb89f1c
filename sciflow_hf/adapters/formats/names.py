"""Names of families and of their layers in kohya's tools and ComfyUI: one table a family.

A row is a layer of the original network (Black Forest Labs, Stability AI) and the diffusers layers that are its rows,
top to bottom: where the original has one matrix for query, key and value, diffusers has three. `*` is a block's number.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Row = tuple[str, tuple[str, ...]]

TWO_PARTS = ("norm_out.linear", "norm1_context.linear")
"""Modulations of which diffusers has the scale above the shift where they have these two parts alone (the last of all,
and SD3's last one of the text): the original network has the shift above the scale."""

DIFFUSERS = "diffusers"
KOHYA = "kohya"
COMFY = "comfy"
FORMATS = (DIFFUSERS, KOHYA, COMFY)
PROGRAMS = {KOHYA: "kohya's tools", COMFY: "ComfyUI"}
DTYPES = ("float32", "bfloat16", "float16")

MLP_RATIO = 4
"""Rows of the last part of a FLUX.1 single block, relative to each of the other parts."""

SD_SCRIPTS, MUSUBI = "sd-scripts", "musubi-tuner"


@dataclass(frozen=True)
class Architecture:
    """A family in the metadata of kohya's tools: train_network.py, library/sai_model_spec.py; musubi-tuner alike.

    Args:
        trainer: the program that trains it.
        name: `modelspec.architecture`, without the type of the adapter.
        beginnings: how it may begin in the files of the family's other models; lower case.
        repository: `modelspec.implementation`, on GitHub.
        network_module: `ss_network_module` of a LoRA.
        other_reader: the program that also reads the trainer's names.
    """

    trainer: str
    name: str
    beginnings: tuple[str, ...]
    repository: str
    network_module: str
    other_reader: str = "ComfyUI"


ARCHITECTURES: Mapping[str, Architecture] = {
    "flux": Architecture(
        SD_SCRIPTS, "flux-1-dev", ("flux-1", "flux.1"), "black-forest-labs/flux", "networks.lora_flux"
    ),
    "flux2_klein": Architecture(MUSUBI, "Flux.2-klein", ("flux.2",), "black-forest-labs/flux2", "networks.lora_flux_2"),
    "flux2": Architecture(MUSUBI, "Flux.2-dev", ("flux.2",), "black-forest-labs/flux2", "networks.lora_flux_2"),
    "qwen_image": Architecture(MUSUBI, "Qwen-Image", ("qwen-image",), "QwenLM/Qwen-Image", "networks.lora_qwen_image"),
    "z_image": Architecture(
        MUSUBI, "Z-Image", ("z-image",), "Tongyi-MAI/Z-Image", "networks.lora_zimage", other_reader="diffusers"
    ),
    "ernie_image": Architecture(
        MUSUBI, "ernie-image", ("ernie-image",), "baidu/ERNIE-Image", "networks.lora_ernie_image"
    ),
    "sd3": Architecture(
        SD_SCRIPTS, "stable-diffusion-3", ("stable-diffusion-3",), "Stability-AI/sd3-ref", "networks.lora_sd3"
    ),
    "sdxl": Architecture(
        SD_SCRIPTS,
        "stable-diffusion-xl-v1-base",
        ("stable-diffusion-xl",),
        "Stability-AI/generative-models",
        "networks.lora",
    ),
}
_NAMES_OF = {"flux2": "flux2_klein", "flux_kontext": "flux", "qwen_image_edit": "qwen_image"}
FAMILIES = tuple(family for family in ARCHITECTURES if family not in _NAMES_OF)
"""Those that have names of their own."""


def names_of(family: str) -> str:
    """The family whose names the layers of `family` have: that of the same network, or the one that edits build on."""
    return _NAMES_OF.get(family, family)


def architecture_of(family: str) -> Architecture:
    """The family as the metadata of a file name it."""
    return ARCHITECTURES.get(family) or ARCHITECTURES[names_of(family)]


def _attention(layer: str, block: str, names: tuple[str, ...], output: str) -> tuple[Row, Row]:
    """A fused query, key and value, and the projection behind them."""
    return (f"{layer}.qkv", tuple(f"{block}.{name}" for name in names)), (f"{layer}.proj", (f"{block}.{output}",))


_DOUBLE = "transformer_blocks.*"
_SINGLE = "single_transformer_blocks.*"
_QKV = ("to_q", "to_k", "to_v")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")

# kohya: sd-scripts, networks/convert_flux_lora.py. ComfyUI: comfy/utils.py, `flux_to_diffusers`.
_FLUX: tuple[Row, ...] = (
    *_attention("double_blocks.*.img_attn", f"{_DOUBLE}.attn", _QKV, "to_out.0"),
    *_attention("double_blocks.*.txt_attn", f"{_DOUBLE}.attn", _ADDED, "to_add_out"),
    ("double_blocks.*.img_mlp.0", (f"{_DOUBLE}.ff.net.0.proj",)),
    ("double_blocks.*.img_mlp.2", (f"{_DOUBLE}.ff.net.2",)),
    ("double_blocks.*.txt_mlp.0", (f"{_DOUBLE}.ff_context.net.0.proj",)),
    ("double_blocks.*.txt_mlp.2", (f"{_DOUBLE}.ff_context.net.2",)),
    ("double_blocks.*.img_mod.lin", (f"{_DOUBLE}.norm1.linear",)),
    ("double_blocks.*.txt_mod.lin", (f"{_DOUBLE}.norm1_context.linear",)),
    ("single_blocks.*.linear1", (*(f"{_SINGLE}.attn.{name}" for name in _QKV), f"{_SINGLE}.proj_mlp")),
    ("single_blocks.*.linear2", (f"{_SINGLE}.proj_out",)),
    ("single_blocks.*.modulation.lin", (f"{_SINGLE}.norm.linear",)),
    ("img_in", ("x_embedder",)),
    ("txt_in", ("context_embedder",)),
    ("time_in.in_layer", ("time_text_embed.timestep_embedder.linear_1",)),
    ("time_in.out_layer", ("time_text_embed.timestep_embedder.linear_2",)),
    ("vector_in.in_layer", ("time_text_embed.text_embedder.linear_1",)),
    ("vector_in.out_layer", ("time_text_embed.text_embedder.linear_2",)),
    ("guidance_in.in_layer", ("time_text_embed.guidance_embedder.linear_1",)),
    ("guidance_in.out_layer", ("time_text_embed.guidance_embedder.linear_2",)),
    ("final_layer.linear", ("proj_out",)),
    ("final_layer.adaLN_modulation.1", ("norm_out.linear",)),
)
# DiffSynth's own FLUX.1 network, for reading: the original's matrices (diffsynth/utils/lora/flux.py).
_OF_DIFFSYNTH = {
    "double_blocks.*.img_attn.qkv": "blocks.*.attn.a_to_qkv",
    "double_blocks.*.txt_attn.qkv": "blocks.*.attn.b_to_qkv",
    "double_blocks.*.img_attn.proj": "blocks.*.attn.a_to_out",
    "double_blocks.*.txt_attn.proj": "blocks.*.attn.b_to_out",
    "double_blocks.*.img_mlp.0": "blocks.*.ff_a.0",
    "double_blocks.*.img_mlp.2": "blocks.*.ff_a.2",
    "double_blocks.*.txt_mlp.0": "blocks.*.ff_b.0",
    "double_blocks.*.txt_mlp.2": "blocks.*.ff_b.2",
    "double_blocks.*.img_mod.lin": "blocks.*.norm1_a.linear",
    "double_blocks.*.txt_mod.lin": "blocks.*.norm1_b.linear",
    "single_blocks.*.linear1": "single_blocks.*.to_qkv_mlp",
    "single_blocks.*.linear2": "single_blocks.*.proj_out",
    "single_blocks.*.modulation.lin": "single_blocks.*.norm.linear",
}

# kohya: musubi-tuner, flux_2/flux2_models.py; diffusers, `_convert_kohya_flux2_lora_to_diffusers`. ComfyUI: as FLUX.1.
_FLUX2: tuple[Row, ...] = (
    *_attention("double_blocks.*.img_attn", f"{_DOUBLE}.attn", _QKV, "to_out.0"),
    *_attention("double_blocks.*.txt_attn", f"{_DOUBLE}.attn", _ADDED, "to_add_out"),
    ("double_blocks.*.img_mlp.0", (f"{_DOUBLE}.ff.linear_in",)),
    ("double_blocks.*.img_mlp.2", (f"{_DOUBLE}.ff.linear_out",)),
    ("double_blocks.*.txt_mlp.0", (f"{_DOUBLE}.ff_context.linear_in",)),
    ("double_blocks.*.txt_mlp.2", (f"{_DOUBLE}.ff_context.linear_out",)),
    ("single_blocks.*.linear1", (f"{_SINGLE}.attn.to_qkv_mlp_proj",)),
    ("single_blocks.*.linear2", (f"{_SINGLE}.attn.to_out",)),
    ("img_in", ("x_embedder",)),
    ("txt_in", ("context_embedder",)),
    ("final_layer.linear", ("proj_out",)),
    ("final_layer.adaLN_modulation.1", ("norm_out.linear",)),
)

# kohya: sd-scripts, library/sd3_models.py and networks/lora_sd3.py. ComfyUI: comfy/utils.py, `mmdit_to_diffusers`.
_SD3: tuple[Row, ...] = (
    *_attention("joint_blocks.*.x_block.attn", f"{_DOUBLE}.attn", _QKV, "to_out.0"),
    *_attention("joint_blocks.*.x_block.attn2", f"{_DOUBLE}.attn2", _QKV, "to_out.0"),
    *_attention("joint_blocks.*.context_block.attn", f"{_DOUBLE}.attn", _ADDED, "to_add_out"),
    ("joint_blocks.*.x_block.mlp.fc1", (f"{_DOUBLE}.ff.net.0.proj",)),
    ("joint_blocks.*.x_block.mlp.fc2", (f"{_DOUBLE}.ff.net.2",)),
    ("joint_blocks.*.context_block.mlp.fc1", (f"{_DOUBLE}.ff_context.net.0.proj",)),
    ("joint_blocks.*.context_block.mlp.fc2", (f"{_DOUBLE}.ff_context.net.2",)),
    ("joint_blocks.*.x_block.adaLN_modulation.1", (f"{_DOUBLE}.norm1.linear",)),
    ("joint_blocks.*.context_block.adaLN_modulation.1", (f"{_DOUBLE}.norm1_context.linear",)),
    ("x_embedder.proj", ("pos_embed.proj",)),
    ("context_embedder", ("context_embedder",)),
    ("t_embedder.mlp.0", ("time_text_embed.timestep_embedder.linear_1",)),
    ("t_embedder.mlp.2", ("time_text_embed.timestep_embedder.linear_2",)),
    ("y_embedder.mlp.0", ("time_text_embed.text_embedder.linear_1",)),
    ("y_embedder.mlp.2", ("time_text_embed.text_embedder.linear_2",)),
    ("final_layer.linear", ("proj_out",)),
    ("final_layer.adaLN_modulation.1", ("norm_out.linear",)),
)

# The published network has diffusers' names. musubi-tuner, convert_lora.py `QWEN_IMAGE_KEYS`; ComfyUI, comfy/lora.py.
_QWEN_IMAGE: tuple[Row, ...] = tuple(
    (name, (name,))
    for name in (
        *(f"{_DOUBLE}.attn.{name}" for name in (*_QKV, *_ADDED, "to_out.0", "to_add_out")),
        *(f"{_DOUBLE}.{stream}_mlp.net.{layer}" for stream in ("img", "txt") for layer in ("0.proj", "2")),
        *(f"{_DOUBLE}.{stream}_mod.1" for stream in ("img", "txt")),
        *("img_in", "txt_in", "proj_out", "norm_out.linear"),
        *(f"time_text_embed.timestep_embedder.linear_{number}" for number in (1, 2)),
    )
)

# The trainer's network has diffusers' names: musubi-tuner, zimage/zimage_model.py. ComfyUI reads them in files of
# diffusers (comfy/utils.py, `z_image_to_diffusers`); in kohya's it has the original's, which are rows for reading.
_Z_BLOCKS = ("layers.*", "noise_refiner.*", "context_refiner.*")
_Z_IMAGE: tuple[Row, ...] = (
    *(
        (name, (name,))
        for name in (
            *(f"{block}.attention.{name}" for block in _Z_BLOCKS for name in (*_QKV, "to_out.0")),
            *(f"{block}.feed_forward.w{number}" for block in _Z_BLOCKS for number in (1, 2, 3)),
            *(f"{block}.adaLN_modulation.0" for block in _Z_BLOCKS[:2]),
            *("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.1"),
        )
    ),
    *((f"{b}.attention.qkv", tuple(f"{b}.attention.{name}" for name in _QKV)) for b in _Z_BLOCKS),
    *((f"{b}.attention.out", (f"{b}.attention.to_out.0",)) for b in _Z_BLOCKS),
    ("x_embedder", ("all_x_embedder.2-1",)),
    ("final_layer.linear", ("all_final_layer.2-1.linear",)),
    ("final_layer.adaLN_modulation.1", ("all_final_layer.2-1.adaLN_modulation.1",)),
)

# All have diffusers' names: musubi-tuner, ernie_image/ernie_image_model.py; ComfyUI, comfy/ldm/ernie/model.py.
_ERNIE_IMAGE: tuple[Row, ...] = tuple(
    (name, (name,))
    for name in (
        *(f"layers.*.self_attention.{name}" for name in (*_QKV, "to_out.0")),
        *(f"layers.*.mlp.{name}" for name in ("gate_proj", "up_proj", "linear_fc2")),
        *("adaLN_modulation.1", "final_norm.linear", "final_linear", "text_proj"),
        *(f"time_embedding.linear_{number}" for number in (1, 2)),
    )
)

TABLES = {
    "flux": (*_FLUX, *((_OF_DIFFSYNTH[layer], parts) for layer, parts in _FLUX if layer in _OF_DIFFSYNTH)),
    "flux2_klein": _FLUX2,
    "qwen_image": _QWEN_IMAGE,
    "sd3": _SD3,
    "z_image": _Z_IMAGE,
    "ernie_image": _ERNIE_IMAGE,
}
"""The families whose layers have the same names in every network; for SDXL see `unet_rows`."""

SDXL_UNET: Mapping[str, Any] = {
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}

_RESNET = {
    "in_layers.2": "conv1",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_TRANSFORMER = (
    *("proj_in", "proj_out", "transformer_blocks.*.ff.net.0.proj", "transformer_blocks.*.ff.net.2"),
    *(f"transformer_blocks.*.{attn}.{name}" for attn in ("attn1", "attn2") for name in (*_QKV, "to_out.0")),
)


@functools.cache
def unet_rows(layers: int, down: tuple[str, ...], up: tuple[str, ...]) -> tuple[Row, ...]:
    """The blocks of Stability AI's UNet, numbered through: sd-scripts, library/sdxl_model_util.py."""
    rows = {
        "input_blocks.0.0": "conv_in",
        "out.2": "conv_out",
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.0": "add_embedding.linear_1",
        "label_emb.0.2": "add_embedding.linear_2",
    }

    def resnet(theirs: str, ours: str) -> None:
        rows.update({f"{theirs}.{name}": f"{ours}.{layer}" for name, layer in _RESNET.items()})

    def attention(theirs: str, ours: str) -> None:
        rows.update({f"{theirs}.{name}": f"{ours}.{name}" for name in _TRANSFORMER})

    for block, kind in enumerate(down):
        first = 1 + block * (layers + 1)
        for i in range(layers):
            resnet(f"input_blocks.{first + i}.0", f"down_blocks.{block}.resnets.{i}")
            if "CrossAttn" in kind:
                attention(f"input_blocks.{first + i}.1", f"down_blocks.{block}.attentions.{i}")
        rows[f"input_blocks.{first + layers}.0.op"] = f"down_blocks.{block}.downsamplers.0.conv"
    for i in range(2):
        resnet(f"middle_block.{2 * i}", f"mid_block.resnets.{i}")
    attention("middle_block.1", "mid_block.attentions.0")
    for block, kind in enumerate(up):
        first = block * (layers + 1)
        for i in range(layers + 1):
            resnet(f"output_blocks.{first + i}.0", f"up_blocks.{block}.resnets.{i}")
            if "CrossAttn" in kind:
                attention(f"output_blocks.{first + i}.1", f"up_blocks.{block}.attentions.{i}")
        last = 2 if "CrossAttn" in kind else 1
        rows[f"output_blocks.{first + layers}.{last}.conv"] = f"up_blocks.{block}.upsamplers.0.conv"
    return tuple((theirs, (ours,)) for theirs, ours in rows.items())


# Text encoders are CLIP: ComfyUI, comfy/lora.py `LORA_CLIP_MAP`; the prefix is `lora_te1_` or `lora_te2_` in kohya's.
CLIP: tuple[Row, ...] = tuple(
    (name, (name,))
    for name in (
        *(f"text_model.encoder.layers.*.self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
        *(f"text_model.encoder.layers.*.mlp.fc{number}" for number in (1, 2)),
    )
)
TEXT_ENCODERS: Mapping[str, tuple[str, ...]] = {
    "flux": ("text_encoder",),
    "sd3": ("text_encoder", "text_encoder_2"),
    "sdxl": ("text_encoder", "text_encoder_2"),
}
"""Which of a family's text encoders a LoRA file may hold."""
