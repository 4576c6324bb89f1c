"""Each way in which a cache can be broken gets an error that names file, row and column."""

import json
import logging
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from caches import edit, index_files, payload_of, resave, write_cache

from sciflow_hf.data.layouts.base import Columns
from sciflow_hf.data.load import load_cache
from sciflow_hf.errors import CacheError, SciflowError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_cache(tmp_path / "cache", settings={"family": "x"})


# --- broken payloads ---


def _broken(folder: Path, *words: str) -> None:
    """Row 0 fails, naming row, image, file and the given words; row 1 is untouched."""
    cache = load_cache(folder)
    with pytest.raises(CacheError) as caught:
        cache[0]
    for word in ("row 0", "1501.00000_0.png", str(payload_of(folder)), *words):
        assert word in str(caught.value)
    assert cache[1]["latents"].ndim == 3


class _MakesAFile:
    """Unpickling this runs code: it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["latents", "prompt_embeds", "text_ids", "an_extra"])
def test_pickled_arrays_are_refused_and_never_loaded(folder: Path, tmp_path: Path, name: str) -> None:
    trap = tmp_path / "trap"
    array = np.empty(1, dtype=object)
    array[0] = _MakesAFile(trap)
    resave(payload_of(folder), **{name: array})
    with np.load(payload_of(folder), allow_pickle=True) as stored:
        stored[name]
    assert trap.exists(), "the trap works"
    trap.unlink()
    _broken(folder, "pickled", f"`{name}`", "sciflow-hf cache build")
    assert not trap.exists()


def test_a_pickle_in_place_of_the_npz_is_refused(folder: Path, tmp_path: Path) -> None:
    payload_of(folder).write_bytes(pickle.dumps(_MakesAFile(tmp_path / "trap")))
    _broken(folder, "cannot be read", "not an npz")
    assert not (tmp_path / "trap").exists()


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _one_array(file: Path) -> None:
    with open(file, "wb") as handle:
        np.save(handle, np.zeros(3))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (Path.unlink, ("missing", "cache_path", "--payload_dir")),
        (_truncate, ("truncated", "sciflow-hf cache build")),
        (lambda file: file.write_bytes(b""), ("cannot be read",)),
        (lambda file: file.write_bytes(b"hello"), ("cannot be read",)),
        (_one_array, ("not an npz",)),
        (lambda file: (file.unlink(), file.mkdir()), ("cannot be read",)),
    ],
)  # fmt: skip
def test_unreadable_payloads_are_named(folder: Path, damage: Callable[[Path], Any], words: tuple[str, ...]) -> None:
    damage(payload_of(folder))
    _broken(folder, *words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"latents": np.zeros((4, 12, 8), np.float32)}, ("`latent_shape`", "(4, 12, 8)", "(4, 8, 12)")),
        ({"latents": np.zeros((1, 4, 8, 12), np.float32)}, ("column `latent_shape`",)),
        ({"prompt_embeds": np.zeros((12, 40), np.float32)}, ("prompt_embeds_shape", "(12, 40)")),
        ({"latents": None}, ("lacks `latents`", "prompt_embeds")),
        ({"prompt_embeds": None}, ("lacks `prompt_embeds`",)),
        ({"latents": np.zeros((4, 8, 12), np.float64)}, ("float64", "float16, float32")),
        ({"prompt_embeds": np.zeros((12, 48), np.int16)}, ("int16",)),
        ({"text_ids": np.zeros((11, 4), np.int64)}, ("text_ids", "(11, 4)", "(12, n)")),
        ({"text_ids": np.full((12, 4), 0.5, np.float32)}, ("text_ids", "whole numbers")),
        ({"text_ids": np.full((12, 4), np.nan, np.float32)}, ("text_ids", "whole numbers")),
        ({"text_ids": np.full((12, 4), "a")}, ("text_ids",)),
    ],
)  # fmt: skip
def test_wrong_arrays_are_named(folder: Path, changes: dict[str, Any], words: tuple[str, ...]) -> None:
    resave(payload_of(folder), **changes)
    _broken(folder, *words)


@pytest.mark.promise("A16")
def test_text_ids_may_be_floats_that_are_whole(folder: Path) -> None:
    resave(payload_of(folder), text_ids=np.arange(48, dtype=np.float16).reshape(12, 4))
    ids = load_cache(folder)[0]["txt_ids"]
    assert ids.dtype == torch.int64 and ids.flatten().tolist() == list(range(48))


def test_values_are_not_scanned(folder: Path) -> None:
    """A NaN passes: the trainer notices it without a pass over all values."""
    resave(payload_of(folder), latents=np.full((4, 8, 12), np.nan, np.float32))
    assert load_cache(folder)[0]["latents"].isnan().all()


# --- where payloads lie ---


@pytest.mark.parametrize(
    "path", ["../outside.npz", "2015/../../outside.npz", "/etc/passwd", "", ".", "{root}x/outside.npz"]
)
def test_cache_path_must_stay_inside(folder: Path, path: str) -> None:
    (folder.parent / "outside.npz").touch()
    path = path.format(root=folder)
    edit(index_files(folder)[0], cache_path=lambda paths: [*paths[:6], path, *paths[7:]])
    with pytest.raises(CacheError, match=r"Row 6 .*cache_path.* outside of") as caught:
        load_cache(folder)
    assert repr(path) in str(caught.value)


def test_no_payload_is_read_from_outside_even_alone(tmp_path: Path) -> None:
    folder = write_cache(tmp_path / "cache", buckets={(32, 48): 1})
    shutil.copy(payload_of(folder), tmp_path / "outside.npz")
    edit(index_files(folder)[0], cache_path=lambda paths: ["../outside.npz"])
    with pytest.raises(CacheError, match="outside of"):
        load_cache(folder)


def test_paths_inside_may_be_roundabout_or_absolute(folder: Path) -> None:
    plain = load_cache(folder)[1]["latents"]
    edit(
        index_files(folder)[0],
        cache_path=lambda paths: [str(folder / paths[0]), "2015/../" + paths[1], "./" + paths[2], *paths[3:]],
    )
    cache = load_cache(folder)
    assert torch.equal(cache[1]["latents"], plain) and all(len(cache[i]) == 3 for i in range(3))


@pytest.mark.promise("A13")
def test_payloads_are_found_by_the_rule(folder: Path, tmp_path: Path) -> None:
    """`payload_dir`, else `dataset_dir`, else the index file's folder."""
    plain = load_cache(folder)[0]["latents"]
    beside = shutil.copytree(folder, tmp_path / "beside")
    edit(index_files(beside)[0], cache_path=lambda paths: [path.removeprefix("2015/") for path in paths])
    assert torch.equal(load_cache(beside)[0]["latents"], plain)

    apart = tmp_path / "apart"
    (apart / "2015").mkdir(parents=True)
    shutil.copy(index_files(folder)[0], apart / "2015")
    with pytest.raises(CacheError, match="--payload_dir"):
        load_cache(apart)
    assert torch.equal(load_cache(apart, payload_dir=folder)[0]["latents"], plain)
    with pytest.raises(CacheError, match="missing"):
        load_cache(folder, payload_dir=apart)
    assert torch.equal(load_cache(index_files(folder)[0], payload_dir=folder)[0]["latents"], plain)


