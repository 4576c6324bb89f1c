"""The reports of a UNet: the size of its activations against what autograd keeps, and one printed batch."""

import re

import pytest
import torch
from kept import kept_bytes
from plans import sizes

import sciflow_hf as sf
from sciflow_hf.demo import make_tiny
from sciflow_hf.engines.memory import _blocks

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SDXL = dict(
    sample_size=128, in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280), layers_per_block=2,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20), cross_attention_dim=2048, addition_embed_type="text_time",
    addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816, use_linear_projection=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def unet():
    """SDXL's UNet, 2.6 billion parameters without values, with a LoRA."""
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    with torch.device("meta"):
        network = UNet2DConditionModel(**SDXL).to(torch.bfloat16).requires_grad_(False)
        network.add_adapter(LoraConfig(r=16, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    assert sum(p.numel() for p in network.parameters() if not p.requires_grad) == 2_567_463_684
    return network.train()


def forward(network, height, width):
    on_meta = {"device": "meta", "dtype": torch.bfloat16}
    network(
        sample=torch.empty(1, 4, height, width, **on_meta),
        timestep=torch.empty(1, device="meta"),
        encoder_hidden_states=torch.empty(1, 77, 2048, **on_meta),
        added_cond_kwargs={
            "text_embeds": torch.empty(1, 1280, **on_meta),
            "time_ids": torch.empty(1, 6, device="meta"),
        },
    )


@pytest.mark.parametrize("size", [pytest.param((128, 128), marks=pytest.mark.acceptance), (96, 160)])
def test_activations_of_sdxl_are_what_autograd_keeps(unet, size, monkeypatch):
    """Of 1024 x 1024 and 768 x 1280 pixels, to a fifth."""
    blocks = _blocks(unet, 10**9, size[0] // 4 * (size[1] // 4))
    estimate = 2 * sum(inner for _, inner in blocks)
    assert estimate == pytest.approx(kept_bytes(unet, lambda: forward(unet, *size), monkeypatch), rel=0.2)
    assert len(blocks) == 70 + 17 and 5e9 < estimate < 8e9
    taken = 2 * sum(inputs for inputs, _ in blocks)
    unet.enable_gradient_checkpointing()
    checkpointed = kept_bytes(unet, lambda: forward(unet, *size), monkeypatch)
    unet.disable_gradient_checkpointing()
    assert taken == pytest.approx(checkpointed, rel=0.4) and taken < 0.1 * estimate


# ---- one batch ----


class Samples(list):
    """Samples in memory, of one bucket."""

    buckets = [(48, 32)] * 4


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    path = make_tiny(tmp_path_factory.mktemp("sdxl") / "tiny", "sdxl", size="test")
    return sf.SDXL(pretrained_model_name_or_path=str(path), posterior="mode")


@pytest.fixture(scope="module")
def samples():
    rng = torch.Generator().manual_seed(0)
    return Samples(
        {
            "latents": torch.randn(4, 12, 8, generator=rng),
            "prompt_embeds": torch.randn(77, 20, generator=rng),
            "pooled_prompt_embeds": torch.randn(12, generator=rng),
            "time_ids": torch.tensor([70 + i, 55, 3, 0, 48, 32]),
        }
        for i in range(4)
    )


def test_the_batch_shows_sizes_crops_and_pooled_text(tmp_path, family, samples):
    args = sf.DiffusionTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=4, weighting_scheme="none", report_to="none"
    )
    model = family.load_model(dtype=torch.float32)
    sf.add_adapter(model, sf.AdapterArguments(rank=2), family=family)
    text = sf.debug_batch(sf.DiffusionTrainer(model, args, family=family, train_dataset=samples))
    assert "  added_cond_kwargs.text_embeds: (4, 12) torch.float32" in text
    assert "  added_cond_kwargs.time_ids: (4, 6) torch.float32" in text
    assert "  sample: (4, 4, 12, 8) torch.float32" in text and "  timestep: (4,) torch.int64" in text
    shown = re.search(r"added_cond_kwargs.time_ids, first three: (\[\[.*\]\])", text).group(1)
    assert all(row[1:] == [55, 3, 0, 48, 32] and 70 <= row[0] <= 73 for row in eval(shown)) and len(eval(shown)) == 3


def test_the_plan_of_a_unet_has_activations(tmp_path, family, samples):
    """Twice as many for twice the batch, and few with checkpointing."""

    def activations(**options):
        args = sf.DiffusionTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options)
        model = family.load_model(dtype=torch.float32, meta=True)
        sf.add_adapter(model, sf.AdapterArguments(rank=2), family=family)
        return sizes(sf.plan(model, family, args, samples).split("Memory and disk, estimated")[1])[2]

    one = activations(per_device_train_batch_size=64)
    assert one > 5 * 2**20
    assert activations(per_device_train_batch_size=128) == pytest.approx(2 * one, rel=0.02)
    assert activations(per_device_train_batch_size=64, activation_checkpointing=True) < 0.5 * one
