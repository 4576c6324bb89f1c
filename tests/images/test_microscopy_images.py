"""Image files go in and out with every value; intensity transforms are undone exactly; bad planes are named."""

import logging

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import sciflow_hf as sf
from sciflow_hf.images.files import ImageFile, check_plane, find_images, read_image, to_dtype, write_image
from sciflow_hf.images.transforms import KINDS, IntensityTransform


def values(shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.normal(100, 500, shape).astype(dtype)
    return rng.integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)


# Name of a file -> (its array, how it is written without this package, planes that are expected).
FILES = {
    "grey8.png": lambda p: Image.fromarray(values((5, 7), "uint8")).save(p) or values((5, 7), "uint8")[None, None],
    "grey16.png": lambda p: Image.fromarray(values((5, 7), "uint16")).save(p) or values((5, 7), "uint16")[None, None],
    "rgb8.png": lambda p: (
        Image.fromarray(values((5, 7, 3), "uint8")).save(p) or values((5, 7, 3), "uint8").transpose(2, 0, 1)[None]
    ),
    "grey16.tif": lambda p: tifffile.imwrite(p, values((5, 7), "uint16")) or values((5, 7), "uint16")[None, None],
    "float.tif": lambda p: tifffile.imwrite(p, values((5, 7), "float32")) or values((5, 7), "float32")[None, None],
    "rgb16.tif": lambda p: (
        tifffile.imwrite(p, values((5, 7, 3), "uint16"), photometric="rgb")
        or values((5, 7, 3), "uint16").transpose(2, 0, 1)[None]
    ),
    "pages.tif": lambda p: (
        tifffile.imwrite(p, values((6, 5, 7), "uint16"), photometric="minisblack", metadata={"axes": "ZYX"})
        or values((6, 5, 7), "uint16")[:, None]
    ),
    "stack.ome.tif": lambda p: (
        tifffile.imwrite(
            p, values((4, 2, 5, 7), "uint16"), ome=True, photometric="minisblack", metadata={"axes": "ZCYX"}
        )
        or values((4, 2, 5, 7), "uint16")
    ),
    "channel_first.ome.tif": lambda p: (
        tifffile.imwrite(
            p, values((2, 4, 5, 7), "uint16"), ome=True, photometric="minisblack", metadata={"axes": "CZYX"}
        )
        or values((2, 4, 5, 7), "uint16").swapaxes(0, 1)
    ),
    "plane.npy": lambda p: np.save(p, values((5, 7), "float32")) or values((5, 7), "float32")[None, None],
    "channels.npy": lambda p: np.save(p, values((3, 5, 7), "uint16")) or values((3, 5, 7), "uint16")[None],
    "planes.npy": lambda p: np.save(p, values((2, 3, 5, 7), "uint8")) or values((2, 3, 5, 7), "uint8"),
    "one.npz": lambda p: np.savez(p, any=values((5, 7), "uint8")) or values((5, 7), "uint8")[None, None],
    "named.npz": lambda p: np.savez(p, image=values((5, 7), "uint8"), x=0) or values((5, 7), "uint8")[None, None],
}


@pytest.mark.parametrize("name", FILES)
def test_files_are_read_and_written_as_they_are(tmp_path, name):
    expected = FILES[name](tmp_path / name)
    image = read_image(tmp_path / name)
    assert image.dtype == expected.dtype and np.array_equal(image.planes, expected)
    assert len(image.names()) == len(set(image.names())) == len(expected)
    again = write_image(image, tmp_path / "out" / name)
    back = read_image(again)
    assert back.dtype == image.dtype and np.array_equal(back.planes, image.planes)
    if name.endswith(("tif", "png")):
        assert back.axes == image.axes and back.shape == image.shape
        reader = tifffile.imread if name.endswith("tif") else lambda p: np.asarray(Image.open(p))
        assert np.array_equal(reader(again), reader(tmp_path / name))


def test_ome_axes_survive(tmp_path):
    FILES["channel_first.ome.tif"](tmp_path / "a.ome.tif")
    write_image(read_image(tmp_path / "a.ome.tif"), tmp_path / "b.ome.tif")
    with tifffile.TiffFile(tmp_path / "b.ome.tif") as file:
        assert file.is_ome and file.series[0].axes == "CZYX" and file.series[0].shape == (2, 4, 5, 7)


