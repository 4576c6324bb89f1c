"""Microscope images as tiles: pairs, forward model, splits by specimen, fold and region, keyed draws, bad folders."""

import unicodedata

import numpy as np
import pytest
import torch

import sciflow_hf as sf
from sciflow_hf.data.batches.loader import BucketLoader, evaluation_keys, training_sampler
from sciflow_hf.images.files import ImageFile, write_image
from sciflow_hf.images.microscopes import MicroscopyDataArguments, load_microscopy_images
from sciflow_hf.images.optics import ForwardModel


def write(path, planes, axes="YX"):
    planes = np.asarray(planes)
    full = planes.reshape((-1, 1, *planes.shape[-2:])) if planes.ndim < 4 else planes
    shape = planes.shape if axes != "YX" else planes.shape[-2:]
    return write_image(ImageFile(path, full, axes, shape), path)


def smooth(height, width, seed, dtype="uint16"):
    """Every pixel has a value of its own within an image."""
    rng = np.random.default_rng(seed)
    return (1000 * seed + rng.permutation(height * width).reshape(height, width) % 60000).astype(dtype)


@pytest.fixture
def folder(tmp_path):
    """Six specimens, one of them of three planes; not square."""
    for number in range(5):
        write(tmp_path / "in" / f"specimen{number}" / "image.tif", smooth(64, 96, number))
    write(tmp_path / "in" / "stack.tif", np.stack([smooth(64, 96, 10 + i) for i in range(3)]), "ZYX")
    return tmp_path / "in"


def load(folder, optics=None, **options):
    options = {"input_dir": str(folder), "tile_size": 32, "eval_fraction": 0.0} | options
    return load_microscopy_images(MicroscopyDataArguments(**options), optics or ForwardModel(psf_sigma=1.0))


def test_tiles_cover_every_image_and_are_named(folder):
    train, held_out = load(folder, augment=False)
    assert held_out is None and len(train) == 8 * 6
    assert train.row_ids[0] == "specimen0/image.tif@0,0" and train.row_ids[-1] == "stack.tif#2@32,64"
    assert set(train.groups) == {*(f"specimen{i}" for i in range(5)), "stack"}
    assert train.buckets == [(32, 32)] * 48 and train.describe(3) == train.row_ids[3]
    sample = train[7]
    assert {name: tuple(value.shape) for name, value in sample.items()} == {
        "pixel_values": (1, 32, 32), "conditioning_pixel_values": (1, 32, 32),
    }  # fmt: skip
    sharp = train.transform.inverse(sample["pixel_values"])
    np.testing.assert_allclose(sharp[0], smooth(64, 96, 1)[0:32, 32:64], atol=0.1)


def test_tiles_at_the_end_of_odd_sizes(tmp_path):
    write(tmp_path / "in" / "odd.npy", smooth(50, 33, 3))
    train, _ = load(tmp_path / "in", augment=False)
    assert [row.split("@")[1] for row in train.row_ids] == ["0,0", "0,1", "18,0", "18,1"]


@pytest.mark.promise("C12")
def test_the_measured_tile_is_the_blurred_image_with_its_surroundings(folder):
    """A tile's conditioning equals that of the whole image, blurred and cut: no border of the tile is seen in it."""
    optics = ForwardModel(psf_sigma=1.5, photons=1e7, background=0, read_noise=0)
    train, _ = load(folder, optics, augment=False)
    image = torch.from_numpy(smooth(64, 96, 2).astype("float32"))[None, None]
    blurred = optics.blur(image)[0]
    row = train.row_ids.index("specimen2/image.tif@32,32")
    sharp, measured = train.intensities(row, 5)
    assert torch.equal(sharp, image[0, :, 32:64, 32:64])
    expected = blurred[:, 32:64, 32:64]
    assert (measured - expected).abs().max() < 0.01 * expected.max()
    corner = train.intensities(train.row_ids.index("specimen2/image.tif@0,0"), 5)[1]
    assert (corner - blurred[:, :32, :32]).abs().max() < 0.01 * expected.max()


