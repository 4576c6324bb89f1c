"""Building caches of edits: forms of reference images, what is shown of them, what is said of unusable ones."""

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from builds import STEP, StubEncoders, build, index_of, picture, write_notes
from PIL import Image

from sciflow_hf.data.batches.sizes import ladder
from sciflow_hf.data.build.build import BuildReport
from sciflow_hf.data.build.jobs import find_jobs
from sciflow_hf.data.build.reading import read_source
from sciflow_hf.data.build.references import SourceRules
from sciflow_hf.data.build.sources.find import find_records
from sciflow_hf.data.load import load_cache
from sciflow_hf.errors import SciflowError

pytestmark = pytest.mark.usefixtures("datasets_cache")
PAYLOADS = ("npz", "shards", "inline")
RED, GREEN, BLUE = (200, 0, 0), (0, 200, 0), (0, 0, 200)


class EditEncoders(StubEncoders):
    """Latents of sources are block means, as those of images, plus 2; counts what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.source_shapes: list[tuple[int, ...]] = []
        self.seen: list[tuple[str, list[tuple[int, int]]]] = []  # captions with the sizes (w, h) of their sources

    def sources(self, pixel_values: torch.Tensor) -> torch.Tensor:
        self.source_shapes.append(tuple(pixel_values.shape))
        return torch.nn.functional.avg_pool2d(pixel_values, STEP) + 2

    def texts(
        self, prompts: Sequence[str], sources: Sequence[Sequence[Image.Image]] | None = None
    ) -> dict[str, torch.Tensor]:
        found = super().texts(prompts)
        if sources is not None:
            self.seen += [(text, [s.size for s in shown]) for text, shown in zip(prompts, sources, strict=True)]
            means = [sum(float(np.asarray(s).mean()) for s in shown) for shown in sources]
            found["prompt_embeds"] += torch.tensor(means)[:, None, None]
        return found

    def rules(self, most: int = 3, text: bool = False, stretch: bool = False) -> SourceRules:
        def size(height: int, width: int) -> tuple[int, int]:
            return height // STEP * STEP, width // STEP * STEP

        def check(height: int, width: int) -> str:
            return f"{height} x {width} pixels are too few" if min(height, width) < 16 else ""

        return SourceRules(most, size, size if stretch else lambda h, w: (h, w), check, self.sources, text)


def edit_cache(source: Path, output: Path, encoders: EditEncoders | None = None, **options: Any) -> BuildReport:
    encoders = encoders or EditEncoders()
    return build(source, output, encoders, **{"dtype": "fp32", "sources": encoders.rules(), "payload": "npz"} | options)


def colour_of(latents: torch.Tensor, shift: float = 2) -> tuple[int, ...]:
    """The colour of a source that has one, from its latents."""
    assert float((latents - latents.mean((1, 2), keepdim=True)).abs().max()) < 1e-5
    return tuple(int(value) for value in ((latents.mean((1, 2)) - shift + 1) * 127.5).round())


def edits_of(output: Path) -> dict[tuple[str, str], list[tuple[int, ...]]]:
    """Colours of the sources of each sample, by image and caption."""
    cache = load_cache(output, dtype=torch.float32)
    found = {}
    for i in range(len(cache)):
        sample = cache[i]
        names = [name for name in ("source_latents", "source_latents_1", "source_latents_2") if name in sample]
        key = (cache.strings("image_path") or [])[i], cache.caption(i)
        assert key not in found
        found[key] = [colour_of(sample[name]) for name in names]
    return found


def save(folder: Path, **images: Image.Image) -> Path:
    for name, image in images.items():
        file = folder / (name.replace("__", "/") + ".png")
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file)
    return folder


# --- every form of input ---

EXPECTED = {("t.png", "redder"): [RED], ("t.png", "both"): [GREEN, BLUE], ("u.png", "from text"): []}


def jsonl(folder: Path) -> dict[str, Any]:
    rows: list[dict[str, Any]] = [
        {"file_name": "t.png", "caption": "redder", "source_image": "red.png"},
        {"file_name": "t.png", "caption": "both", "source_image": ["green.png", "sub/blue.png"]},
        {"file_name": "u.png", "caption": "from text", "source_image": None},
    ]
    write_notes(folder, rows)
    return {}


def csv(folder: Path) -> dict[str, Any]:
    (folder / "metadata.csv").write_text(
        'file_name,caption,source_image\nt.png,redder,red.png\nt.png,both,"[""green.png"", ""sub/blue.png""]"\n'
        "u.png,from text,\n"
    )
    return {}


def columns(folder: Path) -> dict[str, Any]:
    rows: list[dict[str, Any]] = [
        {"file_name": "t.png", "caption": "redder", "one": "red.png"},
        {"file_name": "t.png", "caption": "both", "one": "green.png", "two": "sub/blue.png"},
        {"file_name": "u.png", "caption": "from text"},
    ]
    write_notes(folder, rows)
    return {"source_column": ["one", "two"]}


def published(folder: Path) -> dict[str, Any]:
    rows = {
        "split": ["edit_1024", "edit_1024", "gen_1024"],
        "image_path": [None, None, "u.png"],
        "source_image_path": ["red.png", ["green.png", "sub/blue.png"], None],
        "target_image_path": ["t.png", "t.png", None],
        "caption": ["redder", "both", "from text"],
    }
    rows["source_image_path"] = [
        value if value is None or isinstance(value, str) else json.dumps(value) for value in rows["source_image_path"]
    ]
    pq.write_table(pa.table(rows), folder / "metadata.parquet")
    return {"split": "all"}


@pytest.mark.parametrize("write", [jsonl, csv, columns, published])
def test_sources_in_metadata(tmp_path: Path, write: Callable[[Path], dict[str, Any]]) -> None:
    folder = save(tmp_path / "in", t=picture(32, 40), u=picture(40, 32), red=picture(32, 40, RED))
    save(folder, green=picture(24, 24, GREEN), sub__blue=picture(48, 32, BLUE))
    report = edit_cache(folder, tmp_path / "cache", **write(folder))
    assert report.skipped == [] and report.tally.skipped == {} and edits_of(tmp_path / "cache") == EXPECTED
    assert report.tally.images == 2, "a file that is only a source is no target"
    assert report.tally.measures["edits"] == "2 of 3 samples, with 1 to 2 sources each; 3 distinct"
    files = sum(file.is_file() for file in folder.rglob("*"))
    assert report.tally.files == files and re.search(rf"masks, sources +{files - 2}\n", str(report.tally))


@pytest.mark.parametrize("payload", PAYLOADS)
def test_the_index_names_sources_and_sizes(tmp_path: Path, payload: str) -> None:
    folder = save(tmp_path / "in", t=picture(32, 40), u=picture(40, 32), red=picture(32, 40, RED))
    jsonl(save(folder, green=picture(24, 24, GREEN), sub__blue=picture(48, 32, BLUE)))
    edit_cache(folder, tmp_path / "cache", payload=payload)
    rows = {row["caption"]: row for row in index_of(tmp_path / "cache")}
    assert rows["both"]["source_images"] == ["green.png", "sub/blue.png"] and rows["from text"]["source_images"] == []
    assert rows["both"]["source_sizes"] == [[24, 24], [48, 32]] and rows["redder"]["variant"] == ""
    assert rows["both"]["source_shapes"] == [[3, 3, 3], [3, 6, 4]] and rows["from text"]["source_shapes"] == []
    assert "source_image" not in rows["both"]


def test_a_source_with_a_caption_is_also_a_target(tmp_path: Path) -> None:
    folder = save(tmp_path / "in", t=picture(32, 40), red=picture(32, 40, RED))
    rows = [
        {"file_name": "t.png", "caption": "back"},
        {"file_name": "red.png", "caption": "red", "source_image": "t.png"},
    ]
    write_notes(folder, [rows[0] | {"source_image": "red.png"}, rows[1]])
    edit_cache(folder, tmp_path / "cache")
    assert edits_of(tmp_path / "cache") == {("t.png", "back"): [RED], ("red.png", "red"): [(200, 100, 0)]}


def test_folders_of_sources(tmp_path: Path) -> None:
    folder = save(tmp_path / "in", a=picture(32, 40), sub__b=picture(32, 40), c=picture(32, 40))
    for name in ("a", "sub/b", "c"):
        (folder / name).with_suffix(".txt").write_text(name)
    save(folder / "before", a=picture(32, 40, RED), sub__b=picture(32, 40, GREEN), other=picture(32, 40))
    picture(32, 40, BLUE).save(tmp_path / "in/before/sub/b.bmp")  # two formats: the same name counts
    save(tmp_path / "style", b=picture(24, 24, BLUE))
    report = edit_cache(folder, tmp_path / "cache", source_dir=[folder / "before", tmp_path / "style"])
    expected = {("a.png", "a"): [RED], ("sub/b.png", "sub/b"): [GREEN, BLUE], ("c.png", "c"): []}
    assert edits_of(tmp_path / "cache") == expected and report.tally.images == 3
    assert report.tally.remarks["images without a source in `--source_dir`, trained from text alone"] == ["c.png"]
    with pytest.raises(SciflowError, match=r"`source_dir` '.*nowhere' is no folder"):
        edit_cache(folder, tmp_path / "x", source_dir=[tmp_path / "nowhere"])
    with pytest.raises(SciflowError, match=r"`source_dir` .* holds `--input_dir`"):
        edit_cache(folder, tmp_path / "x", source_dir=[folder])
    save(tmp_path / "style", c=picture(24, 24))
    report = edit_cache(folder, tmp_path / "gap", source_dir=[folder / "before", tmp_path / "style"])
    assert report.skipped == [
        ("c.png", f"the source folder {folder / 'before'} has no file of its name, a later one has")
    ]


def png(colour: tuple[int, int, int], size: tuple[int, int] = (32, 40)) -> bytes:
    data = BytesIO()
    picture(*size, colour).save(data, "PNG")
    return data.getvalue()


TABLES: dict[str, Callable[[list[list[tuple[int, int, int]]], Path], tuple[Any, Any]]] = {
    "bytes": lambda rows, folder: ([png(row[0]) if row else None for row in rows], None),
    "struct": lambda rows, folder: ([{"bytes": png(row[0]), "path": None} if row else None for row in rows], None),
    "image": lambda rows, folder: (
        [{"bytes": png(row[0]), "path": None} if row else None for row in rows], datasets.Image(),
    ),
    "path": lambda rows, folder: ([str(folder / f"{row[0]}.png") if row else None for row in rows], None),
    "JSON paths": lambda rows, folder: ([json.dumps([f"{c}.png" for c in row]) for row in rows], None),
    "lists of bytes": lambda rows, folder: ([[png(c) for c in row] for row in rows], None),
    "lists of images": lambda rows, folder: (
        [[{"bytes": png(c), "path": None} for c in row] for row in rows], datasets.List(datasets.Image()),
    ),
    "lists of structs": lambda rows, folder: ([[{"bytes": png(c), "path": None} for c in row] for row in rows], None),
    "lists of paths": lambda rows, folder: ([[f"{c}.png" for c in row] for row in rows], None),
}  # fmt: skip


@pytest.mark.parametrize("form", TABLES)
def test_sources_in_tables(tmp_path: Path, form: str) -> None:
    rows = [[RED, GREEN], [BLUE], []] if "ists" in form or "JSON" in form else [[RED], [BLUE], []]
    folder = tmp_path / "in"
    folder.mkdir()
    for colour in (RED, GREEN, BLUE):
        picture(32, 40, colour).save(folder / f"{colour}.png") if "path" in form else None
    cells, feature = TABLES[form](rows, folder)
    table = {"target_image": [png((i, i, i)) for i in range(3)], "source_image": cells, "caption": ["a", "b", "c"]}
    data = datasets.Dataset.from_dict(table)
    data = data.cast_column("source_image", feature) if feature else data
    data.to_parquet(folder / "figures.parquet")
    report = edit_cache(folder / "figures.parquet", tmp_path / "cache")
    assert report.skipped == []
    assert [edits_of(tmp_path / "cache")[f"row_{i:08d}", "abc"[i]] for i in range(3)] == rows
    assert report.tally.remarks == {}


def test_columns_of_tables_by_name(tmp_path: Path) -> None:
    table = {"image": [png((0, 0, 0))], "caption": ["a"], "before": [png(RED)], "style": [png(BLUE, (24, 24))]}
    pq.write_table(pa.table(table), tmp_path / "figures.parquet")
    edit_cache(tmp_path / "figures.parquet", tmp_path / "cache", source_column=["before", "style"])
    assert list(edits_of(tmp_path / "cache").values()) == [[RED, BLUE]]
    with pytest.raises(SciflowError, match=r"`source_column` is 'after', but .* has 'image'"):
        find_records(tmp_path / "figures.parquet", source_column=["after"])
    with pytest.raises(SciflowError, match=r"`source_dir` .* is for folders of image files"):
        find_records(tmp_path / "figures.parquet", source_dir=[tmp_path])


def test_published_splits(tmp_path: Path) -> None:
    folder = save(tmp_path / "in", t=picture(32, 40), u=picture(32, 40), red=picture(32, 40, RED))
    published(folder)
    with pytest.raises(SciflowError, match=r"the splits edit_1024, gen_1024\. Choose one by `--split`"):
        find_records(folder)
    records, tally = find_records(folder, split="gen_1024")
    assert [(record.name, record.sources) for record in records] == [("u.png", ())]
    assert tally.ignored.keys() == {"t.png", "red.png"} and tally.skipped == {} and tally.missing == {}


def test_a_configuration_of_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {
        "source_image": [png(RED)],
        "target_image": [png(BLUE)],
        "caption": ["x"],
        "edit_bboxes": ["[[0, 0, 4, 4]]"],
    }
    asked: list[tuple[str, ...]] = []

    def load(*address: str) -> datasets.DatasetDict:
        asked.append(address)
        return datasets.DatasetDict({"train": datasets.Dataset.from_dict(table)})

    monkeypatch.setattr(datasets, "load_dataset", load)
    (record,), _ = find_records("user/figures-700K:editing")
    assert asked == [("user/figures-700K", "editing")]
    assert record.edit_mask == ((0, 0, 4, 4),) and record.sources[0].read() == png(RED)
    with pytest.raises(SciflowError, match=r"user/name:configuration"):
        find_records("user/figures:two:three")


# --- rows ---


@pytest.mark.parametrize("payload", PAYLOADS)
def test_two_edits_of_one_image_are_both_kept(tmp_path: Path, payload: str) -> None:
    folder = save(tmp_path / "in", t=picture(32, 40), red=picture(32, 40, RED), blue=picture(32, 40, BLUE))
    notes = [{"file_name": "t.png", "caption": "x", "source_image": f"{name}.png"} for name in ("red", "blue", "red")]
    write_notes(folder, notes)
    report = edit_cache(folder, tmp_path / "cache", payload=payload)
    assert report.samples == 2 and report.tally.remarks == {"images with the same caption twice, taken once": ["t.png"]}
    cache = load_cache(tmp_path / "cache", dtype=torch.float32)
    assert sorted(colour_of(cache[i]["source_latents"]) for i in range(2)) == [BLUE, RED]
    assert len(set(cache.row_ids)) == 2


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_equal_sources_are_encoded_once_and_a_second_build_encodes_what_is_new(
    tmp_path: Path, payload: str, ranks: int
) -> None:
    from builds import build_on

    folder = save(tmp_path / "in", red=picture(32, 40, RED), copy=picture(32, 40, RED), blue=picture(24, 24, BLUE))
    for i in range(4):
        save(folder, **{f"t{i}": picture(32, 40, (i, 0, 0))})
    sources = ["red.png", "copy.png", ["red.png", "blue.png"], None]
    notes = [{"file_name": f"t{i}.png", "caption": "x", "source_image": source} for i, source in enumerate(sources)]
    write_notes(folder, notes)
    encoders = [EditEncoders() for _ in range(ranks)]
    options: dict[str, Any] = {"dtype": "fp32", "payload": payload, "sources": encoders[0].rules()}
    build_on(ranks, folder, tmp_path / "cache", list(encoders), **options)
    once = [(1, 3, 24, 24), (1, 3, 32, 32)]
    shapes = encoders[0].source_shapes
    assert sorted(shapes) == once if (ranks, payload) != (2, "npz") else set(shapes) == set(once)
    expected = {("t0.png", "x"): [RED], ("t1.png", "x"): [RED], ("t2.png", "x"): [RED, BLUE], ("t3.png", "x"): []}
    assert edits_of(tmp_path / "cache") == expected
    again = EditEncoders()
    report = edit_cache(folder, tmp_path / "cache", again, payload=payload)
    assert (report.encoded, report.reused, again.source_shapes, again.image_shapes) == (0, 4, [], [])
    save(folder, red=picture(32, 40, GREEN))  # copy.png stays
    report = edit_cache(folder, tmp_path / "cache", again, payload=payload)
    assert (report.encoded, report.reused) == (2, 2), "the rows with the edited source"
    expected |= {("t0.png", "x"): [GREEN], ("t2.png", "x"): [GREEN, BLUE]}
    assert edits_of(tmp_path / "cache") == expected


# --- what is shown ---


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("payload", PAYLOADS)
def test_crops_and_flips_of_a_source_of_the_targets_size_are_those_of_the_target(tmp_path: Path, payload: str) -> None:
    folder = save(tmp_path / "in", t=noise(90, 70))
    noise(90, 70).save(folder / "same.bmp")
    write_notes(folder, [{"file_name": "t.png", "caption": "x", "source_image": "same.bmp"}])
    edit_cache(folder, tmp_path / "cache", payload=payload, crops=3, flip=True)
    cache = load_cache(tmp_path / "cache", dtype=torch.float32)
    assert sorted(cache.strings("variant") or []) == sorted(
        ["", "crop1", "crop2", "crop3", "flip", "crop1-flip", "crop2-flip", "crop3-flip"]
    )
    seen = {cache[i]["latents"].numpy().tobytes() for i in range(len(cache))}
    assert len(seen) == 8
    for i in range(len(cache)):
        assert torch.equal(cache[i]["source_latents"], cache[i]["latents"] + 2)


def pixels_of(folder: Path, rules: SourceRules, **options: Any) -> dict[str, list[np.ndarray]]:
    """What is shown of the sources of each view: levels (H, W, 3)."""
    options = {"resolution": 32, "crops": 0, "flip": False, "with_caption": False} | options
    bad: list[Any] = []
    records, _ = find_records(folder)
    jobs = find_jobs(records, ladder(32, STEP), skip=lambda *reason: bad.append(reason), sources=rules, **options)
    found = {job.view.variant: [read_source(source) for source in job.sources] for job in jobs}
    assert not bad
    return {
        variant: [np.round((values.transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8) for values in views]
        for variant, views in found.items()
    }


def test_any_other_source_is_shown_as_the_pipeline_does(tmp_path: Path) -> None:
    folder = save(tmp_path / "in", t=noise(64, 64), s=noise(30, 45, seed=1))
    write_notes(folder, [{"file_name": "t.png", "caption": "x", "source_image": "s.png"}])
    source, encoders = np.asarray(noise(30, 45, seed=1)), EditEncoders()
    cut = pixels_of(folder, encoders.rules(), crops=1, flip=True)
    for variant in ("", "crop1"):  # a window of the target shows nothing of the places in a source of another size
        assert np.array_equal(cut[variant][0], source[3:27, 2:42])
    assert np.array_equal(cut["flip"][0], source[3:27, 2:42][:, ::-1])
    stretched = pixels_of(folder, encoders.rules(stretch=True), flip=True)
    expected = np.asarray(Image.fromarray(source).resize((40, 24), Image.Resampling.LANCZOS))
    assert np.array_equal(stretched[""][0], expected) and np.array_equal(stretched["flip"][0], expected[:, ::-1])

    def size(height: int, width: int) -> tuple[int, int]:
        return (height // 2 // STEP * STEP, width // 2 // STEP * STEP)

    halved = SourceRules(1, size, lambda h, w: (h // 2, w // 2), lambda h, w: "", encoders.sources)
    shown = pixels_of(folder, halved)[""][0]  # 15 x 22 pixels, of which 8 x 16 are cut
    expected = np.asarray(Image.fromarray(source).resize((22, 15), Image.Resampling.LANCZOS))[3:11, 3:19]
    assert shown.shape == expected.shape and np.abs(shown.astype(int) - expected).max() <= 1


def test_a_text_encoder_sees_the_window_in_the_sources_own_pixels(tmp_path: Path) -> None:
    folder = save(tmp_path / "in", t=noise(64, 64), s=noise(64, 64, seed=1))
    write_notes(folder, [{"file_name": "t.png", "caption": "x", "source_image": "s.png"}])
    records, _ = find_records(folder)
    found = find_jobs(
        records, [[(32, 32)]], resolution=32, crops=1, flip=True, with_caption=False, skip=lambda *reason: None,
        sources=EditEncoders().rules(text=True),
    )  # fmt: skip
    jobs = {job.view.variant: job for job in found}
    shown = {variant: np.asarray(job.sources[0].window()) for variant, job in jobs.items()}
    whole = np.asarray(noise(64, 64, seed=1))
    top, left = jobs["crop1"].view.crop
    assert np.array_equal(shown[""], whole) and np.array_equal(shown["flip"], whole[:, ::-1])
    window = whole[top : top + 32, left : left + 32]
    assert np.array_equal(shown["crop1"], window) and np.array_equal(shown["crop1-flip"], window[:, ::-1])


@pytest.mark.parametrize("payload", PAYLOADS)
def test_text_that_depends_on_the_sources_is_stored_with_them(tmp_path: Path, payload: str) -> None:
    folder = save(tmp_path / "in", a=picture(40, 40), b=picture(40, 40), c=picture(24, 24), red=picture(40, 40, RED))
    save(folder, blue=picture(24, 20, BLUE), broken=picture(24, 24))
    whole = (folder / "broken.png").read_bytes()
    (folder / "broken.png").write_bytes(whole[:60])  # its header is fine
    sources = {"a": ["red.png"], "b": ["red.png"], "c": ["red.png", "blue.png"], "red": [], "blue": "broken.png"}
    write_notes(
        folder, [{"file_name": f"{name}.png", "caption": "x", "source_image": files} for name, files in sources.items()]
    )
    encoders = EditEncoders()
    report = edit_cache(
        folder, tmp_path / "cache", encoders, payload=payload, sources=encoders.rules(text=True, stretch=True)
    )
    assert [name for name, _ in report.skipped] == ["blue.png"]
    # All of a source of another size; of one of the target's size what the target shows: here all of it.
    assert sorted(encoders.seen) == [("x", []), ("x", [(40, 40)]), ("x", [(40, 40), (20, 24)])]
    cache = load_cache(tmp_path / "cache", dtype=torch.float32)
    assert cache.metadata["text_reads_sources"] is True and cache.empty_prompt is None
    means = {"a.png": 200 / 3, "b.png": 200 / 3, "c.png": 400 / 3, "red.png": 0}
    for i, name in enumerate(cache.strings("image_path") or []):
        assert torch.allclose(cache[i]["prompt_embeds"], torch.tensor(1.0 + means[name])), name
    again = EditEncoders()
    edit_cache(folder, tmp_path / "cache", again, payload=payload, sources=again.rules(text=True, stretch=True))
    assert again.seen == []
    with pytest.raises(SciflowError, match=r"`embeds` is none, but the text encoder .* reads the ref"):
        edit_cache(
            folder, tmp_path / "x", payload="shards", embeds="none", sources=again.rules(text=True, stretch=True)
        )


def test_odd_sources_are_told(tmp_path: Path) -> None:
    folder = save(tmp_path / "in", t=picture(24, 32))
    values = np.full((24, 32), 0.5, np.float32)
    values[3, 4] = np.nan
    Image.fromarray(values).save(folder / "nan.tif")
    Image.new("RGB", (32, 24)).save(folder / "two.gif", save_all=True, append_images=[Image.new("RGB", (32, 24), RED)])
    write_notes(folder, [{"file_name": "t.png", "caption": "x", "source_image": ["nan.tif", "two.gif"]}])
    assert edit_cache(folder, tmp_path / "cache").tally.remarks == {
        "sources with several frames or pages, of which the first is taken": ["two.gif"],
        "sources with pixels that are NaN (white) or infinite": ["nan.tif"],
    }


# --- changed regions ---


@pytest.mark.parametrize("payload", PAYLOADS)
def test_changed_regions(tmp_path: Path, payload: str) -> None:
    before = noise(32, 32)
    after = before.copy()
    after.putpixel((17, 9), tuple(255 - value for value in before.getpixel((17, 9))))  # x, y: in cell (1, 2)
    folder = save(tmp_path / "in", t=after, s=before, m=picture(32, 32, (0, 0, 0)), other=picture(24, 24))
    mask = picture(32, 32, (0, 0, 0))
    mask.paste((255, 255, 255), (0, 8, 8, 16))
    mask.save(folder / "m.png")
    edit = {"file_name": "t.png", "source_image": "s.png"}
    notes: list[dict[str, Any]] = [
        edit | {"caption": "computed"},
        edit | {"caption": "image", "edit_mask": "m.png"},
        edit | {"caption": "boxes", "edit_bboxes": "[[0, 0, 8, 8], [16, 24, 24, 25]]"},
        edit | {"caption": "list", "edit_bboxes": [[0, 0, 8, 8]]},
        edit | {"caption": "other", "source_image": "other.png"},
        {"file_name": "t.png", "caption": "none", "edit_mask": "m.png"},
    ]
    write_notes(folder, notes)
    report = edit_cache(folder, tmp_path / "cache", payload=payload, edit_masks="computed", flip=True)
    assert report.tally.remarks["changed regions of images without a source, not used"] == ["t.png"]
    what = "edits whose changed region cannot be computed: their first source has another size"
    assert report.tally.remarks[what] == ["t.png"] and report.tally.images == 1
    cache = load_cache(tmp_path / "cache", dtype=torch.float32)
    cells = {
        "computed": [(1, 2)], "image": [(1, 0)], "boxes": [(0, 0), (3, 2)], "list": [(0, 0)],
        "other": [(y, x) for y in range(4) for x in range(4)], "none": [(y, x) for y in range(4) for x in range(4)],
    }  # fmt: skip
    for i, variant in enumerate(cache.strings("variant") or []):
        expected = np.zeros((4, 4), np.uint8)
        for cell in cells[cache.caption(i)]:
            expected[cell] = 255
        found = cache[i]["edit_mask"]
        assert found.dtype == torch.uint8
        assert np.array_equal(found.numpy(), expected[:, ::-1] if variant.endswith("flip") else expected)


def test_without_regions_there_are_no_masks_and_none_are_computed_unless_asked(tmp_path: Path) -> None:
    folder = save(tmp_path / "in", t=picture(32, 32), s=picture(32, 32, RED))
    write_notes(folder, [{"file_name": "t.png", "caption": "x", "source_image": "s.png"}])
    edit_cache(folder, tmp_path / "cache")
    assert "edit_mask" not in load_cache(tmp_path / "cache")[0]
    with pytest.raises(SciflowError, match="`edit_masks` is 'drawn', but must be one of given, computed"):
        edit_cache(folder, tmp_path / "x", edit_masks="drawn")


# --- unusable input ---

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"source_image": "gone.png"}, r"its source gone\.png: .*No such file"),
    "no image": ({"source_image": "text.png"}, r"its source text\.png: .*no format that Pillow knows"),
    "broken": ({"source_image": "broken.png"}, r"its source broken\.png"),
    "small": ({"source_image": "small.png"}, r"its source small\.png: 24 x 8 pixels are too few"),
    "many": ({"source_image": ["s.png"] * 4}, r"it has 4 sources, but the family takes at most 3"),
    "no path": ({"source_image": 7}, r"Line 2 of .*: `source_image` is 7, but must be the path of an image"),
    "not JSON": ({"source_image": "[s.png]"}, r"`source_image` is '\[s\.png\]', which is not JSON"),
    "outside": (
        {"source_image": "s.png", "edit_bboxes": "[[0, 0, 33, 8]]"},
        r"the box \[0\.0, 0\.0, 33\.0, 8\.0\] .* lies outside the image of 24 x 32",
    ),
    "empty": ({"source_image": "s.png", "edit_bboxes": "[[8, 0, 8, 8]]"}, r"the box \[8\.0, 0\.0, 8\.0, 8\.0\]"),
    "no boxes": ({"source_image": "s.png", "edit_bboxes": "{"}, r"`edit_bboxes` is '\{', but must be a list"),
    "no numbers": ({"source_image": "s.png", "edit_bboxes": '[["a", 0, 1, 1]]'}, r"`edit_bboxes` is .*, but must be"),
    "mask": ({"source_image": "s.png", "edit_mask": "small.png"}, r"unusable mask .*it is 24 x 8, its image 24 x 32"),
    "no mask": ({"source_image": "s.png", "edit_mask": "gone.png"}, r"unusable mask of the changed region .*No such"),
}


@pytest.mark.parametrize("payload", PAYLOADS)
def test_one_bad_edit_is_named_skipped_and_counted(tmp_path: Path, payload: str) -> None:
    folder = save(tmp_path / "in", good=picture(24, 32), s=picture(24, 32, RED), small=picture(24, 8))
    (folder / "text.png").write_text("no image")
    picture(24, 32).save(folder / "broken.png")
    whole = (folder / "broken.png").read_bytes()
    (folder / "broken.png").write_bytes(whole[:60])
    good = {"file_name": "good.png", "caption": "good", "source_image": "s.png"}
    notes = [good]
    for i, (row, _) in enumerate(BAD.values()):
        save(folder, **{f"t{i}": picture(24, 32, (i, 0, 0))})
        notes.append({"file_name": f"t{i}.png", "caption": "bad"} | row)
    write_notes(folder, notes)
    report = edit_cache(folder, tmp_path / "cache", payload=payload)
    assert edits_of(tmp_path / "cache") == {("good.png", "good"): [RED]}
    reasons = dict(report.skipped)
    assert reasons.keys() == {f"t{i}.png" for i in range(len(BAD))} and len(report.tally.skipped) == len(BAD)
    for i, (name, (_, reason)) in enumerate(BAD.items()):
        if name not in ("no path",):
            assert re.search(reason, reasons[f"t{i}.png"]), (name, reasons[f"t{i}.png"])
    if payload != "npz":
        told = report.tally.remarks["sources that cannot be used"]
        assert len(told) == 1 and told[0].startswith("broken.png (unreadable image")


@pytest.mark.parametrize("name", BAD)
def test_strict_stops_at_the_first_bad_edit(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path / "in", good=picture(24, 32), t=picture(24, 32))
    row, reason = BAD[name]
    broken = png(RED, (24, 32))[:60]
    files = {"s.png": png(RED, (24, 32)), "small.png": png(RED, (24, 8)), "text.png": b"no image", "broken.png": broken}
    for file, data in files.items():
        if file in str(row) and name != "not JSON":  # whose source is unknown
            (folder / file).write_bytes(data)
    write_notes(folder, [{"file_name": "good.png", "caption": "x"}, {"file_name": "t.png", "caption": "x"} | row])
    for payload in ("npz", "shards"):
        with pytest.raises(SciflowError, match=rf"{reason}[\s\S]*--strict"):
            edit_cache(folder, tmp_path / payload, payload=payload, strict=True)


def test_families_and_options_without_sources_refuse_edits(tmp_path: Path) -> None:
    folder = save(tmp_path / "in", t=picture(24, 32), s=picture(24, 32, RED))
    write_notes(folder, [{"file_name": "t.png", "caption": "x", "source_image": "s.png"}])
    with pytest.raises(SciflowError, match=r"t\.png has a reference image, but the family takes none"):
        build(folder, tmp_path / "cache")
    with pytest.raises(SciflowError, match=r"t\.png has a reference image, but `latents` is none"):
        edit_cache(folder, tmp_path / "cache", payload="shards", latent_shape=lambda h, w: (3, h // STEP, w // STEP))
    assert not (tmp_path / "cache").exists()


def test_a_source_that_would_be_shown_too_small_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "in", t=picture(24, 32), u=picture(24, 32), s=picture(24, 32, RED), other=picture(32, 32))
    notes = [
        {"file_name": f"{t}.png", "caption": t, "source_image": f"{s}.png"} for t, s in (("t", "s"), ("u", "other"))
    ]
    write_notes(folder, notes)
    report = edit_cache(folder, tmp_path / "cache", resolution=8)  # buckets of 8 x 8 pixels
    told = "its source s.png, as large as the image's bucket (raise `--resolution`): 8 x 8 pixels are too few"
    assert report.skipped == [("t.png", told)] and list(edits_of(tmp_path / "cache")) == [("u.png", "u")]


def test_a_table_with_a_bad_source_keeps_the_others(tmp_path: Path) -> None:
    sources = [png(RED), b"no image", None]
    table = {"target_image": [png((i, 0, 0)) for i in range(3)], "caption": ["a", "b", "c"], "source_image": sources}
    pq.write_table(pa.table(table | {"edit_bboxes": [None, None, "[]"]}), tmp_path / "figures.parquet")
    report = edit_cache(tmp_path / "figures.parquet", tmp_path / "cache")
    assert [name for name, _ in report.skipped] == ["row_00000001"] and report.samples == 2
    assert "its source row_00000001/source_image: unreadable image" in report.skipped[0][1]


# --- identity ---

RECORDED = "a832168df83d71e1a5f4aa87332208554eeeebb3e0ba2f26c95caa9573d03436"


def test_rows_without_sources_have_the_ids_of_earlier_versions(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for i, (height, width) in enumerate([(40, 60), (60, 40), (50, 50)]):
        picture(height, width, (20 * i, 0, 255 - 20 * i)).save(folder / f"{i}.bmp")  # bytes that follow from the pixels
    Image.new("L", (60, 40), 255).save(folder / "mask.bmp")
    rows = [{"file_name": f"{i}.bmp", "caption": [f"figure {i}", "other"], "paper_id": f"p{i}"} for i in range(3)]
    found = []
    for mask in ({}, {"loss_mask": "mask.bmp"}):
        write_notes(folder, [rows[0] | mask, *rows[1:]])
        records, _ = find_records(folder)
        for with_caption, by_length in itertools.product((False, True), repeat=2):
            jobs = find_jobs(
                records, ladder(32, STEP), resolution=32, crops=1, flip=True, with_caption=with_caption,
                by_length=by_length, skip=lambda *reason: pytest.fail(str(reason)), sources=EditEncoders().rules(),
                compute_masks=True,
            )  # fmt: skip
            found += [job.id for job in jobs]
    assert found[:3] == ["6b3c6055abcb6445", "86940b126514f75a", "2a23234fc6370753"]
    digest = hashlib.sha256("".join(found).encode()).hexdigest()
    assert (len(found), digest) == (192, RECORDED), "recorded at commit 711aba0, before there were sources"


def test_the_id_of_an_edit_follows_from_its_sources_and_its_region(tmp_path: Path) -> None:
    folder = save(tmp_path / "in", t=picture(32, 32), red=picture(32, 32, RED), blue=picture(24, 32, BLUE))
    ids = set()

    def add(note: dict[str, Any], **options: Any) -> None:
        write_notes(folder, [{"file_name": "t.png", "caption": "x"} | note])
        rules = options.pop("rules", EditEncoders().rules())
        options = {"resolution": 32, "crops": 0, "flip": False, "with_caption": False} | options
        records, _ = find_records(folder)
        (job,) = find_jobs(
            records, ladder(32, STEP), skip=lambda *reason: pytest.fail(str(reason)), sources=rules, **options
        )
        assert job.id not in ids
        ids.add(job.id)

    add({})
    add({"source_image": "red.png"})
    add({"source_image": "blue.png"})
    add({"source_image": ["red.png", "blue.png"]})
    add({"source_image": ["blue.png", "red.png"]})
    add({"source_image": "red.png", "edit_bboxes": "[[0, 0, 8, 8]]"})
    add({"source_image": "red.png", "edit_bboxes": "[[0, 0, 8, 16]]"})
    add({"source_image": "red.png", "edit_mask": "blue.png"})
    add({"source_image": "red.png"}, compute_masks=True)
    larger = SourceRules(1, lambda h, w: (64, 64), lambda h, w: (64, 64), lambda h, w: "", EditEncoders().sources)
    add({"source_image": "red.png"}, rules=larger)
    save(folder, red=picture(32, 32, GREEN))
    add({"source_image": "red.png"})
