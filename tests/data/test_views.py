"""Pixels of a view: colours, orientation, crops, mirror images, loss masks."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from builds import PAYLOADS, STEP, StubEncoders, assert_same_samples, build, picture, write_notes
from PIL import Image

from sciflow_hf.data.build.sources.pixels import oriented_size, to_rgb
from sciflow_hf.data.build.views import fit_pixels, variants, view_of
from sciflow_hf.data.load import load_cache
from sciflow_hf.errors import SciflowError


def whole(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    return fit_pixels(image, view_of("", "x.png", (image.height, image.width), size))


def _saved(image: Image.Image, file: Path, **options: Any) -> Image.Image:
    image.save(file, **options)
    return Image.open(file)


def test_transparency_becomes_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 255, 51))  # a fifth of blue
    rgb = to_rgb(_saved(image, tmp_path / "a.png"))
    assert rgb.mode == "RGB" and rgb.getpixel((0, 0)) == (255, 0, 0) and rgb.getpixel((1, 0)) == (204, 204, 255)
    grey = Image.new("LA", (1, 1), (0, 0))
    assert to_rgb(_saved(grey, tmp_path / "b.png")).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (1, 1), 3)
    palette.putpalette([9, 9, 9] * 4)
    assert to_rgb(_saved(palette, tmp_path / "c.png", transparency=3)).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(_saved(palette, tmp_path / "d.png")).getpixel((0, 0)) == (9, 9, 9)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_keeps_its_range(tmp_path: Path, suffix: str) -> None:
    values = np.array([[257, 514, 32768, 40000]], dtype=np.uint16)
    rgb = to_rgb(_saved(Image.fromarray(values), tmp_path / f"a.{suffix}"))
    assert np.asarray(rgb)[0].tolist() == [[1] * 3, [2] * 3, [128] * 3, [156] * 3]


def test_other_modes_become_rgb(tmp_path: Path) -> None:
    assert np.asarray(to_rgb(Image.fromarray(np.float32([[0, 0.5, 1]]))))[0, :, 0].tolist() == [0, 128, 255]
    assert np.asarray(to_rgb(Image.fromarray(np.float32([[-10, 0, 10]]))))[0, :, 0].tolist() == [0, 128, 255]
    assert np.asarray(to_rgb(Image.fromarray(np.int32([[0, 1 << 20]]))))[0, :, 0].tolist() == [0, 255]
    for mode in ("1", "L", "CMYK", "YCbCr"):
        assert to_rgb(Image.new(mode, (3, 2))).mode == "RGB"


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = picture(20, 40, (255, 255, 255))
    image.paste((0, 0, 0), (0, 0, 10, 20))  # the left quarter is black
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: left becomes top
    saved = _saved(image, tmp_path / "a.jpg", exif=exif, quality=95)
    assert oriented_size(saved) == (40, 20)
    grey = np.asarray(to_rgb(saved).convert("L"))
    assert grey.shape == (40, 20) and grey[:8].max() < 40 and grey[12:].min() > 215
    (tmp_path / "a.txt").write_text("x")
    build(tmp_path, tmp_path / "cache")
    height, width = load_cache(tmp_path / "cache").buckets[0]
    assert height > width


def test_resizing_covers_and_crops_the_centre() -> None:
    image = picture(40, 100, (0, 0, 0))
    image.paste((255, 255, 255), (30, 0, 70, 40))  # the middle square
    pixels = whole(image, (16, 16))
    assert pixels.shape == (3, 16, 16) and pixels.dtype == np.float32 and pixels.min() > 0.8
    image = picture(100, 40, (0, 0, 0))
    image.paste((255, 255, 255), (0, 30, 40, 70))
    assert whole(image, (8, 8)).min() > 0.8
    assert whole(image, (20, 8)).min() == -1, "nothing is cropped where the shape fits"


def test_resizing_is_antialiased() -> None:
    """A fine checkerboard becomes grey; picking single pixels would keep black and white."""
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    pixels = whole(Image.fromarray(board).convert("RGB"), (8, 8))
    assert np.abs(pixels[:, 1:-1, 1:-1]).max() < 0.1


# --- crops and mirror images ---


def coordinates(height: int, width: int) -> Image.Image:
    """Every pixel says where it is: red is the row, green the column."""
    rows, columns = np.indices((height, width)).astype(np.uint8)
    return Image.fromarray(np.stack([rows, columns, np.zeros_like(rows)], axis=-1))


def levels(pixels: np.ndarray) -> np.ndarray:
    """(3, H, W) in [-1, 1] -> (H, W, 3) as in the image."""
    return ((pixels.transpose(1, 2, 0) + 1) * 127.5).round().astype(int)


def test_names_of_variants() -> None:
    assert variants(0, False) == [""] and variants(0, True) == ["", "flip"]
    assert variants(2, True) == ["", "crop1", "crop2", "flip", "crop1-flip", "crop2-flip"]
    for wrong in ("crop0", "crop", "-flip", "flip-crop1", "crop1flip", "cropx"):
        with pytest.raises(ValueError, match="no variant"):
            view_of(wrong, "x.png", (40, 60), (32, 32))


def test_a_crop_is_a_window_of_native_pixels_at_a_place_of_its_own() -> None:
    image, places = coordinates(120, 200), set()
    for number in range(1, 30):
        view = view_of(f"crop{number}", "a.png", (120, 200), (32, 48))
        (top, left), shown = view.crop, levels(fit_pixels(image, view))
        assert np.array_equal(shown[..., 0], np.arange(top, top + 32)[:, None].repeat(48, 1))
        assert np.array_equal(shown[..., 1], np.arange(left, left + 48)[None].repeat(32, 0))
        assert view == view_of(f"crop{number}", "a.png", (120, 200), (32, 48)), "it never moves"
        places.add(view.crop)
    assert len(places) > 25 and len({top for top, _ in places}) > 15 and len({left for _, left in places}) > 15
    one, other = (view_of("crop1", name, (120, 200), (32, 48)).crop for name in ("a.png", "b.png"))
    assert one[0] != other[0] and one[1] != other[1], "images have places of their own"


def test_a_small_image_is_enlarged_until_it_covers_the_bucket() -> None:
    image = coordinates(16, 40)
    view = view_of("crop3", "a.png", (16, 40), (32, 32))
    resized = np.asarray(image.resize((80, 32), Image.Resampling.LANCZOS)).astype(int)  # as RandomCrop would see it
    top, left = view.crop
    assert top == 0 and 0 <= left <= 48
    assert np.abs(levels(fit_pixels(image, view)) - resized[:, left : left + 32]).max() <= 1


@pytest.mark.parametrize("name", ["", "crop2"])
def test_a_flip_is_the_mirror_image(name: str) -> None:
    image, size = coordinates(90, 150), (32, 48)
    plain, flipped = (view_of(n, "a.png", (90, 150), size) for n in (name, f"{name}-flip".removeprefix("-")))
    assert np.array_equal(fit_pixels(image, plain), fit_pixels(image, flipped)[:, :, ::-1])

    # The same window of the mirrored image, counted from its left.
    resized = 150 if name else round(150 * 32 / 90)
    assert flipped.crop == (plain.crop[0], resized - 48 - plain.crop[1]) and flipped.flipped and not plain.flipped


def test_where_the_whole_image_is_cropped() -> None:
    """As SDXL counts: in pixels of the resized image."""
    assert view_of("", "a.png", (100, 300), (50, 50)).crop == (0, 50)  # resized to 50 x 150
    assert view_of("", "a.png", (300, 100), (50, 50)).crop == (50, 0)
    assert view_of("", "a.png", (64, 96), (32, 48)).crop == (0, 0)


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """Three pictures of three shapes that say where each of their pixels is."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i, size in enumerate([(90, 150), (150, 90), (60, 60)]):
        coordinates(*size).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"figure {i}")
    return folder


