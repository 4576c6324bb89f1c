"""Runs that are killed again and again, or that one of all the faults comes to.

`pytest -m acceptance` kills a run 30 times, on one rank and on two, and has 120 cases of random flags and a fault; the
fast suite 3 kills and a few of the cases. With `SOAK_DIR` cases that are done are not done again.
"""

import hashlib
import os
import random
import threading
import time
from pathlib import Path

import forked
import pytest
import soak as soak_module
from caches import encoder_settings, write_cache
from recipe_runs import ROOT, flags, jobs, logged_losses, run, weights
from soak import Soak, draw
from trainings import same

from sciflow_hf.demo import make_tiny
from sciflow_hf.training.checkpoints import checkpoint_fault, list_checkpoints

DEMO = ROOT / "tests" / "flux2klein_tiny.yaml"


class Life:
    """A process with its ranks, until it is killed."""

    def __init__(self, words, *, ranks, env):
        reader, writer = os.pipe()
        self.processes = [forked.start(job, stdout=writer, stderr=writer) for job in jobs(*words, ranks=ranks, **env)]
        os.close(writer)
        self.lines, self._output = [], os.fdopen(reader, encoding="utf-8")
        self._reader = threading.Thread(target=lambda: self.lines.extend(self._output))
        self._reader.start()

    @property
    def steps(self):
        return sum("'loss'" in line for line in self.lines)

    def ended(self):
        return not any(process.is_alive() for process in self.processes)

    def kill(self):
        """As the out-of-memory killer, or a machine that is switched off."""
        forked.kill(self.processes)
        self._reader.join()
        self._output.close()


def newest_step(folder):
    whole = [p for p in list_checkpoints(folder) if checkpoint_fault(p) is None]
    return int(whole[0].name.split("-")[1]) if whole else 0


class Moments:
    """What a run is doing, seen from outside."""

    def __init__(self, folder, server, life, *, eval_steps):
        self.folder, self.server, self.life, self.eval_steps = folder, server, life, eval_steps
        self.start, self.images, self.pushes = newest_step(folder), self._images(), len(server.requests)

    def _images(self):
        return len(list(self.folder.glob("validation/step-*/*.png")))

    def step(self, number):
        return self.life.steps >= number

    def save(self, number):
        return (self.folder / ".saving").exists()

    def evaluation(self, number):  # it comes after the loss is logged
        return self.life.steps > 0 and (self.start + self.life.steps) % self.eval_steps == 0

    def validation(self, number):
        return self._images() > self.images

    def push(self, number):
        return any("/commit/" in path for _, path, _ in self.server.requests[self.pushes :])


def kill_again(words, folder, server, kinds, *, ranks, eval_steps, seed):
    """Starts `words` and kills it at a moment of each kind, then lets it end; how often it could be killed."""
    draw, killed = random.Random(seed), 0
    env = server.env(folder.parent)
    for kind in kinds:
        life = Life(words, ranks=ranks, env=env)
        moments, number = Moments(folder, server, life, eval_steps=eval_steps), draw.randint(1, 7)
        while not getattr(moments, kind)(number) and not life.ended():
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.02 if kind == "save" else 0.2))
        killed += not life.ended()
        life.kill()
        print(f"{kind}: killed after step {moments.start + life.steps}; {newest_step(folder)} is saved")
    done = run(*words, ranks=ranks, **env)
    assert "Traceback" not in done.stderr
    return killed


def compare(tmp_path, words, kinds, server, *, ranks=1, eval_steps, seed=0):
    whole = [*words, "--output_dir", tmp_path / "whole", "--hub_model_id", "user/whole"]
    run(*whole, ranks=ranks, **server.env(tmp_path))
    again = [*words, "--output_dir", tmp_path / "killed", "--hub_model_id", "user/killed"]
    killed = kill_again(again, tmp_path / "killed", server, kinds, ranks=ranks, eval_steps=eval_steps, seed=seed)
    assert killed == len(kinds)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    assert logged_losses(tmp_path / "whole") == logged_losses(tmp_path / "killed")
    assert not (tmp_path / "killed" / ".saving").exists()
    name = "pytorch_lora_weights.safetensors"
    assert server.repos["user/killed"].files[name] == (tmp_path / "killed" / name).read_bytes()


def options(**values):
    common = dict(
        resume_from_checkpoint="latest", push_to_hub=True, hub_strategy="every_save", hub_token="dummy",
        logging_steps=1, eval_strategy="steps", disable_tqdm=True, report_to="none", use_cpu=True,
    )  # fmt: skip
    return [word for name, value in (common | values).items() for word in (f"--{name}", value)]


def test_three_kills(tmp_path, tiny_klein, hub):
    """While a checkpoint is written, in an evaluation, and while it is pushed."""
    cache = write_cache(tmp_path / "cache", settings=encoder_settings(tiny_klein))
    words = flags(tiny_klein, cache, tmp_path, eval_fraction=0.3, max_steps=24, save_steps=4)
    words += options(eval_steps=4, gradient_accumulation_steps=2)
    compare(tmp_path, words, ["save", "evaluation", "push"], hub, eval_steps=4)


@pytest.mark.acceptance
@pytest.mark.parametrize("ranks", [1, 2])
def test_thirty_kills_on_the_demo_data(tmp_path, hub, ranks):
    kinds = ["step"] * 10 + ["save"] * 8 + ["evaluation"] * 4 + ["validation"] * 4 + ["push"] * 4
    random.Random(ranks).shuffle(kinds)
    words = ["--config", DEMO, *options(max_steps=300, save_steps=5, eval_steps=10, validation_steps=20)]
    words += ["--per_device_train_batch_size", 4 // ranks, "--input_dir", "demo"]
    compare(tmp_path, words, kinds, hub, ranks=ranks, eval_steps=10, seed=ranks)


# ---- a fault of any kind ----


@pytest.fixture(scope="module")
def soak(tmp_path_factory):
    folder = Path(os.environ.get("SOAK_DIR") or tmp_path_factory.mktemp("soak"))
    pipeline = folder / "klein"
    if not pipeline.exists():
        make_tiny(pipeline, size="test")
    return Soak(folder, pipeline)


@pytest.mark.parametrize("seed", [7, 8])  # a dead Hub, a lost rank
def test_a_fault_costs_nothing(soak, seed):
    """The result is that of a run without it, or a message says how; signals and full disks have files of their own."""
    soak.check(draw(seed))


@pytest.mark.acceptance
@pytest.mark.parametrize("seed", range(120))
def test_120_faults(soak, seed):
    generator = hashlib.sha256(Path(soak_module.__file__).read_bytes()).hexdigest()[:8]
    done = soak.folder / f"done-{generator}" / f"{seed}.txt"
    if not done.exists():
        seen = soak.check(draw(seed))
        done.parent.mkdir(exist_ok=True)
        done.write_text(f"{seen}\n")
