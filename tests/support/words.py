"""Pages of words in DejaVu Sans, sharp or blurred, and what the OCR reads of them."""

from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFilter, ImageFont

WORDS = (
    *("Encoder", "Decoder", "Attention", "Softmax", "Dropout", "Embedding", "Training", "Validation", "Accuracy"),
    *("Temperature", "Pressure", "Voltage", "Current", "Membrane", "Protein", "Nucleus", "Reactor", "Catalyst"),
    *("Feedback", "Sensor", "Control", "Filter", "Sample", "Detector", "Laser", "Mirror", "Spectrum"),
    *("Time", "Depth", "Input", "Output", "Layer", "Query", "Value", "Epoch", "Noise"),
)
_COLUMNS = 6


def page_of_words(size: int, blur: float = 0.0) -> Image.Image:
    """`WORDS` in black on white, six in a row.

    Args:
        size: of the letters, in pixels.
        blur: radius of a Gaussian, in pixels.
    """
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)
    wide, high = 8 * size, 3 * size
    image = Image.new("RGB", (_COLUMNS * wide + 2 * size, (len(WORDS) // _COLUMNS) * high + 2 * size), "white")
    draw = ImageDraw.Draw(image)
    for i, word in enumerate(WORDS):
        draw.text((size + i % _COLUMNS * wide, size + i // _COLUMNS * high + size // 2), word, font=font, fill="black")
    return image.filter(ImageFilter.GaussianBlur(blur)) if blur else image
