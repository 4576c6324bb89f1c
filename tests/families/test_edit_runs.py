"""Edits from a folder to an edited image: a cache, a short training, and the adapter in the stock pipeline."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from trainings import make_trainer

import sciflow_hf as sf
from sciflow_hf.demo import make_tiny

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.usefixtures("small_sources")]

FAMILIES = {"flux_kontext": {"max_sequence_length": 12}, "qwen_image_edit": {}}


def picture(seed, size=(96, 64)):
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)


@pytest.fixture(scope="module", params=FAMILIES)
def run(request, tmp_path_factory):
    """(family, folder of edits, cache): four captions on two sources, and where there can be two, rows with both."""
    folder = tmp_path_factory.mktemp(request.param)
    family = sf.load_family(request.param)(
        str(make_tiny(folder / "tiny", request.param, size="test")), posterior="mode", **FAMILIES[request.param]
    )
    edits = folder / "edits"
    edits.mkdir()
    rows = []
    for number in range(8):
        sources = [f"source_{number % 2}.png", f"source_{1 - number % 2}.png"][
            : 1 + (number >= 4 and family.max_sources > 1)
        ]
        picture(number).save(edits / f"target_{number}.png")
        rows.append(
            {"file_name": f"target_{number}.png", "source_image": sources, "caption": f"Make it {number // 2}."}
        )
    for number in range(2):
        picture(100 + number, (130, 90)).save(edits / f"source_{number}.png")
    picture(50).save(edits / "plain.png")
    rows.append({"file_name": "plain.png", "caption": "Draw it."})
    (edits / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sf.build_cache_for(family, str(edits), str(folder / "cache"), resolution=64, dtype="fp32")
    return family, edits, rows, sf.load_cache(folder / "cache", dtype=torch.float32)


def test_a_row_holds_what_the_family_makes_of_its_images(run):
    family, edits, rows, data = run
    encoders = family.load_encoders(device="cpu", dtype=torch.float32)
    assert len(data) == 9 and list(data.kinds).count("edit") == 8
    for i in range(len(data)):
        name = Path(data.index["image_path"][i]).name
        row = next(row for row in rows if row["file_name"] == name)
        images = [Image.open(edits / name).convert("RGB") for name in row.get("source_image", [])]
        read = {"sources": [images]} if family.text_reads_sources else {}
        text = family.encode_prompts([row["caption"]], encoders, **read)
        found = data[i]
        assert torch.equal(found["prompt_embeds"], text["prompt_embeds"][0])
        assert [name for name in found if name.startswith("source")] == ["source_latents", "source_latents_1"][
            : len(images)
        ]
        family.check_sample(family.load_model(dtype=torch.float32, meta=True), found)
        for name, image in zip(("source_latents", "source_latents_1"), images, strict=False):
            height, width = family.source_size(image.height, image.width)
            shown = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))[None] / np.float32(255)
            pixels = 2 * torch.from_numpy(shown).permute(0, 3, 1, 2) - 1
            torch.testing.assert_close(found[name], family.encode_source_images(pixels, encoders)[0], rtol=0, atol=1e-3)


def test_edits_are_trained_and_the_stock_pipeline_loads_the_adapter(run, tmp_path):
    family, edits, rows, data = run
    trainer = make_trainer(tmp_path, family, data, data.select(range(4)), max_steps=6, learning_rate=3e-2)
    trainer.train()
    metrics = trainer.evaluate()
    assert np.isfinite(metrics["eval_loss"]) and metrics["eval_gain_edit"] != 0
    trainer.save_model()
    images = [Image.open(edits / name).convert("RGB") for name in rows[-2]["source_image"]]
    inputs = family.encode_validation_prompts(
        [rows[-2]["caption"]], device="cpu", dtype=torch.float32, source_images=[images]
    )[0]

    def draw(pipeline):
        options = {"height": 64, "width": 96, "num_inference_steps": 2, "guidance_scale": 2.5}
        rng = torch.Generator().manual_seed(0)
        return family.generate(pipeline, inputs, generator=rng, source_images=images, **options)[0].tobytes()

    trained = draw(family.load_pipeline(trainer.model.eval()))
    without = dict.fromkeys(family.text_parts)
    stock = family.pipeline_class().from_pretrained(family.pretrained_model_name_or_path, **without)
    base = draw(stock)
    stock.load_lora_weights(str(tmp_path))
    assert draw(stock) == trained != base
