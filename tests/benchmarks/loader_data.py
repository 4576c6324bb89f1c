"""What the loader benchmark reads: the same samples in every layout and every library's own format."""

import contextlib
import io
import json
import logging
import multiprocessing
import shutil
import tarfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sciflow_hf.data.build.convert import convert_cache

from .klein import quiet

NAMES = ("latents", "prompt_embeds")
COMPRESSED_SAMPLES = 4  # zlib takes about a second for each
ROWS_PER_FILE = 16
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Data:
    """Samples on disk below `folder`, one subfolder a format.

    The values are normal, those of the embeddings with a log-normal scale per channel, in float16; every format
    holds them as they are or rounded to bfloat16, so that every reader gives the same batch.
    """

    folder: Path
    latents: tuple[int, ...]  # (C, h, w)
    text: tuple[int, ...]  # (L, D)
    samples: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(zip(NAMES, (self.latents, self.text), strict=True))

    @property
    def sample_bytes(self) -> int:
        """In 16 bit."""
        return 2 * sum(int(np.prod(shape)) for shape in self.shapes.values())

    def path(self, name: str) -> Path:
        return self.folder / name

    def halves(self, i: int) -> dict[str, np.ndarray]:
        """Sample `i` as float16."""
        file = self.path("npz fp16") / f"2015/p/{i}_flux_latents.npz"
        if file.exists():
            with np.load(file) as payload:
                return {name: payload[name] for name in NAMES}
        draw = torch.Generator().manual_seed(i)
        scale = torch.randn(self.text[-1], generator=torch.Generator().manual_seed(-1)).mul_(0.7).exp_()
        values = {name: torch.randn(shape, generator=draw) for name, shape in self.shapes.items()}
        values["prompt_embeds"] *= scale
        return {name: value.half().numpy() for name, value in values.items()}

    def tensors(self, i: int) -> Tensors:
        """Sample `i` as bfloat16: what every reader must give."""
        return {name: torch.from_numpy(value).bfloat16() for name, value in self.halves(i).items()}

    def bits(self, i: int) -> dict[str, np.ndarray]:
        """Sample `i` as bfloat16's bits in uint16."""
        return {name: value.view(torch.uint16).numpy() for name, value in self.tensors(i).items()}

    def write(self, names: Sequence[str]) -> None:
        """Writes the formats that are not there yet and whose library is installed."""
        for name in ("npz fp16", *(n for n in names if n != "npz fp16")):
            if self.path(name).exists() or not installed(name):
                continue
            print(f"  writing {name}", flush=True)
            partial = self.path(f".{name}")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            with quiet():
                WRITERS[name](self, partial)
            partial.rename(self.path(name))


