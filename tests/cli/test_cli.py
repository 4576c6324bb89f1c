"""`sciflow-hf`: what the commands print and write, their exit statuses, and one-line errors."""

import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from caches import TINY_BUCKETS, encoder_settings, write_cache
from PIL import Image
from recipe_runs import environment

import sciflow_hf as sf
from sciflow_hf.cli import main
from sciflow_hf.cli.main import COMMANDS
from sciflow_hf.data.inspect.chart import MAX_BARS, draw_bucket_chart, write_bucket_chart
from sciflow_hf.data.load import load_cache
from sciflow_hf.errors import SciflowError

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    def run(*argv: object) -> tuple[int, str, str]:
        status = main([str(word) for word in argv])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, figures: Path) -> Path:
    """Eight of the drawn figures."""
    folder = tmp_path_factory.mktemp("images")
    rows = [json.loads(line) for line in (figures / "metadata.jsonl").read_text().splitlines()][:8]
    for row in rows:
        target = folder / row["file_name"]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(figures / row["file_name"], target)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def build_command(klein: Path, images: Path, output: Path, *more: object) -> list[object]:
    command = ["cache", "build", "--family", "flux2_klein", "--pretrained_model_name_or_path", klein]
    command += ["--input_dir", images, "--output_dir", output, "--resolution", "32", "--max_sequence_length", "12"]
    return [*command, "--device", "cpu", *more]


def field(text: str, name: str) -> str:
    found = re.search(rf"^{re.escape(name)}  +(.*)$", text, re.M)
    assert found, f"no {name!r} in\n{text}"
    return found[1]


# -- build, info -----------------------------------------------------------------------------------------------


