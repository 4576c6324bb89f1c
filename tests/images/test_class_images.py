"""Images with class labels: folders, `save_to_disk`, parquet; squares, labels, splits, and what is refused."""

from io import BytesIO

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from class_folders import pixels, write_folder
from PIL import Image

import sciflow_hf as sf
from sciflow_hf.demo.digits import write_digits
from sciflow_hf.images.classes import ClassImages, as_square, load_class_images

pytestmark = pytest.mark.usefixtures("datasets_cache")


def load(root, image_size=8, num_classes=None, **options):
    args = sf.ClassImageArguments(**({"input_dir": str(root), "eval_fraction": 0.0} | options))
    return load_class_images(args, image_size=image_size, num_classes=num_classes)


@pytest.mark.promise("D19")
def test_a_folder_of_class_folders(tmp_path):
    train, held_out = load(write_folder(tmp_path / "data"))
    assert held_out is None and len(train) == 12
    assert (train.class_names, train.num_classes, train.channels) == (["axon", "cell"], 2, 3)
    for row, name in enumerate(train.row_ids):
        folder, file = name.split("/")
        expected = pixels(100 * ("axon", "cell").index(folder) + int(file[0]))
        sample = train[row]
        assert sample["class_labels"].item() == ("axon", "cell").index(folder)
        assert sample["pixel_values"].dtype == torch.float32
        np.testing.assert_allclose(sample["pixel_values"].numpy(), expected.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)
    assert train.buckets == [(8, 8)] * 12 and len(set(train.row_ids)) == 12
    assert train.describe(0) == train.row_ids[0]


@pytest.mark.promise("D10", "D19")
@pytest.mark.parametrize("kind", ["save_to_disk", "parquet", "names"])
def test_data_sets_of_datasets(tmp_path, kind):
    """Columns of any name; whole numbers, ClassLabel or text."""
    values = [{"img": Image.fromarray(pixels(i)), "digit": i % 3} for i in range(9)]
    features = datasets.Features({"img": datasets.Image(), "digit": datasets.Value("int64")})
    if kind == "save_to_disk":
        features["digit"] = datasets.ClassLabel(names=["a", "b", "c"])
    if kind == "names":
        features["digit"] = datasets.Value("string")
        values = [v | {"digit": "xyz"[v["digit"]]} for v in values]
    data = datasets.Dataset.from_list(values, features=features)
    if kind == "parquet":
        (tmp_path / "data").mkdir()
        data.to_parquet(tmp_path / "data" / "train.parquet")
    else:
        data.save_to_disk(str(tmp_path / "data"))
    train, _ = load(tmp_path / "data", image_column="img", label_column="digit")
    assert [train[i]["class_labels"].item() for i in range(9)] == [0, 1, 2] * 3
    assert (
        train.class_names
        == {"save_to_disk": ["a", "b", "c"], "parquet": ["0", "1", "2"], "names": ["x", "y", "z"]}[kind]
    )
    expected = torch.from_numpy(pixels(4)).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(train[4]["pixel_values"], expected, rtol=0, atol=1e-6)


def test_squares_are_cut_from_the_middle():
    wide = np.zeros((4, 10), np.uint8)
    wide[:, 3:7] = pixels(0, 4, 4, 1)
    np.testing.assert_array_equal(as_square(Image.fromarray(wide), 4)[:, :, 0], wide[:, 3:7])
    tall = np.repeat(np.arange(20, dtype=np.uint8)[:, None], 8, axis=1)
    halved = as_square(Image.fromarray(tall), 4)[:, :, 0]
    assert halved.shape == (4, 4) and abs(int(halved[0, 0]) - 6.5) <= 1  # rows 6 to 13


def test_eval_split_by_hash_stays_when_data_is_added(tmp_path):
    few = write_folder(tmp_path / "few", each=40)
    train, held_out = load(few, eval_fraction=0.3)
    assert not set(train.row_ids) & set(held_out.row_ids) and len(train) + len(held_out) == 80
    assert 10 < len(held_out) < 40
    more = write_folder(tmp_path / "more", each=60)
    later, kept = load(more, eval_fraction=0.3)
    assert set(held_out.row_ids) <= set(kept.row_ids) and set(train.row_ids) <= set(later.row_ids)


def test_splits_that_the_data_has(tmp_path, caplog):
    write_folder(tmp_path / "data" / "train", each=4)
    write_folder(tmp_path / "data" / "test", each=3)
    caplog.set_level("INFO")
    assert len(load(tmp_path / "data")[0]) == 8 and "Not looked at: the splits test" in caplog.text
    caplog.clear()
    train, held_out = load(tmp_path / "data", eval_split="test")
    assert "Not looked at" not in caplog.text
    assert (len(train), len(held_out)) == (8, 6) and held_out.class_names == train.class_names
    with pytest.raises(sf.SciflowError, match=r"eval_split.*'valid'.*train, test"):
        load(tmp_path / "data", eval_split="valid")


