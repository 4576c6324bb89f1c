"""DiT: the network against diffusers', the loss against numpy, class dropout, and what is refused."""

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import Timesteps
from dits import SMALL, make_network
from torch.distributions import Normal, kl_divergence

import sciflow_hf as sf
from sciflow_hf.diffusion.objectives import alphas_cumprod, beta_schedule, ddpm_mean, variational_bound
from sciflow_hf.diffusion.process import Noised
from sciflow_hf.diffusion.randomness import noise_keys
from sciflow_hf.families.dit import PRESETS
from sciflow_hf.networks.dit import DiTModel

ARGS = sf.DiffusionTrainingArguments(output_dir="unused", use_cpu=True, weighting_scheme="none")


def make_batch(size=6, shape=(3, 4, 10)):
    generator = torch.Generator().manual_seed(1)
    return {
        "pixel_values": torch.rand(size, *shape, generator=generator) * 2 - 1,
        "class_labels": torch.arange(size) % 5,
        "noise_key": noise_keys(0, 0, range(size)),
    }


# -- the network ---------------------------------------------------------------------------------------------------


@pytest.mark.promise("D08")
@pytest.mark.parametrize(("preset", "millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_presets_have_the_papers_sizes(preset, millions):
    family = sf.DiT(preset=preset, image_size=32, in_channels=4, num_classes=1000, objective="ddpm", learn_sigma=True)
    network = family.load_model(dtype=torch.float32, meta=True)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6) == millions
    assert all(p.is_meta for p in network.parameters())
    config = network.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == PRESETS[preset]


@pytest.mark.promise("D01", "D02", "D03", "D04", "D05")
def test_network_is_diffusers():
    """The same weights in diffusers' DiT, on its square images, with the paper's frequencies in place of its own."""
    ours = make_network(image_size=8, learn_sigma=True)
    theirs = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=6, num_layers=2, sample_size=8,
        num_embeds_ada_norm=5,
    ).eval()  # fmt: skip
    state = {
        "pos_embed.proj.weight": ours.x_embedder.weight.view(16, 3, 2, 2),
        "pos_embed.proj.bias": ours.x_embedder.bias,
        "pos_embed.pos_embed": theirs.state_dict().get("pos_embed.pos_embed"),
        "proj_out_1.weight": ours.norm_out_modulation.weight,
        "proj_out_1.bias": ours.norm_out_modulation.bias,
        # Theirs lists the values of a patch position by position, ours channel by channel.
        "proj_out_2.weight": ours.proj_out.weight.view(6, 4, 16).transpose(0, 1).reshape(24, 16),
        "proj_out_2.bias": ours.proj_out.bias.view(6, 4).t().reshape(24),
    }
    for number, block in enumerate(ours.blocks):
        theirs.transformer_blocks[number].norm1.emb.time_proj = Timesteps(256, True, 0)
        query, key, value = block.to_qkv.weight.chunk(3)
        query_bias, key_bias, value_bias = block.to_qkv.bias.chunk(3)
        names = {
            "norm1.linear.weight": block.modulation.weight, "norm1.linear.bias": block.modulation.bias,
            "attn1.to_q.weight": query, "attn1.to_q.bias": query_bias,
            "attn1.to_k.weight": key, "attn1.to_k.bias": key_bias,
            "attn1.to_v.weight": value, "attn1.to_v.bias": value_bias,
            "attn1.to_out.0.weight": block.to_out.weight, "attn1.to_out.0.bias": block.to_out.bias,
            "ff.net.0.proj.weight": block.ff[0].weight, "ff.net.0.proj.bias": block.ff[0].bias,
            "ff.net.2.weight": block.ff[2].weight, "ff.net.2.bias": block.ff[2].bias,
            "norm1.emb.class_embedder.embedding_table.weight": ours.class_embedder.weight,
        }  # fmt: skip
        for layer in ("linear_1", "linear_2"):
            for kind in ("weight", "bias"):
                value_ = getattr(getattr(ours.time_embedder, layer), kind)
                names[f"norm1.emb.timestep_embedder.{layer}.{kind}"] = value_
        state |= {f"transformer_blocks.{number}.{name}": tensor for name, tensor in names.items()}
    result = theirs.load_state_dict({k: v for k, v in state.items() if v is not None}, strict=False)
    assert not result.unexpected_keys and all("pos_embed.pos_embed" in key for key in result.missing_keys)
    x, times, labels = torch.randn(3, 3, 8, 8), torch.tensor([3, 500, 999]), torch.tensor([0, 4, 5])
    with torch.no_grad():
        expected = theirs(x, timestep=times, class_labels=labels).sample
        found = ours(x, times, labels).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.promise("D02")
