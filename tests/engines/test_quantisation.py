"""`--quantize_base`: networks packed in 8 and 4 bits, trained with adapters on top, against their unpacked twins."""

import importlib.util
import json
import shutil
from types import MethodType

import pytest
import torch
from caches import encoder_settings, write_cache
from peft.utils.integrations import dequantize_module_weight
from plans import UNIT, sizes
from recipe_runs import run
from safetensors.torch import load_file
from trainings import same, trained

import sciflow_hf as sf
from sciflow_hf.adapters.files import WEIGHT_NAME
from sciflow_hf.adapters.layers import adapter_disabled, adapter_parameters
from sciflow_hf.engines.quantisation import QUANTIZATIONS, keep_from_broadcast, saved_bytes
from sciflow_hf.families.base import network_dtype

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

KINDS = list(QUANTIZATIONS)
ERROR = {"int8": 0.01, "torchao_int8": 0.01, "torchao_fp8": 0.03, "nf4": 0.11}
"""Relative error of a weight matrix: rounding to 254 steps, to 3 bits after the point, to 16 levels."""


@pytest.fixture(scope="session")
def wide_klein(tmp_path_factory, tiny_klein):
    """The tiny klein, twice as wide: rows of 64 weights and more in all layers but the first two."""
    from diffusers import Flux2Transformer2DModel

    folder = shutil.copytree(tiny_klein, tmp_path_factory.mktemp("wide") / "klein")
    small = Flux2Transformer2DModel.from_pretrained(folder, subfolder="transformer")
    config = {k: v for k, v in small.config.items() if not k.startswith("_")}
    generator = torch.Generator().manual_seed(0)
    network = Flux2Transformer2DModel(**config | {"num_attention_heads": 2 * config["num_attention_heads"]})
    for parameter in network.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.6 / parameter.shape[1] ** 0.5, generator=generator)
    network.save_pretrained(folder / "transformer")
    return folder


@pytest.fixture(scope="session")
def family(wide_klein):
    return sf.Flux2Klein(pretrained_model_name_or_path=str(wide_klein), max_sequence_length=12)


@pytest.fixture(scope="session")
def cache(tmp_path_factory, wide_klein):
    folder = tmp_path_factory.mktemp("wide_cache")
    buckets = {(32, 48): 8, (48, 32): 8}
    return write_cache(folder, settings=encoder_settings(wide_klein), buckets=buckets)


def linear(network):
    """Linear layers of the base by path, without and with an adapter around them."""
    found = {n.removesuffix(".base_layer"): m for n, m in network.named_modules() if isinstance(m, torch.nn.Linear)}
    return {n: m for n, m in found.items() if "lora_" not in n}


def unpacked(layer):
    if type(layer.weight).__module__.startswith("torchao"):
        return layer.weight.dequantize()
    return dequantize_module_weight(layer)


def with_adapter(family, model, adapter_type="lora"):
    sf.add_adapter(model, sf.AdapterArguments(adapter_type=adapter_type, rank=4, lora_alpha=8), family=family, seed=1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model.train()


def batch():
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "latents": torch.randn(2, 4, 8, 12, generator=generator),
        "prompt_embeds": torch.randn(2, 12, 48, generator=generator),
    }
    return inputs, {"noise": torch.randn(2, 16, 4, 6, generator=generator), "levels": torch.tensor([0.3, 0.8])}


def quantised_args(folder, kind, **options):
    defaults = dict(
        output_dir=str(folder), use_cpu=True, max_steps=4, save_strategy="no", logging_steps=1, disable_tqdm=True,
        per_device_train_batch_size=2, per_device_eval_batch_size=4, learning_rate=1e-2, seed=3, report_to="none",
        quantize_base=kind, activation_checkpointing=True, eval_levels=1,
    )  # fmt: skip
    return sf.DiffusionTrainingArguments(**(defaults | options))


def quantised_trainer(folder, family, cache, kind, *, eval_fraction=0.3, adapter_type="lora", **options):
    args = quantised_args(folder, kind, **options)
    model = family.load_model(dtype=args.load_dtype(trained=False), quantize=args.quantize_base)
    with_adapter(family, model, adapter_type)
    train, held_out = sf.load_cache(cache, dtype=torch.float32).split(eval_fraction)
    return sf.DiffusionTrainer(model, args, family=family, train_dataset=train, eval_dataset=held_out)


