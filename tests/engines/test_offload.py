"""`--offload`: the same numbers with the blocks on the host, and how many of their weights are copied at a time."""

import shutil
import weakref

import pytest
import torch
from family_steps import edited
from plans import sizes
from recipe_runs import run
from safetensors.torch import load_file
from trainings import make_args, make_trainer, same, trained

import sciflow_hf as sf
from sciflow_hf.adapters.files import WEIGHT_NAME
from sciflow_hf.engines import offload
from sciflow_hf.engines.offload import held_bytes, offload_blocks
from sciflow_hf.families.base import network_dtype

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

TYPES = {name: {"rank": 4} for name in ("lora", "dora", "lokr", "loha")} | {"oft": {"oft_block_size": 8}}


def make_model(family, adapter_type="lora", *, checkpointing=True, dtype=torch.float32):
    model = family.load_model(dtype=dtype)
    options = {"adapter_type": adapter_type} | TYPES[adapter_type]
    sf.add_adapter(model, sf.AdapterArguments(**options), family=family, seed=1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    if checkpointing:
        model.enable_gradient_checkpointing()
    return model.train()


def step(family, model, args):
    """Loss (2,) and gradients of one step of klein."""
    generator = torch.Generator().manual_seed(0)
    batch = {"latents": torch.randn(2, 4, 8, 12, generator=generator)}
    batch["prompt_embeds"] = torch.randn(2, 12, 48, generator=generator)
    noise, levels = torch.randn(2, 16, 4, 6, generator=generator), torch.tensor([0.3, 0.8])
    loss = family.compute_loss(model, batch, args, noise=noise, levels=levels)[0]
    loss.mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None} | {"": loss.detach()}


def block_weights(model):
    """Frozen matrices in the blocks of a klein, on the host or not, by name."""
    return {
        n: p for n, p in model.named_parameters() if "blocks." in n and p.ndim > 1 and not p.requires_grad
    }  # fmt: skip


class Copies:
    """Bytes of the copies that are alive, and the most that ever were."""

    def __init__(self, monkeypatch):
        self.now = self.most = self.made = 0
        fetch = offload._Held.fetch
        monkeypatch.setattr(offload._Held, "fetch", lambda held, *inputs: (fetch(held, *inputs), self.note(held))[0])

    def note(self, held):
        for name in held.weights:
            storage = getattr(held.layer, name).untyped_storage()
            self.now += storage.nbytes()
            self.made += 1
            weakref.finalize(storage, self.gone, storage.nbytes())
        self.most = max(self.most, self.now)

    def gone(self, size):
        self.now -= size


@pytest.mark.promise("E13")
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("adapter_type", TYPES)
def test_losses_and_gradients_are_the_same_bits(tmp_path, family, adapter_type, checkpointing):
    args, found = make_args(tmp_path), []
    for offloaded in (False, True):
        model = make_model(family, adapter_type, checkpointing=checkpointing)
        weights = block_weights(model)
        if offloaded:
            offload_blocks(model, "cpu")
            offload_blocks(model, "cpu")  # by a second trainer: nothing left to do
            assert block_weights(model) == {} and len(weights) == 16
        found.append(step(family, model, args))
        assert offloaded is not bool(block_weights(model))  # let go of after the step, too
    assert same(*found) and len(found[0]) > 16


@pytest.mark.promise("E13")
def test_weights_are_on_the_device_one_block_at_a_time(tmp_path, family, monkeypatch):
    """Counted in copies on the CPU: a layer in forward, a block in backward, all without checkpointing."""
    args, most, copies = make_args(tmp_path), {}, Copies(monkeypatch)
    for checkpointing in (True, False):
        model = make_model(family, checkpointing=checkpointing)
        total, block = held_bytes(model)
        largest = max(p.nbytes for p in block_weights(model).values())
        assert total == sum(p.nbytes for p in block_weights(model).values()) and largest < block < total
        offload_blocks(model, "cpu")
        copies.most = copies.made = 0
        with torch.no_grad():
            family.compute_loss(model.eval(), {"latents": torch.zeros(1, 4, 8, 12), "prompt_embeds": torch.zeros(
                1, 12, 48)}, args)  # fmt: skip
        assert (copies.most, copies.now, copies.made) == (largest, 0, 16)
        step(family, model.train(), args)
        most[checkpointing] = copies.most
        assert copies.now == 0 and copies.made == 16 * (3 if checkpointing else 2)
    assert block / 2 < most[True] <= block < 1.5 * block < most[False] <= total


