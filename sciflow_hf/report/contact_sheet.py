"""The contact sheet of validation images: a row per prompt and seed, a column per step, read from disk."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import atomic_file

if TYPE_CHECKING:
    from PIL import ImageDraw
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont, ImageFont

    Font = FreeTypeFont | ImageFont

STEP_FOLDER = "step-{:06d}"
SOURCES, TARGETS = "sources", "targets"
MAX_COLUMNS = 12
MAX_PIXELS = 40_000_000  # thumbnails shrink until the sheet is about that large

_INK, _SOFT, _LINE, _EMPTY, _PAPER = "#1f2328", "#59636e", "#d1d9e0", "#f6f8fa", "#ffffff"
_GAP, _MIN_WIDTH = 8, 720


def image_name(prompt: int, seed: int) -> str:
    """File name of an image: `p00_seed42.png`."""
    return f"p{prompt:02d}_seed{seed}.png"


def save_image(image: "Image", path: Path, about: dict[str, str]) -> None:
    """Writes a PNG with `about` as its text fields, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(png_bytes(image, about))


def png_bytes(image: "Image", about: dict[str, str]) -> bytes:
    """A PNG with `about` as its text fields."""
    from PIL.PngImagePlugin import PngInfo

    fields, file = PngInfo(), BytesIO()
    for key, value in about.items():
        fields.add_itxt(key, value)
    kept = image if image.mode in ("L", "RGB", "RGBA") else image.convert("RGB")
    kept.save(file, format="PNG", pnginfo=fields)
    return file.getvalue()


def save_sources(folder: Path, sources: Sequence[Sequence["Image"]]) -> None:
    """Writes the sources of each prompt into `folder`/sources, instead of an earlier run's."""
    for old in (folder / SOURCES).glob("p*_source*.png"):
        old.unlink()
    for prompt, images in enumerate(sources):
        for number, image in enumerate(images):
            save_image(
                image, folder / SOURCES / f"p{prompt:02d}_source{number}.png", {"source_image": names_of([image])}
            )


def save_targets(folder: Path, targets: Sequence["Image | None"]) -> None:
    """Writes what prompts should become into `folder`/targets, instead of an earlier run's."""
    for old in (folder / TARGETS).glob("p*_target.png"):
        old.unlink()
    for prompt, image in enumerate(targets):
        if image is not None:
            save_image(image, target_path(folder, prompt), {"target_image": image.info.get("target_image", "")})


def target_path(folder: Path, prompt: int) -> Path:
    """The file that `save_targets` writes for a prompt that has a target."""
    return folder / TARGETS / f"p{prompt:02d}_target.png"


def source_paths(folder: Path, prompt: int) -> list[Path]:
    """The files that `save_sources` wrote for a prompt, in order."""
    found = (folder / SOURCES).glob(f"p{prompt:02d}_source*.png")
    return sorted(found, key=lambda path: int(path.stem.partition("_source")[2]))


def names_of(sources: Sequence["Image"]) -> str:
    """Names of the files of sources, as the images that are drawn from them have them in their text fields."""
    return ", ".join(source.info.get("source_image", "") for source in sources)


def read_image(path: Path) -> "Image":
    """An RGB image with its text fields in `info`."""
    from PIL import Image

    with Image.open(path) as image:
        image.load()
        converted = image.convert("RGB")
        converted.info = dict(image.info)
        return converted


def step_folders(folder: Path) -> dict[int, Path]:
    """Step -> folder of its images, in the order of steps."""
    found = {}
    for path in folder.glob("step-*"):
        name = re.fullmatch(r"step-(\d+)", path.name)
        if name and path.is_dir():
            found[int(name[1])] = path
    return dict(sorted(found.items()))


