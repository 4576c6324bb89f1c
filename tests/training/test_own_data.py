"""Data sets of one's own: map-style, of `datasets`, streams; raw images and captions; what they may say; errors."""

import itertools
import json
import random
import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets.distributed import split_dataset_by_node
from PIL import Image
from torch.utils.data import IterableDataset
from trainings import losses, make_args, same, trained
from transformers import TrainingArguments

import sciflow_hf as sf
from sciflow_hf.data.batches.buckets import BucketBatchSampler
from sciflow_hf.data.batches.loader import BucketLoader, batch_keys_of, collate, groups_of, row_ids_of
from sciflow_hf.data.stream.own import OwnStreamLoader
from sciflow_hf.diffusion.randomness import noise_keys
from sciflow_hf.report.summary import save_model_card

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.usefixtures("datasets_cache")]

PAGE = (Path(__file__).parents[2] / "docs" / "own_data.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def encoders(family):
    return family.load_encoders(device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def encode(family, encoders):
    """A collator of raw images and captions, which drops all other keys."""

    def encoded(samples):
        pixel_values = torch.stack([torch.as_tensor(sample["pixel_values"]) for sample in samples])
        captions = [sample["caption"] for sample in samples]
        return {**family.encode_images(pixel_values, encoders), **family.encode_prompts(captions, encoders)}

    return encoded


@pytest.fixture(scope="module")
def raw():
    """Ten images, 16 x 24, and captions."""
    generator = torch.Generator().manual_seed(0)
    return [
        {"pixel_values": torch.rand(3, 16, 24, generator=generator) * 2 - 1, "caption": f"figure {i}"}
        for i in range(10)
    ]


class Stream(IterableDataset):
    """Rows in another order each epoch; no `state_dict`."""

    def __init__(self, rows, shuffles=True):
        self.rows, self.shuffles, self.epoch = rows, shuffles, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = np.random.default_rng(self.epoch).permutation(len(self.rows))
        return (self.rows[row] for row in (order if self.shuffles else sorted(order)))


def adapted(family):
    network = family.load_model(dtype=torch.float32)
    return sf.add_adapter(network, sf.AdapterArguments(rank=2, lora_alpha=4), family=family, seed=1)


def trainer_of(folder, family, data, held_out=None, collator=None, *, model=None, **options):
    model = adapted(family) if model is None else model
    return sf.DiffusionTrainer(
        model,
        make_args(folder, **options),
        family=family,
        train_dataset=data,
        eval_dataset=held_out,
        data_collator=collator,
    )


def as_datasets(rows):
    plain = [{**row, "pixel_values": row["pixel_values"].tolist()} for row in rows]
    return datasets.Dataset.from_list(plain).with_format("torch")


KINDS = {
    "datasets": as_datasets,
    "datasets stream": lambda rows: as_datasets(rows).to_iterable_dataset(num_shards=3),
}


@pytest.mark.promise("A02", "A18")
@pytest.mark.parametrize("kind", KINDS)
def test_raw_images_and_captions_train_resume_and_evaluate(tmp_path, family, encode, raw, kind):
    """4 steps of 4 samples of 10 = 3 steps, resume, 1 step, bit for bit; evaluation of the same rows is the same."""
    options = dict(max_steps=4, gradient_accumulation_steps=2, save_strategy="steps", save_steps=3)
    whole = trainer_of(tmp_path / "whole", family, KINDS[kind](raw), KINDS[kind](raw[:3]), encode, **options)
    start = trained(whole)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    again = trainer_of(
        tmp_path / "again", family, KINDS[kind](raw), raw[:3], encode, resume_from_checkpoint="latest", **options
    )
    again.train()
    assert same(trained(whole), trained(again)) and losses(whole) == losses(again) and not same(start, trained(again))
    metrics = again.evaluate()
    assert metrics["eval_loss"] == whole.evaluate()["eval_loss"] != metrics["eval_base_loss"]
    save_model_card(whole)
    facts = json.loads((tmp_path / "whole" / "run_facts.json").read_text())["dataset"]
    counts = (None, None) if "stream" in kind else (10, 3)
    assert (facts["samples"], facts["eval_samples"]) == counts


@pytest.mark.promise("A19")
def test_encoding_in_the_collator_trains_as_encoded_samples_do(tmp_path, family, encode, raw):
    """The losses of raw samples equal those of the same tensors, encoded before and stacked; so does evaluation."""
    encoded = [{name: value[0] for name, value in encode([row]).items()} for row in raw]
    runs = []
    for data, collator in ((raw, encode), (encoded, None), (Stream(encoded, shuffles=False), None)):
        options = dict(max_steps=3, per_device_train_batch_size=1, train_sampling_strategy="sequential", eval_levels=1)
        trainer = trainer_of(tmp_path / str(len(runs)), family, data, data, collator, **options)
        trainer.train()
        runs.append((losses(trainer), trainer.evaluate()["eval_loss"]))
    assert runs[0] == runs[1] == runs[2]


def test_a_collator_that_keeps_the_keys_is_left_alone_and_one_that_drops_them_gets_them_back():
    rows = [{"latents": torch.full((1,), float(row))} for row in range(6)]
    keep = lambda samples: collate(samples[::-1])  # noqa: E731
    drop = lambda samples: {"latents": torch.stack([sample["latents"] for sample in samples])}  # noqa: E731
    sampler = BucketBatchSampler([None] * 6, batch_size=3, seed=5)
    stacked, kept, dropped = (list(BucketLoader(rows, sampler, collate_fn=c)) for c in (collate, keep, drop))
    for one, reverse, without in zip(stacked, kept, dropped, strict=True):
        assert one.keys() == reverse.keys() == without.keys() == {"latents", "row", "position", "noise_key"}
        assert all(torch.equal(one[name], without[name]) for name in one)
        assert all(torch.equal(one[name], reverse[name].flip(0)) for name in one)
        assert one["latents"][:, 0].tolist() == one["row"].tolist()
    assert torch.cat([batch["noise_key"] for batch in dropped]).tolist() == noise_keys(5, 0, range(6)).tolist()


def test_a_collator_may_leave_samples_out_with_their_keys():
    rows = [{"latents": torch.full((1,), float(row))} for row in range(4)]
    sampler = BucketBatchSampler([None] * 4, batch_size=4, shuffle=False)
    few = BucketLoader(rows, sampler, collate_fn=lambda samples: collate(samples[1:]))
    assert [batch["noise_key"].tolist() for batch in few] == [noise_keys(0, 0, [1, 2, 3]).tolist()]
    wrong = BucketLoader(rows, sampler, collate_fn=lambda s: {"latents": torch.zeros(3, 1)})
    with pytest.raises(sf.SciflowError, match=r"`latents` \(3, 1\) of the 4 rows \[0, 1, 2, 3\].*must be 4.*noise_key"):
        next(iter(wrong))


def test_a_collator_whose_posterior_is_drawn_gives_what_stacked_samples_give():
    generator = torch.Generator().manual_seed(2)
    rows = [{n: torch.rand(2, 3, 3, generator=generator) for n in ("latents", "latents_std")} for _ in range(4)]
    sampler = BucketBatchSampler([None] * 4, batch_size=2)
    own = BucketLoader([{"row_of": row} for row in range(4)], sampler, posterior=True, collate_fn=lambda s: {
        name: torch.stack([rows[sample["row_of"]][name] for sample in s]) for name in rows[0]})  # fmt: skip
    for batch, other in zip(own, BucketLoader(rows, sampler, posterior=True), strict=True):
        assert batch.keys() == other.keys() and torch.equal(batch["latents"], other["latents"])
        assert not torch.equal(batch["latents"], torch.stack([rows[row]["latents"] for row in batch["row"]]))


# -- draws --------------------------------------------------------------------------------------------------------


class Drawing:
    """A sample of three draws, by Python, NumPy and torch."""

    def __len__(self):
        return 8

    def __getitem__(self, row):
        return {"latents": torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()])}


