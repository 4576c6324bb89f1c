"""One wrong bit anywhere in the newest checkpoint: it is named, and the one before is used."""

import logging
import random

import pytest
import ranks
from caches import encoder_settings, write_cache

from sciflow_hf.training.checkpoints import MANIFEST, checkpoint_fault, resolve_checkpoint, write_manifest

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, tiny_klein):
    """A run with an average, an evaluation and two checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    cache = write_cache(folder / "cache", settings=encoder_settings(tiny_klein))
    options = dict(max_steps=2, save_steps=1, ema_decay=0.9, held_out=2, eval_strategy="steps", eval_steps=1)
    ranks.make(pipeline=tiny_klein, cache=cache, output_dir=folder, eval_levels=1, **options).train()
    return folder


def with_flipped(path, bit, check):
    """What `check` says while one bit of a file is another."""
    data = path.read_bytes()
    wrong = bytearray(data)
    wrong[bit // 8] ^= 1 << bit % 8
    path.write_bytes(wrong)
    try:
        return check()
    finally:
        path.write_bytes(data)


def test_a_bit_in_each_file(run_dir, caplog):
    newest, before = run_dir / "checkpoint-2", run_dir / "checkpoint-1"
    files = sorted(p for p in newest.rglob("*") if p.is_file())
    names = {p.name for p in files}
    assert {"ema.safetensors", "eval_base.json", "run.json", "optimizer.pt", "trainer_state.json", MANIFEST} <= names
    draw = random.Random(0)
    for file in files:
        bits = 8 * file.stat().st_size
        for bit in (0, bits - 1, draw.randrange(bits)):
            caplog.clear()
            with caplog.at_level(logging.WARNING, logger="sciflow_hf"):
                used = with_flipped(file, bit, lambda: resolve_checkpoint("latest", run_dir))
            assert used == before, f"bit {bit} of {file.name}"
            (said,) = [r.getMessage() for r in caplog.records]
            assert said.startswith(f"{newest} is passed over: ")
            # The manifest itself may then ask for a file that is not there.
            assert file.name in said or (file.name == MANIFEST and ("missing" in said or "damaged" in said))
    assert resolve_checkpoint("latest", run_dir) == newest


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.acceptance), 7])
def test_bits_of_the_manifest(tmp_path, every):
    """It has no checksum of its own, and needs none: what it says no longer fits the files, or is no JSON.

    Every bit, or a bit or two of every byte, by turns.
    """
    for number, name in enumerate(("optimizer.pt", "run.json", "weights.safetensors")):
        (tmp_path / name).write_bytes(bytes(range(40 + number)))
    write_manifest(tmp_path)
    manifest = tmp_path / MANIFEST
    for bit in range(0, 8 * manifest.stat().st_size, every):
        around = manifest.read_bytes()[max(0, bit // 8 - 20) :][:40]
        assert with_flipped(manifest, bit, lambda: checkpoint_fault(tmp_path)), around
    assert checkpoint_fault(tmp_path) is None