# -- the network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_packed_and_how_far_it_is_off(family, kind):
    """Every matrix of a linear layer, the last one too; nf4 leaves the rows that are no multiple of 64."""
    full = linear(family.load_model(dtype=torch.bfloat16))
    network = family.load_model(dtype=torch.bfloat16, quantize=kind)
    packed = {n: m for n, m in linear(network).items() if type(m.weight) is not torch.nn.Parameter}
    narrow = {"x_embedder", "context_embedder"} if kind == "nf4" else set()
    assert packed.keys() == full.keys() - narrow and "proj_out" in packed and len(packed) > 20
    for name, layer in packed.items():
        weight = full[name].weight.float()
        error = (unpacked(layer).float() - weight).norm() / weight.norm()
        assert 0 < error < ERROR[kind], name
    rest = {n: p for n, p in network.named_parameters() if n.removesuffix(".weight") not in packed}
    assert {p.dtype for p in rest.values()} == {torch.bfloat16} and len(rest) >= 8  # norms
    assert network_dtype(network) == torch.bfloat16
    with_adapter(family, network)
    assert network_dtype(network) == torch.bfloat16 and {p.dtype for p in adapter_parameters(network).values()} == {
        torch.float32
    }


@pytest.mark.parametrize("adapter_type", ["lora", "dora"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_the_unpacked_weights(tmp_path, family, kind, adapter_type):
    """An ordinary network given the same rounded weights has the same loss and the same gradient in every tensor."""
    if (kind, adapter_type) == ("int8", "dora"):
        with pytest.raises(sf.SciflowError, match="`adapter_type` 'dora' cannot read the 8-bit weights"):
            with_adapter(family, family.load_model(dtype=torch.float32, quantize=kind), adapter_type)
        return
    network, twin = (family.load_model(dtype=torch.float32, quantize=k) for k in (kind, None))
    for name, layer in linear(network).items():
        linear(twin)[name].weight.data.copy_(unpacked(layer))
    full = family.load_model(dtype=torch.float32)
    models = [with_adapter(family, model, adapter_type) for model in (network, twin, full)]
    args, (inputs, fixed) = quantised_args(tmp_path, None), batch()

    def step(model):
        return lambda: family.compute_loss(model, inputs, args, **fixed)[0]

    gradients = []
    for model in models:
        loss = step(model)()
        loss.mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad} | {"": loss.detach()})
    ours, exact, original = gradients
    assert len(ours) > 30 and {g.dtype for g in ours.values()} == {torch.float32}
    for name, value in exact.items():
        assert torch.isfinite(ours[name]).all() and ours[name].abs().max() > 0, name
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()), msg=name)
    torch.testing.assert_close(ours[""], original[""], rtol=3 * ERROR[kind], atol=0)  # near the full one
    assert not torch.equal(ours[""], original[""])


