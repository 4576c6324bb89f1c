"""What a data set of a build may look like: how files are found, captions read and tables understood, and the count."""

import os
import unicodedata
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builds import build, index_of, picture, write_notes
from PIL import Image

from sciflow_hf.data.build.sources.captions import read_text
from sciflow_hf.data.build.sources.find import find_records
from sciflow_hf.data.build.sources.listing import image_suffixes
from sciflow_hf.data.build.sources.pixels import oriented_size, to_rgb
from sciflow_hf.data.build.tally import Tally
from sciflow_hf.data.load import load_cache
from sciflow_hf.errors import SciflowError

pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "figures").mkdir()
    return tmp_path / "figures"


def figure(file: Path, caption: str | bytes | None = None, **options: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    picture(24, 32).save(file, **options)
    if caption is not None:
        file.with_suffix(".txt").write_bytes(caption if isinstance(caption, bytes) else caption.encode())
    return file


def captions(source: Path, **options: Any) -> dict[str, str]:
    """Caption of each sample, and a look at whether everything is counted."""
    records, tally = find_records(source, **options)
    if source.is_dir() and tally.unit == "images":
        assert_counted(source, tally, encoded=len({record.name for record in records}))
    return {f"{record.name}#{record.part}" if record.part else record.name: record.caption for record in records}


def assert_counted(source: Path, tally: Tally, encoded: int) -> None:
    images = {name for name in tally.skipped if "#caption" not in name}
    files = sum(len(names) for _, _, names in os.walk(source))
    assert tally.used + len(tally.ignored) + len(images) + encoded == files, tally


# --- captions ---


@pytest.mark.parametrize(
    ("data", "text", "encoding"),
    [
        ("Größe in µm".encode(), "Größe in µm", "utf-8"),
        (b"\xef\xbb\xbfA chart", "A chart", "utf-8-sig"),
        ("A chart \u2013 \u201c\u03b1\u201d".encode("utf-16"), "A chart \u2013 \u201c\u03b1\u201d", "utf-16"),
        (b"\xfe\xff" + "A chart".encode("utf-16-be"), "A chart", "utf-16"),
        ("A chart".encode("utf-32"), "A chart", "utf-32"),
        ("A curve\u2019s slope \u2013 5 µm".encode("cp1252"), "A curve\u2019s slope \u2013 5 µm", "cp1252"),
    ],
)
def test_encodings_of_a_text(tmp_path: Path, data: bytes, text: str, encoding: str) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    assert read_text(tmp_path / "a.txt") == (text, encoding)


def test_what_is_no_utf8_is_said_or_refused(folder: Path) -> None:
    figure(folder / "a.png", "naïve".encode("cp1252"))
    figure(folder / "b.png", b"\x81\x8d")
    figure(folder / "c.png", "without a mark".encode("utf-16-le"))
    records, tally = find_records(folder)
    assert [(record.name, record.caption) for record in records] == [("a.png", "naïve")]
    assert tally.remarks == {"captions in Windows-1252 (no UTF-8)": ["a.txt"]}
    assert tally.skipped.keys() == {"b.png", "c.png"}
    assert all("its text file cannot be read" in reason and "UTF-8" in reason for reason in tally.skipped.values())


def test_several_captions_make_several_samples(folder: Path, tmp_path: Path) -> None:
    for name in "abc":
        figure(folder / f"{name}.png")
    write_notes(
        folder,
        [
            {"file_name": "a.png", "caption": ["A bar chart", " Three blue bars ", None, "A bar chart"]},
            {"file_name": "b.png", "caption": "One text", "paper_id": "x"},
            {"file_name": "b.png", "caption": "another row", "paper_id": "x"},
            {"file_name": "c.png", "caption": []},
        ],
    )
    expected = {
        "a.png": "A bar chart",
        "a.png#caption2": "Three blue bars",
        "b.png": "One text",
        "b.png#caption2": "another row",
    }
    assert captions(folder) == expected
    for payload in ("shards", "npz"):
        report = build(folder, tmp_path / payload, payload=payload, flip=True, crops=1)
        cache = load_cache(tmp_path / payload)
        assert len(set(cache.row_ids)) == report.samples == 16 and set(cache.groups) == {"a.png", "x"}
        row = dict(zip(cache.row_ids, cache.captions, strict=True))
        assert {name: row[name] for name in expected} == expected
        assert row["a.png#caption2-crop1-flip"] == "Three blue bars"
        tally = report.tally
        assert (tally.encoded, tally.kept, tally.skipped) == (2, 0, {"c.png": "no caption"}) and tally.files == 4
        assert tally.remarks == {"images with the same caption twice, taken once": ["a.png"]}
        again = build(folder, tmp_path / payload, payload=payload, flip=True, crops=1)
        assert (again.encoded, again.tally.encoded, again.tally.kept) == (0, 0, 2)


@pytest.mark.parametrize("value", [5, {"en": "A chart"}, ["A chart", 7], True])
def test_what_is_no_text_is_refused_by_its_line(folder: Path, value: Any) -> None:
    figure(folder / "a.png")
    write_notes(folder, [{"file_name": "a.png", "caption": "good"}, {"file_name": "a.png", "caption": value}])
    with pytest.raises(SciflowError, match=r"Line 2 of .*metadata\.jsonl: `caption` is .* a list of texts"):
        find_records(folder)
    table = pa.table({"image": [png()], "caption": [value if isinstance(value, int) else 7]})
    pq.write_table(table, folder.parent / "x.parquet")
    with pytest.raises(SciflowError, match=r"Row 0 of .*x\.parquet: `caption` is "):
        find_records(folder.parent / "x.parquet")


@pytest.mark.parametrize("row", [{"caption": "A chart \ud83d"}, {"caption": "A chart", "paper_id": "\ude00 x"}])
def test_half_a_character_is_skipped_by_its_line(folder: Path, tmp_path: Path, row: dict[str, Any]) -> None:
    figure(folder / "a.png")
    figure(folder / "b.png", "good")
    write_notes(folder, [{"file_name": "a.png"} | row])
    report = build(folder, tmp_path / "cache")
    assert report.samples == 1 and report.tally.files == 4
    assert "metadata.jsonl: half a character" in report.tally.skipped["a.png"] and list(row)[-1] in str(report.skipped)
    with pytest.raises(SciflowError, match=r"a\.png: Line 1 of .*half a character"):
        build(folder, tmp_path / "strict", strict=True)


def test_a_text_belongs_to_the_image_of_its_very_name(folder: Path) -> None:
    figure(folder / "a.png", "small")
    figure(folder / "A.png", "large")
    figure(folder / "b.png").with_suffix(".caption").write_text("of kohya's tools")
    figure(folder / "c.PNG").with_suffix(".TXT").write_text("capitals")
    figure(folder / unicodedata.normalize("NFD", "é.png"))
    (folder / unicodedata.normalize("NFC", "é.txt")).write_text("accent")
    figure(folder / "d.png", "text").with_suffix(".caption").write_text("not needed")
    figure(folder / "C.png")
    found = captions(folder)
    assert found.pop(unicodedata.normalize("NFD", "é.png")) == "accent"
    assert found == {
        "A.png": "large", "a.png": "small", "b.png": "of kohya's tools", "c.PNG": "capitals", "d.png": "text",
    }  # fmt: skip
    assert find_records(folder)[1].ignored == {"d.caption": "its image has a caption"}


# --- metadata ---


@pytest.mark.parametrize(
    "name",
    [
        "figures/below/a.png",
        "below\\a.png",
        ".\\below\\a.png",
        "BELOW/A.PNG",
        "/home/me/figures/below/a.png",
        "C:\\data\\figures\\below\\a.png",
        " below/a.png ",
    ],
)
def test_what_file_name_may_look_like(folder: Path, name: str) -> None:
    figure(folder / "below" / "a.png")
    figure(folder / "a.png", "other")
    write_notes(folder, [{"file_name": name, "caption": "found"}])
    assert captions(folder) == {"a.png": "other", "below/a.png": "found"}


def test_normal_forms_of_unicode_and_ambiguous_names(folder: Path) -> None:
    figure(folder / unicodedata.normalize("NFD", "fig_ü.png"))
    for name in ("B.png", "b.png"):
        figure(folder / name)
    rows = [unicodedata.normalize("NFC", "fig_ü.png"), "b.png", "B.PNG"]
    write_notes(folder, [{"file_name": name, "caption": name} for name in rows])
    assert captions(folder) == {unicodedata.normalize("NFD", "fig_ü.png"): rows[0], "b.png": "b.png"}
    assert list(find_records(folder)[1].missing) == ["B.PNG"]


def test_the_error_says_what_was_looked_for_and_what_is_there(folder: Path) -> None:
    figure(folder / "below" / "a.png")
    (folder / "captions.json").write_text("{}")
    (folder / "b.txt").write_text("x")
    write_notes(folder, [{"file_name": "a.png", "caption": "x"}])
    with pytest.raises(SciflowError) as error:
        find_records(folder)
    for words in (
        "none of its 1 images has a caption",
        "1 entries of metadata.jsonl that name no image; a.png: listed in the metadata",
        "(below/a.png has its name)",
        "1 text files that have no image's name, such as b.txt",
        "captions.json, which is not read",
    ):
        assert words in str(error.value)


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1252"])
def test_csv_as_spreadsheets_write_it(folder: Path, separator: str, encoding: str) -> None:
    figure(folder / "a.png")
    figure(folder / "b.png")
    rows = [["file_name", "caption", ""], ["a.png", f'"Größe{separator} ""groß"""', ""], ["b.png", '"two\nlines"', ""]]
    text = "\r\n".join(separator.join(row) for row in rows)
    (folder / "metadata.csv").write_bytes(text.encode(encoding))
    assert captions(folder) == {"a.png": f'Größe{separator} "groß"', "b.png": "two\nlines"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file_name,caption\na.png,A chart, blue bars\n", r"Line 2 of .* has 3 fields, .* 2 columns .*double quotes"),
        ('file_name,caption\na.png,"two\nlines"\nb.png,x,y\n', r"Line 4 of .* has 3 fields"),
        ('file_name,caption\na.png,"A chart\nb.png,x\n', r"Line 2 of .* cannot be read \(unexpected end of data\)"),
        ("image,caption\na.png,x\n", r"Line 1 of .* has no `file_name` among its columns, but 'image,caption'"),
    ],
)
def test_csv_that_would_lose_text_is_refused_by_its_line(folder: Path, text: str, message: str) -> None:
    figure(folder / "a.png")
    (folder / "metadata.csv").write_text(text)
    with pytest.raises(SciflowError, match=message):
        find_records(folder)


