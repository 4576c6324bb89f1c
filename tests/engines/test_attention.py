"""`--attention_backend`: the same losses by another kernel, and why one is refused before the first step."""

import shutil

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from dits import make_network
from trainings import losses, make_args, make_trainer

import sciflow_hf as sf
from sciflow_hf.engines.attention import set_backend


def backends_of(network):
    """The backends of the layers, and of networks that name none."""
    processors = [
        m.processor for m in network.modules() if hasattr(getattr(m, "processor", None), "_attention_backend")
    ]
    return {p._attention_backend for p in processors}, _AttentionBackendRegistry.get_active_backend()[0]


def use(network, tmp_path, backend, *, masked=False, trust_remote_code=False, **options):
    set_backend(
        network, make_args(tmp_path, attention_backend=backend, **options), masked=masked,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip


@pytest.fixture
def klein(family):
    return family.load_model(dtype=torch.float32)


def test_another_kernel_computes_the_same(tmp_path, family, even_cache, monkeypatch):
    """To the rounding of sums in another order; resumed without it, the base model is measured again."""
    calls = []
    kernel = _AttentionBackendRegistry._backends[AttentionBackendName._NATIVE_MATH]

    def counted(**inputs):
        calls.append(inputs["query"].shape)
        return kernel(**inputs)

    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName._NATIVE_MATH, counted)
    options = dict(max_steps=4, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2)
    options |= dict(eval_fraction=0.3, eval_levels=1)
    plain = make_trainer(tmp_path / "plain", family, even_cache, **options)
    plain.train()
    assert not calls
    other = make_trainer(tmp_path / "other", family, even_cache, **options, attention_backend="_native_math")
    assert backends_of(other.model) == ({AttentionBackendName._NATIVE_MATH}, AttentionBackendName.NATIVE)
    other.train()
    assert len(calls) > 2 * 4 and backends_of(plain.model)[0] == {None}
    np.testing.assert_allclose(losses(other), losses(plain), rtol=1e-5)
    shutil.copytree(tmp_path / "other" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    again = make_trainer(tmp_path / "again", family, even_cache, **options, resume_from_checkpoint="latest")
    calls.clear()
    again.train()
    np.testing.assert_allclose(losses(again)[-2:], losses(plain)[-2:], rtol=1e-5)
    base = [[e["eval_base_loss"] for e in run.state.log_history if "eval_base_loss" in e] for run in (plain, again)]
    assert base[0][-1] == base[1][-1] and not calls, "by torch's own kernel, as in the plain run"


@pytest.mark.parametrize(
    ("backend", "told"),
    [
        ("sage", r"'sage' cannot run here: Sage Attention backend 'sage' is not usable"),
        ("_native_cudnn", r"'_native_cudnn' cannot run on cpu in float32: No viable backend"),
        ("flex", r"'flex' cannot run on cpu in float32: FlexAttention does not support backward on CPU"),
        ("flash_hub", r"'flash_hub' runs compiled code .* from the Hub: add `--trust_remote_code`"),
    ],
)
def test_what_cannot_run_here_is_refused(klein, tmp_path, backend, told):
    with pytest.raises(sf.SciflowError, match=rf"`attention_backend` {told}"):
        use(klein, tmp_path, backend)
    assert backends_of(klein) == ({None}, AttentionBackendName.NATIVE), "as before"


@pytest.mark.parametrize(
    ("kernel", "told"),
    [
        (lambda query, key, value: value.detach(), "has no backward pass on cpu in float32: element 0"),
        (lambda query, key, value: value * 2, "has no backward pass on cpu in float32. Choose another one"),
    ],
)
def test_a_kernel_without_a_backward_pass_is_refused(klein, tmp_path, monkeypatch, kernel, told):
    """One that gives no gradient at all, and one that gives none to queries and keys; both would train nothing."""
    name = AttentionBackendName._NATIVE_MATH
    monkeypatch.setitem(_AttentionBackendRegistry._backends, name, kernel)
    monkeypatch.setitem(_AttentionBackendRegistry._supported_arg_names, name, {"query", "key", "value"})
    with pytest.raises(sf.SciflowError, match=f"`attention_backend` '_native_math' {told}"):
        use(klein, tmp_path, "_native_math")
    assert backends_of(klein) == ({None}, AttentionBackendName.NATIVE)


def test_names_and_networks(tmp_path):
    with pytest.raises(sf.SciflowError, match="`attention_backend` 'fast': use one of flash, flash_hub, "):
        make_args(tmp_path, attention_backend="fast")
    small = dict(num_layers=1, num_attention_heads=2, attention_head_dim=8, caption_projection_dim=16, sample_size=8)
    for network in (SD3Transformer2DModel(**small), make_network()):
        with pytest.raises(sf.SciflowError, match=f"{type(network).__name__} computes attention by torch, not by"):
            use(network, tmp_path, "native")


def test_padded_texts_need_a_kernel_with_a_mask(tmp_path, tiny_pipelines):
    path = tiny_pipelines["qwen_image"]
    network = sf.QwenImage(pretrained_model_name_or_path=str(path)).load_model(dtype=torch.float32)
    use(network, tmp_path, "_native_flash")
    with pytest.raises(sf.SciflowError, match=r"with a mask \(texts of different lengths need one: .*not supported"):
        use(network, tmp_path, "_native_flash", masked=True)
    use(network, tmp_path, "_native_math", masked=True)
    assert backends_of(network) == ({AttentionBackendName._NATIVE_MATH}, AttentionBackendName.NATIVE)
