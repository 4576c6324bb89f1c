"""Training on edits: mixed runs, evaluation by kind, sources of validation images, the card, `sciflow-hf sample`."""

import dataclasses
import functools
import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from drawing import SIZE, Network, StubFamily, callback
from PIL import Image
from trainings import assert_resume_is_exact, losses, make_args, make_trainer, same, trained
from transformers import TrainerControl, TrainerState

import sciflow_hf as sf
from sciflow_hf.adapters.layers import adapter_disabled
from sciflow_hf.cli import main
from sciflow_hf.data.build.convert import convert_cache
from sciflow_hf.data.source_images import EditViews, read_sources, source_files
from sciflow_hf.data.stream.stream import StreamingCache
from sciflow_hf.diffusion.randomness import hash64, signed64
from sciflow_hf.metrics.intervals import mean_interval
from sciflow_hf.report.contact_sheet import read_image
from sciflow_hf.report.model_card import CardFacts, model_card
from sciflow_hf.report.plan import tokens_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def data(edits_cache):
    return sf.load_cache(edits_cache, dtype=torch.float32)


# -- training --


def test_a_mixed_run_resumes_bit_for_bit(tmp_path, family, data):
    """Edits of no, one and two sources, sources dropped in some steps, and a loss of the changed region."""
    assert_resume_is_exact(
        tmp_path, family, data, source_dropout=0.4, edit_loss="balanced", gradient_accumulation_steps=1
    )


def test_accumulated_steps_are_those_of_one_batch(tmp_path, family, data):
    """4 rows at once, and 2 x 2: the same steps lose their sources, and the losses are the same to rounding."""
    runs = []
    for size in (4, 2):
        options = dict(per_device_train_batch_size=size, gradient_accumulation_steps=4 // size, source_dropout=0.4)
        trainer = make_trainer(tmp_path / str(size), family, data, **options)
        seen = []
        trainer.compute_loss = wrapped(trainer.compute_loss, seen)
        trainer.train()
        runs.append((losses(trainer), seen))
    (one, whole), (two, halves) = runs
    assert whole == halves[::2] == halves[1::2]
    assert {0, 1, 2} == set(whole) and np.allclose(one, two, rtol=2e-5)


def wrapped(compute_loss, seen):
    """Notes how many sources each micro-batch has."""

    def noted(model, inputs, *args, **kwargs):
        seen.append(sum(name.startswith("source_latents") for name in inputs))
        return compute_loss(model, inputs, *args, **kwargs)

    return noted


def test_every_layout_and_a_stream_train_alike(tmp_path, family, data):
    """Losses and weights are the same bits from npz, shards and inline files, as rows and as a stream."""
    order = sf.BucketBatchSampler(data.batch_keys, batch_size=4, seed=3).batches()
    rows = data.select([row for batch in order for row in batch])
    folders = {payload: tmp_path / payload for payload in ("shards", "npz")}
    for payload, folder in folders.items():
        convert_cache(data, folder, payload=payload)
    runs = {name: sf.load_cache(folder, dtype=torch.float32) for name, folder in folders.items()}
    inline = convert_cache(rows, tmp_path / "inline", payload="inline").output_dir
    runs["stream"] = StreamingCache(inline, dtype=torch.float32, shuffle_buffer=0)
    found = {}
    for name, cache in runs.items():
        trainer = make_trainer(
            tmp_path / f"run {name}", family, cache, gradient_accumulation_steps=2, source_dropout=0.3
        )
        trainer.train()
        found[name] = losses(trainer), trained(trainer)
    for name in ("npz", "stream"):
        assert found[name][0] == found["shards"][0] and same(found[name][1], found["shards"][1])


def test_sources_and_their_loss_change_what_is_learnt(tmp_path, family, data):
    """Other sources, or another weight of the changed region, give other weights; neither is read for nothing."""
    found = []
    for options in ({}, {"source_dropout": 0.99}, {"edit_loss": "weighted"}, {"edit_loss": "balanced"}):
        trainer = make_trainer(tmp_path, family, data, max_steps=3, **options)
        trainer.train()
        found.append(trained(trainer))
    assert not any(same(found[i], found[j]) for i in range(4) for j in range(i))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"edit_weight": 2.0}, r"`edit_weight` 2 is for `--edit_loss weighted`, and that is uniform"),
        ({"edit_loss": "weighted", "edit_balance": 0.3}, r"`edit_balance` 0.3 is for `--edit_loss balanced`"),
        ({"edit_loss": "weighted", "edit_weight": 0}, r"`edit_weight` 0: above 0"),
        ({"edit_loss": "balanced", "edit_balance": 1.5}, r"`edit_balance` 1.5: 0 to 1"),
        ({"edit_loss": "inside"}, r"`edit_loss` 'inside': use one of uniform, weighted, balanced"),
        ({"validation_source_images": ["a.png"]}, r"`validation_source_images` without `validation_prompts`"),
        (
            {"validation_prompts": ["bars", "make it blue"], "validation_source_images": ["none"]},
            r"1 for 2 `validation_prompts`; the first without is 'make it blue'",
        ),
        (
            {"validation_prompts": ["bars"], "validation_source_images": ["a.png", "b.png"]},
            r"2 for 1 `validation_prompts`; 'b.png' has no prompt",
        ),
        (
            {"validation_prompts": ["bars"], "validation_target_images": ["a.png", "b.png"]},
            r"`validation_target_images`: 2 for 1 `validation_prompts`. Give one entry for each",
        ),
    ],
)
def test_options_that_do_not_go_together_are_named(tmp_path, options, words):
    with pytest.raises(sf.SciflowError, match=words):
        make_args(tmp_path, **options)


