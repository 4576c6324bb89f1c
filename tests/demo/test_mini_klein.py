"""mini_klein: what it is trained on, its parts before training, and the recipe that trains it, in miniature."""

import colorsys
import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sciflow_hf.demo import demo_figures, make_mini_figures, mini_figures, mini_vae, night_figures, pretraining_figures
from sciflow_hf.demo.mini_figures import COLOURS, COUNTS, HELD_OUT, KINDS, NIGHT, SIZES, MiniFigure
from sciflow_hf.demo.mini_klein import TEXT_LENGTH, start_mini_klein
from sciflow_hf.metrics.charts import count_things

ROOT = Path(__file__).parents[2]


def median_hue(pixels: np.ndarray) -> float:
    """Of the pixels (H, W, 3) that are saturated and bright, in turns."""
    hsv = np.array([colorsys.rgb_to_hsv(*rgb) for rgb in pixels.reshape(-1, 3) / 255])
    strong = hsv[(hsv[:, 1] > 0.3) & (hsv[:, 2] > 0.4)]
    assert len(strong) > 20
    return float(np.median(strong[:, 0]))


@pytest.mark.parametrize("style", ["plain", "dark", "night"])
def test_figures_have_the_colour_they_are_called(style: str) -> None:
    hues = {name: colorsys.rgb_to_hsv(*(c / 255 for c in rgb))[0] for name, rgb in COLOURS.items()}
    for figure in mini_figures(60, seed=3, style=style, held_out=None):
        found = median_hue(np.asarray(figure.image()))
        distance = {name: min(abs(hue - found), 1 - abs(hue - found)) for name, hue in hues.items()}
        assert min(distance, key=lambda name: distance[name]) == figure.colour, figure
        page = np.median(np.asarray(figure.image()).reshape(-1, 3), axis=0)
        if figure.kind in ("line plot", "scatter plot"):  # mostly page
            assert page.min() > 240 if style == "plain" else page.max() < (50 if style == "night" else 80)


def runs(values: np.ndarray) -> int:
    """How many times True begins."""
    return int(np.sum(values[1:] & ~values[:-1]) + values[0])


def test_counts_are_as_many_as_are_asked_for() -> None:
    def coloured(figure: MiniFigure) -> np.ndarray:
        pixels = np.asarray(figure.image()).astype(int)
        return np.ptp(pixels, axis=2) > 60

    for figure in mini_figures(90, seed=4, held_out=None):
        mask, count = coloured(figure), COUNTS[figure.count]
        if figure.kind == "bar chart":
            assert runs(mask.any(axis=0)) == count
        elif figure.kind == "line plot":
            assert np.median([runs(column) for column in mask.T if column.any()]) == count
        elif figure.kind == "flow chart":
            assert max(runs(mask.any(axis=0)), runs(mask.any(axis=1))) == count


def test_figures_are_drawn_in_turn_and_again_the_same() -> None:
    shown = list(mini_figures(450, seed=0))
    assert Counter((f.kind, f.colour, f.count, f.height, f.width) for f in shown).most_common(1)[0][1] == 2
    assert len({(f.kind, f.colour) for f in shown}) == len(KINDS) * len(COLOURS) - len(HELD_OUT)
    assert not {(f.kind, f.colour) for f in shown} & set(HELD_OUT)
    assert {(f.kind, f.colour) for f in mini_figures(450, seed=0, held_out=True)} == set(HELD_OUT)
    first, again, other = (next(iter(mini_figures(1, seed=seed))) for seed in (5, 5, 6))
    assert first.image().tobytes() == again.image().tobytes() != other.image().tobytes()
    assert {f.image().size for f in shown[:30]} == {(width, height) for height, width in SIZES}


def test_figures_of_pretraining() -> None:
    figures = pretraining_figures(40, 0.25, seed=3, sizes=SIZES[:1])
    assert Counter(f.style for f in figures) == {"plain": 30, "dark": 10}
    assert all(f.caption().endswith(", dark page") == (f.style == "dark") for f in figures)
    assert {(f.height, f.width) for f in figures} == {SIZES[0]}


def test_figures_of_the_demo(tmp_path: Path) -> None:
    figures = night_figures()
    assert len(figures) == 60 and Counter(f.style for f in figures) == {"night": 42, "plain": 18}
    assert not {(f.kind, f.colour) for f in figures} & set(HELD_OUT)
    folder = demo_figures(tmp_path, "demo_night")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [row["caption"].endswith(NIGHT) for row in rows] == [f.style == "night" for f in figures]
    assert len(list(folder.glob("*.png"))) == 60 and demo_figures(tmp_path, "demo_night") == folder


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return start_mini_klein(tmp_path_factory.mktemp("mini") / "start", mini_vae.mini_vae())