def test_metadata_in_parquet(folder: Path) -> None:
    figure(folder / "a.png")
    figure(folder / "b.png", "beside")
    columns = {"file_name": ["a.png", "b.png"], "text": [["one", "two"], None], "year": [2015, 2016], "x": [b"1", b"2"]}
    pq.write_table(pa.table(columns), folder / "metadata.parquet")
    records, _ = find_records(folder)
    assert captions(folder) == {"a.png": "one", "a.png#caption2": "two", "b.png": "beside"}
    assert [record.columns for record in records] == [{"year": 2015}, {"year": 2015}, {"year": 2016}]
    pq.write_table(pa.table({"image": ["a.png"], "text": ["x"]}), folder / "metadata.parquet")
    with pytest.raises(SciflowError, match=r"Row 0 of .*metadata\.parquet has no `file_name`, but .*'image', 'text'"):
        find_records(folder)


# --- files ---


def test_every_format_that_pillow_opens_and_every_file_is_counted(folder: Path, tmp_path: Path) -> None:
    suffixes = [s for s in ("png", "gif", "avif", "jp2", "ppm", "tga", "ico", "webp") if f".{s}" in image_suffixes()]
    for suffix in suffixes:
        figure(folder / f"{suffix}.{suffix}", suffix)
    figure(folder / "page.tif", "pages", save_all=True, append_images=[picture(24, 32)])
    (folder / "photo.heic").write_bytes(b"ftypheic")
    (folder / "photo.txt").write_text("a format that Pillow does not open")
    (folder / "png.csv").write_text("the numbers of png.png")
    (folder / "README.md").write_text("words")
    (folder / "lonely.txt").write_text("no image")
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / ".git").mkdir()
    (folder / ".git" / "a.png").write_bytes(b"x")
    os.symlink(folder / "nowhere", folder / "lost.png")
    os.symlink(folder / "nowhere", folder / "lost")
    os.mkfifo(folder / "pipe.png")
    report = build(folder, tmp_path / "cache", time_ids=False)
    assert report.samples == len(suffixes) + 1 >= 8
    tally = report.tally
    assert tally.files == sum(len(names) for _, _, names in os.walk(folder))
    assert (tally.encoded, tally.used, tally.missing) == (report.samples, report.samples, {})
    assert tally.skipped == {
        "lost.png": "a link to nothing",
        "photo.heic": ".heic is no format of pictures that Pillow decodes",
    }
    assert tally.ignored == {
        ".DS_Store": "hidden",
        ".git/a.png": "hidden",
        "README.md": ".md is no format of pictures that Pillow decodes",
        "lonely.txt": "no image has its name",
        "lost": "a link to nothing",
        "photo.txt": "no image has its name",
        "pipe.png": "no regular file",
        "png.csv": ".csv is no format of pictures that Pillow decodes",
    }
    assert tally.remarks == {"images with several frames or pages, of which the first is taken": ["page.tif"]}
    text = str(tally)
    assert "encoded now" in text and "1: photo.heic" in text and "files together" in text
    with pytest.raises(SciflowError, match=r"(lost\.png|photo\.heic): .*--strict"):
        build(folder, tmp_path / "strict", strict=True)
    for name in ("lost.png", "photo.heic"):
        (folder / name).unlink()
    assert build(folder, tmp_path / "cache", strict=True).tally.kept == report.samples


