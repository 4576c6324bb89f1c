"""Fine-tune Stable Diffusion XL base or a checkpoint derived from it on figures: LoRA, DoRA, or the complete UNet.

The demo, on any CPU, nothing downloaded:
    python recipes/train_sdxl.py --config recipes/configs/sdxl_demo.yaml
Your own figures (a folder of images with metadata.jsonl or .txt captions):
    python recipes/train_sdxl.py --config recipes/configs/sdxl_lora.yaml \
        --input_dir my_figures --dataset_dir my_cache --output_dir my_lora
Several GPUs: put `accelerate launch` (or `torchrun --nproc_per_node N`) instead of `python`.
First look: add --dry_run (options, layers, buckets, memory) or --debug_batch (shapes, gradients of one batch).

Epsilon or v prediction and the noise schedule are those of the checkpoint's scheduler configuration.
Hardware: see the header of each file in recipes/configs.
"""

from train_flux2klein import main as train  # the steps are the same for every family

import sciflow_hf as sf


def main() -> None:
    train(sf.SDXL, __doc__)


if __name__ == "__main__":
    sf.run(main)