def stored_bytes(tensor):
    """Of torchao's wrappers that of the tensors inside, by torch's protocol for them."""
    if not isinstance(getattr(tensor, "__tensor_flatten__", None), MethodType):
        return tensor.nbytes
    return sum(stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


@pytest.mark.parametrize("kind", KINDS)
def test_estimate_of_the_bytes(family, kind):
    full = family.load_model(dtype=torch.bfloat16, meta=True, quantize=kind)
    assert all(p.is_meta for p in full.parameters())
    full.requires_grad_(False)
    estimate = sum(p.numel() * p.element_size() for p in full.parameters()) - saved_bytes(full, kind)
    network, real = family.load_model(dtype=torch.bfloat16, quantize=kind), 0
    for parameter in network.parameters():
        real += stored_bytes(parameter)
    for layer in linear(network).values():
        if kind == "int8":
            real += layer.weight.SCB.nbytes
        elif kind == "nf4" and type(layer.weight) is not torch.nn.Parameter:
            state = layer.weight.quant_state
            real += state.absmax.nbytes + state.state2.absmax.nbytes
    assert estimate == pytest.approx(real, rel=0.03) and real < 0.65 * sum(p.nbytes for p in full.parameters())


# -- in a training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_exact(tmp_path, family, cache, kind):
    """With evaluations, which on a CPU would repack nf4, and accumulation."""
    options = dict(
        save_strategy="steps", save_steps=2, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=1,
        bf16=kind == "nf4",
    )  # fmt: skip
    whole = quantised_trainer(tmp_path / "whole", family, cache, kind, **options)
    before = {n: unpacked(m).clone() for n, m in linear(whole.model).items()}
    start = trained(whole)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    again = quantised_trainer(tmp_path / "again", family, cache, kind, resume_from_checkpoint="latest", **options)
    again.train()
    assert same(trained(whole), trained(again)) and not same(trained(whole), start)
    assert {v.dtype for v in start.values()} == {torch.float32} and start.keys() == set(adapter_parameters(whole.model))
    assert same({n: unpacked(m) for n, m in linear(whole.model).items()}, before)  # the base, bit for bit
    saved = load_file(tmp_path / "whole" / "checkpoint-4" / WEIGHT_NAME)
    assert all("lora_" in name for name in saved) and {v.dtype for v in saved.values()} == {torch.float32}
    assert json.loads((tmp_path / "whole" / "checkpoint-4" / "run.json").read_text())["quantize_base"] == kind


def test_another_base_is_another_run(tmp_path, family, cache):
    options = dict(save_strategy="steps", save_steps=2, max_steps=2)
    quantised_trainer(tmp_path, family, cache, "nf4", **options).train()
    with pytest.raises(sf.SciflowError, match="another run: quantize_base: 'nf4' then, None now"):
        quantised_trainer(tmp_path, family, cache, None, resume_from_checkpoint="latest", **options).train()


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_drawn_with_the_packed_network(tmp_path, family, cache, kind, caplog):
    trainer = quantised_trainer(
        tmp_path, family, cache, kind, max_steps=1, validation_prompts=["A chart."], validation_size=[32, 48],
        num_inference_steps=2,
    )  # fmt: skip
    trainer.train()
    assert len(list((tmp_path / "validation").glob("step-*/p00_seed0.png"))) == 2
    metrics = trainer.evaluate()
    with adapter_disabled(trainer.model):
        assert trainer.evaluate()["eval_loss"] == pytest.approx(metrics["eval_base_loss"], rel=1e-6)
    assert metrics["eval_loss"] != metrics["eval_base_loss"]
    assert "will be cast" not in caplog.text  # bitsandbytes would say so once a layer and step


def test_trained_on_nf4_loads_into_the_stock_pipeline(tmp_path, family, cache):
    """On the full network and on the packed one; and `--adapter_path` takes it again, bit for bit."""
    from diffusers import Flux2KleinPipeline

    trainer = quantised_trainer(tmp_path, family, cache, "nf4")
    trainer.train()
    trainer.save_model()
    args, (inputs, fixed) = quantised_args(tmp_path, None), batch()
    loss = {}
    for kind in (None, "nf4"):
        pipeline = Flux2KleinPipeline.from_pretrained(
            family.pretrained_model_name_or_path,
            transformer=family.load_model(dtype=torch.float32, quantize=kind),
            text_encoder=None,
            tokenizer=None,
        )
        without = family.compute_loss(pipeline.transformer.eval(), inputs, args, **fixed)[0]
        pipeline.load_lora_weights(tmp_path)
        loss[kind] = family.compute_loss(pipeline.transformer.eval(), inputs, args, **fixed)[0]
        assert (loss[kind] - without).abs().min() > 0.01
    trained_loss = family.compute_loss(trainer.model.eval(), inputs, args, **fixed)[0]
    torch.testing.assert_close(loss["nf4"], trained_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(loss[None], trained_loss, rtol=ERROR["nf4"], atol=0)
    model = family.load_model(dtype=torch.float32, quantize="nf4")
    sf.add_adapter(model, sf.AdapterArguments(adapter_path=str(tmp_path)), family=family)
    assert same({n: p for n, p in model.named_parameters() if p.requires_grad}, trained(trainer))


@pytest.mark.parametrize("kind", KINDS)
def test_several_ranks_can_begin(family, kind):
    """torchao's tensors cannot be sent from rank to rank, which DistributedDataParallel begins with."""
    model = with_adapter(family, family.load_model(dtype=torch.bfloat16, quantize=kind))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        if kind.startswith("torchao"):
            with pytest.raises((RuntimeError, AssertionError, NotImplementedError)):
                torch.nn.parallel.DistributedDataParallel(model)
        keep_from_broadcast(model)
        torch.nn.parallel.DistributedDataParallel(model)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.acceptance
def test_two_ranks_equal_one(tmp_path, wide_klein, cache):
    found = []
    for ranks in (1, 2):
        options = dict(
            pretrained_model_name_or_path=wide_klein, max_sequence_length=12, dataset_dir=cache, eval_fraction=0,
            rank=4, learning_rate=1e-2, max_steps=2, logging_steps=1, save_strategy="no", use_cpu=True, seed=3,
            disable_tqdm=True, quantize_base="torchao_int8", output_dir=tmp_path / str(ranks), optim="sgd",
            per_device_train_batch_size=4 // ranks, activation_checkpointing=True,
        )  # fmt: skip
        run(*(word for name, value in options.items() for word in (f"--{name}", value)), ranks=ranks)
        found.append(load_file(tmp_path / str(ranks) / WEIGHT_NAME))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=1e-5)


# -- what cannot work ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("int4", {}, "`quantize_base` 'int4': use one of int8, nf4, torchao_int8, torchao_fp8"),
        ("torchao_fp8", {"activation_checkpointing": False}, "`quantize_base` 'torchao_fp8' saves nothing without"),
        ("nf4", {"torch_compile": True}, "`quantize_base` 'nf4' cannot work with `torch_compile` True"),
        ("nf4", {"offload": True}, "`offload` cannot work with `quantize_base` 'nf4'"),
    ],
)
def test_options_that_cannot_work(tmp_path, kind, options, words):
    with pytest.raises(sf.SciflowError, match=words):
        quantised_args(tmp_path, kind, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_without_its_package_or_device(tmp_path, family, monkeypatch, kind):
    from accelerate import PartialState

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == QUANTIZATIONS[kind] else find(n, *a))
    words = f"`quantize_base` '{kind}' needs {QUANTIZATIONS[kind]}: `pip install {QUANTIZATIONS[kind]}`"
    with pytest.raises(sf.SciflowError, match=words):
        quantised_args(tmp_path, kind)
    with pytest.raises(sf.SciflowError, match=words):
        family.load_model(dtype=torch.float32, quantize=kind)
    monkeypatch.undo()
    monkeypatch.setitem(PartialState._shared_state, "device", torch.device("mps"))
    with pytest.raises(sf.SciflowError, match=f"`quantize_base` '{kind}' cannot work on 'mps'"):
        family.load_model(dtype=torch.float32, quantize=kind)


