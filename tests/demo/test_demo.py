"""The demo's figures and its tiny klein pipeline."""

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sciflow_hf import demo
from sciflow_hf.demo import demo_figures, demo_pipeline, make_figures, make_tiny
from sciflow_hf.errors import SciflowError

PROMPTS = ["a line plot", "a red bar chart with 5 bars"]


@pytest.fixture(scope="module", params=["test", "demo"])
def pipeline(request: pytest.FixtureRequest, tiny_klein: Path, tmp_path_factory: pytest.TempPathFactory):
    """Both sizes, as diffusers loads them."""
    from diffusers import Flux2KleinPipeline

    folder = tiny_klein if request.param == "test" else make_tiny(tmp_path_factory.mktemp("demo") / "klein")
    pipe = Flux2KleinPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _embeds(pipe, prompts: list[str], length: int = 48) -> torch.Tensor:
    return pipe.encode_prompt(prompts, max_sequence_length=length)[0]


@pytest.fixture(scope="module")
def predict(pipeline) -> Callable[..., torch.Tensor]:
    """One forward of the network on a 6 x 4 grid of tokens; keywords replace inputs."""
    noisy = torch.randn(2, pipeline.transformer.config.in_channels, 6, 4, generator=torch.Generator().manual_seed(0))
    embeds = _embeds(pipeline, PROMPTS)
    inputs = {
        "hidden_states": pipeline._pack_latents(noisy),
        "encoder_hidden_states": embeds,
        "timestep": torch.tensor([0.3, 0.8]),
        "img_ids": pipeline._prepare_latent_ids(noisy),
        "txt_ids": pipeline._prepare_text_ids(embeds),
    }

    def call(**changes: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        changed = {name: change(inputs[name]) for name, change in changes.items()}
        with torch.no_grad():
            return pipeline.transformer(**inputs | changed, guidance=None, return_dict=False)[0]

    return call


CHANGES = {
    "height and width swapped in the ids": {"img_ids": lambda ids: ids[..., [0, 2, 1, 3]]},
    "time axis in place of height": {"img_ids": lambda ids: ids[..., [1, 0, 2, 3]]},
    "text positions all zero": {"txt_ids": torch.zeros_like},
    "text positions in the wrong column": {"txt_ids": lambda ids: ids[..., [0, 1, 3, 2]]},
    "timestep times 1000": {"timestep": lambda t: 1000 * t},
    "timestep by 1000": {"timestep": lambda t: t / 1000},
    "timestep turned round": {"timestep": lambda t: 1 - t},
    "no text": {"encoder_hidden_states": torch.zeros_like},
    "the other sample's text": {"encoder_hidden_states": lambda text: text.flip(0)},
    "text in reverse order": {"encoder_hidden_states": lambda text: text.flip(1)},
    "layers in another order": {"encoder_hidden_states": lambda text: text.roll(16, -1)},
    "half of the text": {"encoder_hidden_states": lambda t: t[:, :24], "txt_ids": lambda t: t[:, :24]},
}


@pytest.mark.parametrize("what", CHANGES)
def test_every_wrong_input_shows_in_the_output(predict, what: str) -> None:
    right, wrong = predict(), predict(**CHANGES[what])
    assert torch.linalg.norm(wrong - right) > 0.01 * torch.linalg.norm(right)


def test_the_output_has_unit_scale_and_is_smooth_in_the_timestep(predict) -> None:
    output = predict()
    assert 0.5 < output.std() < 2.0
    near = predict(timestep=lambda t: t + 0.001)
    assert torch.linalg.norm(near - output) < 0.1 * torch.linalg.norm(output)


def test_layers_and_pad_rows_depend_on_the_prompt(pipeline) -> None:
    embeds = _embeds(pipeline, PROMPTS)
    layers = embeds.unflatten(-1, (3, 16))  # (B, L, 3, 16): hidden states 9, 18, 27
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert torch.linalg.norm(layers[:, :, a] - layers[:, :, b]) > 0.1 * torch.linalg.norm(layers[:, :, a])
    for k in range(3):
        first, second = layers[:, :, k]
        assert torch.linalg.norm(first - second) > 0.1 * torch.linalg.norm(first)
    first, second = embeds[:, -4:]  # right padding: these rows are padding in both
    assert torch.linalg.norm(first - second) > 0.1 * torch.linalg.norm(first)


def test_chat_template_and_tokens_are_those_of_qwen3(pipeline) -> None:
    tokenizer = pipeline.tokenizer
    turn = [{"role": "user", "content": "a µm scale"}]

    def render(**options: bool) -> str:
        return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, **options)

    asked = "<|im_start|>user\na µm scale<|im_end|>\n<|im_start|>assistant\n"
    assert render(enable_thinking=False) == asked + "<think>\n\n</think>\n\n"
    assert render(enable_thinking=True) == render() == asked
    ids = tokenizer(asked, padding="max_length", max_length=64).input_ids
    specials = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|endoftext|>"]
    single = tokenizer.convert_tokens_to_ids(specials)
    assert len(set(single)) == 5 and None not in single
    used = len(asked.encode()) - len("<|im_start|>" * 2 + "<|im_end|>") + 3  # one token a byte, one a special
    assert ids[0] == single[0] and len(ids) == 64
    assert ids[used:] == [single[4]] * (64 - used) and single[4] not in ids[:used]
    assert tokenizer.decode(ids[:used]) == asked