@pytest.mark.parametrize("name", ["sd3", "sdxl", "flux", "qwen_image"])
def test_other_networks(tmp_path, tiny_pipelines, name):
    """A UNet checkpoints other parts than those named as its blocks; convolutions are held, too."""
    family = sf.load_family(name)(pretrained_model_name_or_path=str(tiny_pipelines[name]))
    found = []
    for offloaded in (False, True):
        model = make_model(family)
        kept = {n for n, p in model.named_parameters() if p.ndim > 1 and not p.requires_grad}
        if offloaded:
            total, block = held_bytes(model)
            assert 0 < block < total
            offload_blocks(model, "cpu")
            kept -= {n for n, _ in model.named_parameters()}
            assert sum(n.endswith("weight") for n in kept) > 10 and any("resnets" in n for n in kept) is (
                name == "sdxl"
            )
        generator = torch.Generator().manual_seed(0)
        inputs = _inputs(name, model, generator)
        output = model(**inputs, return_dict=False)[0]
        output.square().mean().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"": output.detach()})
    assert same(*found) and len(found[0]) > 10


def _inputs(name, model, generator):
    """Arguments of the forward of a tiny network, non-square, batch 2."""

    def draw(*shape):
        return torch.randn(2, *shape, generator=generator)

    config = model.config
    if name == "sdxl":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {"text_embeds": draw(pooled), "time_ids": torch.ones(2, 6)}
        return {"sample": draw(config.in_channels, 8, 12), "timestep": torch.tensor([10, 700]),
                "encoder_hidden_states": draw(7, config.cross_attention_dim), "added_cond_kwargs": added}  # fmt: skip
    text = {"encoder_hidden_states": draw(7, config.joint_attention_dim)}
    if name == "sd3":
        return text | {"hidden_states": draw(config.in_channels, 8, 12), "timestep": torch.tensor([10.0, 700.0]),
                       "pooled_projections": draw(config.pooled_projection_dim)}  # fmt: skip
    text |= {"hidden_states": draw(24, config.in_channels), "timestep": torch.tensor([0.1, 0.7])}
    if name == "qwen_image":
        return text | {"img_shapes": [[(1, 4, 6)]] * 2, "encoder_hidden_states_mask": None}
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(6.0))
    guidance = {"guidance": torch.ones(2)} if config.guidance_embeds else {}
    ids = {"txt_ids": torch.zeros(7, 3), "img_ids": ids}
    return text | guidance | ids | {"pooled_projections": draw(config.pooled_projection_dim)}


def test_a_layer_that_fails_lets_go(family):
    """So does one whose recomputation is broken off."""
    model = make_model(family)
    offload_blocks(model, "cpu")
    layer = model.transformer_blocks[0].ff.linear_in
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(torch.zeros(1, 5))
    assert layer.get_base_layer().weight is None and layer(torch.zeros(1, 32)).shape == (1, 192)


def test_adapters_stay_float32_on_a_16_bit_base(tmp_path, family):
    model = make_model(family, dtype=torch.bfloat16)
    wanted = {n: p for n, p in model.named_parameters() if p.requires_grad}
    offload_blocks(model, "cpu")
    found = step(family, model, make_args(tmp_path))
    assert network_dtype(model) == torch.bfloat16 and {found[n].dtype for n in wanted} == {torch.float32}
    model.to("cpu"), model.requires_grad_(True), model.state_dict()
    assert block_weights(model) == {}  # what walks over parameters does not bring them back


