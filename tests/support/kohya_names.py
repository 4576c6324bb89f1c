"""Names of layers in kohya's files, listed block by block as their tools' sources have them.

flux: sd-scripts, networks/convert_flux_lora.py. sd3: sd-scripts, library/sd3_models.py (`MMDiTBlock`). flux2_klein:
musubi-tuner, flux_2/flux2_models.py. qwen_image: musubi-tuner, convert_lora.py (`QWEN_IMAGE_KEYS`). sdxl: sd-scripts,
library/sdxl_model_util.py (`make_unet_conversion_map`). z_image and ernie_image: musubi-tuner,
zimage/zimage_model.py and ernie_image/ernie_image_model.py.
"""

DOUBLE = {
    "img_attn_qkv": "attn.to_q attn.to_k attn.to_v",
    "img_attn_proj": "attn.to_out.0",
    "txt_attn_qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "txt_attn_proj": "attn.to_add_out",
}
FLUX_DOUBLE = DOUBLE | {
    "img_mlp_0": "ff.net.0.proj",
    "img_mlp_2": "ff.net.2",
    "txt_mlp_0": "ff_context.net.0.proj",
    "txt_mlp_2": "ff_context.net.2",
}
FLUX2_DOUBLE = DOUBLE | {
    "img_mlp_0": "ff.linear_in",
    "img_mlp_2": "ff.linear_out",
    "txt_mlp_0": "ff_context.linear_in",
    "txt_mlp_2": "ff_context.linear_out",
}
FLUX_SINGLE = {"linear1": "attn.to_q attn.to_k attn.to_v proj_mlp", "linear2": "proj_out"}
FLUX2_SINGLE = {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"}
SD3_JOINT = {
    "x_block_attn_qkv": "attn.to_q attn.to_k attn.to_v",
    "x_block_attn_proj": "attn.to_out.0",
    "x_block_attn2_qkv": "attn2.to_q attn2.to_k attn2.to_v",
    "x_block_attn2_proj": "attn2.to_out.0",
    "x_block_mlp_fc1": "ff.net.0.proj",
    "x_block_mlp_fc2": "ff.net.2",
    "context_block_attn_qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "context_block_attn_proj": "attn.to_add_out",
    "context_block_mlp_fc1": "ff_context.net.0.proj",
    "context_block_mlp_fc2": "ff_context.net.2",
}
QWEN = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
)
Z_IMAGE = (
    *("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"),
    *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
)
ERNIE_IMAGE = (
    *("self_attention.to_q", "self_attention.to_k", "self_attention.to_v", "self_attention.to_out.0"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.linear_fc2"),
)
RESNET = {"in_layers_2": "conv1", "out_layers_3": "conv2", "emb_layers_1": "time_emb_proj"}
RESNET |= {"skip_connection": "conv_shortcut"}
BASIC_BLOCK = (
    *("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"),
    *("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),
    *("ff.net.0.proj", "ff.net.2"),
)
ATTENTION = ("proj_in", "proj_out", *(f"transformer_blocks.0.{name}" for name in BASIC_BLOCK))


def kohya_layers(family, network):
    """`lora_unet_...` -> the layers of `network` that are its rows, of all layers that training presets name."""
    config = network.config
    if family == "sdxl":
        found = dict(_unet(config))
    elif family == "qwen_image":
        found = {
            f"transformer_blocks_{i}_{name.replace('.', '_')}": [f"transformer_blocks.{i}.{name}"]
            for i in range(config.num_layers)
            for name in QWEN
        }
    elif family == "z_image":
        blocks = {"layers": config.n_layers, "noise_refiner": config.n_refiner_layers}
        blocks["context_refiner"] = config.n_refiner_layers
        found = {
            f"{block}_{i}_{name.replace('.', '_')}": [f"{block}.{i}.{name}"]
            for block, number in blocks.items()
            for i in range(number)
            for name in Z_IMAGE
        }
    elif family == "ernie_image":
        found = {
            f"layers_{i}_{name.replace('.', '_')}": [f"layers.{i}.{name}"]
            for i in range(config.num_layers)
            for name in ERNIE_IMAGE
        }
    elif family == "sd3":
        found = _blocks("joint_blocks", "transformer_blocks", SD3_JOINT, config.num_layers)
    else:
        double, single = (FLUX_DOUBLE, FLUX_SINGLE) if family == "flux" else (FLUX2_DOUBLE, FLUX2_SINGLE)
        found = _blocks("double_blocks", "transformer_blocks", double, config.num_layers)
        found |= _blocks("single_blocks", "single_transformer_blocks", single, config.num_single_layers)
    there = dict(network.named_modules())
    return {f"lora_unet_{name}": parts for name, parts in found.items() if all(part in there for part in parts)}


def _blocks(theirs, ours, table, number):
    return {
        f"{theirs}_{i}_{name}": [f"{ours}.{i}.{part}" for part in parts.split()]
        for i in range(number)
        for name, parts in table.items()
    }


def _unet(config):
    """Input blocks are counted through: one for the first convolution, then `layers_per_block` and one a level."""
    per_level = config.layers_per_block + 1
    levels = range(len(config.block_out_channels))
    pairs = []
    for i in levels:
        for j in range(per_level - 1):
            pairs += [(f"input_blocks_{per_level * i + j + 1}", f"down_blocks.{i}", j)]
        yield f"input_blocks_{per_level * (i + 1)}_0_op", [f"down_blocks.{i}.downsamplers.0.conv"]
        for j in range(per_level):
            pairs += [(f"output_blocks_{per_level * i + j}", f"up_blocks.{i}", j)]
        yield f"output_blocks_{per_level * (i + 1) - 1}_2_conv", [f"up_blocks.{i}.upsamplers.0.conv"]
    for theirs, ours, j in pairs:
        yield from ((f"{theirs}_0_{name}", [f"{ours}.resnets.{j}.{layer}"]) for name, layer in RESNET.items())
        yield from ((f"{theirs}_1_{n.replace('.', '_')}", [f"{ours}.attentions.{j}.{n}"]) for n in ATTENTION)
    for i in range(2):
        names = RESNET.items()
        yield from ((f"middle_block_{2 * i}_{name}", [f"mid_block.resnets.{i}.{layer}"]) for name, layer in names)
    yield from ((f"middle_block_1_{n.replace('.', '_')}", [f"mid_block.attentions.0.{n}"]) for n in ATTENTION)
