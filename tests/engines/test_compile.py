"""`--torch_compile`: how often it compiles with many buckets, and that nothing else changes."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch._dynamo
from caches import encoder_settings, write_cache
from ranks import make
from recipe_runs import weights

import sciflow_hf as sf
from sciflow_hf.data.batches.sizes import equal_token_buckets
from sciflow_hf.engines.compilation import compile_blocks
from sciflow_hf.training.checkpoints import list_checkpoints

BUCKETS = {(32, 48): 8, (48, 32): 8, (24, 64): 4, (40, 32): 4, (16, 64): 4, (16, 24): 4}  # 4 different token counts
KINDS = 2  # of blocks in klein: double and single stream


@pytest.fixture(autouse=True)
def counters():
    """torch's counters, from zero; nothing compiled is left behind."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def job(tmp_path_factory, tiny_klein):
    cache = write_cache(tmp_path_factory.mktemp("buckets"), settings=encoder_settings(tiny_klein), buckets=BUCKETS)
    return dict(pipeline=tiny_klein, cache=cache, per_device_train_batch_size=4)


def train(folder, job, **options):
    """Losses of a run, compiled by the backend that needs no compiler of C++."""
    trainer = make(output_dir=folder, **job, **options)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer


COMPILED = {"torch_compile": True, "torch_compile_backend": "eager"}


@pytest.mark.parametrize("options", [{"activation_checkpointing_share": 0.5}, {"whole": True}])
def test_two_compilations_of_each_kind_of_block(tmp_path, job, counters, options):
    """One for the first shape and one for all others, in eight steps through six buckets; the losses are the same."""
    plain, _ = train(tmp_path / "plain", job, **options)
    assert counters["frames"]["total"] == 0
    losses, trainer = train(tmp_path / "compiled", job, **options, **COMPILED)
    assert len(set(plain)) == 8
    np.testing.assert_allclose(losses, plain, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] == 2 * KINDS and not counters["graph_break"]
    assert not [name for name in trainer.model_wrapped.state_dict() if "_orig_mod" in name]


def test_one_compilation_of_each_kind_and_mode_in_buckets_of_one_token_count(tmp_path, tiny_klein, counters):
    """An epoch of six; then evaluations, which compute without gradients, with the adapter and without it."""
    buckets = equal_token_buckets(88, 8, max_aspect_ratio=4)
    assert len(buckets) == 6 and {h * w for h, w in buckets} == {120 * 64}
    cache = write_cache(tmp_path / "cache", settings=encoder_settings(tiny_klein), buckets=dict.fromkeys(buckets, 6))
    job = dict(pipeline=tiny_klein, cache=cache, per_device_train_batch_size=2, num_train_epochs=1, max_steps=-1)
    losses, _ = train(tmp_path / "run", job, **COMPILED)
    assert len(losses) == 18 and counters["stats"]["unique_graphs"] == KINDS and not counters["graph_break"]
    train(tmp_path / "with", job | {"max_steps": 2}, held_out=6, eval_strategy="steps", eval_steps=1, **COMPILED)
    assert counters["stats"]["unique_graphs"] == 3 * KINDS, "those of training serve again"


def test_files_evaluation_images_and_resume(tmp_path, job, even_cache, counters):
    """Compiled, with all that looks at the network in between, stopped and resumed: the run that is not compiled."""
    job = job | {"cache": even_cache}  # of one number of tokens
    options = dict(
        max_steps=4, save_steps=2, eval_strategy="steps", eval_steps=2, validation_prompts=["a plot"],
        validation_steps=2, num_inference_steps=2, validation_size=[40, 56], ema_decay=0.9,
    )  # fmt: skip
    plain, reference = train(tmp_path / "plain", job | options, held_out=6)
    train(tmp_path / "compiled", job | options | {"max_steps": 2}, held_out=6, **COMPILED)
    losses, trainer = train(
        tmp_path / "compiled", job | options, held_out=6, resume_from_checkpoint="latest", **COMPILED
    )
    np.testing.assert_allclose(losses, plain, rtol=1e-5)
    evaluated = [[e["eval_loss"] for e in t.state.log_history if "eval_loss" in e] for t in (reference, trainer)]
    np.testing.assert_allclose(*evaluated, rtol=1e-5)
    assert len(evaluated[0]) == 2
    assert [p.name for p in list_checkpoints(tmp_path / "compiled")] == ["checkpoint-4", "checkpoint-2"]
    for folder in ("checkpoint-4", "checkpoint-2"):
        one, two = weights(tmp_path / "plain" / folder), weights(tmp_path / "compiled" / folder)
        assert one.keys() == two.keys()
        assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5
    drawn = sorted(p.relative_to(tmp_path / "plain") for p in (tmp_path / "plain" / "validation").rglob("p*.png"))
    assert len(drawn) == 3
    assert all((tmp_path / "compiled" / file).is_file() for file in drawn)


def test_images_are_drawn_without_compiling(tmp_path, job, counters):
    options = dict(max_steps=1, validation_prompts=["a plot"], validation_steps=1, num_inference_steps=2)
    train(tmp_path, job, **options, validation_size=[40, 56], **COMPILED)
    assert len(list((tmp_path / "validation").rglob("p*.png"))) == 2
    assert counters["stats"]["unique_graphs"] == KINDS


def test_which_modules_are_compiled():
    """Networks that name repeated blocks, only blocks not to be split, or neither."""
    from diffusers import SD3Transformer2DModel, UNet2DModel

    from sciflow_hf.networks.dit import DiTForImageDiffusion

    args = SimpleNamespace(torch_compile_backend="eager", torch_compile_mode=None)
    sd3 = dict(num_layers=2, num_attention_heads=2, attention_head_dim=8, caption_projection_dim=16, sample_size=8)
    unet = dict(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, sample_size=8)
    unet |= dict(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    for network, names in (
        (DiTForImageDiffusion(hidden_size=48, num_hidden_layers=2), ["blocks.0", "blocks.1"]),
        (SD3Transformer2DModel(**sd3), ["transformer_blocks.0", "transformer_blocks.1"]),
        (UNet2DModel(**unet), [""]),
    ):
        compile_blocks(network, args)
        assert [name for name, module in network.named_modules() if module._compiled_call_impl is not None] == names


def test_an_unknown_backend_is_refused(tmp_path):
    with pytest.raises(sf.SciflowError, match=re.escape("`torch_compile_backend` 'fast': use one of eager, aot_eager")):
        sf.DiffusionTrainingArguments(output_dir=str(tmp_path), use_cpu=True, torch_compile_backend="fast")
