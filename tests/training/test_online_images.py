"""Images encoded in training by the real VAE: the latents of a cache, resumed bit for bit, on one rank or two."""

import json

import numpy as np
import pytest
import torch
from family_steps import FAMILIES
from recipe_runs import flags, logged_losses, run, weights
from trainings import assert_resume_is_exact, largest_difference, losses, make_trainer

import sciflow_hf as sf
from sciflow_hf.errors import CacheError
from sciflow_hf.training.prepare import prepare_data

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
MOVING = dict(image_encoding="online", random_crop=True, crop_from="original", random_flip=True)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, family, figures):
    """A function: the data of a run on the figures with these options; one folder of text for all of them."""
    folder = tmp_path_factory.mktemp("online")

    def prepare(family=family, **options):
        args = sf.DiffusionTrainingArguments(output_dir=str(folder / "out"), use_cpu=True, report_to="none")
        options = {"input_dir": str(figures), "dataset_dir": [str(folder / "text")], "resolution": 32} | options
        return prepare_data(sf.DataArguments(**{"eval_fraction": 0.3} | options), family, args)

    return prepare


@pytest.fixture(scope="module")
def cached(prepared, tmp_path_factory):
    return prepared(dataset_dir=[str(tmp_path_factory.mktemp("cached"))])


def test_latents_are_those_of_a_cache(prepared, cached):
    """Rounded as they are stored; what is held out, too, and with crops and flips that alone."""
    for options in ({"image_encoding": "online"}, MOVING):
        for number, (online, stored) in enumerate(zip(prepared(**options), cached, strict=True)):
            assert online.row_ids == stored.row_ids and online.fingerprint == stored.fingerprint
            assert set(online.members(0)) == {"prompt_embeds", "txt_ids"}
            for row in range(len(online)):
                latents = online[row]["latents"] if number or options is not MOVING else None
                assert latents is None or torch.equal(latents.bfloat16().float(), stored[row]["latents"])


def test_the_same_run_as_on_a_cache(tmp_path, family, prepared, cached):
    """Losses up to the rounding of stored latents, 2^-9 of their size; with random crops others, but not held out."""
    found = {}
    for name, (train, held_out) in {
        "cached": cached, "online": prepared(image_encoding="online"), "moving": prepared(**MOVING)
    }.items():  # fmt: skip
        trainer = make_trainer(tmp_path / name, family, train, held_out, eval_strategy="steps", eval_steps=6)
        trainer.train()
        base = [entry["eval_base_loss"] for entry in trainer.state.log_history if "eval_base_loss" in entry]
        found[name] = losses(trainer) + base
    np.testing.assert_allclose(found["online"], found["cached"], rtol=2e-3)
    assert found["moving"][-1] == found["online"][-1] and found["moving"][:6] != found["online"][:6]


def test_resumed_bit_for_bit(tmp_path, family, prepared):
    assert_resume_is_exact(tmp_path, family, prepared(**MOVING)[0])


def test_text_and_images_online(prepared, cached, tmp_path):
    train, held_out = prepared(dataset_dir=[str(tmp_path)], text_encoding="online", **MOVING)
    assert not train.members(0) and len(train) + len(held_out) == 24
    assert held_out[1].keys() >= {"latents", "prompt_embeds"}
    stored = cached[1][1]["prompt_embeds"]
    torch.testing.assert_close(held_out[1]["prompt_embeds"], stored, rtol=2**-7, atol=2**-7)


def test_with_prior_preservation(tmp_path, family, prepared, figures, cached):
    """The prior's images are found in a folder of their own; without a word, in that of its cache they are not."""
    folder = cached[0].index_files[0].rpartition("/")[0]
    options = dict(prior_dataset_dir=folder, **MOVING)
    train, _ = prepared(**options, image_dir=[str(figures)])
    assert train.prior.rows.sum() == 24
    trainer = make_trainer(tmp_path, family, train)
    trainer.train()
    assert len(losses(trainer)) == 6
    with pytest.raises(CacheError, match=r"there is no image .*--image_dir"):
        prepared(**options)


@pytest.mark.promise("E26")
def test_two_ranks_equal_one(tmp_path, tiny_klein, figures):
    """1 x 4 and 2 x 2, from a folder of images, text encoded beforehand; the card and the checkpoint say it."""
    options = dict(input_dir=figures, resolution=32, random_crop=True, random_flip=True, image_encoding="online")
    options |= dict(max_steps=3, save_steps=3, eval_fraction=0.3, eval_strategy="steps", eval_steps=3)

    def words(name, **more):
        return flags(tiny_klein, tmp_path / "cache", tmp_path / name, **options | more)

    done = run(*words("one", per_device_train_batch_size=4))
    assert done.stderr.count("`random_flip`: mirrored text cannot be read") == 1
    run(*words("two", per_device_train_batch_size=2), ranks=2)
    np.testing.assert_allclose(logged_losses(tmp_path / "one"), logged_losses(tmp_path / "two"), rtol=1e-5)
    assert largest_difference(weights(tmp_path / "one"), weights(tmp_path / "two")) < 1e-4
    kept = json.loads((tmp_path / "one" / "checkpoint-3" / "run.json").read_text())["options"]
    assert (kept["image_encoding"], kept["image_views"]) == ("online", "random crops, half of them mirrored")
    assert "| images, encoded in training | random crops, half of them mirrored |" in (
        tmp_path / "one" / "README.md"
    ).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", FAMILIES)
def test_families_know_the_shape_of_their_latents(tiny_pipelines, name):
    """A cache without latents says it as the VAE would; SDXL is told sizes and corners."""
    family = sf.load_family(name)(pretrained_model_name_or_path=str(tiny_pipelines[name]))
    height, width = 2 * family.bucket_step(), 3 * family.bucket_step()
    encoders = family.load_encoders(device="cpu", dtype=torch.float32, text=False)
    encoded = family.encode_images(torch.zeros(1, 3, height, width), encoders)["latents"]
    assert family.latent_shape(height, width) == tuple(encoded.shape[1:])
    assert family.stores_time_ids == (name == "sdxl")
