"""Fine-tune Qwen-Image-Edit-Plus (20B) on edits of figures: LoRA, DoRA, or all weights of the network.

Your own edits (a folder of images with metadata.jsonl: `file_name`, `source_image`, `caption`):
    python recipes/train_qwen_image_edit.py --config recipes/configs/qwen_image_edit_lora.yaml \
        --input_dir my_edits --dataset_dir my_cache --output_dir my_lora
Several GPUs: put `accelerate launch` (or `torchrun --nproc_per_node N`) instead of `python`.
First look: add --dry_run (options, layers, buckets, memory) or --debug_batch (inputs, gradients of one batch).

Hardware: see the header of each file in recipes/configs.
"""

from train_flux2klein import main as train  # the steps are the same for every family

import sciflow_hf as sf


def main() -> None:
    train(sf.QwenImageEdit, __doc__)


if __name__ == "__main__":
    sf.run(main)