@pytest.mark.parametrize("payload", PAYLOADS)
def test_variants_are_rows_of_one_group(shapes: Path, tmp_path: Path, payload: str, caplog: Any) -> None:
    output, encoders = tmp_path / "cache", StubEncoders()
    report = build(shapes, output, encoders, crops=2, flip=True, payload=payload, batch_size=4, dtype="fp32")
    assert report.samples == 18 and "mirrored text" in caplog.text
    assert set(encoders.prompts) == {"", "figure 0", "figure 1", "figure 2"}
    assert payload == "npz" or len(encoders.prompts) == 4, "a prompt is encoded once"
    cache = load_cache(output, dtype=torch.float32)
    assert len(set(cache.row_ids)) == 18 and "0.png#crop1-flip" in cache.row_ids and "0.png" in cache.row_ids
    assert len(set(cache.groups)) == 3
    latents = dict(zip(cache.row_ids, (cache[i]["latents"] for i in range(18)), strict=True))
    for i, row in enumerate(cache.index):
        image, (height, width) = Image.open(shapes / row["image_path"]), cache.buckets[i]
        assert (row["original_h"], row["original_w"]) == (image.height, image.width)
        if row["variant"] == "crop1":
            box = (row["crop_left"], row["crop_top"], row["crop_left"] + width, row["crop_top"] + height)
            pixels = torch.from_numpy(np.asarray(image.crop(box), dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1
            expected = torch.nn.functional.avg_pool2d(pixels, STEP)
            assert torch.allclose(latents[cache.row_ids[i]], expected, atol=1e-5)
        if row["variant"].endswith("flip"):
            name = row["variant"].removesuffix("flip").removesuffix("-")
            plain = latents[f"{row['image_path']}#{name}" if name else row["image_path"]]
            assert torch.allclose(latents[cache.row_ids[i]], plain.flip(-1), atol=1e-5)
    assert (
        build(shapes, output, StubEncoders(stop_after=0), crops=2, flip=True, payload=payload, dtype="fp32").reused
        == 18
    )


def test_crops_may_be_added_later(shapes: Path, tmp_path: Path) -> None:
    build(shapes, tmp_path / "cache")
    encoders = StubEncoders()
    assert build(shapes, tmp_path / "cache", encoders, crops=1).encoded == 3 and encoders.prompts == []
    build(shapes, tmp_path / "straight", crops=1)
    assert_same_samples(tmp_path / "cache", tmp_path / "straight")


@pytest.mark.parametrize("payload", PAYLOADS)
def test_time_ids_say_original_size_top_left_and_size(tmp_path: Path, payload: str) -> None:
    """(6,) as SDXL is told them, height before width and top before left; read off the pixels, not off the view."""
    folder = tmp_path / "images"
    folder.mkdir()
    coordinates(90, 250).save(folder / "wide.png")
    coordinates(250, 90).save(folder / "tall.png")
    for name in ("wide", "tall"):
        (folder / f"{name}.txt").write_text(name)
    build(folder, tmp_path / "cache", payload=payload, crops=3, time_ids=True, dtype="fp32")
    cache = load_cache(tmp_path / "cache", dtype=torch.float32)
    for name, (height, width) in zip(cache.row_ids, cache.buckets, strict=True):
        sample = cache[cache.row_ids.index(name)]
        size = (90, 250) if name.startswith("wide") else (250, 90)
        if "#crop" in name:  # in native pixels: the mean of a block of 8 is 3.5 after its first
            place = [round(v) for v in ((sample["latents"][:2, 0, 0] + 1) * 127.5 - 3.5).tolist()]
            assert place[0] != place[1], "so that one for the other is noticed"
        else:  # resized until it covers the bucket, and cut alike on both sides of its longer side
            place = [0, 0]
            longer = int(name.startswith("wide"))
            place[longer] = round((size[longer] * min(height, width) / 90 - (height, width)[longer]) / 2)
            assert place[longer] > 0
        assert sample["time_ids"].tolist() == [*size, *place, height, width], name


# --- loss masks ---


def mask_image(height: int, width: int) -> Image.Image:
    """Black but for the left half, and a grey corner at its top right."""
    values = np.zeros((height, width), np.uint8)
    values[:, : width // 2] = 255
    values[: height // 2, width // 2 :] = 51
    return Image.fromarray(values)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_loss_mask_is_fitted_like_its_image(tmp_path: Path, payload: str) -> None:
    folder = tmp_path / "images"
    (folder / "masks").mkdir(parents=True)
    coordinates(64, 64).save(folder / "a.png")
    coordinates(64, 64).save(folder / "b.png")
    coordinates(64, 192).save(folder / "wide.png")
    mask_image(64, 64).save(folder / "masks/a.png")
    wide = Image.fromarray(np.arange(32 * 96, dtype=np.uint32).reshape(32, 96).astype(np.uint8) // 2)
    wide.paste(255, (0, 0, 37, 32))
    wide.save(folder / "masks/wide.png")  # at half of the image's resolution
    rows = [{"file_name": f"{name}.png", "caption": name} for name in ("a", "b", "wide")]
    rows[0]["loss_mask"], rows[2]["loss_mask"] = "masks/a.png", "masks/wide.png"
    write_notes(folder, rows)
    report = build(folder, tmp_path / "cache", payload=payload, flip=True, crops=1, strict=True)
    assert report.samples == 12 and report.skipped == [], "masks are not images without captions"
    cache = load_cache(tmp_path / "cache")
    assert "loss_mask" not in cache.index.column_names or payload == "inline"
    found = {name: cache[i]["loss_mask"] for i, name in enumerate(cache.row_ids)}
    assert all(mask.dtype == torch.uint8 for mask in found.values())
    expected = torch.tensor([[255, 255, 51, 51]] * 2 + [[255, 255, 0, 0]] * 2, dtype=torch.uint8)
    assert torch.equal(found["a.png"], expected) and torch.equal(found["a.png#flip"], expected.flip(-1))
    assert found["b.png"].shape == (4, 4) and (found["b.png"] == 255).all(), "without a mask everything counts"
    native = np.asarray(wide).repeat(2, 0).repeat(2, 1).astype(float)  # by hand, at the image's resolution
    for i, row in enumerate(cache.index):
        if row["image_path"] != "wide.png":
            continue
        (height, width), mask = cache.buckets[i], found[cache.row_ids[i]].numpy()
        is_crop, is_flip = row["variant"].startswith("crop"), row["variant"].endswith("flip")
        scale = 1 if is_crop else 64 / height
        left = round(192 / scale) - width - row["crop_left"] if is_flip else row["crop_left"]
        rows, columns = (
            (start + np.arange(n) + 0.5) * scale for start, n in ((row["crop_top"], height), (left, width))
        )
        window = native[rows.astype(int)][:, columns.astype(int)]
        expected = window.reshape(height // STEP, STEP, width // STEP, STEP).mean((1, 3))
        assert np.abs(mask - (expected[:, ::-1] if is_flip else expected)).max() <= (1 if is_crop else 40), row


def test_broken_masks_are_handled_like_broken_images(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    rows = []
    for name in ("absent", "broken", "square", "good"):
        coordinates(40, 60).save(folder / f"{name}.png")
        rows.append({"file_name": f"{name}.png", "caption": name, "loss_mask": f"mask_{name}.png"})
    write_notes(folder, rows)
    (folder / "mask_broken.png").write_bytes(b"no image")
    mask_image(40, 40).save(folder / "mask_square.png")
    mask_image(40, 60).save(folder / "mask_good.png")
    report = build(folder, tmp_path / "cache")
    assert report.samples == 1 and load_cache(tmp_path / "cache").row_ids == ["good.png"]
    reasons = dict(report.skipped)
    assert reasons.keys() == {"absent.png", "broken.png", "square.png"}
    assert all("unusable loss mask" in reason for reason in reasons.values())
    assert "40 x 40" in reasons["square.png"] and "40 x 60" in reasons["square.png"]
    with pytest.raises(SciflowError, match=r"absent\.png: unusable loss mask.*--strict"):
        build(folder, tmp_path / "strict", strict=True)


@pytest.mark.parametrize("form", ["images", "paths"])
def test_masks_of_a_data_set(tmp_path: Path, form: str) -> None:
    pictures = [picture(64, 64), picture(64, 64, (1, 2, 3))]
    columns: dict[str, Any] = {"image": pictures, "caption": ["x", "y"], "loss_mask": [mask_image(64, 64), None]}
    features = {"image": datasets.Image(), "caption": datasets.Value("string"), "loss_mask": datasets.Image()}
    if form == "paths":
        columns["loss_mask"], features["loss_mask"] = ["m.png", None], datasets.Value("string")
    source = tmp_path / "data"
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).save_to_disk(source)
    mask_image(64, 64).save(source / "m.png")
    build(source, tmp_path / "cache")
    cache = load_cache(tmp_path / "cache")
    masks = {cache.index["caption"][i]: cache[i]["loss_mask"] for i in range(2)}
    assert masks["x"][0].tolist() == [255, 255, 51, 51] and (masks["y"] == 255).all()


def test_another_mask_makes_the_sample_anew(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    rows = []
    for i in range(3):
        coordinates(40, 60).save(folder / f"{i}.png")
        mask_image(40, 60).save(folder / f"m{i}.png")
        rows.append({"file_name": f"{i}.png", "caption": str(i), "loss_mask": f"m{i}.png"})
    write_notes(folder, rows)
    build(folder, tmp_path / "cache")
    Image.new("L", (60, 40), 9).save(folder / "m1.png")
    report = build(folder, tmp_path / "cache")
    cache = load_cache(tmp_path / "cache")
    assert report.encoded == 1 and (cache[cache.row_ids.index("1.png")]["loss_mask"] == 9).all()


def test_pixels_lie_in_memory_as_in_caches_of_earlier_versions() -> None:
    """The layout of a batch decides which convolution runs, and so how its latents round."""
    pixels = whole(picture(48, 32), (32, 32))
    assert np.stack([pixels, pixels]).strides[1] == pixels.itemsize, "channels last"
