"""The recipes' parser: YAML below flags, mistakes in one line, and the names that DESIGN section 8 fixes."""

import re
import runpy
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from transformers import HfArgumentParser

import sciflow_hf as sf
from sciflow_hf.cli.run import run
from sciflow_hf.engines.optimizers import effective_learning_rate, optimizer_class
from sciflow_hf.errors import CacheError, SciflowError
from sciflow_hf.options import RecipeParser, parse_args, read_yaml

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("train_*.py"))
KINDS = (sf.Flux2Klein, sf.DataArguments, sf.AdapterArguments, sf.DiffusionTrainingArguments)
NEEDED = ("--use_cpu", "--pretrained_model_name_or_path", "klein", "--dataset_dir", "cache")


@pytest.fixture(scope="module", autouse=True)
def imported():
    """What transformers imports for the first arguments may print to stdout."""
    sf.DiffusionTrainingArguments(use_cpu=True)


@pytest.fixture
def parse(tmp_path, monkeypatch):
    """Parses flags and the text of a YAML file: (family, data, adapter, training)."""
    monkeypatch.chdir(tmp_path)

    def parse(*flags, yaml=None, needed=NEEDED, kinds=KINDS):
        config = ()
        if yaml is not None:
            (tmp_path / "run.yaml").write_text(yaml)
            config = ("--config", str(tmp_path / "run.yaml"))
        return parse_args(*kinds, argv=[*config, *needed, *flags])

    return parse


@pytest.fixture
def refuses(parse, capsys):
    """The one line that a mistake ends in: status 2, no traceback, no usage."""

    def refuses(*flags, **options):
        with pytest.raises(SystemExit) as caught:
            parse(*flags, **options)
        printed = capsys.readouterr()
        assert caught.value.code == 2 and printed.out == ""
        assert printed.err.endswith("\n") and printed.err.count("\n") == 1
        assert "usage:" not in printed.err and "Traceback" not in printed.err
        return printed.err

    return refuses


# -- values --------------------------------------------------------------------------------------------------


@pytest.mark.promise("A05", "E07")
def test_defaults_then_yaml_then_flags(parse):
    yaml = "rank: 8\nlora_alpha: 4\nlearning_rate: 1e-4\nseed: 7\n"
    family, data, adapter, args = parse("--rank", "32", "--seed=9", yaml=yaml)
    assert (adapter.rank, adapter.lora_alpha, args.seed, args.learning_rate) == (32, 4, 9, 1e-4)
    assert type(args.learning_rate) is float and adapter.lora_layers == "full"
    assert (family.pretrained_model_name_or_path, data.dataset_dir) == ("klein", ["cache"])
    # The order on the command line does not matter.
    assert parse("--config", "run.yaml", "--seed", "1")[3].seed == 1


def test_yaml_types(parse):
    yaml = """
        rank: 8
        learning_rate: 1e-4       # YAML 1.1 reads this as text
        weight_decay: 1
        logit_mean: -0.5
        timestep_shift: 3.0       # a text option
        min_snr_gamma: null       # optional
        gradient_checkpointing_kwargs: {use_reentrant: false}
        report_to: [tensorboard, wandb]
        validation_prompts: One line plot.
        validation_seeds: [1, 2]
        no_adapter: yes
        log_on_each_node: false   # true by default: argparse has a `--no_` twin of it
        eval_strategy: no         # YAML reads this as false
        lr_scheduler_type: cosine
        max_steps: 10
        save_steps: 0.5
    """
    _, data, adapter, args = parse("--dataset_dir", "a", "b", yaml=re.sub("^ +", "", yaml, flags=re.M))
    values = {
        "learning_rate": 1e-4, "weight_decay": 1.0, "logit_mean": -0.5, "timestep_shift": "3.0",
        "min_snr_gamma": None, "gradient_checkpointing_kwargs": {"use_reentrant": False}, 
        "report_to": ["tensorboard", "wandb"], "validation_prompts": ["One line plot."], "validation_seeds": [1, 2],
        "log_on_each_node": False,
        "eval_strategy": "no", "lr_scheduler_type": "cosine", "max_steps": 10, "save_steps": 0.5,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in values} == values
    assert type(args.weight_decay) is float and type(args.max_steps) is int
    assert adapter.no_adapter is True and data.dataset_dir == ["a", "b"]