# --- broken indexes ---


def test_missing_caches_say_how_to_build_one(tmp_path: Path) -> None:
    for folder in (tmp_path / "absent", tmp_path):
        with pytest.raises(CacheError, match="sciflow-hf cache build"):
            load_cache(folder)
    (tmp_path / "x.parquet").write_bytes(b"not parquet")
    with pytest.raises(CacheError, match="cannot be read as parquet"):
        load_cache(tmp_path)
    with pytest.raises(CacheError, match="empty list"):
        load_cache([])


def test_an_empty_index_is_an_error(folder: Path) -> None:
    file = index_files(folder)[0]
    pq.write_table(pq.read_table(file).slice(0, 0), file)
    with pytest.raises(CacheError, match="no samples"):
        load_cache(folder)


def test_unsupported_options_are_refused(folder: Path) -> None:
    with pytest.raises(SciflowError, match="float64"):
        load_cache(folder, dtype=torch.float64)


@pytest.mark.parametrize("column", ["cache_path", "latent_shape", "prompt_embeds_shape", "bucket_h", "bucket_w"])
def test_required_columns_are_named(folder: Path, column: str) -> None:
    file = index_files(folder)[0]
    table = pq.read_table(file)
    pq.write_table(table.drop_columns(column), file)
    with pytest.raises(CacheError, match=f"lacks the column '{column}'"):
        load_cache(folder)
    pq.write_table(table.drop_columns(["image_path", "caption", "paper_id", "aspect_ratio"]), file)
    cache = load_cache(folder)
    assert cache.groups == cache.row_ids == table.column("cache_path").to_pylist()


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("bucket_h", None, "given"),
        ("bucket_w", 0, "positive number of pixels"),
        ("cache_path", None, "given"),
        ("latent_shape", None, "given"),
        ("latent_shape", [4, 8], "3 positive whole numbers"),
        ("latent_shape", [4, 8, 0], "3 positive whole numbers"),
        ("prompt_embeds_shape", [12], "2 positive whole numbers"),
        # In memory these are int32: 2^32 + 32 would become 32.
        ("bucket_h", 2**32 + 32, "at most 2147483647 of pixels"),
        ("bucket_w", 2**31, "at most 2147483647 of pixels"),
        ("latent_shape", [4, 2**32 + 8, 12], "at most 2147483647"),
        ("prompt_embeds_shape", [12, 2**31], "at most 2147483647"),
    ],
)
def test_broken_cells_are_named(folder: Path, column: str, value: Any, words: str) -> None:
    file = index_files(folder)[0]
    edit(file, **{column: lambda cells: [*cells[:5], value, *cells[6:]]})
    with pytest.raises(CacheError, match=rf"Row 5 .*{file.name}.*`{column}` is .*{words}"):
        load_cache(folder)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("bucket_h", None),
        ("bucket_w", 0),
        ("bucket_w", 2**31),
        ("latent_shape", [4, 8, 0]),
        ("cache_path", "../outside.npz"),
    ],
)
def test_the_file_of_a_broken_cell_is_named_among_files_that_are_checked_together(
    tmp_path: Path, column: str, value: Any
) -> None:
    folder = write_cache(tmp_path, parts=4)
    good, counts = load_cache(folder), [len(pq.read_table(file)) for file in index_files(folder)]
    assert [reader.file for reader in good.readers] == list(map(str, index_files(folder)))
    file, start = index_files(folder)[2], sum(counts[:2])
    edit(file, **{column: lambda cells: [*cells[:3], value, *cells[4:]]})
    with pytest.raises(CacheError, match=rf"Row {start + 3} .*{file.name}.*`{column}` is "):
        load_cache(folder)