def test_batch_norm_statistics_normalise_drawn_figures(pipeline, figures: Path) -> None:
    """Latents of figures that the statistics were not made from come out near mean 0 and deviation 1."""
    bn, tokens, raw = pipeline.vae.bn, [], []
    for file in sorted(figures.glob("*.png")):
        picture = Image.open(file)
        pixels = np.asarray(picture.crop((0, 0, picture.width // 8 * 8, picture.height // 8 * 8)), np.float32)
        with torch.no_grad():
            posterior = pipeline.vae.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1).latent_dist
        assert (posterior.logvar + 6).abs().max() < 1.5
        raw.append(pipeline._pack_latents(pipeline._patchify_latents(posterior.mode()))[0])
    tokens = (torch.cat(raw) - bn.running_mean) / torch.sqrt(bn.running_var + pipeline.vae.config.batch_norm_eps)
    assert tokens.mean(0).abs().max() < 0.25
    assert tokens.std(0).min() > 0.7 and tokens.std(0).max() < 1.4
    # Leaving the step out shows: the statistics are not 0 and 1, nor the same in all channels.
    assert (torch.cat(raw) - tokens).pow(2).mean().sqrt() > 0.05
    assert bn.running_mean.std() > 0.02 and bn.running_var.std() > 0.02


def test_the_pipeline_makes_an_image(pipeline) -> None:
    def image(prompt: str) -> np.ndarray:
        made = pipeline(
            prompt=prompt, height=48, width=32, num_inference_steps=2, max_sequence_length=32,
            generator=torch.Generator().manual_seed(0),
        ).images[0]  # fmt: skip
        return np.asarray(made, np.float32)

    first = image("a line plot")
    assert first.shape == (48, 32, 3) and first.std() > 5
    assert np.abs(first - image("a heat map")).mean() > 1


@pytest.mark.promise("B21")
def test_component_classes_and_scheduler(pipeline) -> None:
    names = {key: type(value).__name__ for key, value in pipeline.components.items() if key != "is_distilled"}
    assert names == {
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "vae": "AutoencoderKLFlux2",
        "text_encoder": "Qwen3ForCausalLM",
        "tokenizer": "Qwen2Tokenizer",
        "transformer": "Flux2Transformer2DModel",
    }
    assert pipeline.config.is_distilled is False
    assert pipeline.scheduler.config.use_dynamic_shifting and pipeline.scheduler.config.shift == 3.0
    assert not pipeline.transformer.config.guidance_embeds


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.mark.parametrize(
    "family", ["flux2_klein", "flux2", "flux", "qwen_image", "z_image", "ernie_image", "sd3", "sdxl"]
)
def test_one_seed_gives_the_same_pipeline_bytes_and_leaves_torch_alone(tmp_path: Path, family: str) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, again, other = (
        _bytes(make_tiny(tmp_path / name, family, size="test", seed=seed))
        for name, seed in (("one", 0), ("again", 0), ("other", 1))
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert one == again
    weights = [name for name in one if name.endswith(".safetensors")]
    assert len(weights) >= 3 and all(one[name] != other[name] for name in weights)


def _rows(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def test_figures_are_whole_varied_and_described(tmp_path: Path) -> None:
    folder = make_figures(tmp_path / "figures")
    rows = _rows(folder)
    assert len(rows) == 100 == len({row["file_name"] for row in rows})
    assert {f.name for f in folder.iterdir()} == {row["file_name"] for row in rows} | {"metadata.jsonl"}
    papers = [row["paper_id"] for row in rows]
    assert 25 <= len(set(papers)) <= 50 and all(papers.count(p) in (1, 3) for p in set(papers))
    ratios = {}
    for row in rows:
        with Image.open(folder / row["file_name"]) as picture:
            assert picture.mode == "RGB" and picture.width != picture.height
            pixels = np.asarray(picture)
        ratios.setdefault(round(picture.width / picture.height, 2), []).append(row["file_name"])
        assert (pixels == 255).all(-1).mean() > 0.2, "a white page"
        assert (pixels.min(-1) < 200).mean() > 0.01, "with something drawn on it"
    assert sorted(ratios) == [0.75, 1.33, 2.0] and min(map(len, ratios.values())) >= 20
    captions = [row["caption"] for row in rows]
    assert all(40 <= len(c) <= 150 and c[0].isupper() and c.endswith(".") for c in captions)
    assert len({c.split()[0] for c in captions}) == 12, "twelve kinds"
    assert all(re.search(r"\d", c) and re.search("|".join(demo.figures.COLOURS), c) for c in captions)


def test_colours_in_the_caption_are_in_the_picture(tmp_path: Path) -> None:
    folder = make_figures(tmp_path / "figures", num_figures=36)
    for row in _rows(folder):
        pixels = np.asarray(Image.open(folder / row["file_name"])).astype(int)
        named = [c for c in demo.figures.COLOURS if re.search(rf"\b{c}\b", row["caption"])]
        if "shades" in row["caption"]:
            continue  # a heat map mixes its colour with white
        for name in named:
            near = np.abs(pixels - np.array(demo.figures.COLOURS[name])).max(-1) < 12
            assert near.sum() > 20, f"{row['file_name']}: no {name}, but {row['caption']!r}"


def test_figures_depend_on_seed_and_number_only(tmp_path: Path) -> None:
    few, more = make_figures(tmp_path / "few", num_figures=6), make_figures(tmp_path / "more", num_figures=12)
    other = make_figures(tmp_path / "other", num_figures=6, seed=1)
    assert len(_bytes(few)) == 7
    assert all(_bytes(more)[name] == data for name, data in _bytes(few).items() if name.endswith("png"))
    assert sum(_bytes(other)[name] == data for name, data in _bytes(few).items()) == 0


def test_demo_folders_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, figures = demo_pipeline(tmp_path), demo_figures(tmp_path)
    assert (pipeline / "model_index.json").is_file() and len(_rows(figures)) == 100
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([pipeline.name, figures.name]), "nothing left over"

    def not_again(*_: object, **__: object) -> None:
        raise AssertionError("made a second time")

    monkeypatch.setattr(demo, "make_figures", not_again)
    monkeypatch.setattr(demo, "make_tiny", not_again)
    assert (demo_pipeline(tmp_path), demo_figures(tmp_path)) == (pipeline, figures)


def test_an_interrupted_first_use_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []

    def stop_at_the_third(self: Image.Image, path: Path) -> None:
        saved.append(path)
        if len(saved) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            demo_figures(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert len(_rows(demo_figures(tmp_path))) == 100


def test_a_folder_made_meanwhile_is_kept(tmp_path: Path) -> None:
    from sciflow_hf.demo.folders import new_folder

    with new_folder(tmp_path / "x") as mine:
        (mine / "file").write_text("second")
        (tmp_path / "x").mkdir()  # by another process
        (tmp_path / "x" / "file").write_text("first")
    assert (tmp_path / "x" / "file").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("make", [make_figures, make_tiny])
def test_a_folder_with_content_is_refused(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SciflowError, match=rf"`folder` is '{re.escape(str(tmp_path))}'.*not an empty folder"):
        make(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(SciflowError, match="`size` is 'huge'; allowed: 'test', 'demo'"):
        make_tiny(tmp_path / "x", size="huge")
    with pytest.raises(SciflowError, match="no pipeline for `mine`, only for ernie_image, flux, flux2, flux2_klein, "):
        demo_pipeline(tmp_path, "mine")
    with pytest.raises(SciflowError, match="`num_figures` is 0"):
        make_figures(tmp_path / "x", num_figures=0)


def test_ticks_are_round_numbers() -> None:
    from sciflow_hf.demo.canvas import ticks

    assert ticks(0, 1, count=5) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(0, 50, count=3) == [0.0, 20.0, 40.0]
    assert ticks(-3, 7, count=4) == [0.0, 5.0]
    for low, high in ((0.0, 8.3), (2.0, 977.0), (-0.4, 0.31)):
        found = ticks(low, high, count=6)
        assert low <= found[0] and found[-1] <= high
        assert len({round(b - a, 9) for a, b in pairwise(found)}) == 1


@pytest.mark.promise("A14")
def test_a_hand_written_cache_reads_back(tiny_cache: Path) -> None:
    """`write_cache` is what the cache's tests rest on: its index agrees with its files."""
    import pyarrow.parquet as pq

    table = pq.read_table(tiny_cache / "2015" / "2015_rank0_part0.parquet")
    assert json.loads(table.schema.metadata[b"sciflow_hf"])["text_encoder_layers"] == [9, 18, 27]
    rows = table.to_pylist()
    assert len(rows) == 24 and len({(r["bucket_h"], r["bucket_w"]) for r in rows}) == 3
    for row in rows:
        payload = np.load(tiny_cache / row["cache_path"], allow_pickle=False)
        assert list(payload["latents"].shape) == row["latent_shape"] == [4, row["bucket_h"] // 4, row["bucket_w"] // 4]
        assert list(payload["prompt_embeds"].shape) == row["prompt_embeds_shape"] == [12, 48]
        assert payload["text_ids"].shape == (12, 4)


def test_bfloat16_bits_are_torchs() -> None:
    from caches import to_dtype

    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    assert np.array_equal(to_dtype(values, "bfloat16"), expected)