def test_folders_that_look_like_patterns_and_what_is_passed_over(tmp_path, caplog):
    root = write_folder(tmp_path / "data [v2] *")
    (root / "cell" / "linked").symlink_to(write_folder(tmp_path / "elsewhere", classes=["x"], each=1) / "x")
    (root / "cell" / "lost.png").symlink_to(tmp_path / "nowhere")
    assert len(load(root)[0]) == 12
    assert "2 images not looked at" in caplog.text and "cell/linked/0.png, cell/lost.png" in caplog.text


@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), pa.struct([("bytes", pa.binary()), ("path", pa.string())])]
)
def test_tables_without_the_metadata_of_datasets(tmp_path, kind):
    (tmp_path / "data [v2]").mkdir()
    stored = []
    for i in range(4):
        file = BytesIO()
        Image.fromarray(pixels(i)).save(file, "PNG")
        stored.append({"bytes": file.getvalue(), "path": f"{i}.png"} if pa.types.is_struct(kind) else file.getvalue())
    table = pa.table({"image": pa.array(stored, kind), "label": [0, 1, 0, 1]})
    pq.write_table(table, tmp_path / "data [v2]" / "train.parquet")
    train, _ = load(tmp_path / "data [v2]")
    expected = torch.from_numpy(pixels(3)).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(train[3]["pixel_values"], expected, rtol=0, atol=1e-6)


def test_turned_images_are_seen_upright(tmp_path):
    root = write_folder(tmp_path / "data")
    exif = Image.Exif()
    exif[0x0112] = 6  # clockwise by a quarter
    Image.fromarray(pixels(7)).save(root / "axon" / "0.png", exif=exif)
    train, _ = load(root)
    expected = torch.from_numpy(np.rot90(pixels(7), -1).copy()).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(train[train.row_ids.index("axon/0.png")]["pixel_values"], expected, rtol=0, atol=1e-6)


def test_mirror_images_are_rows_of_their_own(tmp_path):
    root = write_folder(tmp_path / "data")
    train, held_out = load(root, flip=True, eval_fraction=0.4)
    half = len(train) // 2
    torch.testing.assert_close(train[half + 1]["pixel_values"], train[1]["pixel_values"].flip(2))
    assert train[half + 1]["class_labels"] == train[1]["class_labels"]
    assert train.groups[1] == train.groups[half + 1] and len(set(train.row_ids)) == len(train)
    assert not held_out.flip


def test_images_are_read_as_they_are_asked_for_where_there_are_too_many(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "data")
    kept, _ = load(root)
    monkeypatch.setattr("sciflow_hf.images.classes.MEMORY", 10)
    read, _ = load(root)
    assert read._kept is None and kept._kept is not None
    assert all(torch.equal(read[i]["pixel_values"], kept[i]["pixel_values"]) for i in range(len(kept)))


def test_fingerprint_tells_data_apart(tmp_path):
    root = write_folder(tmp_path / "data")
    same, _ = load(root)
    found = {same.fingerprint, load(root)[0].fingerprint}
    assert len(found) == 1
    found |= {load(root, image_size=4)[0].fingerprint, load(root, flip=True)[0].fingerprint}
    (root / "axon" / "0.png").rename(root / "cell" / "9.png")
    found.add(load(root)[0].fingerprint)
    assert len(found) == 4


def test_fewer_images_spread_over_the_data(tmp_path):
    train, _ = load(write_folder(tmp_path / "data"), max_train_samples=4)
    assert len(train) == 4 and sorted(train[i]["class_labels"].item() for i in range(4)) == [0, 0, 1, 1]


def test_modes_are_mixed_only_when_asked(tmp_path):
    root = write_folder(tmp_path / "data")
    Image.fromarray(pixels(5, channels=1)).save(root / "cell" / "3.png")
    with pytest.raises(sf.SciflowError, match=r"cell/3\.png.*mode L.*RGB.*--image_mode"):
        load(root)
    train, _ = load(root, image_mode="RGB")
    assert train[9]["pixel_values"].shape == (3, 8, 8)
    grey, _ = load(root, image_mode="L")
    assert grey.channels == 1 and grey[0]["pixel_values"].shape == (1, 8, 8)