def test_a_folder_of_edits_trains(tmp_path, family, pictures):
    """Built first, by the options of the recipe: sources by their folder, the changed region computed."""
    for name in ("wide", "same"):
        for folder in ("after", "before"):
            (tmp_path / folder).mkdir(exist_ok=True)
            shutil.copy(pictures / f"{name}.png", tmp_path / folder / f"{name}.png")
    (tmp_path / "after" / "wide.txt").write_text("Keep it.")
    (tmp_path / "after" / "same.txt").write_text("Keep it, too.")
    options = dict(input_dir=str(tmp_path / "after"), source_dir=[str(tmp_path / "before")], edit_masks="computed")
    args = make_args(tmp_path / "run", edit_loss="weighted")
    train, _ = sf.prepare_data(sf.DataArguments(**options, resolution=96, eval_fraction=0), family, args)
    assert train.kinds == ["edit", "edit"] and not train[0]["edit_mask"].any(), "nothing has changed"
    make_trainer(tmp_path / "run", family, train, max_steps=1, edit_loss="weighted")


def test_a_loss_of_the_changed_region_needs_one(tmp_path, family, tiny_cache, data):
    with pytest.raises(sf.SciflowError, match=r"`edit_loss` weighted: none of 0 edits of this data has a mask"):
        make_trainer(tmp_path, family, tiny_cache, edit_loss="weighted")
    make_trainer(tmp_path, family, data, edit_loss="weighted")


def test_own_data_without_masks_is_told(tmp_path, family, data, caplog):
    rows = [{name: value for name, value in data[row].items() if name != "txt_ids"} for row in (2, 8)]
    make_trainer(tmp_path, family, rows, edit_loss="weighted")
    assert "no mask of its changed region" not in caplog.text
    plain = [{name: value for name, value in row.items() if name != "edit_mask"} for row in rows]
    make_trainer(tmp_path, family, plain, edit_loss="weighted")
    assert "`edit_loss` weighted: the first sample has source images, but no mask" in caplog.text


def test_sources_are_dropped_only_where_there_are_some(tmp_path, family, tiny_cache, tiny_klein):
    with pytest.raises(sf.SciflowError, match=r"`source_dropout` 0.5: no row of this data has a source"):
        make_trainer(tmp_path, family, tiny_cache, source_dropout=0.5).train()
    other = type("Plain", (sf.Flux2Klein,), {"max_sources": 0})(str(tiny_klein), max_sequence_length=12)
    with pytest.raises(sf.SciflowError, match=r"`source_dropout` 0.5: `flux2_klein` takes no source images"):
        make_trainer(tmp_path, other, tiny_cache, source_dropout=0.5)