@pytest.mark.promise("A13")
def test_build_and_info(
    cli: Cli, images: Path, tmp_path: Path, tiny_klein: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What is stored is what the family's encoders make; info says what is there."""
    source = shutil.copytree(images, tmp_path / "images")
    broken = sorted(source.rglob("*.png"))[0]
    broken.write_bytes(b"")
    output = tmp_path / "cache"
    caplog.set_level(logging.INFO)
    status, out, _ = cli(*build_command(tiny_klein, source, output))
    assert status == 0 and "7 samples in" in out
    assert re.search(r"skipped +1\n +unreadable image .* 1: .*" + re.escape(broken.name), caplog.text)
    cache = load_cache(output)
    family = sf.Flux2Klein(pretrained_model_name_or_path=str(tiny_klein), max_sequence_length=12)
    cache.check_family(family.encoder_settings())
    encoders = family.load_encoders(device="cpu", dtype=torch.float32)
    expected = family.encode_prompts([cache.captions[4]], encoders)["prompt_embeds"][0]
    assert torch.equal(cache[4]["prompt_embeds"], expected.to(torch.bfloat16))

    status, out, _ = cli("cache", "info", "--dataset_dir", output)
    assert status == 0 and field(out, "samples") == "7" and field(out, "layout") == "shards"
    assert field(out, "text lengths") == "12 tokens" and field(out, "posterior") == "mode"
    assert field(out, "distinct prompts") == str(len(set(cache.captions)))
    assert field(out, "empty prompt") == str(output / "empty_prompt.npz") and field(out, str(output)) == "7"
    assert re.search(r"  max_sequence_length +12\n", out) and re.search(r"  family +flux2_klein\n", out)
    height, width = cache.buckets[0]
    assert field(out, f"{height} x {width}").split()[1] == str(cache.buckets.count((height, width)))
    sizes = 2 * sum(int(np.prod(shape)) for shape in cache.index["latent_shape"])
    assert field(out, "latents").split() == ["BF16", "none", "7", f"{sizes / 1024:.1f}", "KiB"]
    assert f"bucket chart: {output / 'bucket_chart.png'}" in out
    assert Image.open(output / "bucket_chart.png").width > 300


def test_build_options(cli: Cli, images: Path, tmp_path: Path, tiny_klein: Path) -> None:
    options = ["--payload", "inline", "--embeds", "fp8", "--codec", "zstd", "--crops", 1, "--flip"]
    status, out, _ = cli(*build_command(tiny_klein, images, tmp_path / "cache", *options, "--posterior", "sample"))
    assert status == 0 and "32 samples in" in out
    _, out, _ = cli("cache", "info", "--dataset_dir", tmp_path / "cache", "--chart", tmp_path / "a" / "b.png")
    assert field(out, "layout") == "inline" and field(out, "posterior").startswith("sample")
    assert field(out, "prompt_embeds").split()[:3] == ["F8_E4M3", "zstd", "32"]
    assert (tmp_path / "a" / "b.png").is_file() and not (tmp_path / "cache" / "bucket_chart.png").exists()


def test_info_of_several_caches(cli: Cli, tmp_path: Path) -> None:
    settings = encoder_settings("/models/m")
    one = write_cache(tmp_path / "one", settings=settings, buckets={(32, 48): 3}, dtype="float16")
    two = write_cache(tmp_path / "two", settings=settings, text_lengths=[5, 9], seed=1, year="2016")
    status, out, _ = cli("cache", "info", "--dataset_dir", one, two)
    assert status == 0 and field(out, "samples") == "27" and field(out, str(one)) == "3"
    assert field(out, "text lengths") == "5 to 12 tokens (3 different)"
    assert field(out, "latents").startswith("F16 and F32") and "about" in field(out, "prompt_embeds")
    assert field(out, "empty prompt").startswith("not stored") and field(out, "loss masks") == "none"
    assert "bucket chart: not written; name a file by --chart" in out
    status, out, _ = cli("cache", "info", "--dataset_dir", write_cache(tmp_path / "old"), "--chart", tmp_path / "c.png")
    assert status == 0 and "encoder settings: unknown" in out


def test_bars_are_as_long_as_buckets_are_large() -> None:
    buckets = {(64, 32): 10, (32, 64): 40, (48, 48): 20}
    pixels = np.asarray(draw_bucket_chart(buckets).convert("RGB")).astype(int)
    blue = (pixels[..., 2] - pixels[..., 0] > 100).sum(axis=1)
    lengths = [length for length, before in zip(blue[1:], blue, strict=False) if length and not before]
    assert len(lengths) == 3, "three bars, from tall to wide"
    np.testing.assert_allclose(np.array(lengths) / lengths[2], [0.25, 0.5, 1], atol=0.01)
    many = {(8 * i, 8): i for i in range(1, 400)}
    assert draw_bucket_chart(many).height < 60 + 30 * (MAX_BARS + 4)
    with pytest.raises(SciflowError, match="empty"):
        write_bucket_chart({}, "x.png")


# -- convert, verify -------------------------------------------------------------------------------------------


@pytest.fixture
def shards(cli: Cli, tmp_path: Path, tiny_klein: Path) -> Path:
    write_cache(tmp_path / "npz", settings=encoder_settings(tiny_klein))
    status, _, _ = cli("cache", "convert", "--input_dir", tmp_path / "npz", "--output_dir", tmp_path / "shards")
    assert status == 0
    return tmp_path / "shards"


def test_convert_says_what_it_cost(cli: Cli, tmp_path: Path) -> None:
    source = write_cache(tmp_path / "npz", settings=encoder_settings("/models/m"))
    command = ["cache", "convert", "--input_dir", source, "--output_dir", tmp_path / "new", "--embeds", "fp8"]
    status, out, _ = cli(*command, "--payload", "inline", "--shard_size_mb", 1)
    assert status == 0 and field(out, "samples").startswith("24 in")
    error = float(re.match(r"([\d.]+)%", field(out, "fp8 error"))[1])
    one, two = load_cache(source, dtype=torch.float32), load_cache(tmp_path / "new", dtype=torch.float32)
    pairs = [(one[i]["prompt_embeds"], two[i]["prompt_embeds"]) for i in range(24)]
    expected = np.mean([float(((a - b).norm(dim=1) / a.norm(dim=1)).mean()) for a, b in pairs])
    assert error == pytest.approx(100 * expected, rel=0.1)
    assert re.fullmatch(r"[\d.]+ KiB, \d\.\d\dx smaller", field(out, "after"))
    status, _, err = cli(*command, "--payload", "shards")
    assert status == 2 and err.splitlines()[-1].startswith("error: ")
    assert cli(*command[:-2], "--payload", "inline", "--shard_size_mb", 0)[0] == 2


def test_verify_finds_and_repairs_and_training_goes_on(
    cli: Cli, shards: Path, tmp_path: Path, tiny_klein: Path
) -> None:
    verify = ["cache", "verify", "--dataset_dir", shards]
    status, out, _ = cli(*verify, "--repair")
    assert status == 0 and "intact" in out and "No row is bad" in out and not (tmp_path / "shards-repaired").exists()
    member = load_cache(shards).members(5)["latents"]
    with open(member.file, "r+b") as handle:
        handle.seek(member.offset + 7)
        handle.write(b"\xff\xff\xff")
    status, out, _ = cli(*verify, "--json", tmp_path / "report.json", "--threads", 1)
    assert status == 1 and "1 problem in 1 of 24 rows" in out and member.file in out and "add --repair" in out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["bad_rows"] == [5] and report["bad_files"] == [member.file] and report["clean"] is False
    assert report["problems"][0]["row"] == 5 and "checksum" in report["problems"][0]["text"]

    status, out, _ = cli(*verify, "--repair")
    flags = shlex.split(next(line for line in out.splitlines() if line.startswith("  --dataset_dir")))
    assert status == 1 and flags[::2] == ["--dataset_dir", "--payload_dir"]
    assert cli("cache", "verify", *flags)[0] == 0
    assert field(cli("cache", "info", *flags)[1], "samples") == "23"
    data = load_cache(flags[1], payload_dir=flags[3], dtype=torch.float32)
    family = sf.Flux2Klein(pretrained_model_name_or_path=str(tiny_klein), max_sequence_length=12)
    model = family.load_model(dtype=torch.float32)
    sf.add_adapter(model, sf.AdapterArguments(rank=2), family=family)
    args = sf.DiffusionTrainingArguments(
        output_dir=str(tmp_path / "out"), use_cpu=True, max_steps=2, save_strategy="no", disable_tqdm=True
    )
    result = sf.DiffusionTrainer(model, args, family=family, train_dataset=data).train()
    assert result.global_step == 2 and np.isfinite(result.training_loss)


@pytest.mark.parametrize("payload", ["npz", "shards", "inline"])
@pytest.mark.parametrize("action", ["build", "convert"])
def test_what_verify_names_can_be_made_anew(
    cli: Cli, images: Path, tmp_path: Path, tiny_klein: Path, action: str, payload: str
) -> None:
    """Deleting the named files and repeating the command heals a cache."""
    cache = tmp_path / "cache"
    command = build_command(tiny_klein, images, cache, "--payload", payload)
    if action == "convert":
        source = write_cache(tmp_path / "npz", settings=encoder_settings(tiny_klein))
        command = ["cache", "convert", "--input_dir", source, "--output_dir", cache, "--payload", payload]
    assert cli(*command)[0] == 0
    rows, member = len(load_cache(cache)), load_cache(cache).members(3)["latents"]
    with open(member.file, "r+b") as handle:
        handle.seek(member.offset + 3)
        handle.write(b"\x11\x22")
    status, out, _ = cli("cache", "verify", "--dataset_dir", cache)
    named = [Path(line.strip()) for line in out.partition("delete these files")[2].splitlines() if line[:2] == "  "]
    assert status == 1 and named == [Path(member.file)]
    named[0].unlink()
    assert cli(*command)[0] == 0
    assert cli("cache", "verify", "--dataset_dir", cache)[0] == 0 and len(load_cache(cache)) == rows


def test_many_problems_are_cut_short(cli: Cli, tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "npz")
    files = sorted(cache.rglob("*.npz"))
    for file in files[:-1]:
        file.write_bytes(b"not a zip")
    status, out, _ = cli("cache", "verify", "--dataset_dir", cache)
    assert status == 1 and "and 3 more" in out and len(files) == sum(TINY_BUCKETS.values())
    assert "23 problems in 23 of 24 rows" in out
    files[-1].write_bytes(b"")
    status, _, err = cli("cache", "verify", "--dataset_dir", cache, "--repair")
    assert status == 2 and "leave nothing" in err


def test_samples_encoded_afresh(cli: Cli, images: Path, tmp_path: Path, tiny_klein: Path) -> None:
    """The stored tensors are the encoders'; one that is not is found, though its checksum is right."""
    cache = tmp_path / "cache"
    assert cli(*build_command(tiny_klein, images, cache, "--payload", "npz", "--crops", 1))[0] == 0
    verify = ["cache", "verify", "--dataset_dir", cache, "--sample", 5, "--input_dir", images, "--device", "cpu"]
    status, out, _ = cli(*verify)
    for name in ("latents", "prompt_embeds"):
        stored, samples, _, relative, allowed, verdict = field(out, name).split()[:6]
        assert (stored, samples, allowed, verdict) == ("BF16", "5", "0.02", "ok") and 5e-4 < float(relative) < 5e-3
    assert status == 0

    opened = load_cache(cache)
    for i in range(len(opened)):
        arrays = dict(np.load(opened.payload_path(i)))
        values = torch.from_numpy(arrays["latents"].view(np.int16)).view(torch.bfloat16)
        arrays["latents"] = (values * 1.05).view(torch.int16).numpy().view(np.uint16)
        np.savez(opened.payload_path(i), **arrays)
    status, out, _ = cli(*verify, "--json", tmp_path / "r.json")
    assert status == 1 and field(out, "latents").split()[5] == "DIFFERS" and "intact" in out
    assert float(field(out, "latents").split()[3]) == pytest.approx(0.05, abs=0.005)
    found = {d["name"]: d["ok"] for d in json.loads((tmp_path / "r.json").read_text())["afresh"]}
    assert found["latents"] is False and found["prompt_embeds"] is True

    for more, message in (
        (["--family", "nonsense"], "`family`"),
        (["--pretrained_model_name_or_path", "/other/model"], "other encoders"),
        (["--sample", "-1"], "`sample`"),
    ):
        status, _, err = cli(*verify, *more)
        assert status == 2 and message in err.splitlines()[-1]
    (tmp_path / "other").mkdir()
    shutil.copy(next(images.rglob("*.png")), tmp_path / "other" / "x.png")
    (tmp_path / "other" / "x.txt").write_text("x")
    assert "none of the images" in cli(*verify, "--input_dir", tmp_path / "other")[2]
    assert "needs `--input_dir`" in cli("cache", "verify", "--dataset_dir", cache, "--sample", 1)[2]


# -- all commands ----------------------------------------------------------------------------------------------


def test_errors_are_one_line(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for action in ("info", "verify"):
        status, _, err = cli("cache", action, "--dataset_dir", tmp_path / "absent")
        assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and "absent" in err
    for argv in (["cache", "info", "--dataset", "x"], ["cache", "build"], ["cache", "verify"], ["nonsense"], []):
        with pytest.raises(SystemExit) as caught:
            cli(*argv)
        said = capsys.readouterr().err
        assert (
            caught.value.code == 2 and said.startswith("sciflow-hf") and ": error: " in said and said.count("\n") == 1
        )
    status, _, err = cli("cache", "verify", "--dataset_dir", "a", "b", "--repair")
    assert status == 2 and "`repair` takes one cache" in err

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sciflow_hf.data.load.load_cache", interrupt)
    assert cli("cache", "info", "--dataset_dir", tmp_path)[0] == 130


def test_options_that_a_family_lacks(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import dataclass

    @dataclass
    class Bare:
        pretrained_model_name_or_path: str
        revision: str | None = None

    monkeypatch.setattr("sciflow_hf.families.load_family", lambda name: Bare)
    command = ["cache", "build", "--family", "bare", "--pretrained_model_name_or_path", "x", "--input_dir", tmp_path]
    status, _, err = cli(*command, "--output_dir", tmp_path / "c", "--posterior", "sample")
    assert status == 2 and "`posterior` is no option of the family 'bare'" in err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_prints_its_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    printed = capsys.readouterr().out
    assert caught.value.code == 0 and printed.startswith(f"usage: sciflow-hf {command} ")


def test_env_names_versions(cli: Cli) -> None:
    from importlib.metadata import version

    status, out, _ = cli("env")
    assert status == 0
    for name in ("torch", "transformers", "diffusers", "accelerate", "peft", "datasets", "huggingface_hub"):
        assert field(out, name) == version(name)


@pytest.mark.parametrize("flag", ["", "--verbose"])
def test_other_packages_speak_when_asked(monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    logger = logging.getLogger("torchao")
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    monkeypatch.setattr(sys, "argv", ["recipe", *filter(None, [flag])])
    with pytest.raises(SystemExit):
        sf.run(lambda: None)
    assert logger.isEnabledFor(logging.WARNING) == bool(flag)
    logger.manager._clear_cache()  # type: ignore[attr-defined]


def test_help_imports_no_model_library() -> None:
    code = (
        "import sys; from sciflow_hf.cli import main\n"
        "try: main(['cache', 'build', '--help'])\n"
        "except SystemExit: print(sorted({'torch', 'transformers', 'diffusers', 'datasets', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.acceptance
def test_two_processes_build_one_cache(images: Path, tmp_path: Path, tiny_klein: Path, cli: Cli) -> None:
    """Under torchrun each process encodes a share; one of them reports. The cache is that of one process."""
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    words += ["-m", "sciflow_hf.cli", *map(str, build_command(tiny_klein, images, tmp_path / "two"))]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=300, cwd=os.sep)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("samples in") == 1 and "8 samples in" in done.stdout
    assert cli(*build_command(tiny_klein, images, tmp_path / "one"))[0] == 0
    one, two = load_cache(tmp_path / "one"), load_cache(tmp_path / "two")
    assert one.row_ids == two.row_ids and cli("cache", "verify", "--dataset_dir", tmp_path / "two")[0] == 0
    for i in range(len(one)):
        for name, value in one[i].items():
            assert torch.equal(value, two[i][name])