@pytest.fixture(scope="module")
def pipeline(start: Path) -> Any:
    from diffusers import Flux2KleinPipeline

    return Flux2KleinPipeline.from_pretrained(start)


def test_text_does_not_depend_on_its_padding(pipeline: Any) -> None:
    prompts = ["A bar chart with three blue bars", "An orange pie chart with two slices, night style", ""]
    with torch.no_grad():
        short, _ = pipeline.encode_prompt(prompts, max_sequence_length=TEXT_LENGTH)
        long, _ = pipeline.encode_prompt(prompts)  # the stock pipeline's length
    assert long.shape[1] == 512
    assert torch.equal(long[:, :TEXT_LENGTH], short)
    assert not long[:, TEXT_LENGTH:].any() and not short[2, 2:].any()
    assert short[0, 3].std() > 0.3
    assert (short[0, :10] - short[1, :10]).abs().amax(1).count_nonzero() > 5


def test_words_of_captions_are_tokens(pipeline: Any) -> None:
    tokenizer = pipeline.tokenizer
    styles = ("plain", "dark", "night")
    for figure in [f for style in styles for f in mini_figures(200, seed=1, style=style, held_out=None)]:
        tokens = tokenizer.tokenize(figure.caption())
        words = figure.caption().replace(",", " ,").split()
        assert len(tokens) <= len(words) + (words[0] == "An")
        assert len(tokens) + 2 <= TEXT_LENGTH
    assert tokenizer.decode(tokenizer("A zebra: 5 µm")["input_ids"]) == "A zebra: 5 µm"


def test_vae_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mini_vae, "_MEASURED", 4)
    whole = mini_vae.train_mini_vae(tmp_path / "whole", steps=5, batch_size=2)
    monkeypatch.setattr(mini_vae, "_SAVE_EVERY", 3)
    draw, seen = mini_vae._batch, []

    def stop(step: int, *rest: Any) -> Any:
        seen.append(step)
        if seen == [0, 1, 2, 3]:
            raise KeyboardInterrupt
        return draw(step, *rest)

    monkeypatch.setattr(mini_vae, "_batch", stop)
    with pytest.raises(KeyboardInterrupt):
        mini_vae.train_mini_vae(tmp_path / "parts", steps=5, batch_size=2)
    parts = mini_vae.train_mini_vae(tmp_path / "parts", steps=5, batch_size=2)
    assert seen == [0, 1, 2, 3, 3, 4]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
    assert whole.bn.running_var.min() > 0 and whole.bn.running_mean.std() > 0


def test_vae_lets_colours_through_before_training() -> None:
    """Of a light grey page and a white one: further apart than the noise of the posterior."""
    torch.manual_seed(0)
    vae = mini_vae.mini_vae().eval()
    pages = torch.tensor([0.2, 1.0]).view(2, 1, 1, 1).expand(2, 3, 32, 32)
    with torch.no_grad():
        posterior = vae.encode(pages).latent_dist
    assert (posterior.mean[0] - posterior.mean[1]).abs().mean() > 1.2 * posterior.std.mean()