def test_a_family_that_takes_no_sources_refuses_a_cache_of_edits(tmp_path, data, tiny_klein):
    """Whichever row comes first: here one without sources does."""
    other = type("Plain", (sf.Flux2Klein,), {"max_sources": 0})(str(tiny_klein), max_sequence_length=12)
    assert data.kinds[0] == "generation"
    with pytest.raises(sf.SciflowError, match=r"`source_latents`.*`flux2_klein` takes none"):
        make_trainer(tmp_path, other, data)


def test_memory_is_estimated_with_the_sources(tmp_path, family, data):
    """Tokens of 8 pixels: 8 x 12 of the target, as many of the first source, 3 x 2 of the second; 12 of the text."""
    assert tokens_of(data, family) == {"tokens": 96 + 96 + 6 + 12, "image_tokens": 96 + 96 + 6}
    model = sf.add_adapter(
        family.load_model(dtype=torch.float32, meta=True), sf.AdapterArguments(rank=4), family=family
    )
    assert "24 samples to train on (16 edits), 0 held out" in sf.plan(model, family, make_args(tmp_path), data)


# -- evaluation --


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, family, data):
    """A short run that holds out all its rows, and its metrics."""
    trainer = make_trainer(
        tmp_path_factory.mktemp("evaluated"), family, data, data, max_steps=2, eval_levels=2,
        per_device_eval_batch_size=1, edit_loss="weighted",
    )  # fmt: skip
    trainer.train()
    return trainer, trainer.evaluate()


def test_evaluation_by_kind_equals_a_loop_over_the_rows(evaluated, data, family):
    """Loss, gain and interval of each kind, from single rows, with the adapter and with it switched off."""
    trainer, metrics = evaluated
    network, levels = trainer.model.eval(), family.evaluation_levels(2)
    found = {True: [], False: []}
    for row, row_id in enumerate(data.row_ids):
        batch = {name: value[None] for name, value in data[row].items() if name != "txt_ids"}
        per_level = []
        for number, level in enumerate(levels):
            keys = [hash64(signed64(hash64(row_id, "evaluation")), number)]
            step = functools.partial(
                family.compute_loss, network, batch | {"noise_key": keys}, trainer.args, levels=level.expand(1)
            )
            with torch.no_grad():
                now = step()[0].item()
                with adapter_disabled(network):
                    per_level.append((now, step()[0].item()))
        found["source_latents" in batch].append(np.mean(per_level, axis=0))
    assert [len(found[kind]) for kind in (True, False)] == [16, 8]
    for kind, is_edit in (("edit", True), ("generation", False)):
        now, base = np.array(found[is_edit]).T
        rounding = 4 * np.finfo(np.float32).eps * base.max()  # of means in single precision
        assert metrics[f"eval_loss_{kind}"] == pytest.approx(now.mean(), abs=rounding)
        assert metrics[f"eval_gain_{kind}"] == pytest.approx((base - now).mean(), abs=rounding) != 0
    low, high = mean_interval(np.array(found[True]) @ [-1, 1], [str(i) for i in range(16)])
    assert (metrics["eval_gain_edit_low"], metrics["eval_gain_edit_high"]) == pytest.approx(
        (low, high), abs=4 * rounding
    )
    assert "eval_gain_generation_low" not in metrics, "8 groups give no interval"
    both = 16 * metrics["eval_loss_edit"] + 8 * metrics["eval_loss_generation"]
    assert metrics["eval_loss"] == pytest.approx(both / 24, abs=rounding)


def test_generation_alone_has_no_kinds(tmp_path, family, data):
    plain = data.select([row for row, kind in enumerate(data.kinds) if kind == "generation"])
    metrics = make_trainer(tmp_path, family, plain, plain, eval_levels=1).evaluate()
    assert "eval_gain" in metrics and not any("edit" in name or "generation" in name for name in metrics)