def drawing_stream(**options):
    class Rows:
        def __iter__(self):
            return (Drawing()[row] for row in range(8))

    return OwnStreamLoader(Rows(), seed=4, **options)


def test_draws_follow_from_the_keys_and_leave_the_generators_as_they_were():
    def epoch(number, **options):
        sampler = BucketBatchSampler([None] * 8, seed=4, **options)
        sampler.set_epoch(number)
        return torch.cat([batch["latents"] for batch in BucketLoader(Drawing(), sampler)])

    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    first = epoch(0, batch_size=4)
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert torch.equal(first, epoch(0, batch_size=2, accumulation_steps=2))
    ranks = [epoch(0, batch_size=2, num_replicas=2, rank=rank).view(2, 2, 3) for rank in (0, 1)]
    assert torch.equal(first, torch.stack(ranks, 1).view(8, 3))
    assert len({value for row in torch.cat([first, epoch(1, batch_size=4)]).tolist() for value in row}) == 48

    stream = iter(drawing_stream(batch_size=4))
    read = torch.cat([next(stream)["latents"] for _ in range(4)])
    again = drawing_stream(batch_size=2).skip(4)
    assert torch.equal(read[8:], torch.cat([batch["latents"] for batch in itertools.islice(again, 4)]))
    assert len({value for row in read.tolist() for value in row}) == 48


