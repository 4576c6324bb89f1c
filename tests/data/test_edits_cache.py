"""Caches of edits: sources of every number and size in every layout, batches of one kind, sources stored once."""

import json
from collections import Counter

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from caches import resave
from stored_blocks import SETTINGS, write_block

from sciflow_hf import BucketBatchSampler, load_cache
from sciflow_hf.data.batches.loader import BucketLoader, batch_keys_of, collate
from sciflow_hf.data.build.convert import convert_cache
from sciflow_hf.data.inspect.describe import describe_cache
from sciflow_hf.data.inspect.repair import write_repaired
from sciflow_hf.data.inspect.verify import verify_cache
from sciflow_hf.data.layouts.base import Layout
from sciflow_hf.data.layouts.shards import read_header
from sciflow_hf.data.stream.loader import StreamLoader
from sciflow_hf.data.stream.own import OwnStreamLoader
from sciflow_hf.data.stream.stream import StreamingCache
from sciflow_hf.diffusion.randomness import step_keys, uniform
from sciflow_hf.diffusion.sources import source_name, source_names_in
from sciflow_hf.errors import CacheError, SciflowError

LAYOUTS = ("npz", "shards", "inline")
WIDE, TALL, SMALL = (4, 6, 9), (4, 9, 6), (4, 3, 5)
SOURCES = [("a",), (), ("b", "c"), ("a",), ("c", "b"), (), ("c", "c"), ("a",), ("b", "c"), (), ("d",), ("a",)]
"""Of each row the ids of its sources."""
SHAPES = {"a": WIDE, "b": TALL, "c": SMALL, "d": TALL}
ROWS = len(SOURCES)


