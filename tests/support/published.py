"""Weights of diffusers under the names of the published single files, written from those files' own layouts."""

import re
from collections.abc import Mapping

import torch

Weights = dict[str, torch.Tensor]

_FLUX2 = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "proj_out": "final_layer.linear",
}
_FLUX2_BLOCKS = {
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_add_out": "txt_attn.proj",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
_FLUX2_SINGLE = {
    "attn.to_qkv_mlp_proj": "linear1",
    "attn.to_out": "linear2",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
}


def flux2_network(weights: Mapping[str, torch.Tensor]) -> Weights:
    """As `flux-2-klein-base-9b.safetensors`: attention fused, the shift of the last modulation before its scale."""
    left, found = dict(weights), Weights()
    for name in list(left):
        if match := re.fullmatch(r"transformer_blocks\.(\d+)\.attn\.(to_q|add_q_proj)\.weight", name):
            start, kind = name.removesuffix(f"{match[2]}.weight"), "img" if match[2] == "to_q" else "txt"
            fused = ("to_q", "to_k", "to_v") if kind == "img" else ("add_q_proj", "add_k_proj", "add_v_proj")
            parts = [left.pop(f"{start}{each}.weight") for each in fused]
            found[f"double_blocks.{match[1]}.{kind}_attn.qkv.weight"] = torch.cat(parts)
    scale, shift = left.pop("norm_out.linear.weight").chunk(2)
    found["final_layer.adaLN_modulation.1.weight"] = torch.cat([shift, scale])
    for name, value in left.items():
        path, end = name.rpartition(".")[::2]
        if match := re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.*)", path):
            inner = (_FLUX2_SINGLE if match[1] else _FLUX2_BLOCKS)[match[3]]
            path, end = (
                f"{'single' if match[1] else 'double'}_blocks.{match[2]}.{inner}",
                "scale" if "norm" in inner else end,
            )
        else:
            path = _FLUX2[path]
        found[f"{path}.{end}"] = value
    return found


def vae(weights: Mapping[str, torch.Tensor]) -> Weights:
    """As `ae.safetensors` of FLUX.1 and the VAE in checkpoints of Stable Diffusion: levels counted from the pixels."""
    levels = 1 + max(int(found[1]) for name in weights if (found := re.match(r"decoder\.up_blocks\.(\d+)", name)))
    attention = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "group_norm": "norm"}
    found = Weights()
    for name, value in weights.items():
        name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        for pattern, inner in (
            (r"up_blocks\.(\d+)\.resnets", "block"),
            (r"up_blocks\.(\d+)\.upsamplers\.0", "upsample"),
        ):
            name = re.sub(pattern, lambda m, inner=inner: f"up.{levels - 1 - int(m[1])}.{inner}", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        if match := re.fullmatch(r"(.*)mid_block\.attentions\.0\.(.*)\.(weight|bias)", name):
            name = f"{match[1]}mid.attn_1.{attention[match[2]]}.{match[3]}"
            value = value[:, :, None, None] if value.ndim == 2 else value  # convolutions of one pixel
        found[name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")] = value
    return found