def thin_out(steps: Sequence[int], limit: int = MAX_COLUMNS) -> list[int]:
    """At most `limit` of `steps`, the first, the last, and evenly spaced ones between."""
    if len(steps) <= limit:
        return list(steps)
    last = len(steps) - 1
    return [steps[(2 * i * last + limit - 1) // (2 * (limit - 1))] for i in range(limit)]


def write_contact_sheet(
    folder: Path, *, prompts: Sequence[str], seeds: Sequence[int], max_columns: int = MAX_COLUMNS
) -> Path:
    """Builds `contact_sheet.png` from the images in `folder`; images of other prompts are left out.

    Returns:
        The sheet's path.
    """
    from PIL import Image, ImageDraw, ImageFont

    folders = step_folders(folder)
    sources = [[read_image(path) for path in source_paths(folder, prompt)] for prompt in range(len(prompts))]
    paths = [target_path(folder, prompt) for prompt in range(len(prompts))]
    targets = [read_image(path) if path.is_file() else None for path in paths]
    before = max(map(len, sources))  # columns of sources
    columns = thin_out(list(folders), max_columns)
    after = int(any(targets))
    rows, number_of_columns = len(prompts) * len(seeds), before + len(columns) + after
    shape = _image_size(folder)
    side = _thumbnail_side(shape, rows * max(number_of_columns, 1))
    scale = side / max(shape)
    cell = max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))  # (width, height)

    grid_width = number_of_columns * (cell[0] + _GAP) - _GAP
    unit = max(1.0, min(2.0, grid_width / 1300))  # wide sheets are looked at from further away
    margin, line_height, label_height = round(28 * unit), round(22 * unit), round(34 * unit)
    title, text, small = (ImageFont.load_default(size * unit) for size in (22, 16, 14))
    gutter = round(max(small.getlength(f"seed {seed}") for seed in seeds) + 20 * unit)
    width = max(_MIN_WIDTH, 2 * margin + gutter + grid_width)
    captions = [_wrap(_readable(prompt, text), text, width - 2 * margin) for prompt in prompts]
    block = label_height + len(seeds) * (cell[1] + _GAP) + margin
    top = margin + round(60 * unit)
    height = top + sum(len(lines) * line_height + block for lines in captions)
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((margin, margin), "Validation: the same prompts and seeds over training", font=title, fill=_INK)

    def show(image: "Image.Image | None", column: int, row: int) -> None:
        place = margin + gutter + column * (cell[0] + _GAP), top + row * (cell[1] + _GAP)
        frame = (place[0] - 1, place[1] - 1, place[0] + cell[0], place[1] + cell[1])
        draw.rectangle(frame, outline=_LINE, fill=_EMPTY)
        if image is not None:
            sheet.paste(_fitted(image, cell), place)

    def label(column: int, *candidates: str) -> None:
        middle = margin + gutter + column * (cell[0] + _GAP) + cell[0] / 2
        _label(draw, (middle, top - 8 * unit), candidates, cell[0], small)

    for prompt, caption in enumerate(captions):
        rule = top - round(14 * unit)
        draw.line((margin, rule, width - margin, rule), fill=_LINE)
        for number, line in enumerate(caption):
            draw.text((margin, top + number * line_height), line, font=text, fill=_INK)
        top += len(caption) * line_height + label_height
        for number, source in enumerate(sources[prompt]):
            label(number, f"source {number + 1}" if len(sources[prompt]) > 1 else "source")
            show(source, number, 0)
        about = {"prompt": prompts[prompt], "source_images": names_of(sources[prompt])}
        for column, step in enumerate(columns, start=before):
            label(column, *(("before training", "start") if step == 0 else (f"step {step:,}", f"{step:,}")))
            for row, seed in enumerate(seeds):
                show(_drawn(folders[step] / image_name(prompt, seed), about), column, row)
        if targets[prompt] is not None:
            label(number_of_columns - 1, "target")
            show(targets[prompt], number_of_columns - 1, 0)
        for row, seed in enumerate(seeds):
            middle = top + row * (cell[1] + _GAP) + cell[1] / 2
            draw.text((margin, middle), f"seed {seed}", font=small, fill=_SOFT, anchor="lm")
        top += block - label_height
    target = folder / "contact_sheet.png"
    save_image(sheet, target, {"steps": ", ".join(map(str, columns))})
    return target


