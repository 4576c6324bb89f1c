"""Options by memory: which fit, in what order; the estimate of klein 9B against autograd; `--auto_memory`."""

import json
import shutil

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from kept import kept_bytes
from peft import LoraConfig
from trainings import losses, make_args, same, trained

import sciflow_hf as sf
from sciflow_hf.engines import checkpointing, memory
from sciflow_hf.engines.memory import SHARES, USABLE, MemoryOptions, device_memory, estimate, fitting
from sciflow_hf.options import given_options
from sciflow_hf.report.plan import tokens_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

KLEIN_9B = dict(
    patch_size=1, in_channels=128, num_layers=8, num_single_layers=24, num_attention_heads=32, attention_head_dim=128,
    joint_attention_dim=12288, timestep_guidance_channels=256, mlp_ratio=3.0, axes_dims_rope=(32, 32, 32, 32),
    rope_theta=2000, guidance_embeds=False,
)  # fmt: skip
IMAGE, TEXT = 4096, 512  # tokens of 1024 x 1024 pixels


@pytest.fixture(scope="module")
def klein():
    """klein 9B without values, with a LoRA of rank 16."""
    with torch.device("meta"):
        network = Flux2Transformer2DModel(**KLEIN_9B).to(torch.bfloat16).requires_grad_(False)
        network.add_adapter(LoraConfig(r=16, target_modules=["to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj"]))
    return network.train()


def forward(network):
    on_meta = {"device": "meta", "dtype": torch.bfloat16}
    network(
        hidden_states=torch.empty(1, IMAGE, 128, **on_meta),
        encoder_hidden_states=torch.empty(1, TEXT, 12288, **on_meta),
        timestep=torch.empty(1, device="meta"),
        img_ids=torch.empty(1, IMAGE, 4, device="meta"),
        txt_ids=torch.empty(1, TEXT, 4, device="meta"),
    )


def options_of(args, **changes):
    return MemoryOptions.of(args)._replace(**changes)


def needed(network, args, **changes):
    options = options_of(args, **changes)
    return estimate(network, network, args, tokens=IMAGE + TEXT, image_tokens=IMAGE, options=options)


def ways_of(network, args, gigabytes, **given):
    """The flags that fit, in order."""
    sizes = {"memory": gigabytes * 1e9, "tokens": IMAGE + TEXT, "image_tokens": IMAGE}
    ways, *_ = fitting(network, network, args, **sizes, **given)
    return [way.options.flags(MemoryOptions.of(args)) for way in ways]


# -- the estimate ----------------------------------------------------------------------------------------------


def test_activations_of_klein_are_what_autograd_keeps(klein, tmp_path, monkeypatch):
    """To a fifth, of 28 GB; with checkpointing what comes into the blocks, and one of them more; by share as much less
    for each quarter of the blocks, to a quarter of itself.
    """
    args = make_args(tmp_path, bf16=True, per_device_train_batch_size=1)
    kept = kept_bytes(klein, lambda: forward(klein), monkeypatch)
    found = needed(klein, args)
    assert found.activations == pytest.approx(kept, rel=0.2) and kept > 25e9
    by_share = [kept]
    for share in SHARES[1:]:
        checkpointing.enable(klein, klein, share)
        by_share.append(kept_bytes(klein, lambda: forward(klein), monkeypatch))
    klein.disable_gradient_checkpointing()
    estimated = [needed(klein, args, activation_checkpointing_share=share).activations for share in SHARES]
    for more, less, predicted, then in zip(by_share, by_share[1:], estimated, estimated[1:], strict=False):
        assert predicted - then == pytest.approx(more - less, rel=0.25)
    few = by_share[-1]
    block = found.activations / 32
    assert needed(klein, args, activation_checkpointing=True).activations - block == pytest.approx(few, rel=0.1)
    assert needed(klein, args, per_device_train_batch_size=3).activations == 3 * found.activations
    assert found.weights == sum(p.nbytes for p in klein.parameters()) and found.host == 0
    trainable = sum(p.numel() for p in klein.parameters() if p.requires_grad)
    assert found.optimizer == trainable * (4 + 8) and found.total == sum(found)  # float32 gradients, Adam's moments