# -- streams ------------------------------------------------------------------------------------------------------


def numbered(count):
    return [{"latents": torch.tensor([float(row)])} for row in range(count)]


def loader_of(rows, kind="as it is", **options):
    data = datasets.Dataset.from_list([{"latents": [float(row)]} for row in range(rows)]).to_iterable_dataset(3)
    data = {"as it is": data, "shuffled": data.shuffle(seed=3, buffer_size=4), "no state": Stream(numbered(rows))}[kind]
    return OwnStreamLoader(data, **{"batch_size": 2} | options)


def rows_of(batches, count):
    return [row for batch in itertools.islice(batches, count) for row in batch["latents"][:, 0].int().tolist()]


def test_a_stream_is_endless_loses_and_repeats_nothing():
    batches = list(itertools.islice(OwnStreamLoader(Stream(numbered(5)), batch_size=2, seed=9), 10))
    wanted = [row for epoch in range(4) for row in np.random.default_rng(epoch).permutation(5).tolist()]
    assert rows_of(batches, 10) == wanted
    assert torch.cat([batch["noise_key"] for batch in batches]).tolist() == noise_keys(9, 0, range(20)).tolist()
    assert torch.cat([batch["position"] for batch in batches]).tolist() == list(range(20))


def test_ranks_and_accumulation_share_the_steps_of_a_stream():
    one = list(itertools.islice(loader_of(7, batch_size=4), 6))
    for ranks in ({"num_replicas": 2}, {"accumulation_steps": 2}):
        parts = [iter(loader_of(7, rank=rank, **ranks)) for rank in range(ranks.get("num_replicas", 1))]
        for batch in one:
            micro = [next(part) for _ in range(2 // len(parts)) for part in parts]
            assert all(torch.equal(batch[name], torch.cat([part[name] for part in micro])) for name in batch)


@pytest.mark.parametrize("kind", ["as it is", "shuffled", "no state"])
def test_a_stream_continues_exactly_at_any_batch(kind, caplog):
    """Through JSON, over the borders of epochs (9 rows, 2 a batch), and once more after that in smaller batches."""
    whole, again_read = rows_of(loader_of(9, kind), 14), kind != "as it is"
    assert sorted(whole[:9]) == sorted(whole[9:18]) == list(range(9)) and (whole[:9] != whole[9:18]) is again_read
    caplog.set_level("INFO")
    for stop in (1, 4, 5, 9, 10):
        loader = loader_of(9, kind)
        rows_of(loader, stop)
        again = loader_of(9, kind)
        again.load_state_dict(json.loads(json.dumps(loader.state_dict())))
        assert rows_of(again.skip(stop), 1) == whole[2 * stop : 2 * stop + 2]
        last = loader_of(9, kind, batch_size=1)
        last.load_state_dict(json.loads(json.dumps(again.state_dict())))
        assert rows_of(last, 2) == whole[2 * stop + 2 : 2 * stop + 4]
    assert ("Passing over" in caplog.text) is again_read  # the others begin where they were


def test_a_stream_reads_for_all_ranks_before_it_is_saved():
    first = loader_of(9, num_replicas=2, rank=0)
    rows_of(first, 2)
    again = loader_of(9, num_replicas=2, rank=1)
    again.load_state_dict(first.state_dict())
    assert rows_of(again, 1) == [1, 2]  # of 8, 0 | 1, 2


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        ([], "gives no sample in epoch 0"),
        ([(1, 2)], "row 0 of the data set is a tuple"),
        ([{"latents": "x"}], "`latents` of row 0 is a str.*data_collator"),
    ],
)
def test_what_a_stream_cannot_be(stream, message):
    with pytest.raises(sf.SciflowError, match=message):
        next(iter(OwnStreamLoader(Stream(stream), batch_size=1)))


