"""LoRA files as LyCORIS and ComfyUI compute with them, written from their formulas: names to weights, no more.

LyCORIS 4.1, lycoris/modules/{locon,loha,lokr}.py; ComfyUI, comfy/weight_adapter/{lora,loha,lokr}.py: `.alpha` over the
rank scales an update, a matrix stored whole (LoKr) has none; `dora_scale` is the norm of each row of the sum.
"""

import torch


def merged(state, base):
    """The weights that a file makes of `base`, {name: weight}, and the names in the file that it lacks."""
    layers = {}
    for key, value in state.items():
        name, _, kind = key.partition(".") if key.startswith("lora_") else _dotted(key)
        layers.setdefault(name, {})[kind] = value
    return {name: _weight(base[name], layers.get(name, {})) for name in base}, sorted(layers.keys() - base.keys())


def _dotted(key):
    end = next(end for end in (".lora_A.weight", ".lora_B.weight", ".alpha", "") if key.endswith(end))
    name, _, kind = key.rpartition(".") if not end else (key.removesuffix(end), ".", end[1:])
    return name, ".", kind


def _weight(weight, layer):
    get = layer.get
    down, up = get("lora_down.weight", get("lora_A.weight")), get("lora_up.weight", get("lora_B.weight"))
    if down is not None:
        update, rank = up.flatten(1) @ down.flatten(1), len(down)
    elif "hada_w1_a" in layer:
        update = (layer["hada_w1_a"] @ layer["hada_w1_b"]) * (layer["hada_w2_a"] @ layer["hada_w2_b"])
        rank = len(layer["hada_w1_b"])
    elif layer:
        rank = next((len(layer[n]) for n in ("lokr_w2_b", "lokr_w1_b") if n in layer), None)
        left, right = (get(f"lokr_{w}", None) for w in ("w1", "w2"))
        left = layer["lokr_w1_a"] @ layer["lokr_w1_b"] if left is None else left
        right = layer["lokr_w2_a"] @ layer["lokr_w2_b"] if right is None else right
        update = torch.kron(left[..., None, None] if right.ndim == 4 else left, right)
    else:
        return weight
    scale = float(layer["alpha"]) / rank if "alpha" in layer and rank is not None else 1.0
    total = weight + scale * update.reshape(weight.shape)
    if "dora_scale" in layer:
        total = total * (layer["dora_scale"] / total.flatten(1).norm(dim=1).reshape(layer["dora_scale"].shape))
    return total