def test_booleans_in_every_spelling(parse):
    for flags, yaml, expected in (
        ((), None, (False, True)),
        (("--dry_run",), None, (True, True)),
        (("--dry_run", "true", "--log_on_each_node", "false"), None, (True, False)),
        (("--no_log_on_each_node",), "dry_run: true", (True, False)),
        (("--dry_run=no", "--log_on_each_node"), "dry_run: true\nlog_on_each_node: false", (False, True)),
        ((), "dry_run: 'yes'\nlog_on_each_node: 0", (True, False)),
    ):
        args = parse(*flags, yaml=yaml)[3]
        assert (args.dry_run, args.log_on_each_node) == expected, (flags, yaml)


def test_lists_from_flags_and_yaml(parse):
    yaml = "dataset_dir: [a, b]\nvalidation_prompts:\n  - one, two\n  - 'three'\n"
    needed = NEEDED[:3]
    _, data, _, args = parse(yaml=yaml, needed=needed)
    assert data.dataset_dir == ["a", "b"] and args.validation_prompts == ["one, two", "three"]
    flags = ("--dataset_dir", "c", "--validation_prompts", "x y", "z")
    _, data, _, args = parse(*flags, yaml=yaml, needed=needed)
    assert data.dataset_dir == ["c"] and args.validation_prompts == ["x y", "z"]
    assert sf.DiffusionTrainingArguments(use_cpu=True).validation_prompts == []  # no shared list was filled


def test_a_list_without_values_switches_off_that_of_the_yaml(parse, refuses):
    yaml = "validation_prompts: [one, two]\nvalidation_seeds: [1, 2]\n"
    assert parse("--validation_prompts", "--seed", "3", yaml=yaml)[3].validation_prompts == []
    assert parse("--seed", "3", "--validation_prompts", yaml=yaml)[3].validation_prompts == []
    assert "expected at least one argument" in refuses("--validation_seeds", yaml=yaml)


def test_a_required_option_may_stand_in_the_yaml(parse, refuses):
    family, *_ = parse(yaml="pretrained_model_name_or_path: from/yaml\n", needed=("--use_cpu", *NEEDED[3:]))
    assert family.pretrained_model_name_or_path == "from/yaml"
    assert "--pretrained_model_name_or_path" in refuses(yaml="rank: 4\n", needed=("--use_cpu", *NEEDED[3:]))


@pytest.mark.promise("A38", "B20", "C22")
def test_base_chains(tmp_path, parse, refuses):
    folder = tmp_path / "shared"
    folder.mkdir()
    (folder / "all.yaml").write_text("rank: 1\nlora_alpha: 1\nseed: 1\n")
    (folder / "klein.yaml").write_text("base: all.yaml\nlora_alpha: 2\nseed: 2\n")
    _, _, adapter, args = parse(yaml="base: shared/klein.yaml\nseed: 3\n")
    assert (adapter.rank, adapter.lora_alpha, args.seed) == (1, 2, 3)
    assert read_yaml(tmp_path / "run.yaml") == {"rank": 1, "lora_alpha": 2, "seed": 3}
    (folder / "all.yaml").write_text("base: ../run.yaml\n")
    said = refuses(yaml="base: shared/klein.yaml\n")
    assert "`base`" in said and "run.yaml is already being read" in said
    assert "nowhere.yaml: cannot be read" in refuses(yaml="base: nowhere.yaml\n")
    assert "`base`" in refuses(yaml="base: [a.yaml, b.yaml]\n")
    # The same file may be the base of two others.
    (folder / "all.yaml").write_text("rank: 1\n")
    (tmp_path / "run.yaml").write_text("base: shared/all.yaml\n")
    assert read_yaml(tmp_path / "run.yaml") == read_yaml(folder / "all.yaml")