def test_images_that_are_not_square():
    """A patch is where it is: moving the picture by a patch, with its positions, moves the answer."""
    network = make_network()
    x = torch.randn(2, 3, 4, 10)
    found = network(x, torch.tensor([1.0, 2.0]), torch.tensor([0, 1])).sample
    assert found.shape == x.shape
    turned = network(x.transpose(2, 3), torch.tensor([1.0, 2.0]), torch.tensor([0, 1])).sample
    assert turned.shape == (2, 3, 10, 4) and not torch.allclose(turned, found.transpose(2, 3))


@pytest.mark.promise("D07")
def test_features_are_what_the_image_head_reads(tmp_path):
    network = make_network()
    network.save_pretrained(tmp_path)
    features = DiTModel.from_pretrained(tmp_path)
    x, times = torch.randn(2, 3, 4, 10), torch.tensor([1.0, 2.0])
    tokens = features(x, times, torch.tensor([0, 1])).sample
    assert tokens.shape == (2, 10, 16) and not hasattr(features, "proj_out")
    expected, _ = network._features(x, times, torch.tensor([0, 1]))
    torch.testing.assert_close(tokens, expected)
    none = torch.tensor([5, 5])
    torch.testing.assert_close(features(x, times).sample, features(x, times, none).sample)


@pytest.mark.promise("D05")
def test_a_new_network_answers_nothing_and_is_the_same_for_a_seed():
    family = sf.DiT(**SMALL)
    one, two = (family.load_model(dtype=torch.float32) for _ in range(2))
    other = sf.DiT(**SMALL, init_seed=1).load_model(dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.x_embedder.weight, other.x_embedder.weight)
    assert one(torch.randn(2, 3, 8, 8), torch.tensor([1.0, 2.0])).sample.abs().max() == 0