REFUSED = {
    "palette.png": (lambda p: Image.fromarray(values((4, 4), "uint8")).convert("P").save(p), "palettes as grey"),
    "alpha.png": (lambda p: Image.fromarray(values((4, 4, 4), "uint8")).save(p), "transparency"),
    "text.png": (lambda p: p.write_bytes(b"hello" * 20), "unreadable image"),
    "cut.png": (lambda p: p.write_bytes(b"\x89PNG"), "unreadable image"),
    "cut.tif": (lambda p: p.write_bytes(b"II*\x00\x08"), "unreadable TIFF"),
    "int32.npy": (lambda p: np.save(p, np.zeros((4, 4), "int32")), "uint8, uint16 or float32"),
    "pickle.npy": (lambda p: np.save(p, np.array([{}]), allow_pickle=True), "unreadable array"),
    "flat.npy": (lambda p: np.save(p, np.zeros(4)), "arrays are"),
    "last.npy": (lambda p: np.save(p, np.zeros((40, 50, 3))), "channels come first"),
    "many.npz": (lambda p: np.savez(p, a=np.zeros((4, 4)), b=np.zeros((4, 4))), "call the image's array `image`"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_names_file_and_remedy(tmp_path, name):
    write, words = REFUSED[name]
    write(tmp_path / name)
    with pytest.raises(sf.SciflowError, match=words) as caught:
        read_image(tmp_path / name)
    assert name in str(caught.value)


def test_sixteen_bit_colours_of_a_png_are_refused_not_cut(tmp_path):
    """Pillow would read them as 8 bits; the file is made by hand, as no library here writes one."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\x00" + values((3, 3), ">u2", row).tobytes() for row in range(2))
    header = struct.pack(">IIBBBBB", 3, 2, 16, 2, 0, 0, 0)
    path = tmp_path / "colour16.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    assert Image.open(path).mode == "RGB"
    with pytest.raises(sf.SciflowError, match="16-bit colours as TIFF"):
        read_image(path)


def test_what_a_png_cannot_hold_is_refused(tmp_path):
    planes = values((1, 3, 4, 4), "uint16")
    with pytest.raises(sf.SciflowError, match="Write TIFF"):
        write_image(ImageFile(tmp_path / "a.tif", planes, "CYX", (3, 4, 4)), tmp_path / "a.png")
    with pytest.raises(sf.SciflowError, match="no format"):
        write_image(ImageFile(tmp_path / "a.tif", planes, "CYX", (3, 4, 4)), tmp_path / "a.bmp")


def test_integers_are_rounded_and_clipped():
    found = to_dtype(np.array([-3.0, 0.5, 1.5, 254.6, 300.0]), np.uint8)
    assert found.dtype == np.uint8 and found.tolist() == [0, 0, 2, 255, 255]
    assert to_dtype(np.array([-3.25]), np.float32).tolist() == [-3.25]


def test_folders_without_images_are_named(tmp_path):
    with pytest.raises(sf.SciflowError, match=r"`input_dir`.*no such folder"):
        find_images(tmp_path / "none")
    with pytest.raises(sf.SciflowError, match=r"`conditioning_dir`.*no image"):
        find_images(tmp_path, option="conditioning_dir")


def test_planes_that_teach_nothing_are_named(caplog):
    good = values((2, 8, 8), "uint16") // 2
    check_plane(good, "good.tif")
    zero = good.copy()
    zero[1] = 0
    bright = good.copy()
    bright[0, :5] = 65535
    nan = good.astype("float32")
    nan[0, 0, 0] = np.nan
    for plane, words in ((zero, "every pixel of channel 1 is 0"), (bright, "% of channel 0 are saturated"),
                         (np.full_like(good, 65535), "every pixel of channel 0 is 65535"),
                         (nan, "1 pixels are NaN")):  # fmt: skip
        with pytest.raises(sf.SciflowError, match=words) as caught:
            check_plane(plane, "stack.tif#3")
        assert str(caught.value).startswith("stack.tif#3") and "image" in str(caught.value)
    some = good.copy()
    some[0, 0] = 65535
    with caplog.at_level(logging.WARNING):
        check_plane(some, "some.tif")
    assert "some.tif: 12.5 % of channel 0 are saturated" in caplog.text


# -- intensity transforms --------------------------------------------------------------------------------------


@pytest.mark.promise("C11")
@pytest.mark.parametrize("kind", KINDS)
def test_transforms_are_undone_for_every_count(kind):
    """All 16-bit counts, and what background and read noise make of them, come back, rounded, as they were."""
    transform = IntensityTransform(kind, (90.0, 100.0), (30000.0, 65535.0), gain=2.5)
    counts = torch.arange(-2000, 65536, dtype=torch.float32).view(1, 1, -1).expand(2, 1, -1)
    back = transform.inverse(transform(counts))
    assert (back - counts).abs().max() < 0.1
    assert torch.equal(back.round(), counts)
    ends = transform(torch.tensor([[90.0, 30000.0], [100.0, 65535.0]]).view(2, 1, 2))
    torch.testing.assert_close(ends, torch.tensor([-1.0, 1.0]).expand(2, 1, 2))
    again = IntensityTransform.from_dict(transform.to_dict())
    assert again == transform


@pytest.mark.promise("C11")
def test_transforms_equal_their_formulas():
    x = torch.tensor([0.0, 3.0, 1000.0, 5000.0]).view(1, 1, 4)
    low, high, gain = 10.0, 4000.0, 2.0
    for kind, g in (
        ("percentile", lambda v: v),
        ("anscombe", lambda v: 2 * np.sqrt(np.asarray(v) / gain + 3 / 8)),
        ("log", lambda v: np.log1p(np.asarray(v) / gain)),
    ):
        found = IntensityTransform(kind, (low,), (high,), gain)(x).numpy()
        expected = 2 * (g(x.numpy()) - g(low)) / (g(high) - g(low)) - 1
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_anscombe_makes_the_noise_alike():
    """Poisson counts of means 5 to 500 photons, 3 counts each: deviations in the network's units differ by < 5 %."""
    rng = np.random.default_rng(0)
    transform = IntensityTransform("anscombe", (0.0,), (1500.0,), gain=3.0)
    stds = [float(transform(torch.tensor(3.0 * rng.poisson(m, (1, 1, 40000)))).std()) for m in (5, 20, 100, 500)]
    assert max(stds) / min(stds) < 1.05
    plain = IntensityTransform("percentile", (0.0,), (1500.0,))
    assert float(plain(torch.tensor(3.0 * rng.poisson(500, (1, 1, 4000)))).std()) > 5 * float(
        plain(torch.tensor(3.0 * rng.poisson(5, (1, 1, 4000)))).std()
    )


def test_fitted_ends_are_percentiles_of_each_channel():
    rng = np.random.default_rng(1)
    planes = [rng.normal((100, 500), 10, (40, 50, 2)).transpose(2, 0, 1) for _ in range(3)]
    found = IntensityTransform.fit(planes, percentiles=(1, 99))
    everything = np.concatenate([p.reshape(2, -1) for p in planes], axis=1)
    np.testing.assert_allclose([found.low, found.high], np.percentile(everything, (1, 99), axis=1))


def test_transforms_that_cannot_work_are_refused():
    with pytest.raises(sf.SciflowError, match="`intensity_transform` 'gamma'"):
        IntensityTransform("gamma", (0.0,), (1.0,))
    with pytest.raises(sf.SciflowError, match=r"`intensity_percentiles`.*channel 1"):
        IntensityTransform("log", (0.0, 3.0), (1.0, 3.0))
    with pytest.raises(sf.SciflowError, match=r"`intensity_percentiles`.*rising"):
        IntensityTransform.fit([np.zeros((1, 2, 2))], percentiles=(99, 1))
    with pytest.raises(sf.SciflowError, match="`intensity_gain`"):
        IntensityTransform("log", (0.0,), (1.0,), gain=0)
    with pytest.raises(sf.SciflowError, match="2 channels: the intensity transform was fitted to 1"):
        IntensityTransform("log", (0.0,), (1.0,))(torch.zeros(2, 4, 4))
