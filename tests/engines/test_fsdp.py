"""FSDP2 on two ranks against DDP: losses, files, and going on with either, with parameters that are truly sharded."""

import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from caches import encoder_settings, write_cache
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from ranks import launch, train
from safetensors.torch import load_file

from sciflow_hf.engines.sharding import check
from sciflow_hf.errors import SciflowError

EVEN = {(32, 48): 12, (48, 32): 8, (24, 64): 4}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 4, "held_out": 4, "ema_decay": 0.9}
NAMES = ("lora", "whole")


@pytest.fixture(scope="module")
def job(tmp_path_factory, tiny_klein):
    cache = write_cache(tmp_path_factory.mktemp("even"), settings=encoder_settings(tiny_klein), buckets=EVEN)
    return dict(pipeline=tiny_klein, cache=cache, save_steps=4, resume_from_checkpoint="latest") | EVALUATED


@pytest.fixture(scope="module")
def runs(tmp_path_factory, job):
    """Folder, and results by subfolder: LoRA and full fine-tuning by DDP, by FSDP2, by FSDP2 from DDP's half."""
    folder = tmp_path_factory.mktemp("runs")
    jobs = {f"{name}_ddp": {**job, "whole": name == "whole"} for name in NAMES}
    jobs |= {f"{name}_fsdp": {**jobs[f"{name}_ddp"], "fsdp": True} for name in NAMES}
    jobs |= {f"{name}_on": {**jobs[f"{name}_fsdp"], "start": folder / f"{name}_ddp" / "checkpoint-4"} for name in NAMES}
    found = launch(folder, *({**each, "output_dir": folder / name} for name, each in jobs.items()))
    return folder, dict(zip(jobs, found, strict=True))


def is_sharded(result):
    """Every parameter is a DTensor; the network and each of its four blocks are gathered on their own."""
    return (result["wrapped"], result["sharded"], result["units"]) == ("FSDPFlux2Transformer2DModel", 1, 5)


def assert_same_losses(one, two, tolerance=1e-4):
    for name in ("losses", "norms", "eval_losses"):
        assert len(one[name]) == len(two[name])
        np.testing.assert_allclose(one[name], two[name], rtol=tolerance)


def assert_same_state(one, two, tolerance=1e-5):
    """Two optimizer.pt with the same moments of the same shapes."""
    left, right = (torch.load(folder / "optimizer.pt", weights_only=True) for folder in (one, two))
    assert left["state"].keys() == right["state"].keys() and len(left["state"]) > 20
    for i, entry in left["state"].items():
        for name, value in entry.items():
            assert type(right["state"][i][name]) is type(value)
            torch.testing.assert_close(right["state"][i][name], value, rtol=1e-3, atol=tolerance)


def drawn(folder, pipeline, name):
    """What the stock pipeline draws with the weights in a folder."""
    kinds = {} if name == "lora" else {"transformer": Flux2Transformer2DModel.from_pretrained(folder / "transformer")}
    pipe = Flux2KleinPipeline.from_pretrained(pipeline, **kinds)
    if name == "lora":
        pipe.load_lora_weights(folder)
    options = dict(height=32, width=48, num_inference_steps=2, guidance_scale=1.0, output_type="pt")
    options |= {"prompt": "a plot", "max_sequence_length": 12}
    return pipe(**options, generator=torch.Generator().manual_seed(0)).images


@pytest.mark.promise("D22")
@pytest.mark.parametrize("name", NAMES)
def test_equal_to_ddp(runs, name):
    """Losses, norms of gradients, evaluations of the averaged weights; the same files with the same values."""
    folder, results = runs
    ddp, fsdp = results[f"{name}_ddp"], results[f"{name}_fsdp"]
    assert ddp["sharded"] == 0 and is_sharded(fsdp)
    assert_same_losses(ddp, fsdp)
    assert len(set(fsdp["losses"])) == 8 and len(fsdp["eval_losses"]) == 2
    listed = [sorted(p.name for p in (folder / f"{name}_{e}" / "checkpoint-4").iterdir()) for e in ("ddp", "fsdp")]
    assert listed[0] == listed[1]
    for place in ("", "checkpoint-4", "checkpoint-8"):
        file = {"lora": "pytorch_lora_weights", "whole": "transformer/diffusion_pytorch_model"}[name]
        files = [file] if not place else [file, "ema"]
        for one in files:
            left, right = (load_file(folder / f"{name}_{e}" / place / f"{one}.safetensors") for e in ("ddp", "fsdp"))
            assert left.keys() == right.keys() and len(left) > 20
            assert max(float((left[key] - right[key]).abs().max()) for key in left) < 1e-5
    assert_same_state(folder / f"{name}_ddp" / "checkpoint-4", folder / f"{name}_fsdp" / "checkpoint-4")


