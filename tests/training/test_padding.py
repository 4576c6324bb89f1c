"""`--fit pad` from flags to gradients: where a page is padded, a network learns nothing, whatever weighs the rest."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from trainings import make_args

import sciflow_hf as sf
from sciflow_hf.data.batches.loader import collate
from sciflow_hf.training.prepare import prepare_data


@pytest.fixture(scope="module")
def padded(tmp_path_factory, family):
    """Two edits of 64 x 256 pixels with a loss mask, shown on 64 x 64: lines 3 and 4 of 8 x 8 tokens are figure."""
    folder, output = (tmp_path_factory.mktemp(name) for name in ("images", "run"))
    rng, rows = np.random.default_rng(0), []
    mask = np.full((64, 256), 255, np.uint8)
    mask[:, 128:] = 0
    Image.fromarray(mask).save(folder / "mask.png")
    for i in range(2):
        source = rng.integers(0, 256, (4, 16, 3), np.uint8).repeat(16, 0).repeat(16, 1)
        image = source.copy()
        image[:, 32:96] = 255 - image[:, 32:96]
        Image.fromarray(source).save(folder / f"s{i}.png")
        Image.fromarray(image).save(folder / f"t{i}.png")
        rows.append({"file_name": f"t{i}.png", "source_image": f"s{i}.png", "caption": "x", "loss_mask": "mask.png"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data_args = sf.DataArguments(
        input_dir=str(folder), fit="pad", max_aspect_ratio=1, resolution=64, enlarge=True, edit_masks="computed",
        eval_fraction=0,
    )  # fmt: skip
    train, _ = prepare_data(data_args, dataclasses.replace(family), make_args(output))
    assert train.buckets == [(64, 64)] * 2 and train.metadata["fit"] == "pad"
    return train


@pytest.mark.parametrize("edit_loss", ["uniform", "weighted", "balanced"])
def test_the_gradient_in_the_padding_is_exactly_zero(tmp_path, family, padded, edit_loss):
    model = family.load_model(dtype=torch.float32)
    outputs = []
    model.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    batch = collate([{**padded[i], "noise_key": torch.tensor(i)} for i in range(2)])
    loss, _ = family.compute_loss(model, batch, make_args(tmp_path, edit_loss=edit_loss))
    (gradient,) = torch.autograd.grad(loss.sum(), outputs)
    tokens = gradient[:, :64].reshape(2, 8, 8, -1)  # those of the source come after the image's
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[3:5, :4] = True  # of the figure, and where the mask of the data counts
    assert tokens[:, ~inside].abs().max() == 0 and tokens[:, inside].abs().amin(-1).min() > 0
    changed = tokens[:, 3:5, 1:3].abs().mean() / tokens[:, 3:5, [0, 3]].abs().mean()
    assert (changed > 1.5) == (edit_loss == "weighted"), "what changed counts more in the figure"