def test_another_loss_of_the_region_is_measured_again(tmp_path, family, data, caplog):
    options = dict(max_steps=2, eval_levels=1, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2)
    make_trainer(tmp_path / "a", family, data, data, **options).train()
    shutil.copytree(tmp_path / "a" / "checkpoint-2", tmp_path / "b" / "checkpoint-2")
    again = make_trainer(
        tmp_path / "b", family, data, data, resume_from_checkpoint="latest", edit_loss="balanced", source_dropout=0.1,
        **options,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        again.train()
    assert "measured again: edit_loss changed" in caplog.text and "source_dropout 0.0 -> 0.1" in caplog.text


def test_the_card_says_what_was_edited(evaluated):
    """Counts, gains by kind, and code whose image is as large as training showed it."""
    trainer, metrics = evaluated
    trainer.create_model_card()
    folder = Path(trainer.args.output_dir)
    card = (folder / "README.md").read_text()
    assert "trained on 24 captioned figures (16 of them edits) with" in card
    assert f"| gain (base - this), edits | {metrics['eval_gain_edit']:.4f} (95 % interval: " in card
    assert f"| gain (base - this), figures drawn from text | {metrics['eval_gain_generation']:.4f} (" in card
    assert "- image-to-image" in card and "pipeline_tag: text-to-image" in card
    facts = json.loads((folder / "run_facts.json").read_text())["dataset"]
    assert facts["edits"] == 16 and facts["sources"] == 2 and facts["as_targets"] is True
    assert facts["source_size"] == [64, 96]
    code = card.split("```python")[1].split("```")[0]
    assert "from diffusers.utils import load_image" in code
    assert 'sources = [load_image("figure.png").resize((96, 64)), load_image("figure1.png")]' in code
    assert "pipeline(image=sources, prompt=prompt, height=64, width=96" in code
    compile(code, "card", "exec")


def test_the_card_of_one_kind_of_edits():
    """All are edits of one source that is shown as a large one is: there is nothing to resize."""
    facts = CardFacts(
        repo_name="user/edits", family="flux2_klein", base_model="black-forest-labs/FLUX.2-klein-base-9B",
        pipeline_class="Flux2KleinPipeline", sample_images=["validation/step-000001/p00_seed0.png"],
        sample_prompts=["make it blue"], sample_sources=[["validation/sources/p00_source0.png"]],
        dataset={"samples": 9, "edits": 9, "sources": 1, "as_targets": True, "buckets": {"1024x1024": 9}},
    )  # fmt: skip
    card = str(model_card(facts))
    assert "trained on 9 edits of figures" in card and "pipeline_tag: image-to-image" in card
    assert 'source = load_image("figure.png")  # the figure to edit\n' in card
    assert "image = pipeline(image=source, prompt=prompt, height=1024, width=1024).images[0]" in card
    assert "![source](validation/sources/p00_source0.png) ![make it blue](validation/step" in card
    whole = facts.dataset | {"as_targets": False, "edits": 4}  # such as sketches, which are no figures' size
    card = str(model_card(dataclasses.replace(facts, dataset=whole, size_arguments={"height": 64, "max_area": 4096})))
    assert "pipeline(image=source, prompt=prompt, height=64, max_area=4096)" in card
    assert "# Without `image` it draws from a caption alone.\n" in card and "pipeline_tag: text-to-image" in card


# -- sources of what is drawn --

GREEN = (7, 200, 90)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A wide and a tall figure, one with transparency, a small one, and a text file."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(3)
    for name, size in (("wide", (200, 300)), ("tall", (300, 200)), ("same", (200, 300)), ("small", (20, 30))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    Image.new("RGB", (300, 200), GREEN).save(folder / "green.png")
    Image.new("RGBA", (80, 90), (0, 0, 0, 0)).save(folder / "clear.png")
    Image.new("RGB", (80, 90)).save(folder / "with,comma.png")
    (folder / "text.png").write_text("no image")
    return folder


def test_sources_are_read_as_they_are_meant_to_be_seen(pictures, family):
    entries = [
        f"{pictures}/clear.png",
        "none",
        f"{pictures}/wide.png, {pictures}/tall.png",
        f"{pictures}/with,comma.png",
    ]
    images = read_sources(entries, family, option="x")
    assert [[image.size for image in each] for each in images] == [[(80, 90)], [], [(300, 200), (200, 300)], [(80, 90)]]
    assert images[0][0].getpixel((3, 3)) == (255, 255, 255), "transparency is white, as in training"
    assert [image.info["source_image"] for image in images[2]] == ["wide.png", "tall.png"]
    assert source_files(" None ") == []


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("gone.png", r"`source_images` '.*gone.png': no such file"),
        ("text.png", r"`source_images` '.*text.png': unreadable image \(no format that Pillow knows\)"),
        ("small.png", r"`source_images` '.*small.png': 20 x 30 pixels: under 64"),
        (",".join(["wide.png"] * 11), r"`source_images` .*: 11 images, and `flux2_klein` takes at most 10"),
    ],
)  # fmt: skip
def test_sources_that_cannot_be_edited_are_named(pictures, family, entry, words):
    entry = ",".join(f"{pictures}/{name}" for name in entry.split(","))
    with pytest.raises(sf.SciflowError, match=words):
        read_sources([entry], family, option="source_images")


