"""How many drawn words the OCR reads right: 36 words a cell, letters of 8 to 32 pixels, sharp and blurred.

    python -m tests.benchmarks.ocr

Needs the extra `ocr`. Words of DejaVu Sans in black on white; right is the whole word, whatever its case. The second
table is the mean of the reward `ocr`, with each word in quotes in a prompt of its own.
"""

import time

from sciflow_hf.metrics.rewards.ocr import read_texts, text_score, word_accuracy
from tests.support.words import WORDS, page_of_words

SIZES, BLURS = (8, 10, 12, 16, 20, 24, 32), (0, 0.5, 1, 1.5, 2)


def main() -> None:
    read_texts(page_of_words(16))  # loads the engine
    start = time.time()
    read = {(size, blur): read_texts(page_of_words(size, blur)) for size in SIZES for blur in BLURS}
    seconds = time.time() - start
    for title, rate in (
        ("words right in per cent", lambda texts: 100 * word_accuracy(WORDS, texts)),
        ("mean of the reward", lambda texts: sum(text_score(word, "".join(texts)) for word in WORDS) / len(WORDS)),
    ):
        print(f"{title}\n\n| pixels | sharp | " + " | ".join(f"radius {blur:g}" for blur in BLURS[1:]) + " |")
        print("| --- |" + " --- |" * len(BLURS))
        for size in SIZES:
            print(f"| {size} | " + " | ".join(f"{rate(read[size, blur]):.3g}" for blur in BLURS) + " |")
        print()
    print(f"{seconds / len(read):.2f} s a page")


if __name__ == "__main__":
    main()