def write_reward_sheet(file: Path, rows: Mapping[str, Sequence[tuple["Image", str]]], *, title: str) -> None:
    """A sheet of images in rows, each image with words below it.

    Args:
        file: to write.
        rows: name -> images and words.
        title: above all.
    """
    from PIL import Image, ImageDraw, ImageFont

    columns = max((len(row) for row in rows.values()), default=1)
    text, small = ImageFont.load_default(16), ImageFont.load_default(12)
    side, margin, words = 160, 20, 3 * 15 + 2 * _GAP
    size = 2 * margin + columns * (side + _GAP) - _GAP, 2 * margin + 30 + len(rows) * (30 + side + words)
    sheet = Image.new("RGB", (max(size[0], _MIN_WIDTH), size[1]), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((margin, margin), title, font=text, fill=_INK)
    top = margin + 30
    for name, row in rows.items():
        draw.text((margin, top), name, font=text, fill=_SOFT)
        for column, (image, told) in enumerate(row):
            left = margin + column * (side + _GAP)
            sheet.paste(_fitted(image, (side, side)), (left, top + 30))
            for number, line in enumerate(_wrap(_readable(told, small), small, side)):
                draw.text((left, top + 30 + side + 4 + 15 * number), line, font=small, fill=_INK)
        top += 30 + side + words
    save_image(sheet, file, {"title": title})


def _image_size(folder: Path) -> tuple[int, int]:
    """(width, height) of the newest image."""
    from PIL import Image

    for path in reversed(step_folders(folder).values()):
        for image_path in sorted(path.glob("p*_seed*.png")):
            with Image.open(image_path) as image:
                return image.size
    return (1, 1)


def _thumbnail_side(shape: tuple[int, int], cells: int) -> int:
    """Pixels of a thumbnail's longer side: 256, down to 64 where there are very many."""
    area = shape[0] * shape[1] / max(shape) ** 2
    return max(64, min(256, int((MAX_PIXELS / (cells * area)) ** 0.5)))


def _drawn(path: Path, about: dict[str, str]) -> "Image | None":
    """The image; None where it is missing or was drawn for another prompt or from another source."""
    if not path.is_file():
        return None
    image = read_image(path)
    return image if all(image.info.get(name, "") == value for name, value in about.items()) else None


def _fitted(image: "Image", cell: tuple[int, int]) -> "Image":
    from PIL import Image, ImageOps

    return ImageOps.pad(image, cell, method=Image.Resampling.LANCZOS, color=_PAPER)


def _label(
    draw: "ImageDraw.ImageDraw", place: tuple[float, float], candidates: Sequence[str], width: int, font: "Font"
) -> None:
    """The name of a column above it, as long as fits."""
    text = next((c for c in candidates if font.getlength(c) <= width), candidates[-1])
    draw.text(place, text, font=font, fill=_SOFT, anchor="ms")


def _readable(text: str, font: "Font") -> str:
    """The text with what Pillow's own font lacks spelled out: Greek by name, the rest plain or as "?"."""
    missing = bytes(font.getmask("\uffff"))

    def spell(char: str) -> str:
        if char.isascii() or bytes(font.getmask(char)) != missing:
            return char
        name = unicodedata.name(char, "")
        if name.startswith("GREEK"):
            return name.split(" WITH ")[0].split()[-1].lower().replace("lamda", "lambda")
        plain = unicodedata.normalize("NFKD", char).encode("ascii", "ignore").decode()
        return plain or "?"

    return "".join(map(spell, text))


def _wrap(prompt: str, font: "Font", width: int, max_lines: int = 3) -> list[str]:
    """The prompt in lines of at most `width` pixels; after `max_lines` it ends in an ellipsis."""
    lines, line = [], ""
    for word in prompt.split():
        while font.getlength(word) > width:  # a word longer than a line is cut
            word = word[:-1]
        longer = f"{line} {word}".strip()
        if font.getlength(longer) <= width:
            line = longer
        else:
            lines.append(line)
            line = word
    lines.append(line)
    if len(lines) > max_lines:
        lines = lines[:max_lines]
        while lines[-1] and font.getlength(lines[-1] + " …") > width:
            lines[-1] = lines[-1].rpartition(" ")[0]
        lines[-1] += " …"
    return lines


def sample_images(output_dir: str | Path, *, step: int | None = None, limit: int = 4) -> list[tuple[str, str]]:
    """Images for the model card: (path relative to `output_dir` with "/", prompt), of `step` or the latest.

    Every prompt comes once before one comes twice.
    """
    folder = Path(output_dir) / "validation"
    found = step_folders(folder)
    chosen = found.get(step) if step is not None else found[max(found)] if found else None
    if chosen is None:
        return []
    by_seed: dict[str, list[Path]] = {}
    for path in sorted(chosen.glob("p*_seed*.png")):
        by_seed.setdefault(path.stem.partition("_")[2], []).append(path)
    paths = [path for group in by_seed.values() for path in group][:limit]
    return [(path.relative_to(output_dir).as_posix(), read_image(path).info.get("prompt", "")) for path in paths]