def test_checkpointed_blocks_give_the_same_gradients():
    x, times, labels = torch.randn(2, 3, 4, 10), torch.tensor([1.0, 2.0]), torch.tensor([0, 1])
    gradients = []
    for checkpointing in (False, True):
        network = make_network().train()
        if checkpointing:
            network.enable_gradient_checkpointing()
        network(x, times, labels).sample.square().mean().backward()
        gradients.append([p.grad for p in network.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


# -- the loss ------------------------------------------------------------------------------------------------------


class Spy(torch.nn.Module):
    """Stands for the network: answers with `answer`, and remembers what it was asked."""

    def __init__(self, answer=0.0):
        super().__init__()
        self.answer, self.weight = answer, torch.nn.Parameter(torch.zeros(()))

    def forward(self, **inputs):
        self.asked = inputs
        return (self.answer + self.weight * inputs["hidden_states"],)


@pytest.mark.promise("D11", "D13", "D15")
@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("prediction", ["velocity", "epsilon", "sample"])
@pytest.mark.parametrize("objective", ["flow", "ddpm"])
def test_loss_in_numpy(objective, prediction, gamma):
    """Mixture, timestep, target and weight, written out once more."""
    family = sf.DiT(**SMALL, objective=objective, prediction_type=prediction, beta_schedule="cosine")
    args = sf.DiffusionTrainingArguments(
        output_dir="unused", use_cpu=True, weighting_scheme="none", min_snr_gamma=gamma
    )
    batch, network = make_batch(), make_network()
    x = batch["pixel_values"].double().numpy()
    e = np.random.default_rng(0).normal(size=x.shape)
    if objective == "flow":
        levels = np.array([0.05, 0.2, 0.4, 0.6, 0.8, 0.95])
        a, b, times = 1 - levels, levels, 1000 * levels
    else:
        levels = times = np.array([9, 100, 300, 500, 800, 990])
        betas = [
            min(1 - np.cos(((t + 1) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
                / np.cos((t / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2, 0.999)
            for t in range(1000)
        ]  # fmt: skip
        bar = np.cumprod(1 - np.array(betas))[levels]
        a, b = np.sqrt(bar), np.sqrt(1 - bar)
    wide = (slice(None), None, None, None)
    noisy = a[wide] * x + b[wide] * e
    pred = network(torch.tensor(noisy).float(), torch.tensor(times), batch["class_labels"]).sample.detach().numpy()
    v = e - x if objective == "flow" else a[wide] * e - b[wide] * x
    target = {"velocity": v, "epsilon": e, "sample": x}[prediction]
    snr = (a / b) ** 2
    of_latents = {"sample": 1.0, "epsilon": 1 / snr, "velocity": b**2 if objective == "flow" else 1 / (snr + 1)}
    weight = 1.0 if gamma is None else np.minimum(snr, gamma) * of_latents[prediction]
    expected = weight * ((pred - target) ** 2).mean(axis=(1, 2, 3))

    found, level = family.compute_loss(
        network, batch, args, noise=torch.tensor(e).float(), levels=torch.tensor(levels).to(
            torch.float32 if objective == "flow" else torch.int64
        )
    )  # fmt: skip
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=2e-4)
    np.testing.assert_allclose(level.numpy(), levels, rtol=1e-6)


@pytest.mark.promise("D13")
@pytest.mark.parametrize("scheme", ["sigma_sqrt", "cosmap"])
def test_weights_of_the_velocity(scheme):
    family, batch, sigmas = sf.DiT(**SMALL), make_batch(), torch.linspace(0.1, 0.9, 6)
    args = sf.DiffusionTrainingArguments(output_dir="unused", use_cpu=True, weighting_scheme=scheme)
    plain, _ = family.compute_loss(Spy(), batch, ARGS, levels=sigmas)
    weighted, _ = family.compute_loss(Spy(), batch, args, levels=sigmas)
    s = sigmas.numpy()
    weight = s**-2 if scheme == "sigma_sqrt" else 2 / (np.pi * (1 - 2 * s + 2 * s**2))
    np.testing.assert_allclose((weighted / plain).detach().numpy(), weight, rtol=1e-5)


@pytest.mark.parametrize("objective", ["flow", "ddpm"])
def test_a_perfect_network_has_no_loss(objective):
    family, batch = sf.DiT(**SMALL, objective=objective, prediction_type="epsilon"), make_batch()
    noise = torch.randn(batch["pixel_values"].shape)
    loss, _ = family.compute_loss(Spy(noise), batch, ARGS, noise=noise)
    assert loss.abs().max() == 0
    wrong, _ = family.compute_loss(Spy(noise + 1), batch, ARGS, noise=noise)
    torch.testing.assert_close(wrong, torch.ones(6))


def test_levels_of_ddpm_are_whole_timesteps():
    family = sf.DiT(**SMALL, objective="ddpm", num_train_timesteps=10)
    levels = family.sample_levels(noise_keys(0, 0, range(4000)), ARGS, 16)
    counts = torch.bincount(levels, minlength=10)
    assert levels.dtype == torch.int64 and len(counts) == 10 and counts.min() > 320 and counts.max() < 480
    assert family.evaluation_levels(5).tolist() == [1, 3, 5, 7, 9] and family.level_range() == 10
    assert sf.DiT(**SMALL).evaluation_levels(2).tolist() == [0.25, 0.75]


@pytest.mark.promise("D09")
def test_variance_is_taught_by_the_bound():
    """The two halves of the answer: squared error of the first, bound of the second with the first held fast."""
    options = SMALL | {"objective": "ddpm", "prediction_type": "epsilon", "learn_sigma": True}
    family, batch = sf.DiT(**options), make_batch()
    network = make_network(learn_sigma=True)
    noise, timesteps = torch.randn(batch["pixel_values"].shape), torch.tensor([0, 1, 10, 500, 900, 999])
    loss, _ = family.compute_loss(network, batch, ARGS, noise=noise, levels=timesteps)
    bars = alphas_cumprod(beta_schedule("linear", 1000))
    bar = bars[timesteps].view(-1, 1, 1, 1)
    noisy = bar.sqrt() * batch["pixel_values"] + (1 - bar).sqrt() * noise
    mean, fraction = network(noisy, timesteps, batch["class_labels"]).sample.chunk(2, dim=1)
    latents = (noisy - (1 - bar).sqrt() * mean.detach()) / bar.sqrt()
    bound = variational_bound(batch["pixel_values"], latents, noisy, fraction, bars, timesteps)
    expected = (mean - noise).square().flatten(1).mean(1) + bound
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


def test_bound_is_the_divergence_of_two_normals():
    bars = alphas_cumprod(beta_schedule("linear", 1000)).double()
    generator = torch.Generator().manual_seed(0)
    latents, wrong, noisy, fraction = (
        torch.randn(3, 1, 2, 3, generator=generator, dtype=torch.float64) for _ in range(4)
    )
    timesteps = torch.tensor([0, 40, 900])
    found = variational_bound(latents, wrong, noisy, fraction, bars, timesteps)
    for row, t in enumerate(timesteps.tolist()):
        now, after = bars[t], bars[t - 1] if t else torch.tensor(1.0, dtype=torch.float64)
        beta, true = 1 - now / after, (1 - after) / (1 - now) * (1 - now / after)
        least = (1 - bars[0]) / (1 - bars[1]) * (1 - bars[1] / bars[0]) if t == 0 else true
        variance = torch.exp((fraction[row] + 1) / 2 * beta.log() + (1 - fraction[row]) / 2 * least.log())
        theirs = Normal(ddpm_mean(noisy[row], wrong[row], now, after), variance.sqrt())
        mean = ddpm_mean(noisy[row], latents[row], now, after)
        nats = kl_divergence(Normal(mean, true.sqrt()), theirs) if t else -theirs.log_prob(mean) - np.log(2 / 255)
        assert float(found[row]) == pytest.approx(float(nats.mean() / np.log(2)), rel=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"objective": "ddpm", "prediction_type": "epsilon", "learn_sigma": True}], ids=["flow", "ddpm"]
)
def test_the_loss_is_the_mean_over_the_mask(options):
    """Pixels of weight 0 count for nothing, and the others by their weights; also in the bound of the variance."""
    family, batch = sf.DiT(**SMALL, **options), make_batch()
    network = make_network(in_channels=3, learn_sigma=family.learn_sigma)
    noise = torch.randn(batch["pixel_values"].shape, generator=torch.Generator().manual_seed(3))
    levels = family.evaluation_levels(len(noise))
    mask = torch.randint(0, 256, (len(noise), *noise.shape[2:]), generator=torch.Generator().manual_seed(4)).byte()
    mask[:, :2] = 0

    def losses(**extras):
        return family.compute_loss(network, batch | extras, ARGS, noise=noise, levels=levels)[0]

    rows = []  # the loss of each row of pixels alone, whose mean by their weights is that of the mask
    for row in range(noise.shape[2]):
        for column in range(noise.shape[3]):
            one = torch.zeros_like(mask)
            one[:, row, column] = 1
            rows.append(losses(loss_mask=one).detach())
    weights = mask.flatten(1).double()
    expected = (torch.stack(rows, 1).double() * weights).sum(1) / weights.sum(1)
    masked = losses(loss_mask=mask)
    torch.testing.assert_close(masked.double(), expected, rtol=1e-4, atol=1e-5)
    assert ((masked / losses() - 1).abs() > 1e-3).all() and (
        (masked / losses(loss_mask=mask.flip(1)) - 1).abs() > 1e-3
    ).all()
    torch.testing.assert_close(losses(loss_mask=torch.full_like(mask, 7)), losses())
    # No part of the answer is taught where the mask is 0, all of it elsewhere.
    process = family.process
    parts = batch["pixel_values"], noise, levels
    noised = Noised(batch["pixel_values"], noise, process.mix(*parts), levels, process.target(*parts))
    model_pred, fraction = torch.rand(2, *noise.shape, generator=torch.Generator().manual_seed(5)).unbind()
    told = {"loss_mask": mask, "variance_fraction": fraction.requires_grad_()}
    family.compare(model_pred.requires_grad_(), noised, batch | told, ARGS).sum().backward()
    for answer in (model_pred, fraction) if family.learn_sigma else (model_pred,):
        assert torch.equal(answer.grad != 0, (mask != 0)[:, None].expand_as(answer))


def test_a_mask_of_another_size_is_refused():
    family = sf.DiT(**SMALL)
    network, sample = family.load_model(dtype=torch.float32), {name: value[0] for name, value in make_batch().items()}
    family.check_sample(network, sample | {"loss_mask": torch.ones(4, 10, dtype=torch.uint8)})
    with pytest.raises(sf.SciflowError, match=r"`loss_mask` \(10, 4\): `pixel_values`"):
        family.check_sample(network, sample | {"loss_mask": torch.ones(10, 4, dtype=torch.uint8)})


# -- classes -------------------------------------------------------------------------------------------------------


@pytest.mark.promise("D12")
def test_class_dropout_follows_the_key():
    family = sf.DiT(**SMALL, class_dropout_prob=0.3)
    keys = noise_keys(0, 0, range(2000))
    batch = {"class_labels": torch.arange(2000) % 5, "noise_key": keys}
    dropped = family.dropped_labels(batch, training=True)
    gone = dropped == 5
    assert 0.26 < gone.float().mean() < 0.34
    assert torch.equal(dropped[~gone], batch["class_labels"][~gone])
    turned = family.dropped_labels({name: value.flip(0) for name, value in batch.items()}, training=True)
    assert torch.equal(turned.flip(0), dropped)  # wherever it stands in a batch
    assert torch.equal(family.dropped_labels(batch, training=False), batch["class_labels"])


@pytest.mark.promise("D12")
def test_network_is_told_of_dropped_classes_in_training_only():
    family, spy = sf.DiT(**SMALL, class_dropout_prob=0.99), Spy()
    family.compute_loss(spy.train(), make_batch(), ARGS)
    assert (spy.asked["class_labels"] == 5).sum() >= 5
    family.compute_loss(spy.eval(), make_batch(), ARGS)
    assert spy.asked["class_labels"].tolist() == [0, 1, 2, 3, 4, 0]


@pytest.mark.promise("D04", "D06")
def test_without_classes():
    family, spy, batch = sf.DiT(**SMALL | {"num_classes": 0}), Spy(), make_batch()
    del batch["class_labels"]
    family.compute_loss(spy.train(), batch, ARGS)
    assert spy.asked["class_labels"] is None
    network = family.load_model(dtype=torch.float32)
    assert network.class_embedder.weight.shape == (1, 16)
    family.check_sample(network, {"pixel_values": torch.zeros(3, 8, 8)})


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.promise("D06")
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"preset": "XXL"}, r"preset.*'XXL'.*S, B, L, XL"),
        ({"objective": "edm"}, r"objective.*'edm'.*flow, ddpm"),
        ({"prediction_type": "v"}, r"prediction_type.*'v'.*velocity"),
        ({"beta_schedule": "steep"}, r"beta_schedule.*'steep'.*cosine"),
        ({"learn_sigma": True}, r"learn_sigma.*objective ddpm"),
        ({"class_dropout_prob": 1.0}, r"class_dropout_prob.*1\.0"),
        ({"hidden_size": 30, "num_attention_heads": 4}, r"hidden_size.*30.*16"),
        ({"patch_size": 0}, r"patch_size.*0"),
    ],
)
def test_options_that_cannot_be(options, match):
    with pytest.raises(sf.SciflowError, match=match):
        sf.DiT(**options)