def test_a_run_with_everything(tmp_path, family, even_cache):
    """Training, evaluation, images, EMA, a resumed run and the saved files: as without."""
    options = dict(
        eval_fraction=0.3, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, max_steps=4,
        gradient_accumulation_steps=2, ema_decay=0.9, validation_prompts=["A chart."], validation_size=[32, 48],
        num_inference_steps=2, validation_steps=2, activation_checkpointing=True,
    )  # fmt: skip
    plain = make_trainer(tmp_path / "plain", family, even_cache, **options)
    plain.train()
    trainer = make_trainer(tmp_path / "held", family, even_cache, offload=True, **options)
    assert block_weights(trainer.model) == {}
    trainer.train()
    assert same(trained(plain), trained(trainer))
    logs = [[(e.get("loss"), e.get("eval_loss")) for e in t.state.log_history] for t in (plain, trainer)]
    assert logs[0] == logs[1]
    images = sorted(p.relative_to(tmp_path / "plain") for p in (tmp_path / "plain").glob("validation/step-*/*.png"))
    assert len(images) == 3
    for file in images:
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "held" / file).read_bytes()
    assert same(*(load_file(tmp_path / name / "checkpoint-4" / WEIGHT_NAME) for name in ("plain", "held")))
    shutil.copytree(tmp_path / "plain" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    again = make_trainer(
        tmp_path / "again", family, even_cache, offload=True, resume_from_checkpoint="latest", **options
    )
    again.train()
    assert same(trained(plain), trained(again))


@pytest.mark.acceptance
def test_two_ranks(tmp_path, tiny_klein, even_cache):
    for name in ("plain", "held"):
        options = dict(
            pretrained_model_name_or_path=tiny_klein, max_sequence_length=12, dataset_dir=even_cache, eval_fraction=0,
            rank=4, learning_rate=1e-2, max_steps=2, logging_steps=1, save_strategy="no", use_cpu=True, seed=3,
            disable_tqdm=True, activation_checkpointing=True, output_dir=tmp_path / name,
            per_device_train_batch_size=2, offload=name == "held",
        )  # fmt: skip
        run(*(word for key, value in options.items() for word in (f"--{key}", value)), ranks=2)
    assert same(*(load_file(tmp_path / name / WEIGHT_NAME) for name in ("plain", "held")))


# -- what cannot work ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "`offload` saves nothing without `--activation_checkpointing`"),
        ({"activation_checkpointing": True, "torch_compile": True}, "`offload` cannot work with `torch_compile` True"),
        ({"activation_checkpointing": True, "quantize_base": "int8"}, "`offload` cannot work with `quantize_base`"),
    ],
)
def test_options_that_cannot_work(tmp_path, options, words):
    with pytest.raises(sf.SciflowError, match=words):
        make_args(tmp_path, offload=True, **options)


def test_a_network_that_is_trained_or_names_no_blocks(tmp_path, family, even_cache):
    args = make_args(tmp_path, offload=True, activation_checkpointing=True)
    with pytest.raises(sf.SciflowError, match=r"`offload` is for frozen networks.*`no_adapter`"):
        args.load_dtype(trained=True)
    with pytest.raises(sf.SciflowError, match="`offload`: there are no frozen weights in the blocks of Flux2Transf"):
        make_trainer(tmp_path, family, even_cache, no_adapter=True, offload=True, activation_checkpointing=True)
    with pytest.raises(sf.SciflowError, match="`offload`: there are no frozen weights in the blocks of Linear"):
        offload_blocks(torch.nn.Linear(2, 2).requires_grad_(False), "cpu")


def test_dry_run_says_what_is_where(tmp_path, tiny_klein, even_cache):
    folder, lines = edited(tiny_klein, tmp_path, "transformer/config.json", num_attention_heads=64), []
    family = sf.Flux2Klein(pretrained_model_name_or_path=str(folder), max_sequence_length=12)
    for offloaded in (False, True):
        args = make_args(tmp_path, offload=offloaded, activation_checkpointing=True)
        model = family.load_model(dtype=torch.float32, meta=True)
        sf.add_adapter(model, sf.AdapterArguments(rank=4), family=family)
        text = sf.plan(model, family, args, sf.load_cache(even_cache, dtype=torch.float32))
        lines.append(next(line for line in text.splitlines() if line.startswith("weights ")))
    total, block = held_bytes(model)
    assert "on the host" not in lines[0] and lines[1].endswith("of weights on the host")
    assert sizes(lines[1])[-1] == pytest.approx(total, rel=0.01)
    assert sizes(lines[0])[0] - sizes(lines[1])[0] == pytest.approx(total - block, rel=0.01)
    assert total - block > 100 * 2**20