def bits(seed: int, *shape: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    values = torch.randint(-(2**15), 2**15, shape, generator=draw).to(torch.int16).view(torch.bfloat16)
    return torch.where(values.isfinite(), values, torch.tensor(-0.0).bfloat16())


def samples() -> list[dict[str, torch.Tensor]]:
    """The tensors of each row; equal ids are equal bits."""
    source = {name: bits(ord(name), *shape) for name, shape in SHAPES.items()}
    made = []
    for row, ids in enumerate(SOURCES):
        sample = {"latents": bits(row, *WIDE), "prompt_embeds": bits(100 + row // 2, 5, 8)}
        sample["edit_mask"] = torch.full(WIDE[1:], row, dtype=torch.uint8)
        made.append(sample | {source_name(number): source[name] for number, name in enumerate(ids)})
    return made


def light(payload: str, rows: range) -> pa.Table:
    table = {
        "image_path": [f"{row}.png" for row in rows],
        "caption": [f"caption {row // 2}" for row in rows],
        "bucket_h": [48] * len(rows),
        "bucket_w": [72] * len(rows),
        "source_ids": [list(SOURCES[row]) for row in rows],
    }
    if payload == "npz":
        table |= {"cache_path": [f"{row}.npz" for row in rows], "latent_shape": [list(WIDE)] * len(rows)}
        table |= {"prompt_embeds_shape": [[5, 8]] * len(rows)}
        table["source_shapes"] = [[list(SHAPES[name]) for name in SOURCES[row]] for row in rows]
    table["source_ids"] = pa.array(table["source_ids"], pa.list_(pa.string()))
    made = pa.table(table).replace_schema_metadata({b"sciflow_hf": json.dumps(SETTINGS).encode()})
    if payload == "npz":
        place = made.schema.get_field_index("source_shapes")
        shapes = made.column(place).cast(pa.list_(pa.list_(pa.int64())))
        made = made.set_column(place, "source_shapes", shapes)
    return made


def make(folder, payload, codec="none"):
    """Two blocks; in shards the second finds `a` and `c` in the first."""
    layout, tensors = Layout(payload, codec=codec, sources=2), samples()
    prompts = [f"{row // 2:016x}" for row in range(ROWS)]
    stored: set[str] = set()
    for number, rows in enumerate((range(7), range(7, ROWS))):
        some = []
        for row in rows:
            known = {source_name(n) for n, name in enumerate(SOURCES[row]) if payload == "shards" and name in stored}
            some.append({name: value for name, value in tensors[row].items() if name not in known})
            stored.update(SOURCES[row])
        owners = dict.fromkeys("abc", "part00000") if number else {}
        write_block(
            folder, f"part{number:05d}", light(payload, rows), some, layout,
            prompts=[prompts[row] for row in rows], sources=[SOURCES[row] for row in rows], owners=owners,
        )  # fmt: skip
    return folder


@pytest.fixture(scope="module", params=[*LAYOUTS, "shards-zstd", "inline-zstd"])
def cache(request, tmp_path_factory):
    payload, _, codec = request.param.partition("-")
    return make(tmp_path_factory.mktemp(request.param) / "c", payload, codec or "none")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make(tmp_path_factory.mktemp("edits") / "c", "shards")


def same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype and value.shape == other[name].shape, name
        assert torch.equal(value.contiguous().view(torch.uint8), other[name].contiguous().view(torch.uint8)), name


# --- reading ---


def test_every_row_reads_as_it_was_written(cache):
    """Sources of both numbers and all sizes, none where the row has none, in every layout, as rows and as a stream."""
    found = load_cache(cache)
    assert [found.source_shapes[row] for row in range(ROWS)] == [tuple(SHAPES[n] for n in ids) for ids in SOURCES]
    assert found.kinds == ["edit" if ids else "generation" for ids in SOURCES]
    for row, sample in enumerate(samples()):
        same(found[row], sample)
    stream = load_cache(cache, streaming=True)
    stream.shuffle_buffer = 0
    for sample, streamed in zip(samples(), stream, strict=True):
        same(streamed, sample)
    view = found.select([4, 1, 0])
    assert view.kinds == ["edit", "generation", "edit"] and view.batch_keys == [found.batch_keys[i] for i in (4, 1, 0)]
    same(view[0], samples()[4])


def test_shards_hold_each_source_once(shards):
    keys = [key for n in (0, 1) for key in read_header(str(shards / f"shards/part0000{n}.safetensors"))]
    assert Counter(key for key in keys if key.startswith("source")) == Counter(f"source_latents.{n}" for n in "abcd")


@pytest.mark.parametrize("payload", LAYOUTS)
def test_converting_keeps_every_bit(cache, payload, tmp_path):
    """From every layout into every other; shards of one row or two find their sources in each other."""
    report = convert_cache(cache, tmp_path / "c", payload=payload, shard_bytes=900)
    found = load_cache(tmp_path / "c")
    assert report.sources == 4 and report.blocks > 4 and report.own_copies == 0
    for row, sample in enumerate(samples()):
        same(found[row], sample)
    assert found.batch_keys == load_cache(cache).batch_keys and found.fingerprint
    assert found.column("source_ids").to_pylist() == [list(ids) for ids in SOURCES]
    if payload == "shards":
        keys = [key for file in tmp_path.rglob("*.safetensors") for key in read_header(str(file))]
        assert Counter(k for k in keys if k.startswith("source")) == Counter(f"source_latents.{n}" for n in "abcd")
    again = convert_cache(cache, tmp_path / "c", payload=payload, shard_bytes=900)
    assert again.written == 0


def test_a_conversion_of_a_cache_without_ids_keeps_every_source(tmp_path):
    """Caches of other programs; and a row whose source differs from that of another row with its id has its own."""
    folder = make(tmp_path / "npz", "npz")
    file = folder / "data_part00000.parquet"
    for path in folder.glob("*.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.drop_columns(["source_ids"]), path)
    convert_cache(folder, tmp_path / "apart", payload="shards")
    wrong = make(tmp_path / "wrong", "inline")
    file = wrong / "data_part00000.parquet"
    ids = pq.read_table(file).column("source_ids").to_pylist()
    ids[2] = ["c", "b"]  # the other way round: `b` and `c` now name two sources each
    table = pq.read_table(file)
    at = table.schema.get_field_index("source_ids")
    arrays = table.set_column(at, "source_ids", pa.array(ids, pa.list_(pa.string())))
    payload = [name for name in arrays.column_names if pa.types.is_binary(arrays.schema.field(name).type)]
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False, "data_page_size": 2**31 - 1}
    assert payload
    pq.write_table(arrays, file, **options)
    convert_cache(wrong, tmp_path / "own", payload="shards")
    for made in ("apart", "own"):
        found = load_cache(tmp_path / made)
        for row, sample in enumerate(samples()):
            same(found[row], sample)


# --- batches ---


def test_batch_keys_tell_kinds_numbers_and_sizes_apart(cache):
    found = load_cache(cache)
    shapes = [tuple(SHAPES[name] for name in ids) for ids in SOURCES]
    assert found.batch_keys == [(48, 72, 5, *own) for own in shapes]
    assert batch_keys_of(found, pads_text=True) == [(48, 72, *own) for own in shapes]
    table = BucketBatchSampler(found.batch_keys, batch_size=2).table()
    assert "48 x 72 x 5, source latents 9 x 6 and 3 x 5 " in table and "48 x 72 x 5  " in table


def batches_of(loader, count):
    return [{k: v.clone() for k, v in batch.items()} for batch, _ in zip(loader, range(count), strict=False)]


def check_batch(batch, drops=False):
    """Every row of a batch has its own sources, and none is there that a row does not have."""
    for number, row in enumerate(batch["row"].tolist()):
        sample = samples()[row]
        gone = {*source_names_in(sample), "edit_mask"} if drops else set()
        left = {name: value for name, value in sample.items() if name not in gone}
        index = ("row", "position", "noise_key", "step_key")
        same({name: value[number] for name, value in batch.items() if name not in index}, left)


@pytest.mark.parametrize("pads_text", [False, True])
def test_no_batch_mixes_kinds_numbers_or_sizes(cache, pads_text):
    found = load_cache(cache)
    sampler = BucketBatchSampler(batch_keys_of(found, pads_text=pads_text), batch_size=3, seed=3)
    loader = BucketLoader(found, sampler, pads_text=pads_text)
    batches = batches_of(loader, len(loader))
    loader.close()
    assert {row for batch in batches for row in batch["row"].tolist()} == set(range(ROWS))
    for batch in batches:
        check_batch(batch)


def test_a_stream_makes_batches_of_one_kind_and_resumes(cache):
    stream = load_cache(cache, streaming=True)
    loader = StreamLoader(stream, batch_size=2, seed=1)
    batches = iter(loader)
    seen = [{k: v.clone() for k, v in next(batches).items()} for _ in range(7)]
    state = json.loads(json.dumps(loader.state_dict()))
    rest = [{k: v.clone() for k, v in next(batches).items()} for _ in range(9)]
    loader.close()
    for batch in seen + rest:
        check_batch(batch)
    again = StreamLoader(load_cache(cache, streaming=True), batch_size=2, seed=1)
    again.load_state_dict(state)
    for one, other in zip(rest, again, strict=False):
        same(one, dict(other))
    again.close()


def test_dropped_sources_follow_the_step(shards):
    """Every step keeps or loses its sources by its key, and so on 1 x 4, 2 x 2 and 1 x 1 x 4."""
    found = load_cache(shards).select(list(range(ROWS)) * 8)
    told = []
    for size, ranks, accumulation in ((4, 1, 1), (2, 2, 1), (1, 1, 4)):
        dropped: dict[int, set[bool]] = {}
        for rank in range(ranks):
            options = {"batch_size": size, "num_replicas": ranks, "rank": rank, "accumulation_steps": accumulation}
            sampler = BucketBatchSampler(found.batch_keys, seed=5, drop_last=True, **options)
            loader = BucketLoader(found, sampler, source_dropout=0.4)
            for batch in batches_of(loader, len(loader)):
                batch["row"] %= ROWS
                drops = "source_latents" not in batch and bool(SOURCES[batch["row"][0]])
                step = int(batch["position"][0]) // 4
                key = step_keys(5, 0, [4 * step], 4)
                assert (batch["step_key"] == key).all()
                lost = bool(uniform(key, stream="source_dropout") < 0.4)
                assert drops == (lost and bool(SOURCES[batch["row"][0]]))
                check_batch(batch, lost)
                dropped.setdefault(step, set()).add(drops)
            loader.close()
        told.append(dropped)
    assert told[0] == told[1] == told[2] and {d for drops in told[0].values() for d in drops} == {True, False}


def test_data_sets_and_streams_of_ones_own_lose_their_sources_alike(shards):
    """A list of samples, and a stream that gives them in the same order, lose them at the same steps as the cache."""

    class Own:
        buckets = tuple(SOURCES)

        def __len__(self):
            return ROWS

        def __getitem__(self, row):
            return samples()[row]

    found, options = load_cache(shards), {"batch_size": 2, "seed": 5}
    lost = []
    for dataset, keys in ((found, found.batch_keys), (Own(), Own.buckets)):
        loader = BucketLoader(dataset, BucketBatchSampler(keys, **options), source_dropout=0.5)
        batches = batches_of(loader, len(loader))
        lost.append([(b["row"].tolist(), "source_latents" in b, "edit_mask" in b) for b in batches])
        loader.close()
    assert lost[0] == lost[1] and {(True, True), (False, False)} <= {tuple(entry[1:]) for entry in lost[0]}

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([samples()[0]] * 8)

    loader = OwnStreamLoader(Stream(), source_dropout=0.5, **options)
    batches = batches_of(loader, 8)
    expected = [bool(uniform(batch["step_key"][:1], stream="source_dropout") >= 0.5) for batch in batches]
    assert ["source_latents" in batch for batch in batches] == expected and len(set(expected)) == 2


def test_a_collator_must_keep_the_sources_of_every_sample():
    def collator(rows):
        batch = collate(rows)
        return batch | {"source_latents": batch["source_latents"][:1]}

    loader = BucketLoader([samples()[0]] * 2, BucketBatchSampler([0, 0], batch_size=2), collate_fn=collator)
    with pytest.raises(SciflowError, match=r"made `source_latents` \(1, 4, 6, 9\) of the 2 rows"):
        next(iter(loader))


def test_without_dropout_the_batches_are_as_ever(shards):
    found = load_cache(shards)
    sampler = BucketBatchSampler(found.batch_keys, batch_size=2)
    (batch, *_) = batches_of(BucketLoader(found, sampler, threads=0), 1)
    assert "step_key" not in batch


def test_caches_of_one_kind_are_mixed(tmp_path):
    """Generations in npz without any column of sources, edits in shards: rows, weights, streams, one conversion."""
    plain, edits = make(tmp_path / "plain", "npz"), make(tmp_path / "edits", "shards")
    generations = [row for row, ids in enumerate(SOURCES) if not ids]
    for file in plain.glob("*.parquet"):
        table = pq.read_table(file)
        names = [int(name.split(".")[0]) for name in table.column("image_path").to_pylist()]
        table = table.filter(pa.array([name in generations for name in names]))
        pq.write_table(table.drop_columns(["source_ids", "source_shapes"]), file)
    both = [plain, edits]
    rows = [*generations, *range(ROWS)]
    found = load_cache(both)
    for number, row in enumerate(rows):
        same(found[number], samples()[row])
    assert Counter(found.kinds) == {"generation": 6, "edit": 9}
    stream = StreamingCache(both, weights=[1.0, 1.0], shuffle_buffer=4)
    loader = StreamLoader(stream, batch_size=2, seed=2)
    seen: Counter[str] = Counter()
    for batch in batches_of(loader, 12):
        batch["row"] = torch.tensor([rows[row] for row in batch["row"]])
        check_batch(batch)
        seen.update("edit" if SOURCES[row] else "generation" for row in batch["row"].tolist())
    loader.close()
    assert min(seen.values()) >= 8 and len(seen) == 2
    convert_cache(both, tmp_path / "one", payload="inline")
    one = load_cache(tmp_path / "one")
    for number, row in enumerate(rows):
        same(one[number], samples()[row])


# --- samples that must not share a batch, and masks ---


def test_collation_refuses_sources_of_some_samples():
    one, other, *_ = samples()
    with pytest.raises(SciflowError, match="row 7 has `source_latents` and row 8 has no source"):
        collate([one | {"row": 7}, other | {"row": 8}])
    found = {"row": 9} | {name: value for name, value in samples()[2].items()}
    with pytest.raises(SciflowError, match="row 9 has `source_latents`, `source_latents_1`"):
        collate([one | {"row": 7}, found])


def test_a_cache_batch_of_two_kinds_is_refused(cache):
    found = load_cache(cache)
    loader = BucketLoader(found, BucketBatchSampler([0] * ROWS, batch_size=ROWS), threads=0)
    with pytest.raises(CacheError, match=r"row \d+ .* has .*source.* and row \d+ .*Give them different buckets"):
        next(iter(loader))


@pytest.mark.parametrize("name", ["edit_mask", "loss_mask"])
def test_a_sample_without_a_mask_counts_everywhere(name, tmp_path):
    mask = torch.arange(6, dtype=torch.uint8).reshape(2, 3)
    rows = [{"latents": torch.ones(2, 2, 3)}, {"latents": torch.zeros(2, 2, 3), name: mask}]
    for order in ([0, 1], [1, 0]):
        batch = collate([rows[i] for i in order])
        full = torch.full_like(mask, 255)
        assert torch.equal(batch[name], torch.stack([full if i == 0 else mask for i in order]))


@pytest.mark.parametrize("without", [0, 3])
def test_a_row_without_a_mask_counts_everywhere(tmp_path, without):
    """The same of a cache, whichever row comes first, in buffers that held other batches before."""
    folder = make(tmp_path / "c", "npz")
    resave(folder / f"{without}.npz", edit_mask=None)
    found = load_cache(folder).select([0, 3] * 4)
    loader = BucketLoader(found, BucketBatchSampler(found.batch_keys, batch_size=2, shuffle=False), buffers=2)
    for batch in loader:
        for row, mask in zip(batch["row"].tolist(), batch["edit_mask"], strict=True):
            expected = 255 if [0, 3][row % 2] == without else [0, 3][row % 2]
            assert mask.dtype == torch.uint8 and (mask == expected).all()
        batch.release()
    loader.close()


# --- what does not fit ---


def test_sources_that_the_index_does_not_know_are_refused(tmp_path):
    folder = make(tmp_path / "c", "npz")
    for file in folder.glob("*.parquet"):
        pq.write_table(pq.read_table(file).drop_columns(["source_shapes"]), file)
    with pytest.raises(CacheError, match=r"holds the sources \['source_latents'\], but column `source_shapes` says"):
        load_cache(folder)[0]


@pytest.mark.parametrize("value", [[[4, 6]], [[4, 6, 0]], [[4, None, 9]], [None]])
def test_a_broken_source_shape_names_the_row(tmp_path, value):
    folder = make(tmp_path / "c", "npz")
    file = folder / "data_part00001.parquet"
    table = pq.read_table(file)
    values = table.column("source_shapes").to_pylist()
    values[3] = value
    array = pa.array(values, pa.list_(pa.list_(pa.int64())))
    place = table.schema.get_field_index("source_shapes")
    pq.write_table(table.set_column(place, "source_shapes", array), file)
    with pytest.raises(CacheError, match=r"Row 10 .*column `source_shapes` is"):
        load_cache(folder)


def test_dropouts_that_cannot_be_are_refused(shards, tmp_path):
    found = load_cache(shards)
    generations = found.select([1, 5, 9])
    sampler = BucketBatchSampler(generations.batch_keys, batch_size=1)
    with pytest.raises(SciflowError, match=r"`source_dropout` 0.5: no row of this data has a source"):
        BucketLoader(generations, sampler, source_dropout=0.5)
    found.metadata["text_reads_sources"] = True
    for name in ("source_dropout", "caption_dropout"):
        with pytest.raises(SciflowError, match=f"`{name}` 0.5: the text encoder of this cache has read"):
            BucketLoader(found, BucketBatchSampler(found.batch_keys, batch_size=1), **{name: 0.5})


# --- inspection ---


def file_of(folder, payload):
    return (
        folder / {"npz": "0.npz", "shards": "shards/part00000.safetensors", "inline": "data_part00000.parquet"}[payload]
    )


@pytest.mark.parametrize("payload", LAYOUTS)
def test_verify_finds_a_damaged_source_and_repair_leaves_out_its_rows(tmp_path, payload):
    """One bit of `a`, which in shards four rows share: all of them are named, and a repaired index is clean."""
    folder = make(tmp_path / "c", payload)
    report = verify_cache(load_cache(folder), progress=False)
    assert report.clean and (payload != "shards" or report.arrays == 3 * ROWS + 4)
    member = load_cache(folder).members(0)["source_latents"]
    data = bytearray(file_of(folder, payload).read_bytes())
    data[member.offset + 7] ^= 16
    file_of(folder, payload).write_bytes(data)
    report = verify_cache(load_cache(folder), progress=False)
    rows = [row for row, ids in enumerate(SOURCES) if "a" in ids] if payload == "shards" else [0]
    assert report.bad_rows == rows, report.problems
    assert all("source_latents" in str(problem) for problem in report.problems)
    repaired, root = write_repaired(load_cache(folder), str(folder), report.bad_rows)
    left = load_cache(repaired, payload_dir=root)
    assert verify_cache(left, progress=False).clean
    wanted = [row for row in range(ROWS) if row not in rows]
    for number, row in enumerate(wanted):
        same(left[number], samples()[row])


@pytest.mark.parametrize("payload", LAYOUTS)
def test_verify_finds_sources_that_do_not_fit(tmp_path, payload):
    """NaN, and another number of channels; in the payload itself, with the right checksums."""
    wrong = samples()
    wrong[0]["source_latents"][0, 0, 0] = float("nan")
    wrong[4]["source_latents"] = bits(1, 5, 3, 5)
    shapes = dict(SHAPES) | {"x": (5, 3, 5), "y": WIDE}
    sources = [("y",), *SOURCES[1:4], ("x", "b")]
    table = light(payload, range(5))
    if payload == "npz":
        lists = pa.array([[list(shapes[i]) for i in ids] for ids in sources], pa.list_(pa.list_(pa.int64())))
        table = table.set_column(table.schema.get_field_index("source_shapes"), "source_shapes", lists)
    write_block(tmp_path / "c", "part00000", table, wrong[:5], Layout(payload, sources=2), sources=sources)
    problems = [(p.row, p.text) for p in verify_cache(load_cache(tmp_path / "c"), progress=False).problems]
    assert (0, "`source_latents` holds NaN or Inf: 1 of 216 values") in problems
    assert (4, "`source_latents` has 5 channels, the latents 4") in problems


def test_verify_holds_the_columns_of_sources_against_each_other(tmp_path):
    folder = make(tmp_path / "c", "npz")
    file = folder / "data_part00000.parquet"
    table = pq.read_table(file)
    names = [[f"{i}.png" for i in ids] for ids in SOURCES[:7]]
    names[2].pop()
    sizes = [[[shape[1] * 8, shape[2] * 8] for shape in map(SHAPES.get, ids)] for ids in SOURCES[:7]]
    sizes[4][1] = [80, 48]
    table = table.append_column("source_images", pa.array(names, pa.list_(pa.string())))
    table = table.append_column("source_sizes", pa.array(sizes, pa.list_(pa.list_(pa.int64()))))
    pq.write_table(table, file)
    problems = verify_cache(load_cache(file), progress=False).problems
    assert [(p.row, p.text) for p in problems] == [
        (2, "column `source_images` names 1 sources, `source_shapes` 2"),
        (4, "source 1 is of [80, 48] pixels, which does not fit its shape (4, 9, 6)"),
    ]


def test_info_tells_of_edits(cache):
    text = describe_cache(load_cache(cache), [str(cache)])
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    assert lines["edits"].endswith("9 of 12 samples, of 1 to 2 sources")
    assert lines["changed regions"].endswith(" 12")
    counts = {"none": 3, "6 x 9": 4, "9 x 6 and 3 x 5": 2, "3 x 5 and 9 x 6": 1, "3 x 5 and 3 x 5": 1, "9 x 6": 1}
    assert {sizes: int(lines[sizes].split()[-2]) for sizes in counts} == counts
    count = {"npz": 13, "inline": 13, "shards": 4}[load_cache(cache).readers[0].payload.get("layout", "npz")]
    assert lines["source_latents"].split()[3] == str(count), lines["source_latents"]


@pytest.mark.parametrize("layout", ["shards", "inline"])
def test_a_cache_of_edits_streams_from_afar(layout, tmp_path):
    folder = make(tmp_path / "c", layout)
    root = f"memory://edits-{layout}"
    fs = fsspec.filesystem("memory")
    fs.put(f"{folder}/", root, recursive=True)
    for number, sample in enumerate(samples()):
        same(load_cache(root)[number], sample)
    fs.rm(root, recursive=True)
