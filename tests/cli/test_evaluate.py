"""`sciflow-hf evaluate`: paired numbers against numpy, kills, ranks, what is refused; mostly with stubs that draw."""

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from scipy import optimize, stats

import sciflow_hf as sf
from sciflow_hf.adapters.files import save_adapter
from sciflow_hf.cli import evaluate, evaluation_prompts, main
from sciflow_hf.metrics.judge.judge import Judge
from sciflow_hf.metrics.judge.scoring import Answer, Error
from sciflow_hf.metrics.rewards import ocr

PROMPTS = [{"prompt": f"figure {i}", "kind": "bar chart", "width": 32 + 16 * (i % 2)} for i in range(12)]
FLAGS = ["--height", "32", "--num_inference_steps", "1", "--max_sequence_length", "12", "--device", "cpu"]
Draw = Callable[..., list[str]]


def light(prompts: Sequence[str], images: Sequence[Image.Image], **columns: Any) -> list[float]:
    """The mean of the pixels; writes down what it was asked about."""
    with open(os.environ["ASKED"], "a") as file:
        file.writelines(f"{path}\n" for path in columns.get("image", prompts))
    return [float(np.asarray(image).mean()) for image in images]


def features(images: torch.Tensor) -> torch.Tensor:
    return images.mean((2, 3))


def make_features() -> Callable[[torch.Tensor], torch.Tensor]:
    return features