def test_a_family_without_sources_says_so(pictures, family):
    other = type("Plain", (sf.Flux2Klein,), {"max_sources": 0})(family.pretrained_model_name_or_path)
    with pytest.raises(sf.SciflowError, match=r"1 image, and `flux2_klein` takes no reference images: leave this out"):
        read_sources([f"{pictures}/wide.png"], other, option="source_images")


def test_edits_are_drawn_as_they_were_trained(pictures, family, data):
    """At the bucket nearest to the source, which is shown through its window; sources of another size stay whole."""
    views = EditViews.of(data, family)
    assert views.as_targets and sorted(views.sizes) == [(64, 96), (96, 64)]
    [wide, same, tall] = [
        read_sources([f"{pictures}/{n}.png"], family, option="x")[0][0] for n in ("wide", "same", "tall")
    ]
    assert views.size_of(wide, (8, 8)) == (64, 96) and views.size_of(tall, (8, 8)) == (96, 64)
    shown = views.shown([wide, tall, same], (96, 64), family)
    assert [image.size for image in shown] == [(64, 96), tall.size, (64, 96)]
    middle = wide.resize((64, 96), Image.Resampling.LANCZOS, box=(300 / 2 - 200 / 3, 0, 300 / 2 + 200 / 3, 200))
    assert (np.asarray(shown[0]) == np.asarray(middle)).all()
    [own] = views.shown([wide], (1024, 1024), family)  # the pipeline brings it to that size itself
    assert (np.asarray(own) == np.asarray(wide)[:, 50:250]).all() and own.info["source_image"] == "wide.png"
    assert views.resized((64, 96), family) == (64, 96), "a larger one would be shown larger"
    assert views.resized((1024, 1024), family) is None

    others = data.select([row for row, shapes in enumerate(data.source_shapes) if len(shapes) == 0])
    plain = EditViews.of(others, family)
    assert not plain.as_targets and plain.size_of(wide, (8, 8)) == (8, 8) and plain.resized((64, 96), family) is None
    assert plain.shown([wide, tall], (8, 8), family) == [wide, tall]
    with pytest.raises(sf.SciflowError, match=r"wide.png, shown as in training, has 32 x 48 pixels: under 64"):
        views.shown([wide], (32, 48), family)


class Editor(StubFamily):
    """Notes what it is given to edit; draws the mean colour of the first source."""

    max_sources, text_reads_sources = 2, False

    def __init__(self):
        super().__init__()
        self.given = []

    def check_source(self, height, width):
        return ""

    def source_size(self, height, width):
        return height // 16 * 16, width // 16 * 16

    def generate(self, pipeline, prompt_inputs, *, source_images=(), **options):
        self.given.append([image.size for image in source_images])
        return super().generate(pipeline, prompt_inputs, **options)


def draw(validator, stop=1):
    args = SimpleNamespace(bf16=False, fp16=False, load_best_model_at_end=False)
    control, state = TrainerControl(), TrainerState()
    validator.on_train_begin(args, state, control, model=Network())
    state.global_step, control.should_training_stop = stop, True
    validator.on_step_end(args, state, control, model=Network())