def test_linked_folders_are_read_once(folder: Path, tmp_path: Path) -> None:
    figure(folder / "b" / "a.png", "here")
    figure(tmp_path / "elsewhere" / "below" / "c.png", "there")
    os.symlink(tmp_path / "elsewhere", folder / "a_link")
    os.symlink(folder / "b", folder / "a_second_name")
    os.symlink(folder.parent, tmp_path / "elsewhere" / "up")
    os.symlink(tmp_path / "elsewhere", tmp_path / "elsewhere" / "round")
    os.symlink(folder, tmp_path / "link")
    os.symlink(tmp_path / "elsewhere" / "below", folder / "a_l")
    for source in (folder, tmp_path / "link"):  # the input itself may be a link
        records, tally = find_records(source)
        found = {record.name: record.caption for record in records}
        assert found == {"a_l/c.png": "there", "b/a.png": "here"} and (tally.used, tally.ignored) == (2, {})
        assert list(tally.remarks.values()) == [["a_link/below", "a_link/round", "a_link/up", "a_second_name"]]


def test_names_that_are_no_utf8(folder: Path, tmp_path: Path) -> None:
    figure(folder / os.fsdecode(b"caf\xe9.png"), "x")
    assert build(folder, tmp_path / "cache").samples == 1
    assert [row["image_path"] for row in index_of(tmp_path / "cache")] == ["caf\\xe9.png"]