def test_sizes_that_the_patches_do_not_divide():
    with pytest.raises(sf.SciflowError, match=r"image_size.*30.*multiple of 4.*patch_size 4"):
        sf.DiT(**SMALL | {"image_size": 30}, patch_size=4).load_model(dtype=torch.float32)


@pytest.mark.parametrize(
    ("sample", "match"),
    [
        ({"latents": torch.zeros(3, 8, 8)}, r"needs `pixel_values`.*latents"),
        ({"pixel_values": torch.zeros(1, 8, 8), "class_labels": 0}, r"\(1, 8, 8\).*\(3, height, width\)"),
        ({"pixel_values": torch.zeros(3, 8, 7), "class_labels": 0}, r"patches are 2x2"),
        ({"pixel_values": torch.zeros(3, 8, 8)}, r"5 classes.*no labels.*--label_column.*--num_classes 0"),
    ],
)
def test_samples_that_do_not_fit(sample, match):
    family = sf.DiT(**SMALL)
    with pytest.raises(sf.SciflowError, match=match):
        family.check_sample(family.load_model(dtype=torch.float32, meta=True), sample)


def test_prompts_are_refused():
    with pytest.raises(sf.SciflowError, match=r"dit.*takes no prompts"):
        sf.DiT(**SMALL).encode_prompts(["a"], None)
    with pytest.raises(sf.SciflowError, match=r"class_labels.*'9'.*0 to 4"):
        sf.DiT(**SMALL).encode_validation_prompts(["9"], device="cpu", dtype=torch.float32)
