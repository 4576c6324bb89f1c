"""SciForma's own caches, `<stem>_flux_h.npz` with `vae_h`, written here by the same encoders as ours."""

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sciforma
import torch
from builds import LENGTH, STEP, WIDTH, StubEncoders, build
from caches import resave

from sciflow_hf.cli import main
from sciflow_hf.data.batches.loader import KeyedDataset
from sciflow_hf.data.cache import LatentCache
from sciflow_hf.data.inspect.verify import verify_cache
from sciflow_hf.data.load import load_cache
from sciflow_hf.diffusion.randomness import signed64
from sciflow_hf.errors import CacheError

pytestmark = pytest.mark.usefixtures("datasets_cache")
GENERATIONS = ["split=gen_768"]


def log_variance(latents: torch.Tensor) -> torch.Tensor:
    """Some of it beyond what diffusers takes."""
    return torch.sin(latents * 100) * 40 - 5


class Encoders(StubEncoders):
    def images(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        latents = super().images(pixel_values)["latents"]
        found = DiagonalGaussianDistribution(torch.cat([latents, log_variance(latents)], 1))
        return {"latents": found.mode(), "latents_std": found.std}


def write_npz(image: Path, caption: str, encoders: StubEncoders, *, compressed: bool = False) -> None:
    """As their script: mean and log-variance, half precision text, a mask."""
    from PIL import Image

    pixels = torch.from_numpy(np.asarray(Image.open(image), dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    latents = torch.nn.functional.avg_pool2d(pixels, STEP)
    mask = np.arange(LENGTH) < 3
    arrays = {
        "vae_h": torch.cat([latents, log_variance(latents)], 1)[0].numpy(),
        "prompt_embeds": encoders.texts([caption])["prompt_embeds"][0].half().numpy(),
        "attention_mask": mask.astype(np.int64),
    }
    (np.savez_compressed if compressed else np.savez)(image.with_name(f"{image.stem}_flux_h.npz"), **arrays)


def write_theirs(folder: Path, *, older: bool = False, sources: bool = True, compressed: bool = False) -> Path:
    """`sciforma.files` with caches next to the images."""
    sciforma.files(folder, older=older)
    for row in pq.read_table(folder / "metadata.parquet").to_pylist():
        for name in ("image_path", "target_image_path", *(["source_image_path"] if sources else [])):
            if row[name]:
                write_npz(folder / row[name], row["caption"], StubEncoders(), compressed=compressed)
    return folder


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_theirs(tmp_path_factory.mktemp("theirs") / "data")


def batches(cache: Any, *, posterior: bool) -> Iterator[dict[str, Any]]:
    rows = sorted(range(len(cache)), key=lambda row: (cache.buckets[row], cache.caption(row)))
    keyed = KeyedDataset(cache, posterior=posterior)
    for start in range(0, len(rows), 2):
        two = rows[start : start + 2]
        if len({cache.buckets[row] for row in two}) == 1:
            yield keyed[[(row, number, signed64(number), 0) for number, row in enumerate(two, start)]]


@pytest.mark.parametrize("kind", ["plain", "compressed", "older"])
def test_batches_are_those_of_our_own_cache(theirs: Path, tmp_path: Path, kind: str) -> None:
    """Bit for bit; the deviation of their posterior is drawn from by the same keys."""
    options = {"older": kind == "older", "compressed": kind == "compressed"}
    folder = theirs if kind == "plain" else write_theirs(tmp_path / "theirs", **options)
    images = sciforma.files(tmp_path / "images")
    build(images, tmp_path / "ours", Encoders(), split="gen_768", buckets="given", payload="npz", dtype="fp32")
    for posterior in (False, True):
        caches = [load_cache(path, dtype=torch.float32, row_filter=GENERATIONS) for path in (folder, tmp_path / "ours")]
        found, expected = (list(batches(cache, posterior=posterior)) for cache in caches)
        assert len(found) == len(expected) > 5
        for one, other in zip(found, expected, strict=True):
            other.pop("pooled_prompt_embeds")  # of our stub alone
            assert one.keys() == other.keys() >= {"latents", "prompt_embeds"} and "attention_mask" not in one
            for name in one.keys() - {"row"}:
                assert torch.equal(one[name], other[name]), (posterior, name)


def test_the_index_is_read_without_the_files(theirs: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = load_cache(theirs)
    assert isinstance(cache, LatentCache) and len(cache) == 40
    columns = sciforma.columns("generation")
    assert cache.buckets[:20] == list(zip(columns["bucket_h"], columns["bucket_w"], strict=True))
    assert cache.text_shapes.tolist() == [[LENGTH, WIDTH]] * 40 and cache.kinds == ["generation"] * 20 + ["edit"] * 20
    assert [tuple(shape) for shape in cache.latent_shapes[:3].tolist()] == [(3, 8, 12), (3, 12, 8), (3, 8, 16)]
    assert cache.row_ids[20] == "images/target_00.png" and cache.groups[:3] == ["2401.00000"] * 2 + ["2401.00001"]
    assert cache.index["image_path"][:] == cache.strings("image_path")


def test_an_edit_reads_the_file_next_to_its_source(theirs: Path, tmp_path: Path) -> None:
    cache = load_cache(theirs, dtype=torch.float32, row_filter=["split=edit_1024"])
    expected = torch.from_numpy(np.load(theirs / "images/source_03_flux_h.npz")["vae_h"][:3])
    assert isinstance(cache, LatentCache) and torch.equal(cache[3]["source_latents"], expected)
    alone = load_cache(write_theirs(tmp_path / "alone", sources=False))
    assert isinstance(alone, LatentCache) and alone[19]["latents"].shape == (3, 12, 8)
    with pytest.raises(CacheError, match=r"row 20 .*target_00\.png.*source_00_flux_h\.npz, which .* `--row_filter`"):
        alone[20]


def test_verified_and_converted(theirs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = load_cache(theirs, dtype=torch.float32)
    assert isinstance(cache, LatentCache)
    report = verify_cache(cache, progress=False)
    assert report.clean, report.problems
    with caplog.at_level(logging.INFO):
        main(["cache", "convert", "--input_dir", str(theirs), "--output_dir", str(tmp_path / "new")])
    assert "`attention_mask` of the source is left out" in caplog.text
    new = load_cache(tmp_path / "new", dtype=torch.float32)
    assert isinstance(new, LatentCache) and new.row_ids == cache.row_ids and new.kinds == cache.kinds
    assert verify_cache(new, progress=False).clean
    for row in (0, 25):
        sample, old = new[row], cache[row]
        assert sample.keys() == old.keys() - {"attention_mask"}
        assert all(torch.equal(sample[name], old[name].bfloat16().float()) for name in sample)
    stream = load_cache(tmp_path / "new", streaming=True, row_filter=GENERATIONS)
    assert len(stream) == 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vae_h": np.zeros((5, 8, 12), np.float32)}, r"`vae_h` has shape \(5, 8, 12\), which is no mean and log-var"),
        (
            {"vae_h": np.zeros((6, 12, 8), np.float32)},
            r"but the first npz .* of `latent_shape` \(3, 8, 12\)",
        ),
        ({"vae_h": np.full((6, 8, 12), np.nan, np.float32)}, r"`latents` holds NaN or Inf"),
        (
            {"prompt_embeds": np.zeros((LENGTH + 1, WIDTH), np.float16)},
            r"`prompt_embeds` in .* of `prompt_embeds_shape`",
        ),
        (
            {"attention_mask": np.zeros(3, np.int64)},
            r"has shape \(3,\), but must have one value for each of the 5",
        ),
        ({"attention_mask": np.full(LENGTH, 2)}, r"`attention_mask` holds other values than 0 and 1"),
    ],
)
def test_verify_names_what_is_wrong(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = write_theirs(tmp_path / "theirs")
    resave(folder / "images/gen_03_flux_h.npz", **change)
    cache = load_cache(folder, dtype=torch.float32)
    assert isinstance(cache, LatentCache)
    report = verify_cache(cache, progress=False)
    assert {problem.row for problem in report.problems} == {3} and re.search(message, str(report.problems[0]))


def test_an_index_without_bad_rows_lies_next_to_theirs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_theirs(tmp_path / "theirs")
    (folder / "images/gen_03_flux_h.npz").write_bytes(b"cut short")
    assert main(["cache", "verify", "--dataset_dir", str(folder), "--repair"]) == 1
    shown = capsys.readouterr().out
    found = re.search(r"--dataset_dir (\S+) --payload_dir (\S+)", shown)
    assert found is not None and "gen_03_flux_h.npz" in shown
    repaired = load_cache(found[1], payload_dir=found[2])
    assert isinstance(repaired, LatentCache) and len(repaired) == 39
    assert verify_cache(repaired, progress=False).clean and "images/gen_03.png" not in repaired.row_ids
    main(["cache", "info", "--dataset_dir", str(folder)])
    told = capsys.readouterr().out
    assert re.search(r"layout +flux_h\n", told) and "edits" in told and re.search(r"posterior +sample", told)


def test_log_variances_are_cut_as_by_diffusers(theirs: Path) -> None:
    cache = load_cache(theirs, dtype=torch.float32)
    assert isinstance(cache, LatentCache)
    std, stored = cache[0]["latents_std"], torch.from_numpy(np.load(theirs / "images/gen_00_flux_h.npz")["vae_h"][3:])
    assert stored.min() < -30 and stored.max() > 20
    assert float(std.min()) == pytest.approx(np.exp(-15)) and float(std.max()) == pytest.approx(np.exp(10))


def test_images_without_caches(tmp_path: Path) -> None:
    folder = sciforma.files(tmp_path / "in")
    with pytest.raises(CacheError, match=r"no 'images/gen_00_flux_h\.npz' \(next to the image .*`--input_dir`"):
        load_cache(folder)
    with pytest.raises(CacheError, match=r"`streaming`: .*metadata\.parquet lists images.*--payload inline"):
        load_cache(folder, streaming=True)


def test_candidates_may_have_their_files_too(theirs: Path, tmp_path: Path) -> None:
    """A table of candidates without shapes, whose `cache_path` names such files."""
    rows = [{"group_id": "a", "caption": "x", "cache_path": f"images/gen_{i:02d}_flux_h.npz", "reward": i / 10,
             "bucket_h": 64, "bucket_w": 96} for i in (0, 3)]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "candidates.parquet")
    cache = load_cache(tmp_path / "candidates.parquet", payload_dir=theirs)
    assert isinstance(cache, LatentCache) and cache[1]["latents"].shape == (3, 8, 12)
    assert json.loads(json.dumps(cache.latent_shapes.tolist())) == [[3, 8, 12]] * 2
