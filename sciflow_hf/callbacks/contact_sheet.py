"""The contact sheet of validation images: a row per prompt and seed, a column per step, made from the files."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import ImageDraw
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

STEP_FOLDER = "step-{:06d}"
MAX_COLUMNS = 12
MAX_PIXELS = 40_000_000  # thumbnails shrink until the sheet is about that large

_INK, _SOFT, _LINE, _EMPTY, _PAPER = "#1f2328", "#59636e", "#d1d9e0", "#f6f8fa", "#ffffff"
_MARGIN, _GAP, _GUTTER, _HEADER, _LINE_HEIGHT = 28, 8, 84, 60, 22
_MIN_WIDTH = 720


def image_name(prompt: int, seed: int) -> str:
    """File name of an image: `p00_seed42.png`."""
    return f"p{prompt:02d}_seed{seed}.png"


def save_image(image: "Image", path: Path, about: dict[str, str]) -> None:
    """Writes a PNG with `about` as its text fields, atomically."""
    from PIL.PngImagePlugin import PngInfo

    fields = PngInfo()
    for key, value in about.items():
        fields.add_itxt(key, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    image.convert("RGB").save(temporary, format="PNG", pnginfo=fields)
    os.replace(temporary, path)


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
    """Builds `contact_sheet.png` from the images in `folder`. An image drawn for another prompt leaves its cell empty.

    Returns:
        The sheet's path.
    """
    from PIL import Image, ImageDraw, ImageFont

    folders = step_folders(folder)
    columns = thin_out(list(folders), max_columns)
    rows = len(prompts) * len(seeds)
    shape = _image_size(folder)
    side = _thumbnail_side(shape, rows * max(len(columns), 1))
    scale = side / max(shape)
    cell = max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))  # (width, height)

    title, text, small = (ImageFont.load_default(size) for size in (22, 16, 14))
    grid_width = len(columns) * (cell[0] + _GAP) - _GAP
    width = max(_MIN_WIDTH, 2 * _MARGIN + _GUTTER + grid_width)
    captions = [_wrap(prompt, text, width - 2 * _MARGIN) for prompt in prompts]
    heights = [len(lines) * _LINE_HEIGHT + 34 + len(seeds) * (cell[1] + _GAP) + 18 for lines in captions]
    sheet = Image.new("RGB", (width, _MARGIN + _HEADER + sum(heights)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text(
        (_MARGIN, _MARGIN), "Validation: the same prompts and seeds over training", font=title, fill=_INK
    )

    top = _MARGIN + _HEADER
    for prompt, (caption, height) in enumerate(zip(captions, heights, strict=True)):
        draw.line((_MARGIN, top - 12, width - _MARGIN, top - 12), fill=_LINE)
        draw.multiline_text((_MARGIN, top), "\n".join(caption), font=text, fill=_INK, spacing=6)
        row_top = top + len(caption) * _LINE_HEIGHT + 34
        for column, step in enumerate(columns):
            left = _MARGIN + _GUTTER + column * (cell[0] + _GAP)
            _label(draw, (left + cell[0] / 2, row_top - 8), step, cell[0], small)
            for row, seed in enumerate(seeds):
                place = left, row_top + row * (cell[1] + _GAP)
                path = folders[step] / image_name(prompt, seed)
                thumbnail = _thumbnail(path, cell, prompts[prompt])
                if thumbnail is not None:
                    sheet.paste(thumbnail, place)
                draw.rectangle(
                    (place[0] - 1, place[1] - 1, place[0] + cell[0], place[1] + cell[1]),
                    outline=_LINE,
                    fill=None if thumbnail is not None else _EMPTY,
                )
        for row, seed in enumerate(seeds):
            middle = row_top + row * (cell[1] + _GAP) + cell[1] / 2
            draw.text((_MARGIN, middle), f"seed {seed}", font=small, fill=_SOFT, anchor="lm")
        top += height
    target = folder / "contact_sheet.png"
    save_image(sheet, target, {"steps": ", ".join(map(str, columns))})
    return target


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


def _thumbnail(path: Path, cell: tuple[int, int], prompt: str) -> "Image | None":
    """The image fitted into the cell; None where it is missing or was drawn for another prompt."""
    from PIL import Image, ImageOps

    if not path.is_file():
        return None
    image = read_image(path)
    if image.info.get("prompt") != prompt:
        return None
    return ImageOps.pad(image, cell, method=Image.Resampling.LANCZOS, color=_PAPER)


def _label(
    draw: "ImageDraw.ImageDraw", place: tuple[float, float], step: int, width: int, font: "FreeTypeFont"
) -> None:
    """The step above its column, as long as fits."""
    candidates = [f"step {step:,}", f"{step:,}"]
    if step == 0:
        candidates = ["before training", "start"]
    label = next((c for c in candidates if font.getlength(c) <= width), candidates[-1])
    draw.text(place, label, font=font, fill=_SOFT, anchor="ms")


def _wrap(prompt: str, font: "FreeTypeFont", width: int, max_lines: int = 3) -> list[str]:
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