def test_many_index_files_are_checked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[int] = []
    shapes = Columns.shapes
    monkeypatch.setattr(Columns, "shapes", lambda own, *args: (checked.append(len(own.table)), shapes(own, *args))[1])
    folder = write_cache(tmp_path, parts=4)
    table = pq.read_table(index_files(folder)[3])
    shorter = table.column("latent_shape").cast(pa.list_(pa.int32()))
    place = table.column_names.index("latent_shape")
    pq.write_table(table.set_column(place, "latent_shape", shorter), index_files(folder)[3])
    cache = load_cache(folder)
    sizes = [len(pq.read_table(file)) for file in index_files(folder)]
    assert sorted(checked) == sorted([sum(sizes[:3]), sizes[3]] * 2), "neighbours of one type together, two columns"
    stored = [row for file in index_files(folder) for row in pq.read_table(file).column("bucket_h").to_pylist()]
    assert [size[0] for size in cache.buckets] == stored
    assert cache.latent_shapes[-1].tolist() == list(cache[len(cache) - 1]["latents"].shape)


@pytest.mark.parametrize("text", ["", "4, 8", "(4, 8, x)", "4.0, 8, 12", "-4, 8, 12", f"(4, {2**70}, 12)"])
def test_broken_shape_strings_are_named(tmp_path: Path, text: str) -> None:
    folder = write_cache(tmp_path, shapes_as_strings=True)
    edit(index_files(folder)[0], latent_shape=lambda cells: [*cells[:5], text, *cells[6:]])
    with pytest.raises(CacheError, match=r"Row 5 .*`latent_shape`"):
        load_cache(folder)


