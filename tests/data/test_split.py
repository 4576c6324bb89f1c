"""What is held out: one rule for caches, streams and images, pinned by a hash of our own."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import sciflow_hf as sf
from sciflow_hf.data import split
from sciflow_hf.data.load import load_cache
from sciflow_hf.images.classes import load_class_images

FRACTION = 0.3
PAPERS = [f"hep/{number}" for number in range(24)]


def own_hash(*parts: str) -> int:
    """SplitMix64 over the words of each text and its inverted length, in plain integers."""
    mask = 2**64 - 1

    def mixed(z: int) -> int:
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z = ((z ^ (z >> shift)) * factor) & mask
        return z ^ (z >> 31)

    state = 0
    for part in parts:
        data = part.encode()
        words = [int.from_bytes(data[start : start + 8], "little") for start in range(0, len(data), 8)]
        for word in [*words, mask - len(data)]:
            state = mixed(((state + 0x9E3779B97F4A7C15) & mask) ^ mixed(word))
    return state


def expected(names: list[str]) -> set[str]:
    return {name for name in names if own_hash(name, "eval split") / 2**64 < FRACTION}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images of each paper, in two index files."""
    folder = tmp_path_factory.mktemp("cache")
    rows = [(paper, f"{paper}/{i}.png") for paper in PAPERS for i in range(2)]
    (folder / "p").mkdir()
    latents, embeds = np.zeros((4, 4, 4), np.float16), np.zeros((3, 5), np.float16)
    np.savez(folder / "p" / "all.npz", latents=latents, prompt_embeds=embeds)
    for part, some in enumerate((rows[:30], rows[30:])):
        table = {
            "paper_id": [paper for paper, _ in some],
            "image_path": [image for _, image in some],
            "caption": [image for _, image in some],
            "cache_path": ["p/all.npz"] * len(some),
            "latent_shape": [[4, 4, 4]] * len(some),
            "prompt_embeds_shape": [[3, 5]] * len(some),
            "bucket_h": [32] * len(some),
            "bucket_w": [32] * len(some),
        }
        pq.write_table(pa.table(table), folder / f"data_{part}.parquet")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for name in ("axon", "cell"):
        (root / name).mkdir()
        for i in range(20):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(root / name / f"{i}.png")
    return root


def sides(cache: Path, images: Path) -> list[tuple[set[str], set[str]]]:
    """Groups to train on and held out: of a cache, of a stream, of images with classes."""
    train, held_out = load_cache(cache).split(FRACTION)
    stream, kept = load_cache(cache, streaming=True).split(FRACTION)
    rows = (row for part in range(2) for row, _ in stream.read_rows(part))
    streamed = {row.values["paper_id"] for row in rows if stream.keeps(row)}
    args = sf.ClassImageArguments(input_dir=str(images), eval_fraction=FRACTION)
    pixels, others = load_class_images(args, image_size=8)
    return [
        (set(train.groups), set(held_out.groups)),
        (streamed, set(kept.groups)),
        (set(pixels.groups), set(others.groups)),
    ]


def test_a_few_hashes() -> None:
    """What old runs held out is held out for ever."""
    assert own_hash("hep/0", "eval split") == 0x990F78BFD1F129DE
    assert own_hash("axon/7.png", "eval split") == 0xDA1B78536F6FFDF8
    assert split.hash64("hep/0", "eval split") == 0x990F78BFD1F129DE
    assert [int(split.is_held_out(name, FRACTION)) for name in PAPERS[:8]] == [0, 0, 0, 0, 0, 0, 0, 1]
    assert not any(split.is_held_out(name, 0.0) for name in PAPERS)


def test_cache_stream_and_images_hold_out_the_same_groups(cache: Path, images: Path) -> None:
    names = [f"{name}/{i}.png" for name in ("axon", "cell") for i in range(20)]
    for (train, held_out), everything in zip(sides(cache, images), (PAPERS, PAPERS, names), strict=True):
        assert held_out == expected(everything) and train == set(everything) - held_out
        assert train and held_out


def test_the_rule_stands_once(cache: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rule in `data/split.py` moves all of them."""
    before = sides(cache, images)
    monkeypatch.setattr(split, "hash64", lambda group, *_: own_hash(group, "another rule"))
    split.is_held_out.cache_clear()
    try:
        after = sides(cache, images)
    finally:
        split.is_held_out.cache_clear()
    assert after[0] == after[1] and all(one != other for one, other in zip(before, after, strict=True))


def test_small_data_sets_hold_one_group_out(tmp_path: Path) -> None:
    """At the usual fraction the hash selects none of 20 groups in .95^20 = 36 % of the cases; the smallest stands in.

    It goes back to training once the hash selects another, and no other group moves when data is added.
    """
    folder = tmp_path / "images"
    (folder / "axon").mkdir(parents=True)
    held: list[set[str]] = []
    for number in range(1, 41):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / "axon" / f"{number}.png")
        args = sf.ClassImageArguments(input_dir=str(folder), eval_fraction=0.05)
        train, others = load_class_images(args, image_size=8, num_classes=0)
        held.append(set() if others is None else set(others.groups))
        assert len(train) + len(others or []) == number and not held[-1] & set(train.groups)
    by_hash = [
        {f"axon/{i}.png" for i in range(1, n + 1) if split.is_held_out(f"axon/{i}.png", 0.05)} for n in range(41)
    ]
    assert held[0] == set() and all(len(found) >= 1 for found in held[1:])
    assert all(found == expected for found, expected in zip(held, by_hash[1:], strict=True) if expected)
    stood_in = [found for found, expected in zip(held[1:], by_hash[2:], strict=True) if not expected]
    assert stood_in and all(len(found) == 1 for found in stood_in)


def test_stream_and_cache_have_the_same_stand_in(cache: Path) -> None:
    _, held_out = load_cache(cache).split(1e-9)
    stream, kept = load_cache(cache, streaming=True).split(1e-9)
    assert kept is not None and set(kept.groups) == set(held_out.groups) and len(set(kept.groups)) == 1
    assert len(stream) + len(kept) == len(load_cache(cache))
    streamed = {row.values["paper_id"] for part in range(2) for row, _ in stream.read_rows(part) if stream.keeps(row)}
    assert not streamed & set(kept.groups)