def test_validation_edits_one_by_one_and_shows_the_sources(tmp_path, pictures):
    family, entries = Editor(), [f"{pictures}/green.png,{pictures}/tall.png", "none"]
    validator = callback(tmp_path, family, source_images=entries, edits=EditViews([(64, 48), SIZE], as_targets=True))
    draw(validator)
    assert validator.sizes == [SIZE, SIZE] and SIZE == (48, 64)
    assert family.given == 2 * [[(64, 48), (200, 300)], [(64, 48), (200, 300)], [], []]
    folder = tmp_path / "validation"
    sources = sorted((folder / "sources").iterdir())
    assert [file.name for file in sources] == ["p00_source0.png", "p00_source1.png"]
    assert read_image(folder / "step-000001" / "p00_seed42.png").info["source_images"] == "green.png, tall.png"
    assert "source_images" not in read_image(folder / "step-000001" / "p01_seed42.png").info
    with Image.open(folder / "contact_sheet.png") as sheet:
        both = sheet.size
    draw(callback(tmp_path / "plain", Editor()))
    with Image.open(tmp_path / "plain" / "validation" / "contact_sheet.png") as sheet:
        assert both[0] >= sheet.width and both[1] == sheet.height
    shown = np.asarray(read_image(folder / "contact_sheet.png"))
    assert (shown == GREEN).all(-1).sum() > 256 * 192 * 0.9, "the source lies on the sheet, once"


def test_the_sheet_ends_with_the_targets(tmp_path, pictures):
    """One column more, for the prompt that has one; those of an earlier run are gone."""
    sources, folder = [f"{pictures}/tall.png", "none"], tmp_path / "validation"
    draw(callback(tmp_path, Editor(), source_images=sources))
    with Image.open(folder / "contact_sheet.png") as sheet:
        width = sheet.width
    draw(callback(tmp_path, Editor(), source_images=sources, target_images=["none", f"{pictures}/green.png"]))
    assert [file.name for file in (folder / "targets").iterdir()] == ["p01_target.png"]
    shown = np.asarray(read_image(folder / "contact_sheet.png"))
    green = np.flatnonzero((shown == GREEN).all(-1).any(0))
    assert shown.shape[1] > width and green.min() > shown.shape[1] / 2 and len(green) > 100
    draw(callback(tmp_path, Editor(), source_images=sources, target_images=["none", "none"]))
    assert not any((folder / "targets").iterdir())
    for entry, words in (("nowhere.png", "no such file"), (str(Path(__file__)), "unreadable image")):
        with pytest.raises(sf.SciflowError, match=rf"`validation_target_images` .*{words}"):
            callback(tmp_path, Editor(), target_images=["none", entry])


def test_images_of_another_source_are_not_shown(tmp_path, pictures):
    """Resumed with another figure to edit: the earlier steps are blank, and its source is the one that is shown."""
    draw(callback(tmp_path, Editor(), source_images=[f"{pictures}/wide.png", "none"]))
    before = np.asarray(read_image(tmp_path / "validation" / "contact_sheet.png"))
    later = callback(tmp_path, Editor(), source_images=["none", f"{pictures}/tall.png"])
    args, state = SimpleNamespace(bf16=False, fp16=False, load_best_model_at_end=False), TrainerState(global_step=20)
    later.on_train_begin(args, state, TrainerControl(), model=Network())
    later.run(args, state, Network())
    names = [file.name for file in (tmp_path / "validation" / "sources").iterdir()]
    assert names == ["p01_source0.png"]
    after = np.asarray(read_image(tmp_path / "validation" / "contact_sheet.png"))
    colour = np.asarray(read_image(tmp_path / "validation" / "step-000000" / "p00_seed42.png"))[0, 0]
    count = [(sheet == colour).all(-1).sum() for sheet in (before, after)]
    assert count[0] == 2 * count[1] > 5000, "of steps 0 and 1, now of step 20 alone"