def test_a_base_that_is_trained_or_was_not_packed(tmp_path, family, cache):
    with pytest.raises(sf.SciflowError, match=r"`quantize_base` is for frozen networks.*`no_adapter`"):
        quantised_args(tmp_path, "nf4").load_dtype(trained=True)
    args = quantised_args(tmp_path, "nf4")
    model = with_adapter(family, family.load_model(dtype=torch.float32))
    with pytest.raises(sf.SciflowError, match="`quantize_base` 'nf4', but the network was not loaded so"):
        sf.DiffusionTrainer(model, args, family=family, train_dataset=sf.load_cache(cache, dtype=torch.float32))


def test_the_gpu_check_of_diffusers_is_back_afterwards(family):
    from diffusers import BitsAndBytesConfig

    family.load_model(dtype=torch.float32, quantize="nf4")
    with pytest.raises(RuntimeError, match="No GPU found"):
        family.network_class().from_pretrained(
            family.pretrained_model_name_or_path,
            subfolder="transformer",
            quantization_config=BitsAndBytesConfig(load_in_4bit=True),
        )


def test_dry_run_says_how_much(tmp_path, family, cache):
    plans = []
    for kind in (None, "nf4"):
        args = quantised_args(tmp_path, kind)
        model = family.load_model(dtype=torch.bfloat16, meta=True, quantize=kind)
        sf.add_adapter(model, sf.AdapterArguments(rank=4), family=family)
        data = sf.load_cache(cache, dtype=torch.float32)
        line = next(x for x in sf.plan(model, family, args, data).splitlines() if x.startswith("weights "))
        plans.append((sizes(line)[0], sum(p.numel() for p in model.parameters())))
    (full, parameters), (packed, _) = plans
    assert full == pytest.approx(2 * parameters, rel=0.1) and packed < 0.7 * full
    assert UNIT["MiB"] == 2**20
