"""`--dry_run` and `--debug_batch`: what they print against what training really does, on a tiny klein."""

import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from caches import TINY_BUCKETS, write_cache
from plans import UNIT, sizes
from trainings import make_args, make_trainer

import sciflow_hf as sf
from sciflow_hf.adapters.layers import adapter_layers, adapter_parameters
from sciflow_hf.data.batches.loader import collate
from sciflow_hf.diffusion.randomness import noise_keys
from sciflow_hf.errors import SciflowError
from sciflow_hf.report.plan import tokens_of
from sciflow_hf.report.work import data_text
from sciflow_hf.training.checkpoints import list_checkpoints

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def plan_of(tmp_path, family, cache, *, rank=4, no_adapter=False, eval_fraction=0.0, **options):
    """The sections of a plan by title, and what it was made of."""
    args = make_args(tmp_path, **options)
    data = sf.load_cache(cache, dtype=torch.float32)
    train, held_out = data.split(eval_fraction) if eval_fraction else (data, None)
    model = family.load_model(dtype=torch.float32, meta=True)
    sf.add_adapter(model, sf.AdapterArguments(rank=rank, no_adapter=no_adapter), family=family)
    text = sf.plan(model, family, args, train, held_out)
    sections = dict(re.findall(r"^(.+)\n-+\n((?:.+\n?)*)", text, flags=re.M))
    return sections, model, train, held_out


# -- the plan ------------------------------------------------------------------------------------------------


@pytest.mark.promise("B08")
def test_a_plan_has_every_part(tmp_path, family, tiny_cache):
    sections, model, train, held_out = plan_of(
        tmp_path, family, tiny_cache, eval_fraction=0.3, learning_rate=3e-3, weighting_scheme="cosmap", seed=11
    )
    titles = ["Family", "Options that differ from the defaults", "Trained", "Buckets of an epoch", "Steps"]
    estimated = ["Memory and disk, estimated", "Time, estimated", "Activation checkpointing by share, estimated"]
    assert list(sections) == [*titles, *estimated]
    assert family.pretrained_model_name_or_path in sections["Family"]
    options = dict(line.split(": ", 1) for line in sections[titles[1]].splitlines())
    assert options["learning_rate"] == "0.003" and options["weighting_scheme"] == "cosmap" and options["seed"] == "11"
    assert "loss_type" not in options and "output_dir" not in options
    lines = sections["Trained"].splitlines()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert lines[0] == f"lora rank 4 alpha 4 on {len(adapter_layers(model))} layers, {trained:,} parameters in float32:"
    patterns = [re.sub(r"\\\*", r"\\d+", re.escape(line.strip())) for line in lines[1:]]
    for name in adapter_layers(model):
        assert sum(bool(re.fullmatch(pattern, name)) for pattern in patterns) == 1
    assert f"{len(train)} samples to train on, {len(held_out)} held out" in sections["Steps"]


def test_the_bucket_table_counts_the_data(tmp_path, family, tiny_cache):
    sections, _, train, _ = plan_of(tmp_path, family, tiny_cache, per_device_train_batch_size=4)
    *lines, tokens = sections["Buckets of an epoch"].splitlines()
    assert {height // 8 * (width // 8) for height, width in TINY_BUCKETS} == {24}
    assert tokens == "24 tokens an image, the same in all buckets"
    rows = [re.split(r"\s{2,}", line) for line in lines]
    assert rows[0] == ["bucket", "samples", "batches", "repeats", "dropped"]
    counted = Counter(train.batch_keys)
    assert len(rows) == len(counted) + 2 == len(TINY_BUCKETS) + 2
    for label, samples, batches, repeats, dropped in rows[1:-1]:
        key = tuple(int(x) for x in label.split(" x "))
        assert int(samples) == counted[key] == TINY_BUCKETS[key[:2]] and int(dropped) == 0
        assert int(batches) == -(-counted[key] // 4) and int(repeats) == 4 * int(batches) - int(samples)
    assert rows[-1][0] == "total" and int(rows[-1][1]) == len(train) == 24


@pytest.mark.promise("B12", "D14", "E10")
@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 2},
        {"max_steps": -1, "num_train_epochs": 1.5, "per_device_train_batch_size": 4},
        {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 5},  # a short last step
        {"max_steps": 3, "dataloader_drop_last": True, "gradient_accumulation_steps": 3},
    ],
)
def test_steps_are_those_of_training(tmp_path, family, tiny_cache, options):
    sections, *_ = plan_of(tmp_path, family, tiny_cache, **options)
    total, an_epoch, batch = (
        int(n) for n in re.match(r"(\d+) steps \((\d+) an epoch\), (\d+) samples a step", sections["Steps"]).groups()
    )
    trainer = make_trainer(tmp_path, family, tiny_cache, **options)
    trainer.train()
    assert trainer.state.global_step == total
    assert trainer.state.epoch == pytest.approx(total / an_epoch, abs=0.51 / an_epoch)
    assert trainer.get_total_train_batch_size(trainer.args) == batch
    whole = make_trainer(tmp_path, family, tiny_cache, **(options | {"max_steps": -1, "num_train_epochs": 1}))
    whole.train()
    assert whole.state.global_step == an_epoch


