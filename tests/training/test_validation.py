"""Validation images and their contact sheet: a stub draws one colour an image, one test draws with klein."""

import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from caches import TINY_BUCKETS
from drawing import PROMPTS, SIZE, Network, StubFamily, callback
from PIL import Image
from trainings import make_trainer
from transformers import TrainerControl, TrainerState
from transformers.integrations import TensorBoardCallback, WandbCallback

import sciflow_hf as sf
from sciflow_hf.errors import SciflowError
from sciflow_hf.report.contact_sheet import read_image, sample_images, thin_out, write_contact_sheet
from sciflow_hf.report.summary import final_step
from sciflow_hf.training.callbacks import validation
from sciflow_hf.training.callbacks.validation import ValidationCallback, log_images


def arguments(**options: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"bf16": False, "fp16": False, "load_best_model_at_end": False, **options})


def train(
    validator: ValidationCallback, network: Network, *, start: int = 0, stop: int, saves: tuple[int, ...] = ()
) -> None:
    """The events of a training from `start` to `stop`; every step adds 1 to the weight."""
    args, control, state = arguments(), TrainerControl(), TrainerState(global_step=start)
    validator.on_train_begin(args, state, control, model=network)
    while state.global_step < stop:
        state.global_step += 1
        with torch.no_grad():
            network.weight += 1
        control.should_save = state.global_step in saves
        control.should_training_stop = state.global_step == stop
        validator.on_step_end(args, state, control, model=network)
        if control.should_save:
            validator.on_save(args, state, control, model=network)
    validator.on_train_end(args, state, control, model=network)


def drawn_steps(tmp_path: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (tmp_path / "validation").glob("step-*"))


def colour(tmp_path: Path, step: int, prompt: int, seed: int) -> tuple[int, int, int]:
    path = tmp_path / "validation" / f"step-{step:06d}" / f"p{prompt:02d}_seed{seed}.png"
    return read_image(path).getpixel((0, 0))


@pytest.mark.promise("A34", "B13", "E28")
def test_images_of_start_interval_and_end(tmp_path: Path) -> None:
    family, network = StubFamily(), Network()
    train(callback(tmp_path, family), network, stop=25)
    assert drawn_steps(tmp_path) == [0, 10, 20, 25]
    assert family.drawn == 4 * 4, "nothing drawn twice"
    assert family.encoded == [PROMPTS], "encoded once"
    assert all(used is network for used in family.networks), "no second copy"
    for step in (0, 10, 20, 25):
        for prompt, text in enumerate(PROMPTS):
            for seed in (42, 7):
                red = torch.randint(256, (1,), generator=torch.Generator().manual_seed(seed)).item()
                assert colour(tmp_path, step, prompt, seed) == (red, len(text), step)
    image = read_image(tmp_path / "validation" / "step-000010" / "p01_seed7.png")
    assert image.size == (SIZE[1], SIZE[0])
    assert (image.info["prompt"], image.info["seed"], image.info["step"]) == (PROMPTS[1], "7", "10")
    assert (tmp_path / "validation" / "contact_sheet.png").is_file()
    assert not list((tmp_path / "validation").rglob("*.tmp"))


def test_end_on_an_interval_is_drawn_once(tmp_path: Path) -> None:
    family = StubFamily()
    train(callback(tmp_path, family), Network(), stop=20)
    assert drawn_steps(tmp_path) == [0, 10, 20] and family.drawn == 3 * 4


def test_modes_gradients_and_random_states_are_untouched(tmp_path: Path) -> None:
    network = Network()
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    train(callback(tmp_path), network, stop=10)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1] and random.getstate() == before[2]
    assert network.training and network.moving.training and not network.fixed.training
    assert torch.is_grad_enabled() and network.weight.requires_grad


def test_modes_are_restored_after_a_failure(tmp_path: Path) -> None:
    network = Network()
    with pytest.raises(SciflowError):
        train(callback(tmp_path, StubFamily(fail_at=("", RuntimeError("broken")))), network, stop=1)
    assert network.training and not network.fixed.training


def test_checkpoint_comes_before_the_images_of_its_step(tmp_path: Path) -> None:
    validator, network = callback(tmp_path), Network()
    control = TrainerControl(should_save=True)
    state = TrainerState(global_step=10)
    validator.on_step_end(arguments(), state, control, model=network)
    assert drawn_steps(tmp_path) == []
    validator.on_save(arguments(), state, control, model=network)
    assert drawn_steps(tmp_path) == [10]


def test_a_later_save_of_the_same_step_draws_nothing_again(tmp_path: Path) -> None:
    """As at the end of an epoch, when the step itself did not save."""
    family, network, control, state = StubFamily(), Network(), TrainerControl(), TrainerState(global_step=10)
    validator = callback(tmp_path, family)
    validator.on_step_end(arguments(), state, control, model=network)
    validator.on_save(arguments(), state, control, model=network)
    assert family.drawn == 4