# -- mistakes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--ranks", "3"], "--ranks 3; did you mean `--rank`?"),
        (["--output_di", "x"], "--output_di x; did you mean `--output_dir`?"),  # no abbreviations
        (["--learning_rat=1"], "did you mean `--learning_rate`?"),
        (["--seed", "1", "stray"], "unknown argument stray"),
        (["--rank", "abc"], "--rank: invalid int value: 'abc'"),
        (["--rank", "1.5"], "--rank: invalid int value: '1.5'"),
        (["--rank"], "--rank"),
        (["--config"], "--config: expected one argument"),
        (["--config", "nowhere.yaml"], "`config` nowhere.yaml: cannot be read"),
        (["--no_adapter", "perhaps"], "--no_adapter"),
        (["--lr_scheduler_type", "flat"], "'constant'"),
        (["--rank", "0"], "`rank` 0"),
        (["--adapter_type", "ia3"], "`adapter_type` 'ia3': use one of lora, dora, lokr, loha, oft"),
        (["--eval_fraction", "1"], "`eval_fraction` 1.0"),
        (["--weighting_scheme", "foo"], "`weighting_scheme` 'foo': use one of none, sigma_sqrt"),
        (["--loss_type", "l3"], "`loss_type` 'l3': use one of mse, l1, huber"),
        (["--timestep_shift", "-1"], "`timestep_shift` '-1'"),
        (["--eval_levels", "0"], "`eval_levels` 0"),
        (["--validation_size", "64"], "`validation_size` [64]"),
        (["--bf16", "--fp16"], "fp16"),
        (["--load_best_model_at_end", "--eval_strategy", "no"], "load_best_model"),
        (["--optim", "nonsense"], "nonsense"),
    ],
)
def test_mistakes_in_flags_end_in_one_line(refuses, flags, words):
    assert words in refuses(*flags)


@pytest.mark.promise("C32")
@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("rnk: 3", "run.yaml: unknown option `rnk`; did you mean `rank`?"),
        ("learning-rate: 1", "did you mean `learning_rate`?"),
        ("_base_: x.yaml", "run.yaml: unknown option `_base_`; did you mean `base`?"),
        ("3: 4", "unknown option `3`"),
        ("config: x.yaml", "unknown option `config`"),
        ("rank: abc", "`rank`: invalid int value: 'abc'"),
        ("rank: 1.5", "`rank`: invalid int value: '1.5'"),
        ("rank: true", "`rank`: invalid int value"),
        ("rank: [1, 2]", "`rank`: expected one value, got [1, 2]"),
        ("rank: {a: 1}", "`rank`: expected one value"),
        ("lora_layers:", "`lora_layers`: expected a value, got nothing"),
        ("validation_prompts:", "`validation_prompts`: expected a value, got nothing"),
        ("validation_seeds: [1, a]", "`validation_seeds`: invalid int value: 'a'"),
        ("bf16: perhaps", "`bf16`"),
        ("learning_rate: fast", "`learning_rate`: invalid float value: 'fast'"),
        ("lora_layers: [to_k, to_q]", "expected one value, got ['to_k', 'to_q']; write to_k,to_q"),
        ("lr_scheduler_type: flat", "`lr_scheduler_type`: invalid choice: 'flat'"),
        ("rank: 0", "`rank` 0"),
        ("lora_dropout: 1", "`lora_dropout` 1.0"),
        ("weighting_scheme: foo", "`weighting_scheme` 'foo'"),
        ("[1, 2]", "run.yaml: expected `option: value` lines, got list"),
        ("rank: [", "run.yaml: is no YAML"),
        ("rank: !!python/object/apply:os.getcwd []", "run.yaml: is no YAML"),  # never executed
    ],
)
def test_mistakes_in_yaml_end_in_one_line(refuses, yaml, words):
    assert words in refuses(yaml=yaml)


def test_yaml_that_is_no_text(refuses, tmp_path):
    (tmp_path / "latin.yaml").write_bytes("seed: 1 # \xe9\n".encode("latin-1"))
    assert "latin.yaml: is no UTF-8 text" in refuses("--config", "latin.yaml")