@pytest.mark.parametrize(
    ("options", "saves"),
    [
        ({"max_steps": 6, "save_strategy": "steps", "save_steps": 2}, 3),
        ({"max_steps": 7, "save_strategy": "steps", "save_steps": 3}, 3),  # 3, 6 and the last
        ({"max_steps": 5, "save_strategy": "steps", "save_steps": 0.3}, 3),  # every 2
        ({"max_steps": -1, "num_train_epochs": 2, "save_strategy": "epoch"}, 2),
        ({"max_steps": 4, "save_strategy": "no"}, 0),
        ({"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}, 2),
    ],
)
def test_disk_is_what_checkpoints_take(tmp_path, family, tiny_cache, options, saves):
    """Their number by training; their size to a tenth, with an adapter big enough for headers not to matter."""
    sections, *_ = plan_of(tmp_path, family, tiny_cache, rank=32, **options)
    line = sections["Memory and disk, estimated"].splitlines()[1]
    trainer = make_trainer(tmp_path, family, tiny_cache, rank=32, **options)
    trainer.train()
    found = list_checkpoints(tmp_path)
    assert len(found) == saves
    at_once = saves + ("save_total_limit" in options)  # an old one goes when the new one is whole
    assert line.startswith(f"at most {at_once} checkpoints of ")
    one, together = sizes(line)
    assert together == pytest.approx(at_once * one, abs=0.1 * UNIT["MiB"] * (1 + at_once))
    for folder in found:
        real = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        assert one == pytest.approx(real, rel=0.12)


@pytest.mark.parametrize(("optim", "states"), [("adamw_torch", 2), ("prodigy", 4)])
def test_memory_counts_weights_gradients_and_states(tmp_path, family, tiny_cache, optim, states):
    options = dict(optim=optim, learning_rate=None, max_steps=1, no_adapter=True)
    sections, model, *_ = plan_of(tmp_path, family, tiny_cache, **options)
    weights, optimizer, activations, together, *_ = sizes(sections["Memory and disk, estimated"])
    trainer = make_trainer(tmp_path, family, tiny_cache, **options)
    trainer.train()
    real = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    assert weights == pytest.approx(real, abs=0.06 * UNIT["MiB"])
    trained = {id(p): p for group in trainer.optimizer.param_groups for p in group["params"]}
    kept = sum(p.numel() for p in trained.values()) * 4  # gradients
    for state in trainer.optimizer.state.values():
        kept += sum(v.numel() * v.element_size() for v in state.values() if torch.is_tensor(v) and v.numel() > 1)
    assert optimizer == pytest.approx(kept, rel=0.05)
    assert kept / (sum(p.numel() for p in trained.values()) * 4) == pytest.approx(1 + states, rel=0.01)
    assert together == pytest.approx(weights + optimizer + activations, abs=0.2 * UNIT["MiB"])
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in trainer.model.parameters())


def test_activation_checkpointing_and_batch_size_change_the_estimate(tmp_path, family, tiny_cache):
    def activations(**options):
        return sizes(plan_of(tmp_path, family, tiny_cache, **options)[0]["Memory and disk, estimated"])[2]

    plain = activations(per_device_train_batch_size=64)
    assert activations(per_device_train_batch_size=128) == pytest.approx(2 * plain, rel=0.02)
    assert activations(per_device_train_batch_size=64, activation_checkpointing=True) < 0.5 * plain


def test_options_that_fit_a_given_size_are_listed(tmp_path, family, tiny_cache):
    """The first is the plan's own estimate where that fits; without a size, on a CPU, there is no list."""
    title = "Options that fit into 1 GB, of which 90% are counted on"
    options = dict(per_device_train_batch_size=64)
    sections, *_ = plan_of(tmp_path, family, tiny_cache, memory_gb=1, **options)
    lines = sections[title].splitlines()
    assert lines[0].startswith("1. as it is: about ") and lines[1].startswith("2. --")
    assert sizes(lines[0])[0] == sizes(sections["Memory and disk, estimated"])[3]
    assert [sizes(line)[0] for line in lines] == sorted((sizes(line)[0] for line in lines), reverse=True)
    none, *_ = plan_of(tmp_path, family, tiny_cache, memory_gb=1e-5, **options)
    assert re.search(
        r"^none; --.* takes least, about ", none["Options that fit into 1e-05 GB, of which 90% are counted on"]
    )


def test_text_that_is_encoded_in_training_counts(family):
    data = SimpleNamespace(batch_keys=[(32, 64, 7), (32, 64), (64, 64)])
    assert tokens_of(data, family) == {"tokens": 64 + 12, "image_tokens": 64}


def test_a_plan_of_the_whole_network(tmp_path, family, tiny_cache):
    sections, *_ = plan_of(tmp_path, family, tiny_cache, no_adapter=True)
    count = sum(p.numel() for p in family.load_model(dtype=torch.float32).parameters())
    assert sections["Trained"].strip() == f"the complete network, {count:,} parameters"


# -- one batch -----------------------------------------------------------------------------------------------


@pytest.fixture
def trainer(tmp_path, family, tiny_cache):
    trainer = make_trainer(tmp_path, family, tiny_cache)
    rng = torch.Generator().manual_seed(4)
    for name, parameter in adapter_parameters(trainer.model).items():
        if "lora_B" in name:  # zero at the start, and A's gradient with it
            parameter.data = torch.randn(parameter.shape, generator=rng) * 0.1
    return trainer


@pytest.mark.promise("A39")
def test_one_batch_is_printed_with_its_ids(trainer):
    text = sf.debug_batch(trainer)
    rows = trainer.get_train_dataloader().sampler.batches()[0]
    height, width, length = trainer.train_dataset.batch_keys[rows[0]]
    assert f"  latents: (2, 4, {height // 4}, {width // 4}) torch.float32" in text
    assert f"  prompt_embeds: (2, {length}, 48) torch.float32" in text
    assert f"  hidden_states: (2, {height // 8 * (width // 8)}, 16) torch.float32" in text
    assert "  img_ids, first three: [[0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 2, 0]]" in text
    assert "  txt_ids, first three: [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 2]]" in text


@pytest.mark.promise("A39")
def test_gradient_norms_are_autograds(trainer):
    """Of the first batch of training, collated by hand."""
    text = sf.debug_batch(trainer, largest=10_000)
    printed = {name: float(value) for value, name in re.findall(r"^  (\d\.\d{3}e[+-]\d+)  (\S+)$", text, flags=re.M)}
    rows = trainer.get_train_dataloader().sampler.batches()[0]
    batch = collate([trainer.train_dataset[row] for row in rows]) | {"noise_key": noise_keys(3, 0, range(len(rows)))}
    model = trainer.model.train()
    loss, levels = trainer.family.compute_loss(model, batch, trainer.args)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss.mean(), list(trained.values()), allow_unused=True)
    expected = {n: float(g.norm()) for n, g in zip(trained, gradients, strict=True) if g is not None}
    assert printed.keys() == expected.keys() and len(expected) > 20
    for name, value in expected.items():
        assert printed[name] == pytest.approx(value, rel=1e-3, abs=1e-12)
    without = len(trained) - len(expected)
    assert f"{len(expected)} trained parameters" in text and f"{without} without a gradient" in text
    order = [float(value) for value in re.findall(r"^  (\d\.\d{3}e[+-]\d+)  \S+$", text, flags=re.M)]
    assert order == sorted(order, reverse=True)
    assert f"Loss per sample: {[round(float(x), 5) for x in loss.detach()]}" in text
    assert f"Noise levels: {[round(float(x), 4) for x in levels]}" in text
    short = sf.debug_batch(trainer, largest=3)
    assert short.count("e-0") + short.count("e+0") <= 5 and f"and {len(expected) - 3} smaller ones" in short