# -- the choice ------------------------------------------------------------------------------------------------

CHECKPOINTED, ONE = "--activation_checkpointing", "--per_device_train_batch_size 1 --gradient_accumulation_steps 2"


@pytest.mark.promise("C36")
@pytest.mark.parametrize(
    ("gigabytes", "first"),
    [
        (140, "as it is"),
        (80, ONE),
        (48, f"{ONE} --activation_checkpointing_share 0.281"),  # 9 of 32 blocks
        (32, f"{ONE} --activation_checkpointing_share 0.719"),
        (24, f"{ONE} {CHECKPOINTED}"),
        (16, f"{CHECKPOINTED} --quantize_base int8"),
        (12, f"{CHECKPOINTED} --quantize_base nf4"),
        (8, f"{CHECKPOINTED} --offload"),
        (6, f"{ONE} {CHECKPOINTED} --offload"),
    ],
)
def test_the_cheapest_that_fits_is_first(klein, tmp_path, gigabytes, first):
    """klein 9B at 1024 px, two samples a step."""
    args = make_args(tmp_path, bf16=True, per_device_train_batch_size=2)
    ways, smallest, refused = fitting(
        klein, klein, args, memory=gigabytes * 1e9, tokens=IMAGE + TEXT, image_tokens=IMAGE
    )
    assert ways[0].options.flags(MemoryOptions.of(args)) == first and refused == []
    totals = [way.estimate.total for way in ways]
    assert totals == sorted(totals, reverse=True) and totals[0] <= USABLE * gigabytes * 1e9 and len(ways) <= 6
    for options, found in ways:
        assert found == needed(klein, args, **options._asdict())
        assert options.per_device_train_batch_size * options.gradient_accumulation_steps == 2
    assert smallest.estimate.total <= totals[-1]


def test_the_edge_is_the_estimate(klein, tmp_path):
    args = make_args(tmp_path, bf16=True, per_device_train_batch_size=1)
    plain = needed(klein, args).total / USABLE / 1e9
    assert ways_of(klein, args, plain * 1.0001)[0] == "as it is" != ways_of(klein, args, plain * 0.9999)[0]


def test_what_is_given_stays(klein, tmp_path):
    args = make_args(tmp_path, bf16=True, per_device_train_batch_size=2)
    assert ways_of(klein, args, 24, given={"activation_checkpointing"}) == []
    both = {"per_device_train_batch_size", "gradient_accumulation_steps"}
    assert ways_of(klein, args, 80, given=both)[:2] == ["--activation_checkpointing_share 0.188", CHECKPOINTED]
    assert ways_of(klein, args, 80, given=both - {"gradient_accumulation_steps"})[0] == ONE  # as many a step
    some, every = f"{ONE} --activation_checkpointing_share 0.75 --offload", f"{CHECKPOINTED} --offload"
    assert ways_of(klein, args, 16, given={"quantize_base"}) == [some, every]
    args.activation_checkpointing = True  # of a smaller card
    assert ways_of(klein, args, 140)[0] == "--activation_checkpointing False"
    for name in ("activation_checkpointing", "activation_checkpointing_share"):
        assert ways_of(klein, args, 140, given={name})[0] == "as it is"