def test_the_table_of_a_build_that_was_partly_there(folder: Path, tmp_path: Path, caplog: Any) -> None:
    for name in ("a.png", "b.png", "c.png", "d.bmp"):
        figure(folder / name, name)
    whole = (folder / "d.bmp").read_bytes()
    (folder / "d.bmp").write_bytes(whole[: len(whole) // 2])  # its header is fine
    build(folder, tmp_path / "cache")
    figure(folder / "e.png", "e")
    write_notes(folder, [{"file_name": "gone.png", "caption": "x"}])
    caplog.set_level("INFO")
    tally = build(folder, tmp_path / "cache", flip=True).tally
    assert (tally.encoded, tally.kept, list(tally.skipped), tally.used) == (4, 0, ["d.bmp"], 6)
    assert list(tally.missing) == ["gone.png"] and tally.files == 11
    assert caplog.text.count("files together") == 1 and str(tally) in caplog.text
    tally = build(folder, tmp_path / "cache", flip=True).tally
    assert (tally.encoded, tally.kept, tally.files) == (0, 4, 11)
    with pytest.raises(SciflowError, match=r"gone\.png: listed in the metadata.*--strict"):
        build(folder, tmp_path / "strict", strict=True)


# --- splits ---


def png(colour: int = 0) -> bytes:
    data = BytesIO()
    picture(24, 32, (colour, 0, 0)).save(data, "PNG")
    return data.getvalue()


@pytest.mark.parametrize(
    "names",
    [
        ("data/train-00000-of-00002.parquet", "validation-00000-of-00002.parquet", "test-00001-of-00002.parquet"),
        ("train.parquet", "val.parquet", "test.parquet"),
        ("default/train/0000.parquet", "default/dev/0000.parquet", "default/test/0000.parquet"),
        ("figures.parquet", "figures_valid.parquet", "figures-test.parquet"),
    ],
)  # fmt: skip
def test_train_alone_of_parquet_files(folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"image": [png()], "caption": [name]}), folder / name)
    assert list(captions(folder).values()) == [names[0]]
    tally = find_records(folder)[1]
    assert tally.used == 1 and sorted(tally.ignored) == sorted(names[1:])
    assert "of the split validation (`--split` chooses others)" in tally.ignored.values()
    assert list(captions(folder, split="test").values()) == [names[2]]
    assert sorted(captions(folder, split="train+validation").values()) == sorted(names[:2])
    assert sorted(captions(folder, split="all").values()) == sorted(names)
    with pytest.raises(SciflowError, match=r"`split` is 'query', but .* the splits .*train"):
        find_records(folder, split="query")
    (folder / names[0]).unlink()
    with pytest.raises(SciflowError, match=r"the splits test, validation\. Choose one by `--split`"):
        find_records(folder)
    (folder / names[1]).unlink()
    assert list(captions(folder).values()) == [names[2]], "the only one"