def batch_row(data: Data, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """Row 1 of a batch of 2: a reader's target."""
    return {name: torch.empty(2, *shape, dtype=dtype)[1] for name, shape in data.shapes.items()}


# -- caches of this library --------------------------------------------------------------------------------------


def write_npz(data: Data, folder: Path, kind: str) -> None:
    """A cache in the npz layout; kind: fp16, fp32, bf16 (bits in uint16) or compressed (fp16)."""
    rows, count = [], min(data.samples, COMPRESSED_SAMPLES) if kind == "compressed" else data.samples
    (folder / "2015/p").mkdir(parents=True)
    for i in range(count):
        arrays = data.bits(i) if kind == "bf16" else data.halves(i)
        if kind == "fp32":
            arrays = {name: value.astype(np.float32) for name, value in arrays.items()}
        ids = np.stack([np.zeros(data.text[0], np.int64)] * 3 + [np.arange(data.text[0])], axis=1)
        path = f"2015/p/{i}_flux_latents.npz"
        save = np.savez_compressed if kind == "compressed" else np.savez
        save(folder / path, **arrays, text_ids=ids)
        rows.append(index_row(data, i, path, f"figure {i}"))
    write_index(pa.Table.from_pylist(rows), folder / "2015/2015_rank0_part0.parquet")


def write_index(rows: pa.Table, file: Path) -> None:
    pq.write_table(rows.replace_schema_metadata({b"sciflow_hf": json.dumps({"family": "benchmark"})}), file)


def index_row(data: Data, i: int, path: str, caption: str) -> dict[str, Any]:
    height, width = (8 * n for n in data.latents[1:])
    return {
        "image_path": f"p/{i}.png", "caption": caption, "cache_path": path, "latent_shape": list(data.latents),
        "prompt_embeds_shape": list(data.text), "bucket_h": height, "bucket_w": width, "aspect_ratio": "",
    }  # fmt: skip


def convert(data: Data, folder: Path, **options: Any) -> None:
    convert_cache(data.path("npz fp16"), folder, shard_bytes=ROWS_PER_FILE * data.sample_bytes, **options)


# -- formats of others -------------------------------------------------------------------------------------------


def write_safetensors(data: Data, folder: Path) -> None:
    from safetensors.torch import save_file

    for i in range(data.samples):
        save_file(data.tensors(i), folder / f"{i}.safetensors")


def write_tar(data: Data, folder: Path) -> None:
    """Tar files of .npy members, as webdataset reads them, and where their values lie."""
    places: list[dict[str, Any]] = []
    for start in range(0, data.samples, ROWS_PER_FILE):
        file = folder / f"{start // ROWS_PER_FILE:06d}.tar"
        with tarfile.open(file, "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(start, min(start + ROWS_PER_FILE, data.samples)):
                for name, value in data.bits(i).items():
                    stream = io.BytesIO()
                    np.save(stream, value)
                    member = tarfile.TarInfo(f"{i:06d}.{name}.npy")
                    member.size = stream.tell()
                    stream.seek(0)
                    tar.addfile(member, stream)
        with tarfile.open(file) as tar:
            for found in tar:
                i, name, _ = found.name.split(".")
                places += [{}] if int(i) == len(places) else []
                nbytes = 2 * int(np.prod(data.shapes[name]))
                places[int(i)][name] = (file.name, found.offset_data + found.size - nbytes)
    (folder / "index.json").write_text(json.dumps(places))


def write_litdata(data: Data, folder: Path) -> None:
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(cache_dir=str(folder), chunk_bytes=64 << 20)  # what `litdata.optimize` calls in its workers
    for i in range(data.samples):
        writer[i] = {name: torch.from_numpy(value.view(np.int16)) for name, value in data.bits(i).items()}
    writer.done()
    writer.merge()


def write_mds(data: Data, folder: Path) -> None:
    from streaming import MDSWriter

    columns = {name: f"ndarray:uint16:{','.join(map(str, shape))}" for name, shape in data.shapes.items()}
    with MDSWriter(out=str(folder / "mds"), columns=columns, size_limit=ROWS_PER_FILE * data.sample_bytes) as out:
        for i in range(data.samples):
            out.write(data.bits(i))


def binary_rows(data: Data) -> Iterator[dict[str, bytes]]:
    for i in range(data.samples):
        yield {name: value.tobytes() for name, value in data.bits(i).items()}


def write_arrow(data: Data, folder: Path) -> None:
    import datasets

    features = datasets.Features(dict.fromkeys(NAMES, datasets.Value("large_binary")))
    made = datasets.Dataset.from_generator(
        binary_rows, gen_kwargs={"data": data}, features=features, cache_dir=str(folder / "made"), writer_batch_size=8
    )
    made.save_to_disk(folder / "arrow")
    shutil.rmtree(folder / "made")


def write_parquet(data: Data, folder: Path) -> None:
    """One row a row group, plain and uncompressed."""
    schema = pa.schema(dict.fromkeys(NAMES, pa.binary()))
    options = dict(compression="none", use_dictionary=False, write_statistics=False)
    with pq.ParquetWriter(folder / "data.parquet", schema, **options) as writer:
        for row in binary_rows(data):
            writer.write_table(pa.Table.from_pylist([row], schema))


WRITERS: dict[str, Callable[[Data, Path], None]] = {
    **{f"npz {kind}": lambda d, f, kind=kind: write_npz(d, f, kind) for kind in ("fp16", "fp32", "bf16", "compressed")},
    "shards": convert,
    "shards zstd": lambda data, folder: convert(data, folder, codec="zstd"),
    "shards fp8": lambda data, folder: convert(data, folder, embeds="fp8"),
    "inline": lambda data, folder: convert(data, folder, payload="inline"),
    "safetensors": write_safetensors,
    "tar": write_tar,
    "litdata": write_litdata,
    "mds": write_mds,
    "arrow": write_arrow,
    "parquet": write_parquet,
}
LIBRARIES = {"webdataset": "webdataset", "litdata": "litdata", "mds": "streaming"}
"""Of formats and readers: the module that they need and the project does not."""


def installed(name: str) -> bool:
    return name not in LIBRARIES or find_spec(LIBRARIES[name]) is not None


def disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def hush() -> None:
    """Other libraries' warnings and logs are not shown."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)


def in_new_process(function: Callable[..., Any], *args: Any) -> Any:
    """What the function returns there: its memory and its threads end with the process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=hush) as pool:
        return pool.submit(function, *args).result()


@contextlib.contextmanager
def torch_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
