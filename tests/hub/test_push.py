"""From the recipe's `--push_to_hub` to `load_lora_weights("user/repo")`, over a Hub on the loopback interface."""

from caches import encoder_settings, write_cache
from hub_server import HubServer
from recipe_runs import run

CHECK = """
import sys, torch
from diffusers import Flux2KleinPipeline
from huggingface_hub import ModelCard
pipeline = Flux2KleinPipeline.from_pretrained(sys.argv[1])
embeds, _ = pipeline.encode_prompt("a line plot", max_sequence_length=12)

def draw():
    generator = torch.Generator().manual_seed(0)
    return pipeline(prompt_embeds=embeds, height=32, width=48, num_inference_steps=2, guidance_scale=1.0,
                    generator=generator, output_type="pt").images

before = draw()
pipeline.load_lora_weights("user/figures-lora")
after = draw()
assert (before - after).abs().max() > 1e-3, "the LoRA changes nothing"
card = ModelCard.load("user/figures-lora")
metrics = {r.metric_type: r for r in card.data.eval_results}
assert {"eval_loss", "eval_base_loss", "eval_gain"} <= set(metrics), metrics
gain = metrics["eval_base_loss"].metric_value - metrics["eval_loss"].metric_value
assert abs(gain - metrics["eval_gain"].metric_value) < 1e-6
print("loaded", sorted(metrics))
"""


def flags(tiny_klein, cache, output_dir, *more):
    return [
        *("--pretrained_model_name_or_path", tiny_klein, "--max_sequence_length", 12, "--dataset_dir", cache),
        *(
            "--output_dir",
            output_dir,
            "--eval_fraction",
            0.4,
            "--rank",
            4,
            "--lora_alpha",
            8,
            "--max_steps",
            6,
        ),
        *(
            "--learning_rate",
            1e-2,
            "--use_cpu",
            True,
            "--push_to_hub",
            "--hub_model_id",
            "figures-lora",
            *more,
        ),
    ]


def test_recipe_pushes_what_a_user_needs_and_it_loads(hub: HubServer, tmp_path, tiny_klein):
    cache = write_cache(tmp_path / "cache", settings=encoder_settings(tiny_klein), buckets={(32, 48): 40})
    words = flags(
        tiny_klein, cache, tmp_path / "out", "--save_steps", 3, "--validation_prompts", "a line plot",
        "--validation_steps", 100, "--num_inference_steps", 1, "--validation_guidance_scale", 1.0,
    )  # fmt: skip
    done = run(*words, **hub.env(tmp_path / "home"))
    repo = hub.repos["user/figures-lora"]
    assert set(repo.files) - {".gitattributes"} == {
        "README.md", "pytorch_lora_weights.safetensors", "run_facts.json", "training.png",
        "validation/contact_sheet.png", "validation/step-000006/p00_seed0.png",
    }  # fmt: skip
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").read_bytes() == repo.files[
        "pytorch_lora_weights.safetensors"
    ]
    assert any("Training in progress, step 3" in m for m in repo.messages) and "End of training" in repo.messages[-1]
    everything = b"".join(repo.files.values()) + done.stdout.encode() + done.stderr.encode()
    assert b"dummy" not in everything and str(tmp_path).encode() not in b"".join(repo.files.values())
    assert "loaded" in hub.run(CHECK, tmp_path / "other", str(tiny_klein))


def test_no_permission_is_said_before_training(hub: HubServer, tmp_path, tiny_klein):
    cache = write_cache(tmp_path / "cache", settings=encoder_settings(tiny_klein))
    hub.tokens["dummy"]["write"] = False
    done = run(*flags(tiny_klein, cache, tmp_path / "out"), check=False, **hub.env(tmp_path / "home"))
    assert done.returncode == 2 and "403" in done.stderr and "Traceback" not in done.stderr
    assert not list((tmp_path / "out").glob("checkpoint-*")) and "'loss'" not in done.stdout + done.stderr


def test_hub_that_fails_at_the_end_loses_nothing(hub: HubServer, tmp_path, tiny_klein):
    cache = write_cache(tmp_path / "cache", settings=encoder_settings(tiny_klein))
    hub.fail("commit", 409, times=99)
    done = run(*flags(tiny_klein, cache, tmp_path / "out"), check=False, **hub.env(tmp_path / "home"))
    assert done.returncode == 2 and "409" in done.stderr and "on disk" in done.stderr
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()
    assert (tmp_path / "out" / "README.md").is_file()