def test_train_alone_of_folders_saved_sets_and_the_hub(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("train", "test", "more"):
        figure(folder / name / "a.png", name)
    assert captions(folder) == {"more/a.png": "more", "train/a.png": "train"}
    assert find_records(folder)[1].ignored.keys() == {"test/a.png", "test/a.txt"}
    assert captions(folder, split="test") == {"more/a.png": "more", "test/a.png": "test"}
    write_notes(folder, [{"file_name": f"{name}/a.png", "caption": name} for name in ("train", "test")])
    assert find_records(folder)[1].missing == {}, "what another split has is there"
    (folder / "train" / "a.png").unlink()
    assert len(captions(folder)) == 2, "a folder called test beside none called train is a folder"

    def rows(*names: str) -> datasets.Dataset:
        columns = {"image": [picture(24, 32)] * len(names), "caption": list(names)}
        return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())

    both = datasets.DatasetDict({"test": rows("x"), "train": rows("y", "z")})
    both.save_to_disk(tmp_path / "saved")
    monkeypatch.setattr(datasets, "load_dataset", lambda name: both)
    for source in (tmp_path / "saved", "user/name"):
        records, tally = find_records(source)
        assert [record.caption for record in records] == ["y", "z"]
        assert tally.remarks == {"splits not looked at (`--split` chooses others)": ["test (1 rows)"]}
        assert len(find_records(source, split="all")[0]) == 3
        with pytest.raises(SciflowError, match=r"`split` is 'dev'.*the splits test, train"):
            find_records(source, split="dev")
    rows("x").save_to_disk(tmp_path / "one")
    with pytest.raises(SciflowError, match=r"`split` is 'test'.*no splits"):
        find_records(tmp_path / "one", split="test")


