"""Short trainings by rewards of a tiny klein: in this process, or as a script that kills itself, on any ranks."""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from recipe_runs import run
from trainings import ADAPTER_OPTIONS, TRAINER_OPTIONS
from transformers import TrainerCallback

import sciflow_hf as sf
from sciflow_hf.cli.run import leave_process_group
from sciflow_hf.training import rollouts
from sciflow_hf.training.reward_prompts import Prompts

WORDS = ("bars", "lines", "points", "slices", "boxes", "dots", "rings")


def prompts(number=6, sizes=((32, 48),)):
    """Rows of prompts, with a column `wanted` for rewards."""
    rows = []
    for i in range(number):
        height, width = sizes[i % len(sizes)]
        rows.append({"prompt": f"{i} {WORDS[i % len(WORDS)]}", "height": height, "width": width, "wanted": i % 2})
    return Prompts(rows)


def mean(image):
    return float(np.asarray(image, dtype=np.float64).mean() / 255)


def dark(prompts, images):
    """More for darker images."""
    return [1 - mean(image) for image in images]


def bright(prompts, images):
    return [mean(image) for image in images]


def wished(prompts, images, wanted):
    """Bright where `wanted` is 1, dark where it is 0."""
    return [mean(image) if w else 1 - mean(image) for image, w in zip(images, wanted, strict=True)]


def away_on_rank_1(prompts, images):
    if os.environ.get("RANK") == "1":
        raise sf.SciflowError("the judge is not installed")
    return dark(prompts, images)


def alike(prompts, images):
    return [0.25] * len(images)


def reward_trainer(folder, family, data=None, held_out=None, *, rewards=(dark,), watched=(), adapter=None, **options):
    """A trainer of a LoRA by rewards: two prompts a rollout, four images each, in steps of two."""
    adapter = adapter or {"rank": 4, "lora_alpha": 8} | {n: options.pop(n) for n in ADAPTER_OPTIONS & options.keys()}
    others = {name: options.pop(name) for name in TRAINER_OPTIONS & options.keys()}
    defaults = dict(
        output_dir=str(folder), use_cpu=True, num_train_epochs=2, save_strategy="no", logging_steps=1,
        disable_tqdm=True, per_device_train_batch_size=2, learning_rate=1e-2, seed=3, report_to="none",
        num_generations=4, prompts_per_rollout=2, rollout_batch_size=4, rollout_steps=2, num_inference_steps=2,
        validation_guidance_scale=1.0,
    )  # fmt: skip
    args = sf.RewardTrainingArguments(**(defaults | options))
    model = family.load_model(dtype=torch.float32)
    model = sf.add_adapter(model, sf.AdapterArguments(**adapter), family=family, seed=1)
    return sf.DiffusionRewardTrainer(
        model, args, family=family, train_dataset=prompts() if data is None else data, eval_dataset=held_out,
        reward_funcs=rewards, watch_rewards=watched, **others,
    )  # fmt: skip


def rollout_logs(trainer):
    return [entry for entry in trainer.state.log_history if "rollout" in entry]


class Fault:
    """Something that happens at the `at`-th draw or score of this process, or after a step of that number."""

    def __init__(self, what):
        self.what, self.count = what, 0

    def put(self, trainer, where, at):
        def counting(function):
            def counted(*args, **kwargs):
                self.count += 1
                if self.count == at:
                    self.what()
                return function(*args, **kwargs)

            return counted

        if where == "update":
            trainer.add_callback(_AtStep(at, self.what))
        else:
            owner, name = {"draw": (rollouts.Painter, "draw"), "score": (rollouts.Rollout, "score")}[where]
            setattr(owner, name, counting(getattr(owner, name)))


class _AtStep(TrainerCallback):
    def __init__(self, step, what):
        self.step, self.what = step, what

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.what()


def train(*, pipeline, output_dir, kill=None, sizes=((32, 48),), rewards="wished", **options):
    """A run in this process; `kill` = (where, at) ends it by SIGKILL."""
    family = sf.Flux2Klein(str(pipeline), max_sequence_length=12)
    functions = [globals()[name] for name in rewards.split()]
    trainer = reward_trainer(output_dir, family, prompts(sizes=sizes), prompts(12), rewards=functions, **options)
    if kill:
        Fault(lambda: os.kill(os.getpid(), signal.SIGKILL)).put(trainer, *kill)
    try:
        trainer.train()
    except sf.SciflowError as error:
        return {"error": str(error)}
    trainer.save_model()
    trainer.evaluate()
    return {"log": [{n: v for n, v in e.items() if "runtime" not in n and "per_second" not in n}
                    for e in trainer.state.log_history]}  # fmt: skip


def launch(folder, job, ranks=1, check=True):
    """Runs `train(**job)` in processes of their own: what it returned on the first rank."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.json").write_text(json.dumps(job, default=str))
    done = run(folder / "job.json", ranks=ranks, script=Path(__file__), check=check)
    return json.loads((folder / "result.json").read_text()) if done.returncode == 0 else done


def main():
    torch.set_num_threads(1)
    path = Path(sys.argv[1])
    result = train(**json.loads(path.read_text()))
    if int(os.environ.get("RANK", "0")) == 0:
        (path.parent / "result.json").write_text(json.dumps(result))
    leave_process_group()


if __name__ == "__main__":
    main()