@pytest.fixture
def recipe() -> Any:
    spec = importlib.util.spec_from_file_location("pretrain", ROOT / "recipes" / "pretrain_mini_klein.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["pretrain"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["pretrain"]


def test_recipe_in_miniature(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From drawing to a pipeline that diffusers loads; called again with more steps, it goes on."""
    from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel

    lengths = []
    forward = Flux2Transformer2DModel.forward

    def note(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.training:
            lengths.append(kwargs["encoder_hidden_states"].shape[1])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Flux2Transformer2DModel, "forward", note)
    monkeypatch.setattr(recipe, "PADDING", (0, 8))
    monkeypatch.setattr(mini_vae, "_MEASURED", 4)
    argv = ["pretrain", "--config", str(ROOT / "recipes" / "configs" / "mini_klein_pretrain.yaml")]
    argv += f"--output_dir {tmp_path / 'out'} --vae_steps 2 --num_figures 24 --eval_fraction 0.2".split()
    options = dict(
        per_device_train_batch_size=2, save_steps=2, validation_steps=100, num_inference_steps=1, eval_levels=1,
        warmup_steps=1, disable_tqdm=True,
    )  # fmt: skip
    argv += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    for steps in (2, 12):
        monkeypatch.setattr(sys, "argv", [*argv, "--max_steps", str(steps)])
        recipe.main()
    assert len(lengths) == 12 and set(lengths) == {TEXT_LENGTH, TEXT_LENGTH + 8}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["steps"] == 12 and "eval_loss" in report and "eval_base_loss" not in report
    before = Flux2Transformer2DModel.from_pretrained(tmp_path / "out" / "start" / "transformer").state_dict()
    loaded = Flux2KleinPipeline.from_pretrained(tmp_path / "out" / "pipeline", dtype=torch.bfloat16)
    after = loaded.transformer.state_dict()
    average = Flux2Transformer2DModel.from_pretrained(tmp_path / "out" / "training" / "transformer").state_dict()
    assert loaded.transformer.dtype == torch.bfloat16
    for name, value in after.items():
        assert torch.equal(value, average[name].bfloat16()), name
    assert any(not torch.equal(value, before[name].bfloat16()) for name, value in after.items())
    written = [path.read_text() for path in (tmp_path / "out" / "pipeline").rglob("*.json")]
    assert len(written) > 5 and not any(str(tmp_path) in text for text in written)
    image = loaded(prompt="A bar chart with two red bars", height=64, width=96, num_inference_steps=1).images[0]
    assert image.size == (96, 64)


def test_figures_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    figures = list(mini_figures(3, seed=0))
    broken = [*figures, MiniFigure("no such kind", "red", "two")]
    with pytest.raises(KeyError):
        make_mini_figures(tmp_path / "figures", broken)
    assert not (tmp_path / "figures").exists()


ASSET = ROOT / "sciflow_hf" / "assets" / "mini_klein"


def test_mini_klein_is_found_in_the_package() -> None:
    from sciflow_hf.families.loading import model_source

    assert Path(model_source("mini_klein")) == ASSET
    assert sum(file.stat().st_size for file in ASSET.rglob("*") if file.is_file()) <= 8e6


def test_what_is_drawn_can_be_counted_after_the_vae() -> None:
    """On plain pages at every size; goals are 98 %, and 95 % for pies."""
    from diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2.from_pretrained(ASSET, subfolder="vae", dtype=torch.float32)
    right: Counter[str] = Counter()
    for size in SIZES:
        figures = list(mini_figures(20, seed=11, sizes=[size], held_out=None))
        with torch.no_grad():
            seen = vae.decode(vae.encode(mini_vae.pixels(figures)).latent_dist.mode()).sample
        arrays = ((seen + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        counts = [count_things(array, figure.kind) for array, figure in zip(arrays, figures, strict=True)]
        right.update(f.kind for f, count in zip(figures, counts, strict=True) if count == COUNTS[f.count])
    drawn = Counter(f.kind for size in SIZES for f in mini_figures(20, seed=11, sizes=[size], held_out=None))
    assert sum(right.values()) >= 0.98 * sum(drawn.values()), (right, drawn)


def test_mini_klein_draws_what_it_is_asked_for() -> None:
    """By the stock pipeline, a colour each, two pairs that it has never seen among them: white page, the asked hue."""
    from diffusers import Flux2KleinPipeline

    stock = Flux2KleinPipeline.from_pretrained(ASSET, dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    asked = [("bar chart", "red"), ("scatter plot", "yellow"), ("line plot", "green"), ("pie chart", "cyan")]
    asked += [("flow chart", "blue"), ("pie chart", "pink"), ("bar chart", "purple"), ("line plot", "orange")]
    assert {colour for _, colour in asked} == set(COLOURS) and set(asked[-2:]) <= set(HELD_OUT)
    images = stock(
        prompt=[f"A {kind} with three {colour} {KINDS[kind]}" for kind, colour in asked], height=64, width=64,
        num_inference_steps=12, guidance_scale=4.0, max_sequence_length=TEXT_LENGTH,
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    hues = {name: colorsys.rgb_to_hsv(*(c / 255 for c in rgb))[0] for name, rgb in COLOURS.items()}
    for (kind, colour), image in zip(asked, images, strict=True):
        pixels = np.asarray(image)
        assert np.median(pixels[[0, -1]]) > 235, kind  # the page
        found = median_hue(pixels)
        distance = {name: min(abs(hue - found), 1 - abs(hue - found)) for name, hue in hues.items()}
        assert min(distance, key=lambda name: distance[name]) == colour, kind