def test_what_cannot_work_here_is_left_out_and_said(klein, tmp_path, monkeypatch):
    args = make_args(tmp_path, bf16=True, torch_compile=True)
    sizes = {"tokens": IMAGE + TEXT, "image_tokens": IMAGE}
    ways, _, refused = fitting(klein, klein, args, memory=80e9, **sizes)
    assert all(not way.options.offload and not way.options.quantize_base for way in ways) and len(ways) == 2
    assert [why.split(":")[0] for why in refused] == [
        "`quantize_base` 'int8' cannot work with `torch_compile` True",
        "`quantize_base` 'nf4' cannot work with `torch_compile` True",
        "`offload` cannot work with `torch_compile` True",
    ]
    klein.requires_grad_(True)  # all of it is trained: nothing to pack or to offload
    whole, _, refused = fitting(klein, klein, make_args(tmp_path), memory=1e15, **sizes)
    klein.requires_grad_(False)
    assert len(whole) == 2 and not refused


def test_the_smallest_card_counts(tmp_path, monkeypatch):
    args = make_args(tmp_path)
    assert device_memory(args) is None and device_memory(make_args(tmp_path, memory_gb=24)) == 24e9
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda device: (1, 80_000_000_000))
    monkeypatch.setattr(type(args), "device", torch.device("cuda", 0))
    seen = []
    monkeypatch.setattr(memory, "gather_object", lambda own: [seen.append(own), *own, 24_000_000_000][1:])
    assert device_memory(args) == 24e9 and seen == [[80_000_000_000]]


# -- what was given --------------------------------------------------------------------------------------------


def test_options_that_stand_on_the_command_line_or_in_the_yaml(tmp_path):
    (tmp_path / "base.yaml").write_text("activation_checkpointing: false\n")
    (tmp_path / "run.yaml").write_text("base: base.yaml\ngradient_accumulation_steps: 1\nrank: 8\n")
    words = [
        "--config",
        str(tmp_path / "run.yaml"),
        "--output_dir",
        "x",
        "--no_use_cache",
        "--per_device_train_batch_size=1",
    ]
    words.remove("--no_use_cache")
    adapter, args = sf.parse_args(sf.AdapterArguments, sf.DiffusionTrainingArguments, argv=[*words, "--no_ema_warmup"])
    named = {"activation_checkpointing", "gradient_accumulation_steps", "output_dir", "per_device_train_batch_size"}
    assert given_options(args) == named | {"ema_warmup"} and given_options(adapter) == {"rank"}
    assert {"seed", "memory_gb"} <= given_options(make_args(tmp_path, memory_gb=3.0))
    assert not set(MemoryOptions._fields) & given_options(make_args(tmp_path, per_device_train_batch_size=1))


# -- the run ---------------------------------------------------------------------------------------------------


def fitted_trainer(folder, family, cache, **options):
    """A trainer as a recipe makes it."""
    defaults = dict(auto_memory=True, per_device_train_batch_size=4, save_strategy="steps", save_steps=2, max_steps=4)
    args = make_args(folder, **(defaults | options))
    data, adapter = sf.load_cache(cache, dtype=torch.float32), sf.AdapterArguments(rank=4, lora_alpha=8)
    sf.fit_memory(args, family, data, adapter)
    model = family.load_model(dtype=args.load_dtype(trained=False), quantize=args.quantize_base)
    model = sf.add_adapter(model, adapter, family=family, seed=1)
    return sf.DiffusionTrainer(model, args, family=family, train_dataset=data)


def size_for(folder, family, cache, **changes):
    """Gigabytes of a device into which the tiny klein fits with these options by a hair."""
    args = make_args(folder, per_device_train_batch_size=4)
    model = sf.add_adapter(
        family.load_model(dtype=torch.float32, meta=True), sf.AdapterArguments(rank=4), family=family
    )
    sizes = tokens_of(sf.load_cache(cache), family)
    return 1.001e-9 / USABLE * estimate(model, model, args, options=options_of(args, **changes), **sizes).total