REFUSED = {
    "auto_find_batch_size": "true", "label_smoothing_factor": "0.1", "neftune_noise_alpha": "5",
    "use_liger_kernel": "true", "remove_unused_columns": "true", "batch_eval_metrics": "true",
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_stock_options_that_cannot_work_are_refused_by_name(refuses, name):
    assert re.search(rf"error: `{name}` \S+ cannot work here: \w", refuses(f"--{name}", REFUSED[name]))
    assert f"`{name}`" in refuses(yaml=f"{name}: {REFUSED[name]}")


@pytest.mark.promise("B10")
def test_prodigy_is_an_optimizer_like_any_other(parse, refuses):
    args = parse("--optim", "prodigy")[3]
    assert args.optim == "prodigy" and args.learning_rate == 1.0
    assert parse(yaml="optim: prodigy\nlearning_rate: 0.5\n")[3].learning_rate == 0.5
    assert parse("--optim", "adamw_torch")[3].learning_rate == 1e-4
    assert "prodigy" in help_text(*KINDS)
    assert "nonsense" in refuses("--optim", "nonsense") and "adamw_torch" in refuses("--optim", "nonsense")


def test_options_of_prodigy():
    cls, options = optimizer_class("prodigy", 0.5, "d_coef=2, safeguard_warmup=False,slice_p=11")
    assert cls.__name__ == "Prodigy" and options["lr"] == 0.5 and options["d_coef"] == 2.0
    assert options["safeguard_warmup"] is False and options["use_bias_correction"] is True and options["slice_p"] == 11
    cls([torch.nn.Parameter(torch.zeros(2))], **options)  # it takes them
    for args, words in (
        ("d_coeff=2", "'d_coeff=2': write name=value, with one of d0, d_coef"),
        ("d_coef", "'d_coef': write name=value"),
        ("d_coef=much", "'d_coef=much': expected number, got 'much'"),
        ("slice_p=1.5", "expected whole number, got '1.5'"),
        ("decouple=maybe", "expected true or false, got 'maybe'"),
    ):
        with pytest.raises(SciflowError) as caught:
            optimizer_class("prodigy", 1.0, args)
        assert words in str(caught.value) and str(caught.value).startswith("`optim_args`")
    groups = [{"d": 2e-4, "lr": 0.5}, {"d": 1.0, "lr": 1.0}]
    assert effective_learning_rate(groups) == 1e-4
    assert effective_learning_rate([{"lr": 0.5}]) is None and effective_learning_rate([]) is None


# -- exit statuses -------------------------------------------------------------------------------------------


def test_run_turns_mistakes_into_statuses(capsys):
    def ends(error=None):
        def main():
            if error is not None:
                raise error

        with pytest.raises(SystemExit) as caught:
            run(main)
        return caught.value.code, capsys.readouterr().err

    assert ends() == (0, "")
    for error in (SciflowError("`rank` 0: at least 1."), CacheError("a.npz is damaged")):
        status, said = ends(error)
        assert status == 2 and said.strip() == f"error: {error}"
    status, said = ends(KeyboardInterrupt())
    assert status == 130 and "--resume_from_checkpoint latest" in said and "Traceback" not in said
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        run(lambda: 1 / 0)


# -- the surface ---------------------------------------------------------------------------------------------


def help_text(*kinds):
    return RecipeParser(kinds).format_help()


@pytest.mark.promise("B01", "C08", "E01")
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_prints_its_help(recipe, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(recipe), "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(recipe), run_name="__main__")
    printed = capsys.readouterr().out
    assert caught.value.code == 0 and "--pretrained_model_name_or_path" in printed and "--config" in printed


def test_recipes_were_found():
    assert [p.name for p in RECIPES] and "train_flux2klein.py" in [p.name for p in RECIPES]


def test_recipes_refuse_unknown_flags(monkeypatch, capsys):
    for recipe in RECIPES:
        monkeypatch.setattr(sys, "argv", [str(recipe), *NEEDED, "--input_dir", "x", "--no_such_flag"])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(recipe), run_name="__main__")
        assert caught.value.code == 2 and "--no_such_flag" in capsys.readouterr().err


@dataclass
class Percent:
    share: float = field(default=0.5, metadata={"help": "Between 0 % and 100%, 50 %s say; 10%% too (%(prog)s)."})


def test_a_stray_percent_sign_does_not_break_help(capsys):
    with pytest.raises(SystemExit):
        parse_args(Percent, argv=["--help"], description="100 % of it")
    printed = " ".join(capsys.readouterr().out.split())
    assert "Between 0 % and 100%, 50 %s say; 10% too" in printed and "100 % of it" in printed


def test_every_option_of_ours_has_a_help_text():
    texts = {action.dest: action.help for action in RecipeParser(KINDS)._actions}
    assert [name for name, text in texts.items() if not text or not text.strip()] == []


def test_the_parser_of_transformers_takes_the_same_classes():
    """HfArgumentParser, as in anybody's script: the same flags and defaults, the same objects, and a help page."""
    stock, ours = HfArgumentParser(KINDS), RecipeParser(KINDS)
    flags = [
        {  # ours takes lists without values, too
            flag: (a.dest, a.default, "+" if a.nargs == "*" else a.nargs, a.required)
            for a in parser._actions
            for flag in a.option_strings
        }
        for parser in (stock, ours)
    ]
    assert flags[1].pop("--config") and flags[1].pop("--verbose") and flags[0] == flags[1]
    words = [*NEEDED, "--optim", "prodigy", "--export_formats", "kohya", "--ema_decay", "0.5"]
    *_, args = stock.parse_args_into_dataclasses(words)
    assert type(args) is sf.DiffusionTrainingArguments and (args.optim, args.learning_rate) == ("prodigy", 1.0)
    assert (args.export_formats, args.ema_decay, args.validation_seeds) == (["kohya"], 0.5, [0])
    printed = " ".join(stock.format_help().split())
    for words in ("Decay of an exponential moving average", "In [0, 1).", "nf4, torchao_int8", "0 to 4."):
        assert words in printed
    with pytest.raises(SciflowError, match=r"`ema_decay` 1\.0: in"):
        stock.parse_args_into_dataclasses([*NEEDED, "--ema_decay", "1"])


HEADINGS = {
    "weighting_scheme": "Noise levels", "min_snr_gamma": "Loss", "learning_rate": "Optimizer", "optim": "Optimizer",
    "ema_decay": "Averaged weights", "eval_levels": "Evaluation", "validation_seeds": "Validation images",
    "dataloader_threads": "Reading", "export_formats": "Output", "quantize_base": "Quantisation", "offload": "Offload",
    "torch_compile": "Compilation", "seed": "TrainingArguments",
}  # fmt: skip


def test_help_has_each_option_below_its_heading():
    """In the order in which the class is composed, the parent's options last."""
    groups = {g.title: {a.dest for a in g._group_actions} for g in RecipeParser(KINDS[3:])._action_groups}
    assert {name: next(title for title, names in groups.items() if name in names) for name in HEADINGS} == HEADINGS
    order = [title for title in groups if title in HEADINGS.values()]
    assert order == list(dict.fromkeys(HEADINGS.values()))


def test_arguments_are_documented_by_their_options():
    doc = " ".join(sf.DiffusionTrainingArguments.__doc__.split())
    assert "offload: Keep the frozen weights of the blocks" in doc and "Defaults that differ" in doc
    assert "quantize_base: Keep the frozen network in 8 or 4 bits" in doc and "100%%" not in doc


SECTION_8 = re.findall(
    r"\w+",
    """
    config dry_run dataset_dir payload_dir eval_fraction caption_dropout adapter_type rank
    lora_alpha lora_dropout lora_layers adapter_path no_adapter pretrained_model_name_or_path
    revision max_sequence_length weighting_scheme logit_mean logit_std mode_scale timestep_shift
    loss_type min_snr_gamma eval_levels validation_prompts validation_steps num_inference_steps
    validation_guidance_scale validation_seeds output_dir resume_from_checkpoint
    overwrite_output_dir per_device_train_batch_size gradient_accumulation_steps push_to_hub
    report_to optim max_steps save_total_limit load_best_model_at_end dataloader_drop_last seed
    data_seed bf16 activation_checkpointing
    """,
)


@pytest.mark.promise("E10")
def test_the_flags_that_others_rely_on_exist():
    flags = {flag for action in RecipeParser(KINDS)._actions for flag in action.option_strings}
    assert {f"--{name}" for name in SECTION_8} - flags == set()


def test_no_two_dataclasses_share_a_flag():
    RecipeParser(KINDS)  # argparse would raise
    with pytest.raises(Exception, match="conflicting option"):
        RecipeParser((*KINDS, sf.AdapterArguments))
