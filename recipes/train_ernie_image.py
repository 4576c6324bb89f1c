"""Fine-tune ERNIE-Image on figures: LoRA, DoRA, or all weights of the network.

The demo, on any CPU, nothing downloaded:
    python recipes/train_ernie_image.py --config recipes/configs/ernie_image_demo.yaml
Your own figures (a folder of images with metadata.jsonl or .txt captions):
    python recipes/train_ernie_image.py --config recipes/configs/ernie_image_lora.yaml \
        --input_dir my_figures --dataset_dir my_cache --output_dir my_lora
Several GPUs: put `accelerate launch` (or `torchrun --nproc_per_node N`) instead of `python`.
First look: add --dry_run (options, layers, buckets, memory) or --debug_batch (inputs, gradients of one batch).

Hardware: see the header of each file in recipes/configs.
"""

from train_flux2klein import main as train  # the steps are the same for every family

import sciflow_hf as sf


def main() -> None:
    train(sf.ErnieImage, __doc__)


if __name__ == "__main__":
    sf.run(main)