def test_a_training_that_stops_is_drawn_before_its_end_event(tmp_path: Path) -> None:
    """TensorBoard's callback, which comes before ours, closes its file in `on_train_end`."""
    control = TrainerControl(should_training_stop=True)
    callback(tmp_path).on_step_end(arguments(), TrainerState(global_step=13), control, model=Network())
    assert drawn_steps(tmp_path) == [13]


def test_resume_draws_neither_the_start_nor_a_finished_step_again(tmp_path: Path) -> None:
    network = Network()
    train(callback(tmp_path), network, stop=27, saves=(20,))
    assert drawn_steps(tmp_path) == [0, 10, 20, 27]
    kept = (tmp_path / "validation" / "step-000020" / "p00_seed7.png").stat().st_mtime_ns
    family = StubFamily()
    with torch.no_grad():
        network.weight.fill_(20)
    train(callback(tmp_path, family), network, start=20, stop=30)
    assert drawn_steps(tmp_path) == [0, 10, 20, 30], "step 27 lies after the resume"
    assert family.drawn == 4
    assert (tmp_path / "validation" / "step-000020" / "p00_seed7.png").stat().st_mtime_ns == kept
    assert read_image(tmp_path / "validation" / "contact_sheet.png").info["steps"] == "0, 10, 20, 30"


def test_resume_makes_up_for_images_lost_to_a_kill(tmp_path: Path) -> None:
    network, family = Network(), StubFamily()
    train(callback(tmp_path), network, stop=10)
    (tmp_path / "validation" / "step-000010" / "p01_seed7.png").unlink()
    train(callback(tmp_path, family), network, start=10, stop=15)
    assert drawn_steps(tmp_path) == [0, 10, 15] and family.drawn == 2 * 4
    assert colour(tmp_path, 10, 1, 7)[2] == 10


def test_a_new_run_does_not_show_the_images_of_an_older_one(tmp_path: Path) -> None:
    train(callback(tmp_path, prompts=[*PROMPTS, "A third."], steps=4), Network(), stop=8)
    (tmp_path / "validation" / "step-000004" / "notes.txt").write_text("of the user")
    train(callback(tmp_path), Network(), stop=10)
    assert drawn_steps(tmp_path) == [0, 4, 10]
    assert [p.name for p in (tmp_path / "validation" / "step-000004").iterdir()] == ["notes.txt"]
    assert not (tmp_path / "validation" / "step-000000" / "p02_seed7.png").exists()


def test_best_model_at_the_end_is_drawn_under_its_own_step(tmp_path: Path) -> None:
    state = TrainerState(global_step=20, best_global_step=15, best_model_checkpoint="checkpoint-15")
    args = arguments(load_best_model_at_end=True)
    assert final_step(args, state) == 15 and final_step(arguments(), state) == 20
    validator = callback(tmp_path)
    validator.on_train_end(args, state, TrainerControl(), model=Network())
    assert drawn_steps(tmp_path) == [15]
    family = StubFamily()
    callback(tmp_path, family).on_train_end(args, state, TrainerControl(), model=Network())
    assert family.drawn == 0, "there since training passed that step"


class Ranks:
    """What `accelerate.PartialState` tells one of two ranks."""

    def __init__(self, process_index: int, num_processes: int = 2) -> None:
        self.process_index, self.num_processes, self.barriers = process_index, num_processes, 0

    def wait_for_everyone(self) -> None:
        self.barriers += 1


def test_ranks_share_the_pairs_and_main_builds_the_sheet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    barriers = []
    for rank in (1, 0):  # the main process last: it waits for the others' images
        ranks, family, writer = Ranks(rank), StubFamily(), FakeTensorBoard()
        monkeypatch.setattr(validation, "PartialState", lambda ranks=ranks: ranks)
        state = TrainerState(global_step=10, is_world_process_zero=rank == 0)
        validator = callback(tmp_path, family, prompts=[*PROMPTS, "A third."], trackers=lambda w=writer: [w])
        validator.run(arguments(), state, Network())
        assert family.drawn == 3
        assert (tmp_path / "validation" / "contact_sheet.png").exists() == (rank == 0)
        assert len(writer.images) == (6 if rank == 0 else 0)
        barriers.append(ranks.barriers)
    assert barriers == [1, 1]
    assert len(list((tmp_path / "validation" / "step-000010").iterdir())) == 6