def test_what_is_random_follows_the_key(folder):
    train, _ = load(folder)
    one, again, other = train.keyed(5, 77), train.keyed(5, 77), train.keyed(5, 78)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["pixel_values"], other["pixel_values"])
    plane = torch.from_numpy(smooth(64, 96, 0).astype("float32"))
    starts, turns = set(), set()
    for key in range(200):
        tile = train.intensities(0, key)[0][0]
        (y, x), right, below = (np.argwhere(plane.numpy() == int(tile[place]))[0] for place in ((0, 0), (0, 1), (1, 0)))
        turns.add((*(right - (y, x)), *(below - (y, x))))
        starts.add((y // 4, x // 4))
    assert len(turns) == 8 and len(starts) > 40  # the symmetries of the square, many places


def test_batches_have_fresh_photons_in_every_epoch_and_fixed_ones_in_evaluation(folder, tmp_path):
    train, _ = load(folder, augment=False)
    args = sf.DiffusionTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=4, report_to="none"
    )
    sampler = training_sampler(train, args)

    def epoch(number, key_of=None):
        sampler.set_epoch(number)
        rows = {}
        for batch in BucketLoader(train, sampler, key_of=key_of):
            rows |= dict(zip(batch["row"].tolist(), batch["conditioning_pixel_values"], strict=True))
        return rows

    first, second, again = epoch(0), epoch(1), epoch(0)
    assert len(first) == len(train)
    assert all(torch.equal(first[row], again[row]) for row in first)
    assert not any(torch.equal(first[row], second[row]) for row in first)
    fixed = [epoch(number, evaluation_keys(train.row_ids)) for number in (0, 1)]
    assert all(torch.equal(fixed[0][row], fixed[1][row]) for row in first)


def test_pairs_are_read_and_cut_alike(folder, tmp_path):
    for number in range(5):
        write(tmp_path / "out" / f"specimen{number}" / "image.npy", smooth(64, 96, number) // 2 + 7)
    write(tmp_path / "out" / "stack.ome.tif", np.stack([smooth(64, 96, 10 + i) // 2 + 7 for i in range(3)]), "ZYX")
    train, _ = load(folder, conditioning_dir=str(tmp_path / "out"))
    assert train.optics is None
    for row, key in ((0, 3), (20, 4), (47, 5)):
        sharp, measured = train.intensities(row, key)
        assert torch.equal(sharp // 2 + 7, measured)
    sample = train.keyed(0, 3)
    torch.testing.assert_close(train.conditioning_transform.inverse(sample["conditioning_pixel_values"]), measured * 0
                               + train.intensities(0, 3)[1], atol=0.1, rtol=0)  # fmt: skip
    assert train.transform != train.conditioning_transform


def test_pairs_by_name(folder, tmp_path, caplog):
    """Links, hidden files, other formats, normal forms of Unicode; what has no partner is said."""
    sharp, measured, elsewhere = tmp_path / "sharp", tmp_path / "measured", tmp_path / "elsewhere"
    write(sharp / "link" / unicodedata.normalize("NFC", "fibré.tif"), smooth(40, 40, 1))
    write(elsewhere / unicodedata.normalize("NFD", "fibré.tif"), smooth(40, 40, 1))
    write(elsewhere / "spare.tif", smooth(40, 40, 2))
    measured.mkdir()
    (sharp / "round").symlink_to(sharp)
    (measured / "link").symlink_to(elsewhere)
    (sharp / "._fibre.tif").write_bytes(b"a shadow of another system")
    (sharp / "photo.jpg").write_bytes(b"x")
    train, _ = load(sharp, conditioning_dir=str(measured), eval_fraction=0.0)
    assert len(train) > 0 and len({plane.path for plane, *_ in train.tiles}) == 1
    assert "1 file not looked at" in caplog.text and "photo.jpg" in caplog.text
    assert "1 image without a sharp one" in caplog.text and "link/spare.tif" in caplog.text
    write(sharp / "link" / "a.1.tif", smooth(40, 40, 1))
    write(sharp / "link" / "a.2.tif", smooth(40, 40, 2))
    with pytest.raises(sf.SciflowError, match=r"link/a\.1\.tif and link/a\.2\.tif are both 'link/a'"):
        load(sharp, conditioning_dir=str(measured))


# -- splits ----------------------------------------------------------------------------------------------------


def test_specimens_are_held_out_whole_and_stay_so(folder):
    train, held_out = load(folder, eval_fraction=0.4)
    assert set(train.groups).isdisjoint(held_out.groups) and len(train) + len(held_out) == 48
    write(folder / "specimen9" / "image.tif", smooth(64, 96, 30))
    more_train, more_held = load(folder, eval_fraction=0.4)
    assert set(train.groups) <= set(more_train.groups) and set(held_out.groups) <= set(more_held.groups)
    train, held_out = load(folder, eval_specimens=["stack", "specimen3"])
    assert set(held_out.groups) == {"stack", "specimen3"}


def test_every_specimen_is_held_out_in_one_fold(folder):
    folds = [set(load(folder, split="fold", num_folds=3, fold=i)[1].groups) for i in range(3)]
    assert sum(len(fold) for fold in folds) == 6 == len(set.union(*folds)) and all(len(f) == 2 for f in folds)


def test_regions_share_no_pixel_not_even_by_the_psf(folder):
    optics = ForwardModel(psf_sigma=1.0)
    train, held_out = load(folder, optics, split="region", eval_fraction=0.35, split_margin=0, tile_size=16)
    assert set(train.groups) == set(held_out.groups) and optics.radius == 4
    for row in range(len(train)):
        for key in range(5):
            if train.groups[row] == "specimen0":
                values = train.intensities(row, key)[0].numpy()
                columns = np.argwhere(np.isin(smooth(64, 96, 0), values))[:, 1]
                assert columns.max() + optics.radius < round(96 * 0.65)
    assert min(tile[3] for tile in held_out.tiles) == round(96 * 0.65)


def test_the_transform_is_fitted_to_the_training_part_alone(tmp_path):
    for name, top in (("a", 1000), ("b", 60000)):
        write(tmp_path / "in" / f"{name}.tif", (smooth(64, 64, 1) % 1000 * (top // 1000)).astype("uint16"))
    train, held_out = load(tmp_path / "in", eval_specimens=["b"])
    assert train.transform.high[0] < 1000 and held_out.transform == train.transform
    assert float(held_out[0]["pixel_values"].max()) > 50
    assert train.optics.white_level == train.transform.high[0]


def test_specimens_by_pattern(tmp_path):
    for name in ("mouse1_a", "mouse1_b", "mouse2_a"):
        write(tmp_path / "in" / f"{name}.png", smooth(40, 40, 1, "uint8"))
    train, _ = load(tmp_path / "in", specimen_pattern=r"(mouse\d)")
    assert sorted(set(train.groups)) == ["mouse1", "mouse2"]
    with pytest.raises(sf.SciflowError, match="finds nothing in 'mouse1_a"):
        load(tmp_path / "in", specimen_pattern=r"(rat\d)")


def test_the_fingerprint_knows_data_and_optics(folder):
    same = [load(folder)[0].fingerprint for _ in range(2)]
    others = [load(folder, tile_size=16)[0], load(folder, ForwardModel(photons=7))[0],
              load(folder, intensity_transform="log")[0], load(folder, eval_specimens=["stack"])[0]]  # fmt: skip
    assert same[0] == same[1] and len({same[0], *(d.fingerprint for d in others)}) == 5


# -- bad input -------------------------------------------------------------------------------------------------

BAD = {
    "mixed depth": (lambda f: write(f / "x.png", smooth(64, 96, 1, "uint8")), {}, "x.png: 1 channels of uint8, but"),
    "mixed channels": (
        lambda f: write(f / "x.npy", np.stack([smooth(64, 96, 1)] * 2)[None], "QCYX"),
        {},
        "x.npy: 2 channels of uint16, but",
    ),
    "all zero": (lambda f: write(f / "x.tif", np.zeros((64, 96), "uint16")), {}, "x.tif: every pixel of channel 0"),
    "saturated": (
        lambda f: write(f / "x.tif", np.maximum(smooth(64, 96, 1), (np.arange(96) > 30) * 65535).astype("uint16")),
        {},
        "x.tif: .* saturated",
    ),
    "small": (lambda f: write(f / "x.tif", smooth(20, 96, 1)), {}, "x.tif: 20 x 96 pixels, smaller than"),
    "small for the psf": (
        lambda f: write(f / "x.tif", smooth(33, 40, 1)),
        {"optics": ForwardModel(psf_sigma=10)},
        "x.tif: 33 x 40 pixels, but `psf` gaussian is 81 wide",
    ),
    "unknown specimen": (lambda f: None, {"eval_specimens": ["nobody"]}, "`eval_specimens` \\['nobody'\\]"),
    "nothing left": (
        lambda f: None,
        {"eval_specimens": [*(f"specimen{i}" for i in range(5)), "stack"]},
        "nothing is left to train on",
    ),
    "too many folds": (lambda f: None, {"split": "fold", "num_folds": 9}, "`num_folds` 9: the images are of 6 "),
    "no room": (lambda f: None, {"split": "region", "eval_fraction": 0.1}, "`eval_fraction` 0.1 leaves"),
    "no partner": (lambda f: write(f.parent / "out" / "specimen0" / "image.tif", smooth(64, 96, 1)),
                   {"conditioning_dir": "out"}, "no image for specimen1/image.tif"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_folders_name_file_and_remedy(folder, name):
    spoil, options, words = BAD[name]
    spoil(folder)
    options = dict(options)
    if "conditioning_dir" in options:
        options["conditioning_dir"] = str(folder.parent / options["conditioning_dir"])
    with pytest.raises(sf.SciflowError, match=words):
        load(folder, **options)


def test_nan_and_unequal_pairs(tmp_path):
    bad = smooth(40, 40, 1).astype("float32")
    bad[3, 3] = np.nan
    write(tmp_path / "in" / "x.npy", bad)
    with pytest.raises(sf.SciflowError, match=r"x.npy: 1 pixels are NaN"):
        load(tmp_path / "in")
    write(tmp_path / "in" / "x.npy", smooth(40, 40, 1))
    write(tmp_path / "out" / "x.npy", smooth(20, 40, 1))
    with pytest.raises(sf.SciflowError, match="Register and resample"):
        load(tmp_path / "in", conditioning_dir=str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": "half"}, "`split` 'half'"),
        ({"tile_size": 4}, "`tile_size` 4"),
        ({"eval_fraction": 1.0}, "`eval_fraction` 1.0"),
        ({"fold": 5}, "`fold` 5 of `num_folds` 5"),
        ({"split_margin": -1}, "`split_margin` -1"),
        ({"specimen_pattern": "x"}, "put \\( \\) around"),
        ({"specimen_pattern": "("}, "`specimen_pattern`"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(sf.SciflowError, match=words):
        MicroscopyDataArguments(input_dir="x", **options)