def test_it_leaves_everything_as_it_was(trainer):
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = sf.debug_batch(trainer)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(p, weights[name]) for name, p in trainer.model.named_parameters())
    assert all(p.grad is None for p in trainer.model.parameters())
    assert not trainer.model._forward_pre_hooks and trainer.state.global_step == 0
    assert sf.debug_batch(trainer) == first


def test_it_computes_in_the_dtype_of_training(tmp_path, family, tiny_cache):
    """`--bf16` without adapter: float32 weights under autocast, as in a training step."""
    trainer = make_trainer(tmp_path, family, tiny_cache, no_adapter=True, bf16=True)
    text = sf.debug_batch(trainer, largest=10_000)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = trainer.family.compute_loss(trainer.model, batch, trainer.args)
    assert f"Loss per sample: {[round(float(x), 5) for x in loss.detach()]}" in text
    plain, _ = trainer.family.compute_loss(trainer.model, batch, trainer.args)
    assert f"Loss per sample: {[round(float(x), 5) for x in plain.detach()]}" not in text


# -- time and bytes ------------------------------------------------------------------------------------------


def counted_flops(family, sample):
    """Of a forward pass with real weights: two for each weight and row of every linear layer, and the attention."""
    network, found = family.load_model(dtype=torch.float32), []
    for layer in (module for module in network.modules() if isinstance(module, torch.nn.Linear)):
        layer.register_forward_hook(lambda m, args, out: found.append(2 * out.numel() * m.in_features))
    batch = {name: value[None] for name, value in sample.items()}
    latents = family.clean_latents(batch)
    with torch.no_grad():
        family.predict(network, batch, latents, torch.zeros(1))
    tokens = latents[0, 0].numel() + len(sample["prompt_embeds"])
    config = network.config
    width, blocks = config.num_attention_heads * config.attention_head_dim, config.num_layers + config.num_single_layers
    return sum(found) + blocks * 4 * tokens**2 * width