def test_all_ranks_draw_everything_when_the_network_is_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sharded forward gathers weights from all ranks: unequal numbers of forwards would hang."""
    monkeypatch.setattr(validation, "_is_sharded", lambda model: True)
    for rank in (1, 0):
        monkeypatch.setattr(validation, "PartialState", lambda rank=rank: Ranks(rank))
        family = StubFamily()
        state = TrainerState(global_step=10, is_world_process_zero=rank == 0)
        callback(tmp_path, family).run(arguments(), state, Network())
        assert family.drawn == 4
        assert bool(drawn_steps(tmp_path)) == (rank == 0), "one rank writes"


def test_images_of_another_machine_are_missed_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "PartialState", lambda: Ranks(0))
    validator = callback(tmp_path, trackers=list)
    with pytest.raises(SciflowError, match=r"p00_seed7.png' of another rank is not here. `--output_dir`"):
        validator.run(arguments(), TrainerState(global_step=10), Network())


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "no memory for 48x64 pixels.*--num_inference_steps"),
        (MemoryError(), "no memory"),
        (RuntimeError("shape mismatch"), "RuntimeError: shape mismatch.*last checkpoint"),
    ],
)
def test_failures_name_prompt_seed_and_step(tmp_path: Path, error: Exception, says: str) -> None:
    with pytest.raises(SciflowError, match=r"step 0, prompt 'A bar chart.', seed 42.*" + says) as caught:
        train(callback(tmp_path, StubFamily(fail_at=("", error))), Network(), stop=1)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prompts": []}, "`validation_prompts`"),
        ({"prompts": ["a", " "]}, "`validation_prompts`"),
        ({"seeds": [1, 1]}, "`validation_seeds`"),
        ({"size": (48, 60)}, "48x60 .*multiples of 16"),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(SciflowError, match=says):
        callback(tmp_path, **options)


@pytest.mark.parametrize("name", ["validation_steps", "num_inference_steps"])
def test_steps_are_at_least_one(tmp_path: Path, name: str) -> None:
    with pytest.raises(SciflowError, match=f"`{name}` 0: at least 1"):
        sf.DiffusionTrainingArguments(output_dir=str(tmp_path), **{name: 0})


class FakeTensorBoard(TensorBoardCallback):
    """Keeps what `add_image` was given."""

    def __init__(self, log_dir: str = "runs") -> None:
        self.images: list[tuple[str, tuple[int, ...], int]] = []
        self.tb_writer, self.logging_dir, self.closed = self, log_dir, False

    def add_image(self, tag: str, image: np.ndarray, step: int, *, dataformats: str) -> None:
        assert dataformats == "HWC"
        self.images.append((tag, image.shape, step))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


class FakeWandb(WandbCallback):
    def __init__(self) -> None:
        pass


@pytest.mark.promise("A33", "E29")
def test_trackers_get_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[dict] = []
    wandb = SimpleNamespace(run=None, log=logged.append, Image=lambda image, caption: (image.size, caption))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    board, other = FakeTensorBoard(), ValidationCallback
    images = {"validation/p00_seed42": (Image.new("RGB", (64, 48)), "A bar chart. (seed 42)")}
    log_images([FakeWandb(), board, other], images, step=500)
    assert logged == [] and board.images == [("validation/p00_seed42", (48, 64, 3), 500)]
    wandb.run = object()
    log_images([FakeWandb()], images, step=500)
    assert logged == [{"validation/p00_seed42": ((64, 48), "A bar chart. (seed 42)"), "train/global_step": 500}]
    writers: list[FakeTensorBoard] = []
    closed = SimpleNamespace(SummaryWriter=lambda log_dir: writers.append(FakeTensorBoard(log_dir)) or writers[-1])
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", closed)
    ended = FakeTensorBoard("runs/x")
    ended.tb_writer = None
    log_images([ended], images, step=500)
    assert writers[0].logging_dir == "runs/x" and len(writers[0].images) == 1 and writers[0].closed
    validator = callback(tmp_path, trackers=lambda: [board])
    train(validator, Network(), stop=10)
    assert [tag for tag, _, step in board.images if step == 10] == [
        f"validation/p{prompt:02d}_seed{seed}" for prompt in (0, 1) for seed in (42, 7)
    ]


def test_sample_images_for_the_card(tmp_path: Path) -> None:
    assert sample_images(tmp_path) == []
    train(callback(tmp_path), Network(), stop=10)
    assert sample_images(tmp_path, limit=3) == [
        ("validation/step-000010/p00_seed42.png", PROMPTS[0]),
        ("validation/step-000010/p01_seed42.png", PROMPTS[1]),
        ("validation/step-000010/p00_seed7.png", PROMPTS[0]),
    ]
    assert sample_images(tmp_path, step=0)[0][0] == "validation/step-000000/p00_seed42.png"
    assert sample_images(tmp_path, step=3) == []


@pytest.mark.parametrize("number", [1, 2, 11, 12, 13, 14, 40, 1000])
def test_columns_are_thinned_evenly_and_keep_both_ends(number: int) -> None:
    steps = list(range(0, 500 * number, 500))
    kept = thin_out(steps, 12)
    assert len(kept) == len(set(kept)) == min(number, 12) and kept == sorted(kept)
    assert kept[0] == steps[0] and kept[-1] == steps[-1] and set(kept) <= set(steps)
    gaps = np.diff([steps.index(step) for step in kept])
    assert gaps.size == 0 or gaps.max() - gaps.min() <= 1


def test_sheet_shows_rows_by_seed_and_columns_by_step(tmp_path: Path) -> None:
    """The colours of the cells, read back: rows differ in noise and prompt, columns in the weight."""
    train(callback(tmp_path), Network(), stop=200)
    sheet = np.asarray(read_image(tmp_path / "validation" / "contact_sheet.png"))
    wanted = [colour(tmp_path, step, prompt, seed) for prompt in (0, 1) for seed in (42, 7) for step in (0, 200)]
    places = []
    for rgb in wanted:
        rows, columns = np.nonzero((sheet == np.array(rgb, np.uint8)).all(-1))
        assert len(rows) > 10_000, rgb
        places.append((rows.mean(), columns.mean()))
    first, last = places[::2], places[1::2]
    assert [row for row, _ in first] == [row for row, _ in last] == sorted(row for row, _ in first)
    assert len({column for _, column in first}) == len({column for _, column in last}) == 1
    assert first[0][1] < last[0][1]
    assert "0, 20, 40" in read_image(tmp_path / "validation" / "contact_sheet.png").info["steps"]


def test_sheet_leaves_out_images_of_other_prompts(tmp_path: Path) -> None:
    train(callback(tmp_path), Network(), stop=10)
    folder = tmp_path / "validation"
    old = colour(tmp_path, 10, 0, 42)
    before = np.asarray(read_image(folder / "contact_sheet.png"))
    write_contact_sheet(folder, prompts=["Another prompt.", PROMPTS[1]], seeds=[42, 7])
    after = np.asarray(read_image(folder / "contact_sheet.png"))
    count = [(sheet == np.array(old, np.uint8)).all(-1).sum() for sheet in (before, after)]
    assert count[0] > 10_000 and count[1] < 100


@pytest.mark.promise("A33")
def test_klein_draws_from_the_training_network(tmp_path: Path, tiny_klein: Path) -> None:
    from sciflow_hf.families import load_family

    family = load_family("flux2_klein")(pretrained_model_name_or_path=str(tiny_klein), max_sequence_length=12)
    network = family.load_model(dtype=torch.float32).train()
    options = {"prompts": PROMPTS[:1], "seeds": [42], "steps": 1, "num_inference_steps": 2, "family": family}
    validator = callback(tmp_path, **options)
    before = torch.get_rng_state()
    state, control, args = TrainerState(), TrainerControl(), arguments()
    validator.on_train_begin(args, state, control, model=network)
    for step in (1, 2):
        state.global_step = step
        validator.on_step_end(args, state, control, model=network)
        with torch.no_grad():
            network.proj_out.weight.mul_(0.5)
    assert torch.equal(torch.get_rng_state(), before) and network.training

    paths = [tmp_path / "validation" / f"step-{step:06d}" / "p00_seed42.png" for step in range(3)]
    images = [np.asarray(read_image(path)) for path in paths]
    assert images[0].shape == (*SIZE, 3) and images[0].std() > 5
    assert (images[0] == images[1]).all(), "the same weights and seed give the same image"
    assert (images[0] != images[2]).mean() > 0.2, "it is drawn from the weights of that step"
    from diffusers import Flux2KleinPipeline

    pipeline = Flux2KleinPipeline.from_pretrained(tiny_klein)
    pipeline.set_progress_bar_config(disable=True)
    plain = pipeline(
        prompt=PROMPTS[0],
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=2,
        guidance_scale=2.0,
        max_sequence_length=12,
        generator=torch.Generator().manual_seed(42),
    ).images[0]
    assert (np.asarray(plain) == images[0]).all(), "what a user gets from the untouched pipeline"


def test_size_is_that_of_most_rows(tmp_path, family, tiny_cache):
    """Landscape figures are drawn as landscapes: `tiny_cache` has most rows of height 32 and width 48."""
    trainer = make_trainer(
        tmp_path, family, tiny_cache, max_steps=1, validation_prompts=["a chart"], num_inference_steps=1,
        validation_seeds=[0],
    )  # fmt: skip
    trainer.train()
    sizes = {Image.open(file).size[::-1] for file in tmp_path.glob("validation/step-*/*.png")}
    assert sizes == {max(TINY_BUCKETS, key=TINY_BUCKETS.get)} == {(32, 48)}
