"""Caches of scored candidates, and short trainings on their comparisons."""

from pathlib import Path

import numpy as np
import torch
from caches import edit, encoder_settings, index_files, write_cache
from trainings import ADAPTER_OPTIONS, TRAINER_OPTIONS

import sciflow_hf as sf

SIZE = 4  # candidates of a group
AXES = ("component", "text")
PUBLISHED = dict(axes=list(AXES), min_reward_gap=0.1)


def write_candidates(folder, pipeline, *, buckets=None, seed=0, **columns):
    """A cache of groups of `SIZE` candidates of one caption and bucket, with `reward` and a score for each axis.

    The first of a group is the best; the next two lose one axis each, the last one loses both a little and the most
    reward. `columns` change columns of the index, see `caches.edit`.
    """
    buckets = buckets or {(32, 48): 6 * SIZE, (48, 32): 4 * SIZE}
    write_cache(folder, settings=encoder_settings(pipeline), buckets=buckets, figures_per_paper=1, seed=seed)
    (file,) = index_files(folder)
    seen, names, places = {}, [], []

    def groups(values):
        for size in zip(sizes["h"], sizes["w"], strict=True):
            number = seen[size] = seen.get(size, -1) + 1
            names.append(f"{size[0]}x{size[1]} {number // SIZE}")
            places.append(number % SIZE)
        return names

    sizes = {}

    def note(name):
        return lambda values: sizes.setdefault(name, values)

    edit(file, bucket_h=note("h"), bucket_w=note("w"))
    scores = {"component_score": [1.0, 0.4, 0.9, 0.8], "text_score": [0.9, 0.8, 0.2, 0.7]}
    edit(
        file,
        group_id=groups,
        caption=lambda _: [f"A figure of the group {name}." for name in names],
        paper_id=lambda _: names,
        reward=lambda _: [[0.95, 0.6, 0.55, 0.3][place] for place in places],
        **{name: lambda _, values=values: [values[place] for place in places] for name, values in scores.items()},
    )
    edit(file, **columns)
    return Path(folder)


def groups_of(folder, **rules):
    return sf.load_groups(sf.load_cache(folder, dtype=torch.float32), sf.TupleArguments(**rules))


def dpo_trainer(folder, family, data, held_out=None, *, adapter=None, reference=None, **options):
    """A trainer of a LoRA on groups, six steps of two; as `trainings.make_trainer`."""
    adapter = adapter or {"rank": 4, "lora_alpha": 8} | {n: options.pop(n) for n in ADAPTER_OPTIONS & options.keys()}
    others = {name: options.pop(name) for name in TRAINER_OPTIONS & options.keys()}
    defaults = dict(
        output_dir=str(folder), use_cpu=True, max_steps=6, save_strategy="no", logging_steps=1, disable_tqdm=True,
        per_device_train_batch_size=2, learning_rate=1e-3, seed=3, report_to="none", max_winner_drift=0.0,
    )  # fmt: skip
    args = sf.PreferenceTrainingArguments(**(defaults | options))
    model = family.load_model(dtype=torch.float32)
    model = sf.add_adapter(model, sf.AdapterArguments(**adapter), family=family, seed=1)
    return sf.DiffusionDPOTrainer(
        model, args, family=family, train_dataset=data, eval_dataset=held_out, reference_model=reference, **others
    )


def moved(model, scale=0.1):
    """Weights of a LoRA that change the network: as if it had been trained."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=scale, generator=torch.Generator().manual_seed(len(name)))
    return model


def first_batch(trainer):
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def log_sigmoid_loss(policy, reference, beta):
    """-log sigmoid(beta s) by numpy, of losses (B, 2) in float64."""
    gained = np.asarray(reference, np.float64) - np.asarray(policy, np.float64)
    return np.log1p(np.exp(-beta * (gained[:, 0] - gained[:, 1])))