def test_the_time_is_that_of_the_operations(tmp_path, family, tiny_cache):
    cache = sf.load_cache(tiny_cache, dtype=torch.float32)
    keys = cache.batch_keys
    forward = sum(counted_flops(family, cache[keys.index(key)]) * count for key, count in Counter(keys).items()) / 24
    for options, passes in (({}, 2), ({"no_adapter": True}, 3), ({"activation_checkpointing": True}, 3)):
        options |= {"gradient_accumulation_steps": 3, "device_tflops": 1e-4, "max_steps": 7}
        text = plan_of(tmp_path, family, tiny_cache, per_device_train_batch_size=2, **options)[0]["Time, estimated"]
        found = re.match(r"(\S+) TFLOP a step, 7 steps: about (\S+) hours on 1 device at 0\.0001 TFLOP/s each;", text)
        flops, hours = found.groups()
        assert float(flops) == pytest.approx(6 * passes * forward / 1e12, rel=6e-3)
        assert float(hours) == pytest.approx(7 * float(flops) / 1e-4 / 3600, rel=1e-2)
    assert "400 TFLOP/s each, which is assumed" in plan_of(tmp_path, family, tiny_cache)[0]["Time, estimated"]


def test_the_bytes_of_edits(family, edits_cache):
    cache = sf.load_cache(edits_cache)
    samples = [cache[i] for i in range(len(cache))]
    latents = 2 * sum(v.numel() for sample in samples for name, v in sample.items() if "latents" in name)
    text = data_text(family, family.load_model(dtype=torch.float32, meta=True), cache)
    assert text.startswith(f"data: latents {latents / 1024:.1f} KiB, text ")


def test_the_bytes_of_the_data(tmp_path, family, tiny_cache):
    cache = sf.load_cache(tiny_cache)
    text = plan_of(tmp_path, family, tiny_cache)[0]["Memory and disk, estimated"]
    latents = 2 * sum(cache[i]["latents"].numel() for i in range(24))
    embeds = 2 * sum(cache[i]["prompt_embeds"].numel() for i in range(24))
    assert f"data: latents {latents / 1024:.1f} KiB, text {embeds / 1024:.1f} KiB" in text
    cache.online_text = len  # not called
    stream = sf.load_cache(tiny_cache, streaming=True)
    network = family.load_model(dtype=torch.float32, meta=True)
    online = data_text(family, network, cache)
    assert f"encoded in training (stored, {24 * 2 * 12 * 48 / 1024:.1f} KiB)" in online
    assert re.fullmatch(r"data: latents \S+ KiB, text 27\.0 KiB", data_text(family, network, stream))


def test_a_plan_refuses_a_cache_that_does_not_fit(tmp_path, family):
    cache = write_cache(tmp_path / "wrong", latent_channels=8)
    with pytest.raises(SciflowError, match=r"`latents` \(8, .*`flux2_klein` takes \(4, h, w\)"):
        plan_of(tmp_path, family, cache)