def test_images_of_16_bits_are_for_another_family(tmp_path):
    root = write_folder(tmp_path / "data")
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(root / "axon" / "0.png")
    with pytest.raises(sf.SciflowError, match=r"axon/0\.png.*I;16.*microscopy_unet"):
        load(root)


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    root = write_folder(tmp_path / "data")
    (root / "cell" / "2.png").write_bytes(b"no image")
    with pytest.raises(sf.SciflowError, match=r"cell/2\.png cannot be read"):
        load(root)


def labelled(tmp_path, labels, kind="int64"):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value(kind)})
    rows = [{"image": Image.fromarray(pixels(i)), "label": label} for i, label in enumerate(labels)]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("labels", "options", "match"),
    [
        ([0, None, 1], {}, r"1 image without a class: row 1"),
        ([0, 5, 1], {"num_classes": 3}, r"1 label not in 0 to 2, first that of row 1: 5"),
        ([0, -1, 1], {}, r"not in 0 to 1.*row 1: -1"),
        ([0.5, 1.0], {"kind": "float64"}, r"label.*not one class an image"),
        ([0, 1], {"label_column": "class"}, r"label_column.*'class'.*image, label"),
        ([0, 1], {"image_column": "img"}, r"image_column.*'img'.*image \(Image\)"),
    ],
)
def test_labels_that_cannot_be_used(tmp_path, labels, options, match):
    root = labelled(tmp_path, labels, options.pop("kind", "int64"))
    with pytest.raises(sf.SciflowError, match=match):
        load(root, **options)


def test_without_labels(tmp_path):
    (tmp_path / "data").mkdir()
    Image.fromarray(pixels(0)).save(tmp_path / "data" / "0.png")
    with pytest.raises(sf.SciflowError, match=r"label_column.*one folder a class.*--num_classes 0"):
        load(tmp_path / "data")
    train, _ = load(tmp_path / "data", num_classes=0)
    assert set(train[0]) == {"pixel_values"} and train.num_classes == 0


def test_rows_are_chosen_by_their_columns(tmp_path):
    rows = [
        {"image": Image.fromarray(pixels(i)), "label": i % 2, "quality": ["High", "Low", None][i % 3], "year": 2015 + i}
        for i in range(12)
    ]
    data = datasets.Dataset.from_list(rows, features=datasets.Features({
        "image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"]),
        "quality": datasets.Value("string"), "year": datasets.Value("int64"),
    }))  # fmt: skip
    datasets.DatasetDict({"train": data, "test": data.select(range(6))}).save_to_disk(str(tmp_path / "data"))
    every, _ = load(tmp_path / "data")
    conditions = ["quality=High,none", "year>=2018"]
    train, held_out = load(tmp_path / "data", row_filter=conditions, eval_split="test")
    chosen = [i for i in range(3, 12) if i % 3 != 1]
    assert train.row_ids == [f"row {i}" for i in chosen] and held_out.row_ids == ["row 3", "row 5"]
    for own, row in enumerate(chosen):
        for name, value in every[row].items():
            torch.testing.assert_close(train[own][name], value, rtol=0, atol=0)
    assert train.row_filter == tuple(conditions) and train.fingerprint != every.fingerprint
    for wrong, match in (
        ("quality=Best", "no row of `input_dir` .*split train.* has 'Best' in 'quality'.*High"),
        ("grade=1", "has no column 'grade', but 'image', 'label', 'quality', 'year'"),
        ("image=1", "'image' holds no single texts"),
        ("quality", "row_filter"),
    ):
        with pytest.raises(sf.SciflowError, match=match):
            load(tmp_path / "data", row_filter=[wrong])


def test_no_such_data(tmp_path):
    with pytest.raises(sf.SciflowError, match=r"input_dir.*cannot be read.*one subfolder of images a class"):
        load(tmp_path / "nothing")
    with pytest.raises(sf.SciflowError, match=r"input_dir"):
        sf.ClassImageArguments()


def test_digits_are_scikit_learns(tmp_path):
    from sklearn.datasets import load_digits

    root = write_digits(tmp_path / "digits")
    train, held_out = load(root, eval_split="test")
    assert (len(train), len(held_out)) == (1257, 540) and train.class_names == list("0123456789")
    digits = load_digits()
    for row in (0, 700, 1256):
        number = int(train.row_ids[row].split("/")[-1].removesuffix(".png"))
        found = (train[row]["pixel_values"][0].numpy() + 1) * 8
        np.testing.assert_allclose(found, digits.images[number], atol=0.04)  # 17 levels in 8 bits
        assert train[row]["class_labels"] == digits.target[number]
    counts = np.bincount([int(held_out[i]["class_labels"]) for i in range(540)])
    assert counts.min() >= 52  # stratified
    assert isinstance(train, ClassImages) and write_digits(tmp_path / "digits") == root