def test_parts_with_other_columns_are_named(tmp_path: Path) -> None:
    folder = write_cache(tmp_path, parts=2)
    edit(index_files(folder)[1], licence=lambda _: ["cc-by"] * 12)
    with pytest.raises(CacheError, match=r"part0.parquet and .*part1.parquet .*'licence'"):
        load_cache(folder)
    edit(index_files(folder)[0], licence=lambda _: [[1]] * 12)
    with pytest.raises(CacheError, match=r"part0.parquet and .*part1.parquet .*other types"):
        load_cache(folder)


def test_parts_with_other_settings_are_named(tmp_path: Path) -> None:
    settings = {"family": "flux2_klein", "max_sequence_length": 12, "version": "0.1.0"}
    folder = write_cache(tmp_path / "a", settings=settings, parts=2)
    second = index_files(folder)[1]
    table = pq.read_table(second)

    def write(metadata: dict[str, Any] | None) -> None:
        encoded = None if metadata is None else {b"sciflow_hf": json.dumps(metadata).encode()}
        pq.write_table(table.replace_schema_metadata(encoded), second)

    write(settings | {"version": "0.2.0"})
    assert len(load_cache(folder)) == 24, "the library's version is no setting"
    write(settings | {"max_sequence_length": 512})
    with pytest.raises(CacheError, match=r"part0.*part1.*`max_sequence_length` is 12 and 512"):
        load_cache(folder)
    write(None)
    with pytest.raises(CacheError, match="`family` is 'flux2_klein' and None"):
        load_cache(folder)
    pq.write_table(table.replace_schema_metadata({b"sciflow_hf": b"{"}), second)
    with pytest.raises(CacheError, match="not JSON"):
        load_cache(folder)


def test_no_metadata_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = load_cache(write_cache(tmp_path, parts=3))
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and cache.metadata == {}
    cache.check_family({"family": "anything"})
    assert len(cache[0]) == 3


def test_rows_that_cannot_share_a_batch_are_named(folder: Path) -> None:
    edit(index_files(folder)[0], latent_shape=lambda shapes: [*shapes[:3], [4, 9, 12], *shapes[4:]])
    with pytest.raises(CacheError, match=r"row 3 .*row 0 .*\(32, 48, 12\).*\(4, 9, 12, 12, 48\)"):
        _ = load_cache(folder).batch_keys


@pytest.mark.parametrize("name", ["latents", "an_extra"])
def test_an_array_that_would_fill_the_memory_is_refused(folder: Path, name: str) -> None:
    """1 GiB of zeros, compressed a thousandfold: known from its header, before a byte is decoded."""
    with np.load(payload_of(folder)) as stored:
        arrays = dict(stored)
    zeros = np.zeros((1 << 14, 1 << 14), dtype=np.float32)
    np.savez_compressed(payload_of(folder), **(arrays | {name: zeros}))
    assert payload_of(folder).stat().st_size < 2 << 20
    _broken(folder, f"array `{name}` would take 1,024 MiB of memory, more than 256 MiB")