def test_a_source_for_each_prompt(tmp_path, pictures):
    with pytest.raises(sf.SciflowError, match=r"`validation_source_images`: 1 for 2 `validation_prompts`"):
        callback(tmp_path, Editor(), source_images=[f"{pictures}/wide.png"])


def stock_edit(folder, prompt, sources, *, size, seed=0, length=12, **options):
    """What the untouched pipeline makes of sources."""
    from diffusers import Flux2KleinPipeline

    pipeline = Flux2KleinPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        prompt=prompt, image=sources, height=size[0], width=size[1], max_sequence_length=length,
        generator=torch.Generator().manual_seed(seed), **options,
    )  # fmt: skip
    return np.asarray(drawn.images[0])


def test_klein_edits_in_validation_as_the_stock_pipeline(tmp_path, family, data, pictures, tiny_klein):
    trainer = make_trainer(
        tmp_path, family, data, max_steps=1, validation_prompts=["make it blue", "a bar chart"], num_inference_steps=2,
        validation_source_images=[f"{pictures}/tall.png", "none"], validation_guidance_scale=2.0,
    )  # fmt: skip
    trainer.train()
    first = np.asarray(read_image(tmp_path / "validation" / "step-000000" / "p00_seed0.png"))
    with Image.open(pictures / "tall.png") as image:
        source = image.convert("RGB").resize((64, 96), Image.Resampling.LANCZOS)
    options = dict(size=(96, 64), num_inference_steps=2, guidance_scale=2.0)
    assert first.shape == (96, 64, 3)
    assert (first == stock_edit(tiny_klein, "make it blue", [source], **options)).all()
    plain = stock_edit(tiny_klein, "make it blue", None, **options)
    assert (first != plain).mean() > 0.2


def sample(*words):
    return main(["sample", "--device", "cpu", "--num_inference_steps", "1", "--guidance_scale", "2", *map(str, words)])


def test_sample_edits_images(tmp_path, tiny_klein, pictures):
    """As the stock pipeline does, at the size of each source; prompts without a source at the usual size."""
    small = tmp_path / "small.png"
    Image.open(pictures / "wide.png").resize((100, 70)).save(small)
    words = ["--model_path", tiny_klein, "--num_images", 2, "--prompts", "blue", "a chart"]
    assert sample(*words, "--source_images", small, "none", "--output_dir", tmp_path, "--height", 64) == 0
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert [row.get("source_images") for row in rows] == ["small.png", None]
    found = [np.asarray(Image.open(tmp_path / f"0000{number}.png")) for number in (0, 1)]
    assert [image.shape for image in found] == [(64, 96, 3), (64, 1024, 3)]
    options = dict(seed=hash64(0, "sample", 0) & 0xFFFFFFFF, length=512, num_inference_steps=1, guidance_scale=2.0)
    expected = stock_edit(tiny_klein, "blue", [Image.open(small).convert("RGB")], size=(64, 96), **options)
    assert (found[0] == expected).all()


def test_sample_edits_as_a_run_was_trained(tmp_path, tiny_klein, pictures, evaluated):
    """At a bucket of its training, the source through its window; one source for all prompts."""
    run = Path(evaluated[0].args.output_dir)
    evaluated[0].save_model()
    evaluated[0].create_model_card()
    words = ["--model_path", run, "--base_model", tiny_klein, "--num_images", 2, "--prompts", "blue", "red"]
    assert sample(*words, "--source_images", pictures / "tall.png", "--output_dir", tmp_path) == 0
    assert [Image.open(tmp_path / f"0000{number}.png").size for number in (0, 1)] == [(64, 96), (64, 96)]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["--source_images", "a.png", "b.png"],
            "`source_images`: 2 for 3 `prompts`. Give one for each, or one for all.",
        ),
        (["--source_images", "gone.png"], "`source_images` 'gone.png': no such file. Give an image"),
    ],
)
def test_mistakes_of_sources(tmp_path, tiny_klein, capsys, words, told):
    assert sample("--model_path", tiny_klein, "--prompts", "x", "y", "z", *words, "--output_dir", tmp_path) == 2
    assert told in capsys.readouterr().err
