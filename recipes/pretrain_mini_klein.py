"""Train `mini_klein` from scratch: draw figures, then train a VAE and a FLUX.2 klein transformer on them.

    python recipes/pretrain_mini_klein.py --config recipes/configs/mini_klein_pretrain.yaml
If it is interrupted, run the same command again; delete the folder to start from scratch. `<output_dir>/pipeline` is
what comes with the package as `mini_klein`: the averaged weights, in bfloat16. `report.json` next to it says what was
done.

Hardware: any CPU. Time and results: sciflow_hf/assets/mini_klein/README.md.
"""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import sciflow_hf as sf
from sciflow_hf import demo

# Rows of padding that a batch gets beyond TEXT_LENGTH: they are zeros here, and not masked. Few, for the time.
PADDING = (0,) * 44 + (8,) * 6 + (16,) * 6 + (48,) * 4 + (112,) * 3 + (496,)


@dataclass
class PretrainArguments:
    """Number and kinds of figures, and the length of the VAE's training."""

    vae_steps: int = field(default=4000, metadata={"help": "Steps of the VAE, 16 figures each."})
    num_figures: int = field(default=28_000, metadata={"help": "Figures for the transformer."})
    large_fraction: float = field(default=0.15, metadata={"help": "Share of them with 96 x 144 pixels."})
    dark_fraction: float = field(default=0.3, metadata={"help": "Share of them on dark pages, which they say."})
    unnamed_fraction: float = field(default=0.1, metadata={"help": "As many more whose captions name no colour."})
    eval_fraction: float = field(default=0.01, metadata={"help": "Share of the figures held out for eval_loss."})
    caption_dropout: float = field(default=0.1, metadata={"help": "Share of samples with the empty prompt."})


@dataclass
class MiniKlein(sf.Flux2Klein):
    """klein from random weights, that learns to overlook padding."""

    @property
    def from_scratch(self) -> bool:
        return True

    def compute_loss(self, model, batch, args, *, noise=None, levels=None):  # type: ignore[no-untyped-def]
        if model.training:
            rows = PADDING[int(batch["noise_key"][0]) % len(PADDING)]
            text = torch.nn.functional.pad(batch["prompt_embeds"], (0, 0, 0, rows))
            batch = batch | {"prompt_embeds": text}
        return super().compute_loss(model, batch, args, noise=noise, levels=levels)


def build_cache(family: MiniKlein, folder: Path, own: PretrainArguments, seed: int) -> list[str]:
    """Draws figures and encodes them."""
    caches, encoders = [], family.load_encoders(device="cpu", dtype=torch.float32)
    shares = {"large": own.large_fraction, "dark": own.dark_fraction, "unnamed": own.unnamed_fraction}
    for name, drawn in demo.pretraining_parts(own.num_figures, **shares, seed=seed).items():
        figures, cache = folder / f"figures_{name}", folder / f"cache_{name}"
        if not drawn:
            continue
        if not figures.is_dir():
            demo.make_mini_figures(figures, drawn)
        sf.build_cache(
            figures, cache, buckets=sorted({(f.height, f.width) for f in drawn}), batch_size=16, samples_per_part=5000,
            encode_images=lambda pixel_values: family.encode_images(pixel_values, encoders),
            encode_prompts=lambda prompts: family.encode_prompts(prompts, encoders),
            settings=family.encoder_settings(), bucket_step=family.bucket_step(),
        )  # fmt: skip
        caches.append(str(cache))
    return caches


def main() -> None:
    own, args = sf.parse_args(PretrainArguments, sf.DiffusionTrainingArguments, description=__doc__)
    if args.dry_run or args.debug_batch or args.world_size > 1:
        raise sf.SciflowError("`dry_run`, `debug_batch` and several processes: this recipe is one run of one process.")
    folder, start = Path(args.output_dir), time.time()
    if not (folder / "start").is_dir():
        vae = demo.train_mini_vae(folder / "vae", steps=own.vae_steps, seed=args.seed)
        demo.start_mini_klein(folder / "start", vae, seed=args.seed)
    family = MiniKlein(str(folder / "start"), max_sequence_length=demo.TEXT_LENGTH)
    data = sf.DataArguments(build_cache(family, folder, own, args.seed), eval_fraction=own.eval_fraction)
    train_dataset, eval_dataset = sf.load_data(data, dtype=torch.float32)

    args.output_dir = str(folder / "training")
    trainer = sf.DiffusionTrainer(
        family.load_model(dtype=torch.float32), args, family=family, caption_dropout=own.caption_dropout,
        train_dataset=train_dataset, eval_dataset=eval_dataset,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint="latest")
    trainer.save_model()
    metrics = trainer.evaluate()
    with trainer.averaged_weights():
        pipeline = family.load_pipeline(trainer.model, with_text_encoder=True)
        for part in (pipeline, pipeline.transformer, pipeline.vae):
            part.register_to_config(_name_or_path="mini_klein")  # and not a folder of this machine
        pipeline.to(torch.bfloat16).save_pretrained(folder / "pipeline")
    report = asdict(own) | {"seed": args.seed, "steps": trainer.state.global_step}
    report["seconds_of_this_call"] = time.time() - start
    (folder / "report.json").write_text(json.dumps(report | metrics, indent=2), encoding="utf-8")


if __name__ == "__main__":
    sf.run(main)
