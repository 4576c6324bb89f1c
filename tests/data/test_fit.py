"""Buckets of one number of tokens, and images that are padded instead of cut: in every layout, stream and encoding."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builds import PAYLOADS, STEP, StubEncoders, build, picture, write_notes
from PIL import Image, ImageDraw

from sciflow_hf.data.arguments import DataArguments
from sciflow_hf.data.batches.sizes import aspect_ratio_buckets, equal_token_buckets, fitting_bucket, ladder
from sciflow_hf.data.build.blocks import BUILD_FILE
from sciflow_hf.data.build.convert import convert_cache
from sciflow_hf.data.build.references import SourceRules
from sciflow_hf.data.build.sources.pixels import to_rgb
from sciflow_hf.data.build.views import fit_mask, fit_pixels, own_pixels, page_colour, random_view, view_of
from sciflow_hf.data.inspect.recheck import compare_afresh
from sciflow_hf.data.load import load_cache, load_data
from sciflow_hf.data.online import OnlineImages
from sciflow_hf.data.source_images import EditViews
from sciflow_hf.errors import SciflowError

PAGE = (240, 236, 200)


# --- buckets of one number of tokens ---


def test_one_number_of_tokens_near_the_squares() -> None:
    shapes = [(32, 126), (36, 112), (42, 96), (48, 84), (56, 72), (63, 64)]
    wide = [(a * 16, b * 16) for a, b in shapes]
    assert equal_token_buckets(1024, 16, max_aspect_ratio=4) == [
        *((b, a) for a, b in wide), *reversed(wide),
    ]  # fmt: skip
    assert equal_token_buckets(1024, 16) == [*((b, a) for a, b in wide[3:]), *reversed(wide[3:])], "up to 2:1"
    for side in range(1, 40):  # by counting all rectangles of every number
        found = equal_token_buckets(side * 8, 8, max_aspect_ratio=4)
        (tokens,) = {height * width // 64 for height, width in found}
        assert side**2 * 31 / 32 <= tokens <= side**2
        all_of = {
            n: sum(h * w == n for h in range(1, 2 * side + 1) for w in range(1, 2 * side + 1) if h <= 4 * w <= 16 * h)
            for n in range(-(-31 * side**2 // 32), side**2 + 1)
        }
        assert len(found) == all_of[tokens] == len(set(found))
        nearest = found[(len(found) - 1) // 2 : len(found) // 2 + 1]  # a square, or a shape and its transpose
        assert equal_token_buckets(side * 8, 8, max_aspect_ratio=1) == nearest


def test_each_rung_of_the_ladder_has_its_number() -> None:
    rungs = ladder(1024, 16, buckets="equal_tokens", max_aspect_ratio=4)
    assert [{h * w // 256 for h, w in rung} for rung in rungs[:3]] == [{4032}, {2016}, {1008}]
    assert ladder(512, 16, max_aspect_ratio=4)[0] == aspect_ratio_buckets(512, 32, max_aspect_ratio=4)
    for options, told in (
        ({"buckets": "equal"}, "`buckets` is 'equal', but must be one of resolution, equal_tokens, given"),
        ({"max_aspect_ratio": 4.5}, r"`max_aspect_ratio` is 4.5, but must lie in \[1, 4\]"),
    ):
        with pytest.raises(SciflowError, match=told):
            ladder(512, 16, **options)


def test_a_strip_that_is_padded_need_not_shrink() -> None:
    """Of 6:1, its length stays where it is padded; cut, it would have to grow by a half."""
    rungs = ladder(1024, 16, max_aspect_ratio=4)
    assert fitting_bucket(340, 2040, rungs, "pad") == (512, 2048)
    assert fitting_bucket(340, 2040, rungs) == (352, 1408)


# --- padded views ---


def test_nothing_is_cut_and_the_rest_is_page() -> None:
    """Of any shape in any bucket: all of the image, in the middle, no pixel wider than its scale allows."""
    rng = random.Random(0)
    for _ in range(300):
        original = rng.randint(1, 300), rng.randint(1, 300)
        size = rng.randint(1, 12) * 8, rng.randint(1, 12) * 8
        view = view_of("", "x.png", original, size, "pad")
        left, top, right, bottom = view.place
        assert view.cut_off == pytest.approx(0, abs=1e-12) and view.inside == pytest.approx((0, 0, *original[::-1]))
        assert (left == 0 and right == size[1]) or (top == 0 and bottom == size[0]), "as large as it can be"
        assert abs(left - (size[1] - right)) <= 1 and abs(top - (size[0] - bottom)) <= 1, "in the middle"
        scale = min(size[0] / original[0], size[1] / original[1])
        assert abs(bottom - top - max(1, original[0] * scale)) <= 0.5 + 1e-9
        assert abs(right - left - max(1, original[1] * scale)) <= 0.5 + 1e-9
        assert view.enlarged == pytest.approx(scale, abs=1 / min(original)) and view.crop == (0, 0)
        assert view.padded == pytest.approx(1 - (right - left) * (bottom - top) / (size[0] * size[1]))
        plain = view_of("", "x.png", original, size)
        assert plain.padded == 0 and plain.place == (0, 0, *size[::-1])


@pytest.mark.parametrize("flip", [False, True])
def test_pixels_and_masks_of_a_padded_view(flip: bool) -> None:
    """A figure of 16 x 64 in 32 x 32: 8 lines of it, between 12 lines of page on either side."""
    levels = np.random.default_rng(0).integers(0, 256, (16, 64, 3), np.uint8)
    levels[[0, -1]], levels[:, [0, -1]] = PAGE, PAGE
    image = Image.fromarray(levels)
    view = view_of("flip" * flip, "x.png", (16, 64), (32, 32), "pad")
    pixels = ((fit_pixels(image, view) + 1) * 127.5).round().astype(np.uint8).transpose(1, 2, 0)
    expected = np.full((32, 32, 3), PAGE, np.uint8)
    expected[12:20] = np.asarray(image.resize((32, 8), Image.Resampling.LANCZOS))
    assert np.array_equal(pixels, expected[:, ::-1] if flip else expected)
    seen = np.zeros((32, 32), np.uint8)
    seen[12:20] = 255
    assert np.array_equal(np.asarray(fit_mask(None, view)), seen)
    half = Image.fromarray(np.where(np.arange(32) < 16, 255, 51).astype(np.uint8)[None].repeat(8, 0))
    shown = np.where(np.arange(32) < 16, 255, 51)
    expected_mask = seen // 255 * (shown[::-1] if flip else shown)
    assert np.array_equal(np.asarray(fit_mask(half, view)), expected_mask), "of half the image's resolution"
    assert own_pixels(image, view).size == (64, 64) and own_pixels(image, view).getpixel((5, 3)) == PAGE


def test_windows_are_not_padded() -> None:
    assert view_of("crop1", "x.png", (40, 90), (32, 32), "pad") == view_of("crop1", "x.png", (40, 90), (32, 32))
    assert random_view("", "x.png", 7, (40, 90), (32, 32), "", False, "pad").padded > 0.5


def figure(mode: str) -> Image.Image:
    """A drawing that touches one edge, on a page."""
    if mode == "16 bit":
        levels = np.full((20, 60), 60_000, np.uint16)
        levels[5:15, 20:] = 9
        return Image.fromarray(levels)
    image = Image.new(
        "RGBA" if mode == "transparent" else "RGB", (60, 20), (0, 0, 0, 0) if mode == "transparent" else PAGE
    )
    ImageDraw.Draw(image).rectangle((20, 5, 59, 15), fill=(9, 9, 99))
    if mode == "compressed":
        noise = np.random.default_rng(1).integers(-2, 3, (20, 60, 3))
        return Image.fromarray((np.asarray(image) + noise).astype(np.uint8))
    return image


@pytest.mark.parametrize(
    ("mode", "page"), [("plain", PAGE), ("compressed", PAGE), ("transparent", (255,) * 3), ("16 bit", (233,) * 3)]
)
def test_the_page_has_the_colour_of_the_edges(mode: str, page: tuple[int, ...]) -> None:
    assert page_colour(to_rgb(figure(mode))) == page


def test_of_several_colours_the_commonest_and_no_mixture() -> None:
    """A third white, and two kinds of dark that are more together: their median would be none of them."""
    levels = np.full((40, 40, 3), 255, np.uint8)
    levels[:14, :], levels[26:, :20] = (0, 0, 120), (120, 0, 0)
    assert page_colour(Image.fromarray(levels)) in {(255, 255, 255), (0, 0, 120)}
    assert page_colour(Image.new("RGB", (1, 1), (3, 4, 5))) == (3, 4, 5)


# --- caches ---


@pytest.fixture
def strips(tmp_path: Path) -> Path:
    """Figures on a page: wide, tall, and of a bucket's own shape."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, size in {"wide": (24, 96), "tall": (96, 24), "square": (32, 32)}.items():
        image = picture(*size, PAGE)
        image.paste((10, 20, 30), (4, 4, size[1] - 4, size[0] - 4))
        image.save(folder / f"{name}.png")
    write_notes(folder, [{"file_name": f"{name}.png", "caption": name} for name in ("wide", "tall", "square")])
    return folder