def test_a_state_that_json_does_not_take_is_refused():
    stream = Stream(numbered(4))
    stream.state_dict, stream.load_state_dict = lambda: {"at": torch.zeros(1)}, lambda state: None
    loader = OwnStreamLoader(stream, batch_size=1)
    next(iter(loader))
    with pytest.raises(sf.SciflowError, match=r"`state_dict\(\)` goes into the checkpoint.*Tensor"):
        loader.state_dict()


# -- what a data set may say --------------------------------------------------------------------------------------


class Said(list):
    """A list that says more."""

    def __init__(self, rows, **said):
        super().__init__(rows)
        vars(self).update(said)


def test_attributes_are_one_entry_a_row_and_lists_are_buckets_too():
    rows = numbered(3)
    said = Said(rows, buckets=[[8, 8], [8, 16], [8, 8]], row_ids=["a", "b", "c"], groups=["p", "p", "q"])
    assert batch_keys_of(said) == [(8, 8), (8, 16), (8, 8)]
    assert (row_ids_of(said), groups_of(said)) == (["a", "b", "c"], ["p", "p", "q"])
    assert (batch_keys_of(rows), row_ids_of(rows), groups_of(rows)) == ([None] * 3, ["0", "1", "2"], ["0", "1", "2"])
    for name, of in (("buckets", batch_keys_of), ("row_ids", row_ids_of), ("groups", groups_of)):
        with pytest.raises(sf.SciflowError, match=f"`{name}` of the data set has 2 entries for 3 rows"):
            of(Said(rows, **{name: ["a", "b"]}))
    with pytest.raises(sf.SciflowError, match="`row_ids` holds 'a' twice"):
        row_ids_of(Said(rows, row_ids=["a", "b", "a"]))
    with pytest.raises(sf.SciflowError, match=r"`latents` have the shapes.*different buckets"):
        collate([{"latents": torch.zeros(1)}, {"latents": torch.zeros(2)}])


@pytest.mark.promise("A20", "B27")
def test_the_script_of_the_page_runs(tmp_path, monkeypatch):
    """Buckets, names and groups, random flips, raw images: it trains mini_klein, resumes bit for bit and evaluates."""
    monkeypatch.chdir(tmp_path)
    for folder, papers in (("my_figures", "abc"), ("my_held_out", "xy")):
        Path(folder).mkdir()
        for number, paper in enumerate(papers):
            for figure in (1, 2):
                name = f"{paper}-{figure}"
                pixels = np.random.default_rng([number, figure]).integers(0, 256, (60, 90, 3), dtype=np.uint8)
                Image.fromarray(pixels if figure == 1 else pixels.transpose(1, 0, 2).copy()).save(
                    f"{folder}/{paper}-{figure}.png"
                )
                Path(folder, f"{name}.txt").write_text(f"figure {figure} of {paper}")
    code = re.search(r"`my_run.py`:\n\n```python\n(.*?)```", PAGE, re.S).group(1)
    small = {
        "max_steps=200": "max_steps=3",
        "save_steps=100": "save_steps=2, use_cpu=True, report_to='none', logging_steps=1",
    }
    for there, here in small.items():
        assert there in code
        code = code.replace(there, here)
    first, again = {}, {}
    exec(compile(code, "my_run.py", "exec"), first)
    trainer = first["trainer"]
    assert trainer._eval_groups == {"x-1.png": "x", "x-2.png": "x", "y-1.png": "y", "y-2.png": "y"}
    shapes = {tuple(batch["latents"].shape[2:]) for batch in trainer.get_train_dataloader()}
    assert shapes == {(16, 24), (24, 16)}
    shutil.rmtree("my_lora/checkpoint-3")
    exec(compile(code, "my_run.py", "exec"), again)
    assert losses(again["trainer"]) == losses(trainer) and len(losses(trainer)) == 3
    assert same(trained(again["trainer"]), trained(trainer))
    evaluated = [run["trainer"].state.log_history[-1]["eval_loss"] for run in (first, again)]
    assert evaluated[0] == evaluated[1] > 0
    the_stream_of_the_page_runs(first)