# --- pixels ---


@pytest.mark.parametrize("behind", [False, True])
def test_the_size_of_a_png_is_known_without_its_pixels(behind: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever its EXIF stands: behind the pixels, where some programs write it, these are read for it."""
    file, exif = BytesIO(), Image.Exif()
    exif[0x0112] = 6
    picture(20, 40).save(file, "PNG", exif=exif)
    data = file.getvalue()
    start = data.index(b"eXIf") - 4
    chunk = data[start : start + 12 + int.from_bytes(data[start : start + 4], "big")]
    if behind:
        end = data.index(b"IEND") - 4
        data = data[:start] + data[start + len(chunk) : end] + chunk + data[end:]
    with Image.open(BytesIO(data)) as opened:
        assert oriented_size(opened) == (40, 20)
        assert to_rgb(opened).size == (20, 40)
    if not behind:
        monkeypatch.setattr(Image.Image, "load", None)
    with Image.open(BytesIO(data)) as opened:
        assert oriented_size(opened) == (40, 20)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_is_that_of_the_turned_image(tmp_path: Path, orientation: int) -> None:
    image = Image.new("RGB", (40, 20), "white")
    image.paste((0, 0, 0), (0, 0, 10, 20))  # black at the left: at the top once it is turned by 6
    for suffix in sorted({"tif", "png", "jpg", "webp", "avif"} & {name[1:] for name in image_suffixes()}):
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(tmp_path / f"a.{suffix}", exif=exif)
        with Image.open(tmp_path / f"a.{suffix}") as opened:
            size = oriented_size(opened)
            seen = np.asarray(to_rgb(opened).convert("L"))
        assert seen.shape == size == ((20, 40) if orientation < 5 else (40, 20)), suffix
        edges = [seen[:, 0], seen[:, -1], seen[:, -1], seen[:, 0], seen[0], seen[0], seen[-1], seen[-1]]
        assert edges[orientation - 1].max() < 60 and (seen > 200).mean() > 0.7, suffix


def test_a_turned_tiff_is_built(folder: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    figure(folder / "a.tif", "x", exif=exif)
    assert build(folder, tmp_path / "cache", strict=True).samples == 1
    assert (index_of(tmp_path / "cache")[0]["original_h"], index_of(tmp_path / "cache")[0]["original_w"]) == (32, 24)


def test_nan_is_white_and_said(folder: Path, tmp_path: Path) -> None:
    values = np.linspace(5, 9, 32 * 32, dtype=np.float32).reshape(32, 32)
    clean = np.asarray(to_rgb(Image.fromarray(values)))
    holes = values.copy()
    holes[3, 4], holes[5, 6], holes[7, 8] = np.nan, np.inf, -np.inf
    seen = np.asarray(to_rgb(Image.fromarray(holes)))
    assert seen[3, 4, 0] == seen[5, 6, 0] == 255 and seen[7, 8, 0] == 0
    rest = np.isfinite(holes)
    assert np.array_equal(seen[rest], clean[rest]), "the other pixels are as without"
    for row, greys in {(0, np.nan, 0.5, 1): [0, 255, 128, 255], (7, np.nan): [0, 255]}.items():
        assert np.asarray(to_rgb(Image.fromarray(np.float32([row]))))[0, :, 0].tolist() == greys
    for name, pixels in {"a": holes, "b": np.full((32, 32), np.nan, np.float32), "c": values}.items():
        Image.fromarray(pixels).save(folder / f"{name}.tif")
        (folder / f"{name}.txt").write_text(name)
    tally = build(folder, tmp_path / "cache").tally
    assert tally.remarks == {"images with pixels that are NaN (white) or infinite": ["a.tif"]}
    assert list(tally.skipped) == ["b.tif"] and "all its pixels are NaN" in tally.skipped["b.tif"]


# --- tables ---

STORED = {
    "bytes": pa.binary(),
    "large bytes": pa.large_binary(),
    "views": pa.binary_view(),
    "struct": pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    "large struct": pa.struct([("path", pa.large_string()), ("bytes", pa.large_binary())]),
    "struct of bytes": pa.struct([("bytes", pa.binary())]),
    "paths": pa.large_string(),
}


@pytest.mark.parametrize("kind", STORED)
def test_tables_of_pandas_polars_and_duckdb(tmp_path: Path, kind: str) -> None:
    """Without the metadata of `datasets`, in a folder whose name looks like a pattern."""
    folder = tmp_path / "in [v2] *?"
    folder.mkdir()
    values: list[Any] = [png(10), png(200), None]
    if kind == "paths":
        for i in range(2):
            (folder / f"{i}.bin").write_bytes(values[i])  # no image by its name
        values = ["0.bin", "1.bin", None]
    elif "struct" in kind:
        values = [{"bytes": data, "path": f"{i}.png"} if data else None for i, data in enumerate(values)]
    text = pa.large_string() if "large" in kind else pa.string_view() if kind == "views" else pa.string()
    columns = {
        "image": pa.array(values, STORED[kind]),
        "caption": pa.array(["x", "y", "z"], text),
        "thumbnail": pa.array([b"", b"", b""], pa.binary()),
    }
    pq.write_table(pa.table(columns), folder / "x.parquet")
    report = build(folder, tmp_path / "cache")
    assert report.samples == 2 and load_cache(tmp_path / "cache")[0]["latents"].shape[0] == 3
    reds = [load_cache(tmp_path / "cache")[i]["latents"][0, 0, 0].item() for i in range(2)]
    assert np.allclose(sorted(reds), [10 / 127.5 - 1, 200 / 127.5 - 1], atol=0.01)
    tally = report.tally
    assert (tally.unit, tally.images, tally.used, list(tally.skipped.values())) == (
        "rows", 3, 1, ["unreadable image (no image in this row)"],
    )  # fmt: skip
    assert tally.remarks == {"columns that are not kept": ["thumbnail"]}


def test_tables_with_several_captions_a_row_and_masks_in_bytes(tmp_path: Path) -> None:
    mask = BytesIO()
    Image.new("L", (32, 24), 51).save(mask, "PNG")
    columns = {"image": [png(), png()], "caption": [["one", "two"], []], "loss_mask": [mask.getvalue(), None]}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    assert captions(tmp_path / "x.parquet") == {"row_00000000": "one", "row_00000000#caption2": "two"}
    report = build(tmp_path / "x.parquet", tmp_path / "cache")
    assert (load_cache(tmp_path / "cache")[1]["loss_mask"] == 51).all()
    assert report.tally.skipped == {"row_00000001": "no caption"} and report.tally.images == 2


def test_a_column_of_something_else_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [[1, 2]], "caption": ["x"]}), tmp_path / "x.parquet")
    with pytest.raises(SciflowError, match=r"`image` holds List.*not images.*struct"):
        find_records(tmp_path / "x.parquet")


def test_other_files_beside_tables_are_named(folder: Path) -> None:
    pq.write_table(pa.table({"image": [png()], "caption": ["x"]}), folder / "x.parquet")
    (folder / "README.md").write_text("---\n")
    (folder / "part.arrow").write_bytes(b"x")
    tally = find_records(folder)[1]
    assert tally.ignored.keys() == {"README.md", "part.arrow"} and tally.used == 1
    empty = folder.parent / "empty"
    empty.mkdir()
    (empty / "a.svg").write_text("<svg/>")
    with pytest.raises(SciflowError, match=r"holds no images, but 1 \.svg\. Images are \.png"):
        find_records(empty)