def masks_of(cache: Any) -> dict[str, list[list[int]]]:
    return {name: cache[i]["loss_mask"].tolist() for i, name in enumerate(cache.row_ids)}


@pytest.mark.parametrize("payload", PAYLOADS)
def test_padded_in_every_layout_and_way_of_reading(strips: Path, tmp_path: Path, payload: str) -> None:
    options: dict[str, Any] = {"fit": "pad", "payload": payload, "dtype": "fp32", "flip": True}
    report = build(strips, tmp_path / "cache", **options)
    assert report.tally.measures["images that are padded"].startswith("2, at most 58% of the bucket: ")
    assert not [text for text in report.tally.measures if "lose" in text]
    cache = load_cache(tmp_path / "cache", dtype=torch.float32)
    masks = masks_of(cache)
    assert np.array(masks["square.png"]).min() == 255
    for i, row in enumerate(cache.index):
        image = Image.open(strips / row["image_path"])
        view = view_of(row["variant"], row["image_path"], (image.height, image.width), cache.buckets[i], "pad")
        expected = np.asarray(fit_mask(None, view)).reshape(
            view.size[0] // STEP, STEP, view.size[1] // STEP, STEP
        ).mean((1, 3))  # fmt: skip
        assert np.abs(np.array(masks[cache.row_ids[i]]) - expected).max() <= 1
    stream = load_cache(tmp_path / "cache", streaming=True, dtype=torch.float32)
    assert sorted(str(sample["loss_mask"].tolist()) for sample in stream) == sorted(map(str, masks.values()))
    convert_cache(tmp_path / "cache", tmp_path / "other", payload={"npz": "shards"}.get(payload, "npz"))
    other = load_cache(tmp_path / "other")
    assert masks_of(other) == masks and other.metadata["fit"] == "pad"
    if payload != "npz":  # without latents, which are encoded in training
        build(strips, tmp_path / "online", **options, latent_shape=lambda h, w: (3, h // STEP, w // STEP))
        online = OnlineImages(StubEncoders().images, [str(strips)])
        arguments = DataArguments(dataset_dir=[str(tmp_path / "online")], image_encoding="online", eval_fraction=0)
        train, _ = load_data(arguments, dtype=torch.float32, online_images=online)
        assert masks_of(train) == masks and str(train.online_images) == "padded"
        for i, name in enumerate(train.row_ids):
            assert torch.equal(train[i]["latents"], cache[cache.row_ids.index(name)]["latents"])
        cropped = OnlineImages(StubEncoders().images, [str(strips)], crop="original")
        with pytest.raises(SciflowError, match=r"`random_crop` shows windows, .* `--fit pad`"):
            load_data(arguments, online_images=cropped)


def test_the_fit_is_part_of_a_caches_identity(strips: Path, tmp_path: Path) -> None:
    """Also the rule of its buckets; a cache of the defaults notes none of them, as before there were others."""
    build(strips, tmp_path / "plain")
    noted = json.loads((tmp_path / "plain" / BUILD_FILE).read_text())["settings"]
    plain = load_cache(tmp_path / "plain")
    assert not {"fit", "buckets", "max_aspect_ratio"} & {*noted, *plain.metadata} and "loss_mask" not in plain[0]
    for name, value, before in (
        ("fit", "pad", "cut"), ("buckets", "equal_tokens", "resolution"), ("max_aspect_ratio", 4.0, "2.0"),
    ):  # fmt: skip
        with pytest.raises(SciflowError, match=f"`{name}` was '?{before}'? and is now '?{value}'?"):
            build(strips, tmp_path / "plain", **{name: value})
        build(strips, tmp_path / name, **{name: value})
        assert load_cache(tmp_path / name).metadata[name] == value
        with pytest.raises(SciflowError, match=f"`{name}` was '?{value}'? and is now '?{before}'?"):
            build(strips, tmp_path / name)
    samples = [{row["sample_id"] for row in load_cache(tmp_path / name).index} for name in ("plain", "fit")]
    assert len(samples[1]) == 3 and samples[0].isdisjoint(samples[1]), "whatever decides the pixels of a sample"
    caches = [str(tmp_path / name) for name in ("buckets", "max_aspect_ratio")]
    assert len(load_cache(caches)) == 6, "of several shapes together, as of several resolutions"
    with pytest.raises(SciflowError, match="`fit` is 'cut' and 'pad'"):
        load_cache([*caches, str(tmp_path / "fit")])


def test_equal_tokens_in_a_cache(strips: Path, tmp_path: Path) -> None:
    build(strips, tmp_path / "cache", buckets="equal_tokens", max_aspect_ratio=4, resolution=64, enlarge=True)
    cache = load_cache(tmp_path / "cache")
    assert {h * w // STEP**2 for h, w in cache.buckets} == {64}
    assert dict(zip(cache.row_ids, cache.buckets, strict=True)) == {
        "square.png": (64, 64), "tall.png": (128, 32), "wide.png": (32, 128),
    }  # fmt: skip


def test_masks_of_the_data_and_of_changed_regions_are_padded(tmp_path: Path) -> None:
    """A source on another page than its edit's: the pages differ, but nothing has changed there."""
    folder = tmp_path / "images"
    folder.mkdir()
    after, before = picture(16, 64, PAGE), picture(16, 64, (90, 0, 0))
    inner = np.random.default_rng(0).integers(0, 256, (14, 62, 3), np.uint8)
    for image in (after, before):
        image.paste(Image.fromarray(inner), (1, 1))
    mask = Image.new("L", (64, 16), 255)
    mask.paste(0, (0, 0, 32, 16))
    for name, image in {"t": after, "s": before, "m": mask}.items():
        image.save(folder / f"{name}.png")
    write_notes(folder, [{"file_name": "t.png", "caption": "x", "source_image": "s.png", "loss_mask": "m.png"}])
    encoders, sizes = StubEncoders(), []

    def encode_sources(pixel_values: torch.Tensor) -> torch.Tensor:
        sizes.append(tuple(pixel_values.shape))
        return encoders.images(pixel_values)["latents"]

    rules = SourceRules(1, lambda h, w: (h, w), lambda h, w: (h, w), lambda h, w: "", encode_sources)
    options: dict[str, Any] = {"sources": rules, "edit_masks": "computed", "max_aspect_ratio": 1, "dtype": "fp32"}
    build(folder, tmp_path / "cache", encoders, fit="pad", resolution=64, payload="npz", enlarge=True, **options)
    cache = load_cache(tmp_path / "cache", dtype=torch.float32)
    sample = cache[0]
    assert cache.buckets == [(64, 64)] and sizes == [(1, 3, 64, 64)]
    inside = np.zeros((8, 8), np.uint8)
    inside[3:5] = 255
    assert np.array_equal(sample["loss_mask"].numpy(), np.where(np.arange(8) < 4, 0, inside))
    changed = sample["edit_mask"].numpy()
    assert (changed[inside == 0] == 0).all() and changed.any(), "the edges of both differ, their paddings do not count"
    for name, page in (("latents", PAGE), ("source_latents", (90, 0, 0))):
        corner = (sample[name][:, 0, 0] + 1) * 127.5
        assert corner.numpy() == pytest.approx(np.array(page), abs=0.01), "each on its own page"
    afresh = {"input_dir": folder, "encode_images": encoders.images, "encode_prompts": encoders.texts}
    found = compare_afresh(cache, 1, sources=rules, **afresh)
    assert {difference.name: difference.ok for difference in found}["source_latents"] and all(d.ok for d in found)


class Plain:
    """A family that shows sources as they are."""

    @staticmethod
    def source_size(height: int, width: int) -> tuple[int, int]:
        return height, width

    @staticmethod
    def check_source(height: int, width: int) -> str:
        return ""


def test_sources_of_drawn_edits_are_padded_as_in_training() -> None:
    """A strip of 3:1 is edited on 64 x 64, of which it fills a third: one side need not grow."""
    source = Image.new("RGB", (66, 22), PAGE)
    source.paste((9, 9, 9), (4, 4, 62, 18))
    source.info["source_image"] = "strip.png"
    padded, cut = (EditViews([(64, 64), (24, 24)], as_targets=True, fit=fit) for fit in ("pad", "cut"))
    assert padded.size_of(source, (0, 0)) == (64, 64) and cut.size_of(source, (0, 0)) == (24, 24)
    (shown,) = padded.shown([source], (64, 64), Plain())
    pixels = np.asarray(shown)
    assert shown.size == (64, 64) and shown.info == source.info
    assert (pixels[:20] == PAGE).all() and (pixels[44:] == PAGE).all() and (pixels[32, 8:56] < 20).all()
    (whole,) = cut.shown([source], (24, 24), Plain())
    assert (np.asarray(whole)[12] < 20).all(), "the middle alone"
