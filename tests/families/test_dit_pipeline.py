"""The DiT pipeline: perfect networks draw the data, guidance, saved folders that load where this package is not."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from dits import make_network
from recipe_runs import environment

import sciflow_hf as sf
from sciflow_hf.networks.dit import DiTForImageDiffusion
from sciflow_hf.pipelines.dit import DiTImagePipeline
from sciflow_hf.pipelines.standalone import standalone_source

NAMES = {str(i): name for i, name in enumerate(["cell", "nucleus", "axon", "spine", "glia"])}


class Perfect(DiTForImageDiffusion):
    """Knows the one image of each class, and says of it what `kind` asks for."""

    def know(self, images, kind):
        self.images, self.kind = images, kind
        return self

    def forward(self, hidden_states, timestep, class_labels=None, return_dict=True):
        data = self.images[class_labels]
        a, b = self.mixture(timestep)
        a, b = a.view(-1, 1, 1, 1), b.view(-1, 1, 1, 1)
        noise = (hidden_states - a * data) / b
        if self.kind == "velocity":
            return (self.velocity(a, b, noise, data),)
        return ({"epsilon": noise, "sample": data}[self.kind],)


def perfect(objective, kind):
    network = Perfect(image_size=(4, 6), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_classes=5)
    network.know(torch.rand(6, 3, 4, 6, generator=torch.Generator().manual_seed(3)) * 2 - 1, kind)
    pipeline = DiTImagePipeline(network, objective=objective, prediction_type=kind, beta_schedule="linear")
    pipeline.set_progress_bar_config(disable=True)
    if objective == "flow":
        network.mixture = lambda t: (1 - t / 1000, t / 1000)
        network.velocity = lambda a, b, noise, data: noise - data
    else:
        bars = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
        network.mixture = lambda t: (bars[t].sqrt(), (1 - bars[t]).sqrt())
        network.velocity = lambda a, b, noise, data: a * noise - b * data
    return pipeline


@pytest.mark.promise("D16")
@pytest.mark.parametrize("kind", ["velocity", "epsilon", "sample"])
@pytest.mark.parametrize(
    ("objective", "sampler"),
    [("flow", "euler"), ("flow", "heun"), ("ddpm", "ddpm"), ("ddpm", "ddim"), ("ddpm", "ancestral")],
)
def test_a_perfect_network_draws_the_data(objective, sampler, kind):
    pipeline = perfect(objective, kind)
    found = pipeline([4, 1, 1], num_inference_steps=7, sampler=sampler, output_type="pt").images
    expected = pipeline.transformer.images[[4, 1, 1]] / 2 + 0.5
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)


@pytest.mark.promise("D17")
def test_guidance_moves_away_from_no_class():
    """Of one step of Euler: x - velocity, which is linear in the guidance."""
    pipeline = DiTImagePipeline(make_network())
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 3, 4, 10)

    def drawn(labels, scale):
        raw = {}
        pipeline._decode = lambda latents: raw.setdefault("latents", latents)
        pipeline(labels, num_inference_steps=1, guidance_scale=scale, latents=noise, output_type="pt")
        return raw["latents"]

    conditional = drawn([1, 3], 1.0)
    unconditional = noise - pipeline.transformer(noise, torch.full((2,), 1000.0), torch.tensor([5, 5])).sample.detach()
    guided = drawn([1, 3], 2.5)
    torch.testing.assert_close(guided, unconditional + 2.5 * (conditional - unconditional), rtol=1e-4, atol=1e-4)


def test_an_image_depends_on_its_generator_alone():
    pipeline = DiTImagePipeline(make_network(), objective="ddpm", prediction_type="epsilon")
    pipeline.set_progress_bar_config(disable=True)

    def drawn(labels, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipeline(labels, num_inference_steps=4, generator=generators, output_type="pt").images

    both = drawn([2, 3], [10, 11])
    torch.testing.assert_close(both[1:], drawn([3], [11]))
    assert not torch.allclose(both[:1], drawn([2], [12]))


def test_output_types_and_sizes():
    pipeline = DiTImagePipeline(make_network())
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(1, num_inference_steps=1).images[0]
    assert image.size == (10, 4) and image.mode == "RGB"
    values = pipeline([1, 2], num_inference_steps=1, output_type="np", height=6, width=4).images
    assert values.shape == (2, 6, 4, 3) and values.min() >= 0 and values.max() <= 1
    grey = DiTImagePipeline(make_network(in_channels=1))
    grey.set_progress_bar_config(disable=True)
    assert grey(None, num_images=2, num_inference_steps=1).images[1].mode == "L"
    many = DiTImagePipeline(make_network(in_channels=2))
    many.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match=r"2 channels.*'np'"):
        many(1, num_inference_steps=1)


def test_what_it_cannot_draw():
    pipeline = DiTImagePipeline(make_network(id2label=NAMES))
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline._class_ids(["axon", 1, "4"], 1).tolist() == [2, 1, 4]
    for labels, match in ((5, r"'5'.*0 to 4.*cell, nucleus"), ("dog", r"'dog'"), (-1, r"'-1'")):
        with pytest.raises(ValueError, match=match):
            pipeline(labels)
    with pytest.raises(ValueError, match=r"5x10.*multiples of 2"):
        pipeline(1, height=5)
    with pytest.raises(ValueError, match=r"sampler.*'ddim'.*heun"):
        pipeline(1, sampler="ddim")
    with pytest.raises(ValueError, match="knows no classes"):
        DiTImagePipeline(make_network(num_classes=0))(1)


def test_latents_are_decoded_as_they_were_scaled():
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=4, latent_channels=3, scaling_factor=0.3, shift_factor=0.1,
    ).eval()  # fmt: skip
    pipeline = DiTImagePipeline(make_network(), vae)
    pipeline.set_progress_bar_config(disable=True)
    family = sf.DiT(vae_name_or_path="unused")
    family.__dict__["_vae_config"] = vae.config
    raw = torch.randn(2, 3, 4, 10)
    with torch.no_grad():
        expected = vae.decode(raw).sample
        found = pipeline._decode(family.clean_latents({"latents": raw}))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert pipeline(1, num_inference_steps=1).images[0].size == (20, 8)


ELSEWHERE = """
import sys, torch
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "sciflow_hf":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from diffusers import DiffusionPipeline
for source, target in zip(sys.argv[1:], sys.argv[2:]):
    pipeline = DiffusionPipeline.from_pretrained(source, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    torch.save(pipeline(["axon", 4], generator=generators, num_inference_steps=3, guidance_scale=2.0,
                        output_type="pt").images, f"{target}.pt")
    pipeline.save_pretrained(target)
"""


def test_a_saved_pipeline_draws_the_same_where_this_package_is_not(tmp_path):
    """In a process that cannot import sciflow_hf; and what that one saves loads there again."""
    pipeline = DiTImagePipeline(make_network(id2label=NAMES))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path / "saved")
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    expected = pipeline(
        ["axon", 4], generator=generators, num_inference_steps=3, guidance_scale=2.0, output_type="pt"
    ).images
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
    env = environment(HF_HOME=str(tmp_path / "hf"), HF_MODULES_CACHE=str(tmp_path / "hf" / "modules"))
    done = subprocess.run(
        [sys.executable, "elsewhere.py", *(str(tmp_path / name) for name in ("saved", "again", "third"))],
        env=env, capture_output=True, text=True, cwd=tmp_path, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for target in ("again", "third"):
        torch.testing.assert_close(torch.load(tmp_path / f"{target}.pt"), expected)
    files = sorted(p.relative_to(tmp_path / "third").as_posix() for p in (tmp_path / "third").rglob("*.*"))
    assert files == [
        "model_index.json", "pipeline.py", "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors", "transformer/modeling_dit.py",
    ]  # fmt: skip


def test_standalone_source_refuses_two_meanings_of_a_name(tmp_path, monkeypatch):
    package = tmp_path / "pkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "one.py").write_text("def helper():\n    return 1\n")
    (package / "two.py").write_text("from .one import helper\n\n\ndef helper():\n    return 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    import pkg.two

    with pytest.raises(ValueError, match="helper"):
        standalone_source(pkg.two)
    (package / "three.py").write_text("from .one import helper as other\n")
    import pkg.three

    with pytest.raises(ValueError, match=r"pkg\.three, line 1"):
        standalone_source(pkg.three)


def test_loads_with_our_classes(tmp_path):
    network = make_network(id2label=NAMES, num_classes=5)
    pipeline = DiTImagePipeline(network, objective="ddpm", prediction_type="sample", beta_schedule="sigmoid")
    pipeline.save_pretrained(tmp_path)
    family = sf.DiT(pretrained_model_name_or_path=str(tmp_path), objective="flow")
    loaded = family.load_pipeline()
    assert (family.objective, family.prediction_type, family.beta_schedule) == ("ddpm", "sample", "sigmoid")
    assert family.num_classes == 5 and not family.from_scratch and type(loaded.transformer) is DiTForImageDiffusion
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), loaded.transformer.parameters(), strict=True))
    assert np.isfinite(loaded("glia", num_inference_steps=2, output_type="np").images).all()
    with pytest.raises(sf.SciflowError, match=r"has 5 classes.*7"):
        sf.DiT(pretrained_model_name_or_path=str(tmp_path), num_classes=7).load_model(dtype=torch.float32)
    with pytest.raises(sf.SciflowError, match="cannot load its network"):
        sf.DiT(pretrained_model_name_or_path=str(tmp_path / "nothing")).load_model(dtype=torch.float32)