class Network(torch.nn.Module):
    """Stands for the network of a model and for its pipeline."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


@pytest.fixture(autouse=True)
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """The images that `light` and the judge were asked about, by any process."""
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    return lambda: (tmp_path / "asked").read_text().splitlines() if (tmp_path / "asked").is_file() else []


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[dict[str, Any]]]:
    """Stubs of the models: an image is noise of its seed around a tone that the prompt and the model decide."""

    def load(family: Any, args: Any, kind: Any, dtype: Any) -> Network:
        return Network("base" if kind else Path(args.model_path).name)

    def draw(
        family: Any, pipeline: Network, prompt: str, *, generators: list[torch.Generator], height: int, width: int,
        source_images: Sequence[Image.Image] = (), **options: Any,
    ) -> tuple[torch.Tensor, list[Image.Image]]:  # fmt: skip
        seed = generators[0].initial_seed()
        with open(tmp_path / "drawn", "a") as file:
            call = {"model": pipeline.name, "prompt": prompt, "seed": seed, "size": [height, width], **options}
            file.write(json.dumps(call) + "\n")
        if source_images:
            return torch.zeros(1), [source_images[0]]
        noise = np.random.default_rng(seed).normal(0, 20, (height, width, 3))
        tone = 100 + len(pipeline.name) * (1 + int(prompt.split()[-1]) % 5)
        return torch.zeros(1), [Image.fromarray((tone + noise).clip(0, 255).astype(np.uint8))]

    monkeypatch.setattr(evaluation_prompts, "load_network", load)
    monkeypatch.setattr(evaluation_prompts, "encoded_each", lambda pairs, *others: [prompt for prompt, _ in pairs])
    monkeypatch.setattr(sf.Flux2Klein, "load_pipeline", lambda family, network, **options: network)
    monkeypatch.setattr(sf.Flux2Klein, "draw", draw)
    file = tmp_path / "drawn"
    return lambda: [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def write_prompts(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def run(tiny_klein: Path, tmp_path: Path) -> Callable[..., int]:
    """The command with the tiny klein, the adapter "night" and `PROMPTS`, unless other prompts are given."""
    write_prompts(tmp_path / "prompts.jsonl", PROMPTS)
    (tmp_path / "night").mkdir()

    def command(output: str, *flags: object, metrics: Sequence[str] = (f"{__name__}.light",)) -> int:
        given = {"--prompts", "--benchmark", "--dataset"} & set(map(str, flags))
        words = ["evaluate", "--model_path", tiny_klein, "--output_dir", tmp_path / output, *FLAGS]
        words += [] if given else ["--prompts", tmp_path / "prompts.jsonl"]
        words += [] if "--adapters" in flags else ["--adapters", tmp_path / "night"]
        return main([*map(str, [*words, "--metrics", *metrics, *flags])])

    return command


def table(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / "scores.parquet").to_pylist()


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def hall_interval(gains: np.ndarray) -> tuple[float, float]:
    """95 % of the mean of independent values: Student's t, its skewness taken out by Hall's transformation."""
    error, number = gains.std(ddof=1) / np.sqrt(len(gains)), len(gains)
    pulls = (gains - gains.mean()) / (number - 1)
    skewness = (number - 1) / number * (pulls**3).sum() / error**3

    def unskewed(sign: int) -> float:
        wanted = sign * stats.t.ppf(0.975, number - 1)
        found = lambda t: t + skewness * t**2 / 3 + skewness**2 * t**3 / 27 + skewness / 6 - wanted  # noqa: E731
        return float(optimize.brentq(found, -50, 50))

    return gains.mean() - error * unskewed(1), gains.mean() - error * unskewed(-1)


def test_means_and_paired_differences(run, drawn, tmp_path, capsys):
    assert run("a") == 0
    rows = table(tmp_path / "a")
    assert [(row["row"], row["model"]) for row in rows] == [(i, m) for i in range(12) for m in ("base", "night")]
    for row in rows:
        with Image.open(tmp_path / "a" / row["image"]) as image:
            assert image.size == (row["width"], row["height"]) and image.info["model"] == row["model"]
            assert row["light"] == np.asarray(image).mean()
    assert rows[3]["kind"] == "bar chart" and not rows[3]["incomplete"] and rows[0]["reference"] is None
    base, night = (np.array([row["light"] for row in rows if row["model"] == m]) for m in ("base", "night"))
    found = summary(tmp_path / "a")
    assert found["metrics"]["light"]["night"]["mean"] == pytest.approx(night.mean(), rel=1e-12)
    paired = found["paired"]["light"]["night"]
    assert paired["difference"] == pytest.approx((night - base).mean(), rel=1e-12) and paired["number"] == 12
    # mean_interval's quantile of Student's t is an expansion
    np.testing.assert_allclose([paired["low"], paired["high"]], hall_interval(night - base), rtol=1e-3)
    assert paired["low"] > 0
    out = capsys.readouterr().out
    assert "12 prompts, 2 models, 24 images" in out and "better" in out and (tmp_path / "a" / "scores.png").is_file()
    assert "figure 11" in (tmp_path / "a" / "report.html").read_text(encoding="utf-8")


def test_models_draw_from_the_same_seeds_and_the_same_command_gives_the_same_numbers(run, drawn, tmp_path):
    for folder in ("a", "b"):
        run(folder, "--num_images_per_prompt", 2)
    calls = drawn()
    assert len(calls) == 96 and calls[:48] == calls[48:]
    assert [c["seed"] for c in calls[:24]] == [c["seed"] for c in calls[24:48]]
    assert len({c["seed"] for c in calls}) == 24
    assert table(tmp_path / "a") == table(tmp_path / "b") and summary(tmp_path / "a") == summary(tmp_path / "b")
    rows = table(tmp_path / "a")
    base, night = (np.array([row["light"] for row in rows if row["model"] == m]) for m in ("base", "night"))
    paired = summary(tmp_path / "a")["paired"]["light"]["night"]
    by_prompt = (night - base).reshape(12, 2).mean(1)  # which the interval is over
    np.testing.assert_allclose([paired["low"], paired["high"]], hall_interval(by_prompt), rtol=1e-3)
    assert paired["number"] == 24
    run("c", "--num_images_per_prompt", 2, "--seed", 1)
    assert not {c["seed"] for c in calls} & {c["seed"] for c in drawn()[96:]}


def test_an_image_depends_on_no_other_prompt(run, drawn, tmp_path):
    run("a")
    run("b", "--prompts", write_prompts(tmp_path / "few.jsonl", PROMPTS[4:6]))
    one, other = (table(tmp_path / name) for name in "ba")
    assert [row["light"] for row in one] == [row["light"] for row in other[8:12]]


@pytest.mark.parametrize("die_at", [3, 9, 28, 29, 31])
def test_killed_and_continued(run, drawn, asked, tmp_path, die_at):
    """kill -9 as a file is renamed; only the image that was being written is drawn twice, and a batch of scores."""
    six = ["--prompts", write_prompts(tmp_path / "six.jsonl", PROMPTS[:6]), "--num_images_per_prompt", 2]
    assert run("whole", *six) == 0
    wanted, once = table(tmp_path / "whole"), summary(tmp_path / "whole")
    for name in ("asked", "drawn"):
        (tmp_path / name).unlink()
    pid, calls = os.fork(), 0
    if pid == 0:
        replace = os.replace

        def replace_or_die(source: Any, target: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        os.replace = replace_or_die
        run("a", *six)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    kept = len(list((tmp_path / "a").glob("images/*/*.png")))
    assert run("a", *six) == 0
    being_written = 4 <= die_at <= 27
    assert len(drawn()) == 24 + being_written and (kept == die_at - 4 if being_written else kept in (0, 24))
    assert len(asked()) - len(set(asked())) == {28: 16, 29: 8}.get(die_at, 0)  # the batch that was being written
    assert table(tmp_path / "a") == wanted and summary(tmp_path / "a") == once
    assert run("a", *six) == 0 and len(drawn()) == 24 + being_written


def test_two_ranks_are_one(run, drawn, asked, tmp_path, monkeypatch, capsys):
    run("one")
    for name in ("asked", "drawn"):
        (tmp_path / name).unlink()
    (tmp_path / "two").mkdir()
    for name in ("evaluation.json", "images/base/model.json", "images/night/model.json"):  # of rank 0, before
        (tmp_path / "two" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "two" / name).write_bytes((tmp_path / "one" / name).read_bytes())
    capsys.readouterr()
    for rank in (1, 0):
        ranks = {"rank": rank, "world_size": 2, "barrier": lambda: None}
        given = (torch.device("cpu"), ranks)
        monkeypatch.setattr(evaluate, "processes", lambda device, given=given: contextlib.nullcontext(given))
        assert run("two") == 0
        if rank:
            assert len(drawn()) == 12 and len(asked()) == 12 and not (tmp_path / "two" / "summary.json").exists()
            kept = tmp_path / "two" / ".scores.parquet.scores"
            assert not (kept / "all.json").exists()  # which would replace files that the other one writes
    assert len(drawn()) == 24 and len(asked()) == 24 == len(set(asked()))
    assert table(tmp_path / "two") == table(tmp_path / "one") and summary(tmp_path / "two") == summary(tmp_path / "one")
    assert capsys.readouterr().out.count("24 images in") == 1


def test_further_metrics_and_adapters_use_what_is_there(run, drawn, asked, tmp_path):
    run("a")
    (tmp_path / "day").mkdir()
    metrics = ["blank", f"{__name__}.light"]
    assert run("a", "--adapters", tmp_path / "night", f"noon={tmp_path / 'day'}", metrics=metrics) == 0
    assert len(drawn()) == 36 and len(asked()) == 36
    found = summary(tmp_path / "a")
    assert found["models"] == ["base", "night", "noon"] and found["blank_share"] == {m: 0 for m in found["models"]}


def test_rows_of_a_benchmark(run, drawn, asked, tmp_path, monkeypatch):
    """Seeds, steps and guidance are its own; the judge is asked once a question, and not of a row that lacks all."""
    questions = []

    def ask(question: Any) -> Answer:
        questions.append(question)
        return Answer([Error("missing box", "critical")] if len(question.pictures) == 2 else [])

    monkeypatch.setattr(Judge, "_model", lambda judge: ask)
    flags = ["--judge_cache_dir", tmp_path / "answers", "--judge_model", "m", "--judge_url", "http://localhost:1/v1"]
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    cells = {"bytes": (tmp_path / "red.png").read_bytes(), "path": "red.png"}
    rubric = {"rubric_components": '[{"name": "a"}, {"name": "b"}]', "rubric_arrows": "[]", "rubric_text": "[]"}
    rows = [{"prompt": f"figure {i}", "width": 32, "height": 32, "gt_image": cells, **rubric} for i in range(2)]
    (tmp_path / "bench").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "bench" / "simple.parquet")
    words = ["--benchmark", tmp_path / "bench", *flags]
    monkeypatch.setattr(sys.modules[__name__], "FLAGS", FLAGS[4:])  # sizes and steps of the rows
    for _ in range(2):
        assert run("a", *words, metrics=["judge"]) == 0
    calls = drawn()
    assert [(c["seed"], c["num_inference_steps"], c["guidance_scale"]) for c in calls] == [(42, 50, 4), (43, 50, 4)] * 2
    found = summary(tmp_path / "a")
    assert found["metrics"]["judge"]["base"]["mean"] == 0.5 and list(found["metrics"]) == ["judge", "judge_component"]
    assert len(questions) == 4 and (tmp_path / "a" / "references" / "00001.png").is_file()
    one = write_prompts(tmp_path / "lacks.jsonl", [PROMPTS[0] | {"reference": "red.png"}, PROMPTS[1]])
    monkeypatch.setattr(sys.modules[__name__], "FLAGS", FLAGS)
    assert run("b", "--prompts", one, "--height", 32, *flags, metrics=["judge"]) == 0
    assert [row["judge"] for row in table(tmp_path / "b")] == [0.5, 0.5, None, None]


def test_edits_sets_and_copies(run, drawn, tmp_path, capsys):
    """The stub gives the source back: nothing changed where it should have, and all was kept."""
    source = np.full((64, 96, 3), 200, np.uint8)
    source[8:40, 8:60] = (10, 90, 30)
    target = source.copy()
    target[10:20, 10:20] = (250, 0, 0)
    for name, pixels in (("source", source), ("target", target)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    (tmp_path / "training").mkdir()
    Image.fromarray(source).resize((48, 32)).save(tmp_path / "training" / "known.png")
    Image.fromarray(255 - source.transpose(1, 0, 2)).save(tmp_path / "training" / "other.png")
    names = [{"source_images": "source.png"}, {"source_image": ["source.png"]}]
    edits = [{"prompt": f"figure {i}", "target_image": "target.png", **names[i]} for i in range(2)]
    rows = write_prompts(tmp_path / "edits.jsonl", edits)
    words = ["--prompts", rows, "--height", 64, "--width", 96, "--training_images", tmp_path / "training"]
    words += ["--metric_network", f"{__name__}.make_features"]
    assert run("a", *words, metrics=["edits", "fid", "kid"]) == 0
    [row, *_] = table(tmp_path / "a")
    changed = (np.abs(source.astype(float) - target) >= 24).any(-1)
    mse = ((source.astype(float) - target) ** 2).mean()
    assert row["psnr"] == pytest.approx(10 * np.log10(255**2 / mse), rel=1e-12)
    inside = ((source.astype(float) - target)[changed] ** 2).mean()
    assert row["changed_psnr"] == pytest.approx(10 * np.log10(255**2 / inside), rel=1e-12) and changed.sum() == 100
    assert row["kept_psnr"] == 100 and 0 < row["ssim"] < 1
    found = summary(tmp_path / "a")
    means = [(2 * p.astype(np.float64) / 255 - 1).mean((0, 1)) for p in (source, target)]
    assert found["metrics"]["fid"]["base"]["mean"] == pytest.approx(((means[0] - means[1]) ** 2).sum(), rel=1e-5)
    assert "fid" in found["lower_is_better"] and "kid" in found["metrics"] and "fid" not in row
    assert {copy["training_image"] for copy in found["copies"]["base"]} == {"known.png"}
    assert "2 near copies of training figures: images/base/00000.png is like known.png" in capsys.readouterr().out


def test_the_card(run, drawn, tmp_path, capsys):
    card = tmp_path / "night" / "README.md"
    assert run("a", "--card") == 2 and "has no README.md" in capsys.readouterr().err and not drawn()
    card.write_text("# night\n\nA text of its own.\n\n## Training\n\nrows\n")
    for _ in range(2):
        assert run("a", "--card") == 0
    text = card.read_text()
    assert text.count("## Evaluation") == 1 and text.index("## Evaluation") < text.index("## Training")
    assert text.startswith("# night\n\nA text of its own.") and text.endswith("rows\n") and "12 prompts" in text
    assert str(tmp_path) not in text and "| light |" in text


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--seed", "1"], "holds another evaluation: its `seed` was 0, not 1"),
        (["--num_inference_steps", "2"], "its `num_inference_steps` was 1, not 2"),
        (["--prompts", "other.jsonl"], "another evaluation: its `prompts` was"),
        (["--adapters", "night=else"], "images of another model called 'night'"),
    ],
)
def test_a_folder_of_another_evaluation(run, drawn, tmp_path, capsys, monkeypatch, flags, said):
    write_prompts(tmp_path / "other.jsonl", PROMPTS[1:])
    (tmp_path / "else").mkdir()
    for name in ("night", "else"):
        (tmp_path / name / "pytorch_lora_weights.safetensors").write_bytes(name.encode())
    monkeypatch.chdir(tmp_path)
    run("a")
    number = len(drawn())
    assert run("a", *flags) == 2 and said in capsys.readouterr().err and len(drawn()) == number


@pytest.mark.parametrize(
    ("rows", "flags", "metrics", "said"),
    [
        ([], [], ["blank"], "`prompts` 'p.jsonl' holds no prompts."),
        ([{"words": "a"}], [], ["blank"], "has the columns 'words', but none called prompt, caption, text"),
        ([{"prompt": "a", "reference": "none.png"}], [], ["blank"], "row 0: `reference` 'none.png' cannot be read"),
        ([{"prompt": "a", "seed": -1}], [], ["blank"], "row 0: `seed` is -1"),
        ([{"prompt": "a", "width": 33}], [], ["blank"], "row 0: `height` and `width` 32x33: multiples of"),
        ([{"prompt": "figure 1"}], [], ["psnr"], "`metrics` psnr applies to none of 2 images: it needs a column `refe"),
        ([{"prompt": "figure 1"}], [], ["nothing"], "`reward` 'nothing' is unknown"),
        ([{"prompt": "figure 1"}], [], ["fid"], "fid needs a feature network: name one by `--metric_network`"),
        ([{"prompt": "figure 1"}], ["--metric_network", f"{__name__}.make_features"], ["fid"], "0 rows with a ref"),
        ([{"prompt": "figure 1"}], ["--benchmark", "x"], ["blank"], "give one of `--prompts`, `--dataset`"),
        ([{"prompt": "figure 1"}], ["--adapters", "a/base"], ["blank"], "the name 'base' is taken"),
        ([{"prompt": "figure 1"}], ["--training_images", "nowhere"], ["blank"], "`training_images` is 'nowhere'"),
        ([{"prompt": "figure 1"}], ["--training_images", "cache"], ["blank"], "A cache holds no images: give what"),
        ([{"prompt": "figure 1"}], ["--num_images_per_prompt", "0"], ["blank"], "`num_images_per_prompt` 0"),
        ([{"prompt": "figure 1"}], ["--judge_model", "m"], ["blank"], "is for the judge, whom no"),
        ([{"prompt": "figure 1"}], [], ["judge"], "The judge needs a model"),
    ],
)
def test_mistakes(run, drawn, tiny_cache, tmp_path, capsys, monkeypatch, rows, flags, metrics, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache").symlink_to(tiny_cache)
    for name in ("SCIFLOW_JUDGE_MODEL", "SCIFLOW_JUDGE_URL"):
        monkeypatch.delenv(name, raising=False)
    write_prompts(tmp_path / "p.jsonl", rows)
    assert run("a", "--prompts", "p.jsonl", *flags, metrics=metrics) == 2
    assert said in capsys.readouterr().err
    assert not drawn() or "applies" in said or "0 rows" in said


def test_a_missing_package_is_named_before_anything_is_drawn(run, drawn, capsys, monkeypatch):
    ocr._engine.cache_clear()
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    assert run("a", metrics=["ocr"]) == 2 and not drawn()
    assert "pip install 'sciflow_hf[ocr]'" in capsys.readouterr().err


def test_a_metric_that_fails_leaves_its_rows_incomplete(run, drawn, tmp_path, caplog, monkeypatch):
    def picky(prompts: Sequence[str], images: Sequence[Image.Image]) -> list[float]:
        if any(prompt.endswith(" 3") for prompt in prompts):
            raise RuntimeError("three")
        return [1.0] * len(prompts)

    monkeypatch.setattr(sys.modules[__name__], "picky", picky, raising=False)
    assert run("a", metrics=[f"{__name__}.picky"]) == 0
    assert [row["row"] for row in table(tmp_path / "a") if row["incomplete"]] == [3, 3]
    found = summary(tmp_path / "a")
    assert found["incomplete"] == {"base": 1, "night": 1} and found["metrics"]["picky"]["base"]["number"] == 11
    assert "`metrics` picky failed on 2 images, first on images/base/00003.png (RuntimeError: three)" in caplog.text


@pytest.fixture(scope="module")
def trained(tiny_klein: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    family = sf.Flux2Klein(str(tiny_klein), max_sequence_length=12)
    model = sf.add_adapter(family.load_model(dtype=torch.float32), sf.AdapterArguments(rank=2), family=family, seed=1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("trained") / "lora"
    save_adapter(model, folder, family=family)
    yield folder


def test_images_are_those_of_the_pipeline_with_and_without_the_adapter(run, trained, tiny_klein, tmp_path):
    rows = write_prompts(tmp_path / "one.jsonl", [{"prompt": "a chart", "seed": 7, "width": 48}])
    assert run("a", "--prompts", rows, "--adapters", trained, "--guidance_scale", 2) == 0
    family = sf.Flux2Klein(str(tiny_klein), max_sequence_length=12)
    network = family.load_model(dtype=torch.float32).eval()
    [text] = family.encode_validation_prompts(["a chart"], device="cpu", dtype=torch.float32)
    pictures = []
    for model in ("base", "lora"):
        if model == "lora":
            network.load_lora_adapter(trained, prefix="transformer", weight_name="pytorch_lora_weights.safetensors")
        image = family.generate(
            family.load_pipeline(network), text, height=32, width=48, num_inference_steps=1, guidance_scale=2,
            generator=torch.Generator().manual_seed(7),
        )[0]  # fmt: skip
        with Image.open(tmp_path / "a" / "images" / model / "00000.png") as found:
            pictures.append(found.tobytes())
        assert pictures[-1] == image.tobytes()
    assert pictures[0] != pictures[1]


def test_an_adapter_of_another_network_is_refused(tmp_path: Path) -> None:
    """It fits by its shapes and would draw: one of an earlier stage. A network of its own is fine."""
    run = tmp_path / "stage3"
    run.mkdir()
    own = {"part": "transformer", "option": "init_weights", "path": "stage2"}
    (run / "run_facts.json").write_text(json.dumps({"parts": [{"part": "vae", "option": "x", "path": "y"}, own]}))
    args = argparse.Namespace(model_path="base", network_name_or_path=None)
    models = {"base": None, "stage3": str(run)}
    with pytest.raises(sf.SciflowError, match=r"'stage2' .*`init_weights`.*`--network_name_or_path`"):
        evaluate._check_networks(models, args, "transformer")
    evaluate._check_networks(models, args, "unet")
    evaluate._check_networks(models, argparse.Namespace(network_name_or_path="stage2"), "transformer")
    (run / "transformer").mkdir()
    evaluate._check_networks(models, args, "transformer")