@pytest.mark.parametrize("name", NAMES)
def test_the_stock_pipeline_draws_the_same(runs, tiny_klein, name):
    folder, _ = runs
    fsdp, ddp = (drawn(folder / f"{name}_{engine}", tiny_klein, name) for engine in ("fsdp", "ddp"))
    torch.testing.assert_close(fsdp, ddp, rtol=0, atol=1e-4)
    before = drawn(folder / f"{name}_fsdp" / "checkpoint-4", tiny_klein, name)
    assert float((fsdp - before).abs().max()) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_each_goes_on_with_the_other(runs, tmp_path, job, name):
    """FSDP2 from a checkpoint of DDP, and one process from one of FSDP2."""
    folder, results = runs
    assert is_sharded(results[f"{name}_on"])
    assert_same_losses(results[f"{name}_ddp"], results[f"{name}_on"])
    shutil.copytree(folder / f"{name}_fsdp" / "checkpoint-4", tmp_path / "alone" / "checkpoint-4")
    alone = train(**job, whole=name == "whole", output_dir=tmp_path / "alone", per_device_train_batch_size=4)
    assert alone["sharded"] == 0
    assert_same_losses(results[f"{name}_ddp"], alone)


OPTIONS = {
    "checkpointing": {"activation_checkpointing_share": 0.5},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    "bf16": {"bf16": True},
    "accumulation": {"gradient_accumulation_steps": 2, "max_steps": 4, "save_steps": 2},
}


@pytest.mark.acceptance
def test_options_equal_to_ddp(tmp_path, job):
    """With each option the losses of DDP, and images on the way; under bf16 they differ by its rounding."""
    drawn = {"validation_prompts": ["a plot"], "validation_steps": 4, "num_inference_steps": 2}
    jobs = {name: {**job, **drawn, "validation_size": [32, 48], **options} for name, options in OPTIONS.items()}
    both = {f"{name}_ddp": each for name, each in jobs.items()}
    both |= {f"{name}_fsdp": {**each, "fsdp": True} for name, each in jobs.items()}
    found = launch(tmp_path, *({**each, "output_dir": tmp_path / name} for name, each in both.items()))
    results = dict(zip(both, found, strict=True))
    for name in jobs:
        ddp, fsdp = results[f"{name}_ddp"], results[f"{name}_fsdp"]
        assert is_sharded(fsdp) and not ddp["sharded"]
        assert_same_losses(ddp, fsdp, tolerance=2e-2 if name == "bf16" else 1e-4)
        images = [sorted(p.name for p in (tmp_path / f"{name}_{e}").rglob("p*.png")) for e in ("ddp", "fsdp")]
        assert images[0] == images[1] and len(images[0]) >= 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"version": 1}, "`fsdp_version` 1"),
        ({"optim": "prodigy"}, "`optim` 'prodigy' does not know of sharded weights: use one of adamw_torch"),
        ({"quantize_base": "nf4"}, "`quantize_base` 'nf4' cannot work with FSDP"),
        ({"fp16": True}, "`fp16` True cannot work with FSDP"),
        ({"classes": ["NoBlock"]}, "`fsdp_transformer_layer_cls_to_wrap` 'NoBlock'"),
        ({"text": True}, "`train_text_encoder` cannot work with FSDP"),
        ({"checkpointing": True}, "use `--activation_checkpointing`"),
    ],
)
def test_what_cannot_be_sharded_is_refused(options, words):
    values = {"version": 2, "optim": "adamw_torch", "quantize_base": None, "fp16": False, "offload": False} | options
    plugin = SimpleNamespace(
        fsdp_version=values["version"], activation_checkpointing=values.get("checkpointing", False),
        transformer_cls_names_to_wrap=values.get("classes"),
    )  # fmt: skip
    args = SimpleNamespace(**values)
    with pytest.raises(SciflowError, match=re.escape(words)):
        check(args, plugin, torch.nn.Linear(1, 1), trains_text_encoder=values.get("text", False))