def the_stream_of_the_page_runs(namespace):
    """Goes on with the script's names: images in parquet through a shuffle buffer, resumed bit for bit."""
    rows = {"image": [Image.open(file) for file in sorted(Path("my_figures").glob("*.png"))], "caption": list("abcdef")}
    Path("figures").mkdir()
    for part in range(2):
        datasets.Dataset.from_dict(rows).shard(2, part).to_parquet(f"figures/{part}.parquet")
    code = re.search(r"```python\n(import datasets\n.*?)```", PAGE, re.S).group(1)
    namespace["args"].output_dir = "my_stream"
    found = []
    for _ in range(2):
        exec(compile(code, "stream", "exec"), namespace)
        found.append((trained(namespace["trainer"]), losses(namespace["trainer"])))
        shutil.rmtree("my_stream/checkpoint-3")
    assert same(found[0][0], found[1][0]) and found[0][1] == found[1][1] and len(found[0][1]) == 3


def test_the_table_of_the_page_names_what_families_ask_for():
    named = {cell for row in re.findall(r"^\| (.*?) \|", PAGE, re.M) for cell in re.findall(r"`(\w+)", row)}
    assert named >= {"buckets", "row_ids", "groups", "flux2_klein", "qwen_image", "dit", "microscopy_unet"}


# -- errors -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(family):
    return adapted(family)


BATCHES = {
    "no key": (
        lambda batch: {"prompt_embeds": batch["prompt_embeds"]},
        r"needs \['latents'\].*first batch has `prompt_",
    ),
    "channels": (lambda batch: batch | {"latents": batch["latents"][:, :1]}, r"`latents` \(1, .*own_data.md"),
    "text width": (lambda batch: batch | {"prompt_embeds": batch["prompt_embeds"][..., :3]}, r"`prompt_embeds` .*3\)"),
    "not stacked": (lambda batch: batch | {"latents": list(batch["latents"])}, r"needs \['latents'\].*`latents` list"),
    "captions": (lambda batch: batch | {"captions": ["a", "b"]}, "takes `prompt_embeds`, not `captions`"),
    "no dict": (lambda batch: list(batch.values()), "`data_collator` gave a list.*dict of tensors"),
    "too few": (lambda batch: {n: v[:1] for n, v in batch.items()}, "of the 2 rows .*must be 2, one entry a sample"),
}


@pytest.mark.parametrize("case", BATCHES)
def test_the_collated_batch_is_checked(tmp_path, family, encode, raw, model, case):
    change, message = BATCHES[case]

    def collator(samples):
        return change(encode(samples))

    with pytest.raises(sf.SciflowError, match=message):
        trainer_of(tmp_path, family, raw, collator=collator, model=model)
    stream = trainer_of(tmp_path, family, Stream(raw), collator=collator, model=model)
    with pytest.raises(sf.SciflowError, match=message):
        stream.train()


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (lambda raw: raw, {}, "`caption` of row 0 is a str.*data_collator"),
        (lambda raw: [tuple(row.values()) for row in raw], {}, "row 0 of the data set is a tuple"),
        (lambda raw: [], {}, "the data set is empty"),
        (lambda raw: (row for row in raw), {}, "`train_dataset` is a generator.*IterableDataset"),
        (lambda raw: 5, {}, "`train_dataset` is a int"),
        (
            lambda raw: datasets.DatasetDict(train=as_datasets(raw), test=as_datasets(raw)),
            {},
            r"`train_dataset` is a DatasetDict of \['test', 'train'\]: give one of them",
        ),
        (Stream, {"max_steps": -1}, "`max_steps` is missing"),
        (Stream, {"dataloader_num_workers": 1}, "`dataloader_num_workers` does not go with a stream"),
        (
            lambda raw: split_dataset_by_node(KINDS["datasets stream"](raw), 0, 2),
            {},
            "split_dataset_by_node",
        ),
    ],
)
def test_what_cannot_be_trained_on(tmp_path, family, raw, model, data, options, message):
    with pytest.raises(sf.SciflowError, match=message):
        trainer_of(tmp_path, family, data(raw), model=model, **options).train()


def test_plain_training_arguments_are_refused_in_one_sentence(tmp_path, family, raw):
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(
        sf.SciflowError, match=r"^`args` is a `TrainingArguments`: give a `sciflow_hf.DiffusionTraining"
    ):
        sf.DiffusionTrainer(torch.nn.Linear(1, 1), args, family=family, train_dataset=raw)


def test_a_stream_has_no_plan(family, model, tmp_path):
    args = make_args(tmp_path)
    with pytest.raises(sf.SciflowError, match="no number of samples to plan with"):
        sf.plan(model, family, args, Stream([]))
