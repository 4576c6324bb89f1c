"""The work of one rank in a build: its share of the batches is encoded, its parts are completed."""

import itertools
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from ... import __version__
from ...errors import first_line
from ..batches.samples import text_rows
from ..index import EMPTY_PROMPT_FILE
from .jobs import Batch, Job, in_batches
from .sources import to_rgb
from .stores import STAGING, Skips, Store
from .views import average_mask, fit_mask, fit_pixels
from .writing import SETTINGS_FILE, readable_bytes, write_payload, write_whole

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

BLOCK_BYTES = 1 << 30
_Encode = Callable[[Any], dict[str, torch.Tensor]]
_Tensors = dict[str, torch.Tensor]


class Work:
    """See `build_cache` for the arguments.

    Attributes:
        samples: rows of the index (rank 0).
        encoded: samples that this rank, and on rank 0 all, encoded.
        reused: samples that were there before (rank 0).
        bytes: of the payloads (rank 0).
    """

    def __init__(
        self,
        store: Store,
        jobs: Sequence[Job],
        encode_images: _Encode,
        encode_prompts: _Encode,
        skip: Skips,
        *,
        settings: Mapping[str, Any],
        batch_size: int,
        samples_per_part: int,
        time_ids: bool = False,
        rank: int,
        world_size: int,
        barrier: Callable[[], None],
    ) -> None:
        self.store, self.jobs, self.skip, self.settings = store, jobs, skip, settings
        self.encode_images, self.encode_prompts = encode_images, encode_prompts
        self.batch_size, self.samples_per_part = batch_size, samples_per_part
        self.rank, self.world_size, self.barrier = rank, world_size, barrier
        self.output, self.dtype, self.with_embeds = store.output, store.layout.dtype, store.layout.embeds != "none"
        self.uses = Counter(job.caption for job in jobs)
        self.time_ids = time_ids
        self.masked = any(job.record.open_mask is not None for job in jobs)
        self.texts: dict[str, _Tensors] = {}  # of the last batch
        self.samples = self.encoded = self.reused = self.bytes = 0
        self.sizes: dict[str, int] = {}  # bytes of an image, of a prompt
        self.left: dict[str, int] = {}  # images and prompts to encode, on all ranks
        self.own: int | None = None  # images that this rank encodes; None before that is planned
        self.bar: tqdm[Any] | None = None
        self.opened: tuple[str, Image.Image | None] = ("", None)

    def run(self) -> None:
        """Builds, together with the other ranks."""
        try:
            self._run()
        except KeyboardInterrupt:
            done, total = self.encoded + self.reused, len(self.jobs)
            logger.warning("Stopped with %d of %d images encoded. The same command goes on from here.", done, total)
            raise
        finally:
            if self.bar is not None:
                self.bar.close()

    def _run(self) -> None:
        self.store.look()
        self.barrier()
        if self.rank == 0:
            self._begin()
        self.barrier()
        parts = self.store.plan(self._part_size())
        self.barrier()
        if self.rank == 0:
            self.store.clear()

        batches = [list(in_batches(part.jobs, self.batch_size, prompts=part.prompts)) for part in parts]
        turn = itertools.count()  # batches are dealt in turn, over all parts: no rank has one more than another
        mine = [[batch for batch in part if next(turn) % self.world_size == self.rank] for part in batches]
        images, prompts = sum(len(part.jobs) for part in parts), sum(len(part.prompts or ()) for part in parts)
        self.left = {"image": images + self.encoded, "prompt": prompts}
        self.own = sum(len(batch.jobs) for part in mine for batch in part)
        self.reused = len(self.jobs) - self.left["image"]
        if not self.left["image"]:
            logger.info("All %d images are encoded already.", len(self.jobs))
        for start in range(0, len(parts), self.world_size):
            numbers = range(start, min(start + self.world_size, len(parts)))
            own = start + self.rank
            try:
                for number in numbers:
                    for batch in mine[number]:
                        self._encode(batch)
                self.barrier()
                self.store.gather(numbers.start, numbers.stop)
                self.barrier()  # before any rank tidies up
            except BaseException:
                if own in numbers:
                    self.store.salvage(own)
                raise
            if own in numbers:
                self.store.finish(own)
        if self.rank:
            self._write_note()
        self.barrier()
        if self.rank == 0:
            self._read_notes()
            self.samples, self.bytes = self.store.close()
            if (self.output / STAGING).exists():
                shutil.rmtree(self.output / STAGING)
        self.barrier()

    def _begin(self) -> None:
        """What one rank does before the others start."""
        size = self._settings_before().get("sample_bytes")
        self._write_settings(size)
        self.store.clean()
        file = self.output / EMPTY_PROMPT_FILE
        if self.with_embeds and not file.is_file():  # for caption dropout
            write_payload(file, text_rows(self.encode_prompts([""]))[0], self.dtype)
        if size is None and not self.store.with_text:
            self._write_settings(self._measure())

    def _measure(self) -> int | None:
        """Bytes of the first sample that can be encoded: they tell how many make a block."""
        for batch in in_batches(self.jobs, self.batch_size, prompts=self.uses if self.with_embeds else ()):
            size = self.store.measure(batch.jobs)
            if size is None:
                self._encode(batch)
                size = self.store.measure(batch.jobs)
            if size is not None:
                return size
        return None

    def _settings_before(self) -> dict[str, Any]:
        file = self.output / SETTINGS_FILE
        return json.loads(file.read_text()) if file.is_file() else {}

    def _write_settings(self, sample_bytes: int | None) -> None:
        content: dict[str, Any] = {"settings": self.settings, "version": __version__}
        if sample_bytes is not None:  # kept, so that the blocks of a build are as large before as after a kill
            content["sample_bytes"] = sample_bytes
        text = json.dumps(content, indent=2) + "\n"
        write_whole(self.output / SETTINGS_FILE, lambda file: file.write(text.encode()))

    def _part_size(self) -> int:
        size = self._settings_before().get("sample_bytes")
        return max(1, min(self.samples_per_part, BLOCK_BYTES // size)) if size else self.samples_per_part

    def _encode(self, batch: Batch) -> None:
        """Encodes and saves the images of a batch that can be used, and its prompts."""
        pixels, masks, good = [], [], []
        for job in batch.jobs:
            try:
                image = self._open(job)
                pixels.append(fit_pixels(image, job.view))
            except Exception as error:  # PIL lets through whatever its decoders raise; the image is named
                self.skip(job.name, f"unreadable image ({first_line(error)})")
                continue
            try:
                masks.append(fit_mask(_mask(job), job.view))
            except Exception as error:
                pixels.pop()
                self.skip(job.name, f"unusable loss mask ({first_line(error)})")
                continue
            good.append(job)
        images = self.encode_images(torch.from_numpy(np.stack(pixels))) if good else {}
        self._encode_texts(batch, good)
        for i, job in enumerate(good):
            sample = {name: value[i] for name, value in images.items()}
            if self.masked:
                height, width = sample["latents"].shape[-2:]
                sample["loss_mask"] = torch.from_numpy(average_mask(masks[i], (height, width)))
            if self.time_ids:
                sample["time_ids"] = torch.tensor([*job.view.original, *job.view.crop, *job.view.size])
            if self.store.with_text:
                sample |= self.texts.get(job.caption, {})
            if bad := self._not_finite(sample):
                self.skip(job.name, f"its encoded {bad} holds NaN or Inf in {self.settings['dtype']}")
                continue
            self.sizes["image"] = self.store.save(job, sample)
            self.encoded += 1
            self._advance()

    def _encode_texts(self, batch: Batch, good: Sequence[Job]) -> None:
        """Encodes the prompts of a batch: those of the images that are used, or that other batches have, too."""
        if not self.with_embeds:
            return
        mine, here = {job.caption for job in good}, Counter(job.caption for job in batch.jobs)
        prompts = [p for p in batch.prompts if p in mine or (not self.store.with_text and self.uses[p] > here[p])]
        new = [prompt for prompt in prompts if prompt not in self.texts]
        texts = self.encode_prompts(new) if new else {}
        known = {prompt: self.texts[prompt] for prompt in prompts if prompt in self.texts}
        self.texts = known | dict(zip(new, text_rows(texts) if new else [], strict=True))
        if self.store.with_text:
            return
        for prompt, text in self.texts.items():
            if bad := self._not_finite(text):
                if self.skip.strict:
                    self.skip(f"The prompt {prompt!r}", f"its encoded {bad} holds NaN or Inf")
                self.store.save_prompt(prompt, None)
            else:
                self.sizes["prompt"] = self.store.save_prompt(prompt, text)
        self.texts = {}

    def _open(self, job: Job) -> "Image.Image":
        """The image in RGB; the views of one image mostly follow each other, so the last one is kept."""
        name, image = self.opened
        if image is None or name != job.record.name:
            with job.record.open() as file:
                image = to_rgb(file)
            self.opened = job.record.name, image
        return image

    def _not_finite(self, sample: _Tensors) -> str:
        return " and ".join(n for n, value in sample.items() if not torch.isfinite(value.to(self.dtype)).all())

    def _advance(self) -> None:
        if self.own is None:  # nothing is planned yet
            return
        if self.bar is None:  # the first sample tells the size of all
            size = sum(self.sizes.get(name, 0) * count for name, count in self.left.items())
            free = shutil.disk_usage(self.output).free
            need, room = readable_bytes(size), readable_bytes(free)
            buckets = len({job.bucket for job in self.jobs})
            text = "%d images in %d buckets, %d to encode: about %s (%s free)."
            logger.info(text, len(self.jobs), buckets, self.left["image"], need, room)
            if size - self.sizes["image"] > free:
                text = "The cache needs %s, but %s has %s free. Make room; finished samples are kept."
                logger.warning(text, need, self.output, room)
            self.bar = tqdm(total=self.own, unit="image", desc="Encoding", disable=self.rank > 0)
        self.bar.update()

    def _note(self, rank: int) -> Path:
        return self.output / STAGING / f"rank{rank}.json"

    def _write_note(self) -> None:
        text = json.dumps([self.encoded, self.skip.found])
        write_whole(self._note(self.rank), lambda file: file.write(text.encode()))

    def _read_notes(self) -> None:
        """Adds what the other ranks did."""
        for rank in range(1, self.world_size):
            encoded, skipped = json.loads(self._note(rank).read_text())
            self.encoded += encoded
            self.skip.found |= skipped


def _mask(job: Job) -> "Image.Image | None":
    if job.record.open_mask is None:
        return None
    with job.record.open_mask() as file:
        return to_rgb(file)