def test_a_run_is_fitted_and_resumed_as_it_was(tmp_path, family, even_cache, caplog):
    """The same bits as with the flags, and after a resume on a larger card."""
    half = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    size = size_for(tmp_path, family, even_cache, **half)
    with caplog.at_level("INFO", logger="sciflow_hf"):
        run = fitted_trainer(tmp_path / "run", family, even_cache, memory_gb=size)
    told = "`auto_memory`: --per_device_train_batch_size 2 --gradient_accumulation_steps 2, about "
    assert told in caplog.text and MemoryOptions.of(run.args)[:2] == (2, 2) and run.args.total_batch == 4
    assert caplog.text.count("Training lora rank 4") == 1
    run.train()
    by_flags = fitted_trainer(tmp_path / "flags", family, even_cache, auto_memory=False, **half)
    by_flags.train()
    assert same(trained(run), trained(by_flags)) and losses(run) == losses(by_flags)
    saved = json.loads((tmp_path / "run/checkpoint-2/run.json").read_text())["options"]
    assert saved["auto_memory"] is True and {name: saved[name] for name in half} == half

    shutil.copytree(tmp_path / "run/checkpoint-2", tmp_path / "again/checkpoint-2")
    caplog.clear()
    with caplog.at_level("INFO", logger="sciflow_hf"):
        again = fitted_trainer(tmp_path / "again", family, even_cache, memory_gb=1000, resume_from_checkpoint="latest")
        again.train()
    assert "gradient_accumulation_steps 2, as in checkpoint-2." in caplog.text and "Other options" not in caplog.text
    assert MemoryOptions.of(again.args) == MemoryOptions.of(run.args) and same(trained(run), trained(again))


def test_packed_and_checkpointed(tmp_path, family, even_cache):
    options = {"quantize_base": "int8", "activation_checkpointing": True}
    size = size_for(tmp_path, family, even_cache, **options)
    run = fitted_trainer(
        tmp_path / "run", family, even_cache, memory_gb=size, max_steps=2, gradient_accumulation_steps=2
    )
    assert run.model.is_quantized and run.args.activation_checkpointing and run.args.total_batch == 8
    run.train()
    args = make_args(
        tmp_path / "run", auto_memory=True, resume_from_checkpoint="latest", activation_checkpointing=False
    )
    args.given = {"activation_checkpointing"}
    sf.fit_memory(args, family, None)
    assert args.quantize_base == "int8" and args.activation_checkpointing is False and args.total_batch == 2


def test_what_auto_memory_says_where_it_can_do_nothing(tmp_path, family, even_cache, caplog):
    with caplog.at_level("INFO", logger="sciflow_hf"):
        plain = fitted_trainer(tmp_path, family, even_cache)
    assert "`auto_memory`: there is no GPU to fit into" in caplog.text and plain.args.per_device_train_batch_size == 4
    with pytest.raises(sf.SciflowError, match=r"`auto_memory`: nothing fits into 90% of 1e-05 GB; --.* takes least"):
        fitted_trainer(tmp_path, family, even_cache, memory_gb=1e-5)
    size = size_for(tmp_path, family, even_cache, activation_checkpointing=True)
    given = {"gradient_accumulation_steps": 2, "activation_checkpointing": False}
    args = make_args(tmp_path, auto_memory=True, per_device_train_batch_size=4, memory_gb=size, **given)
    args.given = {*given, "per_device_train_batch_size", "quantize_base"}
    with pytest.raises(sf.SciflowError, match=r"Given, and so kept: `activation_checkpointing`, .*fit: --") as found:
        sf.fit_memory(args, family, sf.load_cache(even_cache), sf.AdapterArguments(rank=4))
    assert "This would fit: --per_device_train_batch_size" in str(found.value)
    with pytest.raises(sf.SciflowError, match=r"`auto_memory`: a stream of your own"):
        sf.fit_memory(make_args(tmp_path, auto_memory=True, memory_gb=1), family, (row for row in []))
    with pytest.raises(sf.SciflowError, match=r"call `sciflow_hf.fit_memory"):
        sf.DiffusionTrainer(plain.model, make_args(tmp_path, auto_memory=True), family=family)
