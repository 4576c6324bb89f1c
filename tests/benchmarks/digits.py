"""What a DiT trained on scikit-learn's digits draws: class accuracy, Frechet distance, copies; table and picture.

    python recipes/train_dit.py --config recipes/configs/dit_digits.yaml
    python -m tests.benchmarks.digits --model_path outputs/dit_digits

The judges see the 1,257 real training digits only: a support-vector machine of scikit-learn on the pixels, and a small
convolutional network whose penultimate layer is the feature space. Prints a Markdown table; writes digits.json and
digits.png (100 drawn digits, a row a class) into the model's folder.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.svm import SVC

import sciflow_hf as sf
from sciflow_hf.images.classes import load_class_images
from sciflow_hf.metrics.classifier import class_accuracy, train_classifier
from sciflow_hf.metrics.frechet import frechet_distance, image_features, kernel_distance, nearest_distances
from sciflow_hf.metrics.samples import draw, even_labels


def everything(dataset):
    """(N, 1, 8, 8) in [-1, 1] and (N,)."""
    samples = [dataset[row] for row in range(len(dataset))]
    return torch.stack([s["pixel_values"] for s in samples]), torch.stack([s["class_labels"] for s in samples])


def measure(model_path: str, *, number: int, guidance_scale: float, steps: int, seed: int) -> tuple[dict, torch.Tensor]:
    """Everything that the goals ask for, and the drawn images."""
    data = Path(model_path) / "data" / "digits"
    args = sf.ClassImageArguments(input_dir=str(data), eval_split="test")
    train_set, held_out_set = load_class_images(args, image_size=8)
    (train, train_labels), (held_out, held_out_labels) = everything(train_set), everything(held_out_set)

    family = sf.DiT(pretrained_model_name_or_path=model_path)
    network = family.load_model(dtype=torch.float32)
    labels = even_labels(number, 10)
    start = time.perf_counter()
    samples = draw(family, network, labels, steps=steps, seed=seed, guidance_scale=guidance_scale, batch_size=250)
    seconds = time.perf_counter() - start

    machine = SVC(C=10).fit(train.flatten(1).numpy(), train_labels.numpy())
    classifier = train_classifier(train_set, num_classes=10, steps=1000)
    seen = {name: image_features(classifier.features, images.split(256))
            for name, images in (("train", train), ("held_out", held_out), ("samples", samples))}  # fmt: skip
    real, drawn = (frechet_distance(seen[name], seen["held_out"]) for name in ("train", "samples"))
    near = nearest_distances(samples.numpy(), train.numpy())
    near_real = nearest_distances(held_out.numpy(), train.numpy())
    found = {
        "parameters": sum(p.numel() for p in network.parameters()),
        "samples": number,
        "guidance_scale": guidance_scale,
        "steps": steps,
        "seed": seed,
        "seconds_to_draw": seconds,
        "svm_accuracy_held_out": float(machine.score(held_out.flatten(1).numpy(), held_out_labels.numpy())),
        "svm_accuracy_samples": float(machine.score(samples.flatten(1).numpy(), labels.numpy())),
        "network_accuracy_held_out": class_accuracy(classifier, held_out, held_out_labels),
        "network_accuracy_samples": class_accuracy(classifier, samples, labels),
        "frechet_train_held_out": real,
        "frechet_samples_held_out": drawn,
        "frechet_ratio": drawn / real,
        "kernel_distance_samples_held_out": kernel_distance(seen["samples"], seen["held_out"])[0],
        "nearest_training_digit_samples": float(np.median(near)),
        "nearest_training_digit_held_out": float(np.median(near_real)),
        "nearest_of_all_samples": float(near.min()),
        "nearest_of_all_held_out": float(near_real.min()),
    }
    return found, samples


def picture(samples: torch.Tensor, *, columns: int = 10, zoom: int = 6) -> Image.Image:
    """A row a class, of the first samples; labels go round the classes."""
    grid = samples[: 10 * columns].view(columns, 10, 8, 8).transpose(0, 1)
    padded = torch.nn.functional.pad(grid, (1, 1, 1, 1), value=1.0)
    values = ((padded.permute(0, 2, 1, 3).reshape(100, 10 * columns) + 1) * 127.5).round().byte().numpy()
    return Image.fromarray(values).resize((10 * columns * zoom, 100 * zoom), Image.Resampling.NEAREST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", default="outputs/dit_digits")
    parser.add_argument("--number", type=int, default=1000)
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found, samples = measure(
        options.model_path, number=options.number, guidance_scale=options.guidance_scale, steps=options.steps,
        seed=options.seed,
    )  # fmt: skip
    print("| | |\n| --- | --- |")
    for name, value in found.items():
        print(f"| {name.replace('_', ' ')} | {value:.4g} |" if isinstance(value, float) else f"| {name} | {value} |")
    folder = Path(options.model_path)
    (folder / "digits.json").write_text(json.dumps(found, indent=2) + "\n")
    picture(samples).save(folder / "digits.png")


if __name__ == "__main__":
    main()
