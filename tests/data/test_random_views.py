"""Images read in training: which window is shown follows from the key alone, and every pixel of it is the image's."""

import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builds import RandomEncoders, StubEncoders, assert_same_samples, build, write_notes
from memory_cache import PATHS, released
from PIL import Image

from sciflow_hf.data.arguments import DataArguments
from sciflow_hf.data.batches.buckets import BucketBatchSampler
from sciflow_hf.data.batches.loader import BucketLoader, batch_keys_of, collate, evaluation_keys
from sciflow_hf.data.build.convert import convert_cache
from sciflow_hf.data.cache import LatentCache
from sciflow_hf.data.inspect.describe import describe_cache
from sciflow_hf.data.inspect.verify import verify_cache
from sciflow_hf.data.load import load_cache, load_data
from sciflow_hf.data.online import OnlineImages
from sciflow_hf.data.stream.loader import StreamLoader
from sciflow_hf.errors import CacheError, SciflowError

SIZES = [(40, 90), (90, 40), (120, 180), (64, 64)]  # height, width; buckets of about 32 x 32


def as_they_are(pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"latents": pixel_values}


def latent_shape(height: int, width: int) -> tuple[int, int, int]:
    return 3, height, width


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 images of which every pixel says where it is (red its row, green its column) and of which image (blue)."""
    folder, rows = tmp_path_factory.mktemp("images"), []
    for i in range(16):
        height, width = SIZES[i % 4]
        red, green = np.indices((height, width)).astype(np.uint8)
        Image.fromarray(np.stack([red, green, np.full_like(red, i)], axis=-1)).save(folder / f"fig_{i:02d}.png")
        rows.append({"file_name": f"fig_{i:02d}.png", "caption": f"figure {i}", "paper_id": f"p{i // 2}"})
    write_notes(folder, rows)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """Their cache, without latents."""
    output = tmp_path_factory.mktemp("cache") / "cache"
    build(images, output, dtype="fp32", latent_shape=latent_shape)
    return output


def load(folder: Path, images: Path | None, **options: Any) -> Any:
    """The training and the held-out part."""
    online = OnlineImages(as_they_are, [None if images is None else str(images)], **options)
    arguments = DataArguments(dataset_dir=[str(folder)], image_encoding="online", eval_fraction=0.3)
    return load_data(arguments, dtype=torch.float32, online_images=online)


def batches(cache: Any, epoch: int = 0, *, ranks: int = 1, rank: int = 0, size: int = 4, **options: Any) -> list[Any]:
    sampler = BucketBatchSampler(batch_keys_of(cache), batch_size=size, num_replicas=ranks, rank=rank, seed=5)
    loader = BucketLoader(cache, sampler, **options)
    loader.set_epoch(epoch)
    return list(released(loader))


def shown(batch: dict[str, torch.Tensor]) -> dict[tuple[int, int], np.ndarray]:
    """(row, position) -> pixels (H, W, 3) as in the image."""
    pixels = ((batch["latents"].permute(0, 2, 3, 1) + 1) * 127.5).numpy()
    return dict(zip(zip(batch["row"].tolist(), batch["position"].tolist(), strict=True), pixels, strict=True))


def pixels_of(found: list[dict[str, torch.Tensor]]) -> dict[tuple[int, int], np.ndarray]:
    return {key: value for batch in found for key, value in shown(batch).items()}


def same_pixels(one: dict[Any, np.ndarray], other: dict[Any, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


@pytest.mark.promise("E26")
def test_a_window_of_own_pixels_at_a_place_of_its_key(folder: Path, images: Path) -> None:
    train, _ = load(folder, images, crop="original", time_ids=True)
    epochs = [batches(train, epoch) for epoch in (0, 1, 0)]
    assert same_pixels(pixels_of(epochs[0]), pixels_of(epochs[2]))
    places: dict[int, set[tuple[int, int]]] = {}
    for batch in [*epochs[0], *epochs[1]]:
        for ((row, _), pixels), ids in zip(shown(batch).items(), batch["time_ids"].tolist(), strict=True):
            pixels = pixels.round().astype(int)
            (height, width), (top, left) = train.buckets[row], pixels[0, 0, :2].tolist()
            number = int(re.findall(r"\d+", train.row_ids[row])[0])
            assert (pixels[..., 2] == number).all(), "the image that the row names"
            assert np.array_equal(pixels[..., 0], np.arange(top, top + height)[:, None].repeat(width, 1))
            assert np.array_equal(pixels[..., 1], np.arange(left, left + width)[None].repeat(height, 0))
            assert ids == [*SIZES[number % 4], top, left, height, width], "what SDXL is told"
            places.setdefault(row, set()).add((top, left))
    assert sum(len(seen) > 1 for seen in places.values()) > 0.8 * len(places), "two epochs differ"
    assert len({place for seen in places.values() for place in seen}) > 12


def test_resized_it_covers_the_bucket_and_moves_along_one_side(folder: Path, images: Path) -> None:
    """As kohya's and diffusers' scripts: all of the shorter side is seen."""
    train, _ = load(folder, images, crop="resized", time_ids=True)
    tops: set[int] = set()
    for epoch in range(4):
        for batch in batches(train, epoch):
            for ((row, _), pixels), ids in zip(shown(batch).items(), batch["time_ids"].tolist(), strict=True):
                original, (top, left), size = tuple(ids[:2]), ids[2:4], train.buckets[row]
                scale = max(size[0] / original[0], size[1] / original[1])
                spare = [round(full * scale) - side for full, side in zip(original, size, strict=True)]
                assert min(spare) <= 0 and 0 <= top <= max(spare[0], 0) and 0 <= left <= max(spare[1], 0)
                middle = pixels[size[0] // 2, size[1] // 2]
                assert middle[0] == pytest.approx((top + size[0] / 2) / scale, abs=2 + 1 / scale)
                assert middle[1] == pytest.approx((left + size[1] / 2) / scale, abs=2 + 1 / scale)
                tops |= {top} if original == (90, 40) else set()
    assert len(tops) > 3


@pytest.mark.promise("E26")
def test_half_are_mirrored(folder: Path, images: Path) -> None:
    train, _ = load(folder, images, flip=True)
    plain = pixels_of(batches(load(folder, images)[0]))
    drawn = [pixels_of(batches(train, epoch)) for epoch in range(8)]
    mirrored = {key: np.array_equal(value, plain[key][:, ::-1]) for key, value in drawn[0].items()}
    assert all(np.array_equal(value, plain[key]) for key, value in drawn[0].items() if not mirrored[key])
    left_to_right = [value[0, 0, 1] < value[0, -1, 1] for epoch in drawn for value in epoch.values()]
    assert 0.3 < np.mean(left_to_right) < 0.7 and len(left_to_right) > 80


def test_two_ranks_see_what_one_sees(folder: Path, images: Path) -> None:
    train, _ = load(folder, images, crop="original", flip=True)
    for epoch in (0, 1):
        one = batches(train, epoch)
        full = {key for batch in one if len(batch["row"]) == 4 for key in shown(batch)}
        two = pixels_of([b for rank in (0, 1) for b in batches(train, epoch, ranks=2, rank=rank, size=2)])
        one = pixels_of(one)
        both = one.keys() & two.keys() & full
        assert len(both) >= 8 and all(np.array_equal(one[key], two[key]) for key in both)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_whoever_reads(folder: Path, images: Path, path: dict[str, int]) -> None:
    train, _ = load(folder, images, crop="original", flip=True)
    assert same_pixels(pixels_of(batches(train, **path)), pixels_of(batches(train)))


def test_what_is_held_out_stays(folder: Path, images: Path) -> None:
    """The centre, not mirrored, whatever training shows, and whatever the key."""
    _, moving = load(folder, images, crop="original", flip=True)
    _, still = load(folder, images)
    keys = evaluation_keys(moving.row_ids)
    assert len(moving) > 1 and same_pixels(pixels_of(batches(moving, key_of=keys)), pixels_of(batches(still)))


@pytest.mark.parametrize("payload", ["shards", "inline"])
@pytest.mark.parametrize("posterior", [False, True])
def test_without_crops_the_batches_are_those_of_the_cache(
    tmp_path: Path, images: Path, payload: str, posterior: bool
) -> None:
    """Crops and mirror images of the build, masks, sizes and draws of the posterior included."""
    for name in ("a", "b"):
        shutil.copytree(images, tmp_path / name)
    source, encoders = tmp_path / "a", RandomEncoders()
    rows = [{"file_name": f"fig_{i:02d}.png", "caption": f"figure {i}"} for i in range(16)]
    Image.fromarray(np.indices((90, 40))[0].astype(np.uint8) * 2).save(source / "mask.png")
    rows[1]["loss_mask"] = "mask.png"
    write_notes(source, rows)
    options: dict[str, Any] = dict(dtype="fp32", payload=payload, crops=1, flip=True, time_ids=True)
    build(source, tmp_path / "full", encoders, **options)
    report = build(source, tmp_path / "none", encoders, **options, latent_shape=lambda h, w: (3, h // 8, w // 8))
    records = {record.name: record for record in report.records}
    online = load_cache(tmp_path / "none", dtype=torch.float32)
    online.online_images = OnlineImages(encoders.images, [records], time_ids=True)
    cached = load_cache(tmp_path / "full", dtype=torch.float32)
    assert online.batch_keys == cached.batch_keys and len(online) == 64
    stored = batches(cached, posterior=posterior)
    encoded = batches(online, posterior=posterior)
    for one, other in zip(stored, encoded, strict=True):
        assert one.keys() == other.keys() and {"latents", "prompt_embeds", "loss_mask", "time_ids"} <= one.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert sum((batch["loss_mask"] < 255).any() for batch in stored)
    collated = batches(online, posterior=posterior, collate_fn=lambda samples: collate(samples))
    for one, other in zip(encoded, collated, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_stream_shows_the_same(folder: Path, images: Path) -> None:
    arguments = DataArguments(
        dataset_dir=[str(folder)], image_encoding="online", eval_fraction=0.3, streaming=True, shuffle_buffer=8
    )
    online = OnlineImages(as_they_are, [str(images)], crop="original", flip=True)
    stream, held_out = load_data(arguments, dtype=torch.float32, online_images=online)
    every: LatentCache = load_cache(folder, dtype=torch.float32)  # type: ignore[assignment]
    every.online_images, loader = online, StreamLoader(stream, batch_size=2, seed=3)
    taken = [batch for batch, _ in zip(loader, range(12), strict=False)]
    for batch in taken:
        for row, key, latents in zip(batch["row"].tolist(), batch["noise_key"].tolist(), batch["latents"], strict=True):
            assert torch.equal(latents, every.image(row, key)["pixel_values"])
    assert held_out is not None and torch.equal(held_out[0]["latents"], held_out.image(0)["pixel_values"])
    loader.close()


# ---- caches without latents ----


@pytest.mark.parametrize("payload", ["shards", "inline"])
@pytest.mark.parametrize("embeds", ["bf16", "none"])
def test_a_cache_without_latents(tmp_path: Path, images: Path, payload: str, embeds: str) -> None:
    """Nothing is encoded for it but text; built again, converted, verified and described it stays what it is."""
    output, options = tmp_path / "cache", dict(payload=payload, embeds=embeds, latent_shape=latent_shape)
    encoders = StubEncoders()
    assert build(images, output, encoders, **options).encoded == 16 and not encoders.image_shapes
    before = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    again = build(images, output, StubEncoders(stop_after=0), **options)
    assert (again.encoded, again.reused) == (0, 16)
    assert {file: file.read_bytes() for file in output.rglob("*") if file.is_file()} == before
    cache = load_cache(output, dtype=torch.float32)
    assert verify_cache(cache).clean and "latents" not in cache[0]
    assert cache.latent_shapes.tolist() == [[3, *bucket] for bucket in cache.buckets]
    assert "images are encoded in training" in describe_cache(cache, [str(output)])
    convert_cache(output, tmp_path / "other", payload="inline" if payload == "shards" else "shards", embeds=embeds)
    assert_same_samples(output, tmp_path / "other")
    assert load_cache(tmp_path / "other").fingerprint == cache.fingerprint
    with pytest.raises(SciflowError, match="always stores latents"):
        convert_cache(output, tmp_path / "npz", payload="npz", embeds=embeds)


def test_one_cache_for_both(tmp_path: Path, images: Path) -> None:
    """One with latents serves both; one without is not filled with them unasked."""
    build(images, tmp_path / "full")
    again = build(images, tmp_path / "full", latent_shape=latent_shape)
    assert again.encoded == 0 and "latents" in load_cache(tmp_path / "full")[0]
    build(images, tmp_path / "none", latent_shape=latent_shape)
    with pytest.raises(SciflowError, match=r"`latents` was 'none'.*--image_encoding online"):
        build(images, tmp_path / "none")
    with pytest.raises(SciflowError, match="npz, which always stores latents"):
        build(images, tmp_path / "npz", payload="npz", latent_shape=latent_shape)
    for streaming in (False, True):
        arguments = DataArguments(dataset_dir=[str(tmp_path / "none")], streaming=streaming)
        with pytest.raises(CacheError, match=r"none' holds no latents.*--image_encoding online"):
            load_data(arguments)


# ---- what goes wrong ----


def test_an_image_that_is_gone_or_broken_is_named(tmp_path: Path, folder: Path, images: Path) -> None:
    copy = tmp_path / "images"
    shutil.copytree(images, copy)
    train, _ = load(folder, copy)
    name, last = train.row_ids[-1], len(train) - 1
    (copy / name).write_bytes((copy / name).read_bytes()[:60])
    with pytest.raises(CacheError, match=rf"row \d+ \({name}.*unreadable image.*Mend the file"):
        train.image(last)
    with pytest.raises(CacheError, match=name):
        batches(train)
    (copy / name).unlink()
    with pytest.raises(CacheError, match=rf"there is no image {copy / name}.*--image_dir"):
        train.image(last)
    with pytest.raises(CacheError, match=r"there is no image .*fig_0.*--image_dir"):
        load(folder, None)
    with pytest.raises(CacheError, match="`input_dir` has no image of that name"):
        train.online_images = OnlineImages(as_they_are, [{}])
        train.image(0)


def test_no_image_outside_of_its_folder(tmp_path: Path, images: Path) -> None:
    online = OnlineImages(as_they_are, [str(images)])
    for name in ("../secret.png", str(tmp_path / "other.png"), ""):
        (tmp_path / "other.png").write_bytes(b"")
        with pytest.raises(CacheError, match="there is no image"):
            online.read(name, "", (8, 8), None, source=0, root="", where="row 0")
    absolute = str(images / "fig_00.png")
    assert online.read(absolute, "", (8, 8), None, source=0, root="", where="row 0")["pixel_values"].shape == (3, 8, 8)
    with pytest.raises(CacheError, match=r"row 0: .*no variant of an image is called 'odd'"):
        online.read("fig_00.png", "odd", (8, 8), None, source=0, root="", where="row 0")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"random_crop": True}, r"`random_crop`: stored latents.*--image_encoding online.*--crops N"),
        ({"random_flip": True}, r"`random_flip`: stored latents.*--flip`"),
        ({"image_dir": ["x"]}, "`image_dir`: stored latents"),
        ({"image_encoding": "online", "crop_from": "original"}, "`crop_from` original is for `--random_crop`"),
        ({"image_encoding": "online", "image_dir": ["x", "y"]}, "2 folders for 1 caches"),
        ({"image_encoding": "later"}, "`image_encoding` 'later': use one of cached, online"),
        ({"image_encoding": "online", "random_crop": True, "crop_from": "x"}, "`crop_from` 'x': use one of resized"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(SciflowError, match=words):
        DataArguments(dataset_dir=["a"], **options)


def test_workers_get_the_images_and_no_vae(folder: Path, images: Path) -> None:
    train, _ = load(folder, images, crop="original")
    before = train.image(1, 7)["pixel_values"]
    train.online_images = sent = pickle.loads(pickle.dumps(train.online_images))
    assert sent.encode is None and torch.equal(train.image(1, 7)["pixel_values"], before)
    assert (sent.crop, sent.fixed().crop, str(sent.fixed())) == ("original", "", "centre crops")
