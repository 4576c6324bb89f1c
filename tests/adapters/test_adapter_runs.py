"""Runs with each type of adapter: resuming, averages, what the card tells a user to do, what goes to the Hub."""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from trainings import make_trainer, trained

import sciflow_hf as sf
from sciflow_hf.adapters.files import load_adapter_weights
from sciflow_hf.adapters.layers import adapter_parameters
from sciflow_hf.hub.upload import publishable_files
from sciflow_hf.report.summary import summary

TYPES = {
    "pissa": {"rank": 4, "lora_alpha": 6, "init_lora_weights": "pissa", "rank_pattern": "to_q=2"},
    "dora": {"rank": 4, "lora_alpha": 6, "adapter_type": "dora"},
    "lokr": {"rank": 4, "lora_alpha": 6, "adapter_type": "lokr"},
    "loha": {"rank": 4, "lora_alpha": 6, "adapter_type": "loha"},
    "oft": {"adapter_type": "oft", "oft_block_size": 8},
}


def adapter_trainer(folder, family, cache, adapter, **options):
    defaults = dict(max_steps=4, save_steps=2, save_strategy="steps", eval_fraction=0.3)
    return make_trainer(folder, family, cache, adapter=adapter, **(defaults | options))


@pytest.fixture(scope="module", params=TYPES)
def run(request, family, tiny_cache, tmp_path_factory):
    """Four steps of one type, then evaluated and saved as a recipe does."""
    folder = tmp_path_factory.mktemp("runs") / request.param
    trainer = adapter_trainer(folder, family, tiny_cache, TYPES[request.param])
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card()
    return trainer, folder, TYPES[request.param]


def test_resuming_is_exact(run, family, tiny_cache, tmp_path):
    whole, folder, adapter = run
    shutil.copytree(folder / "checkpoint-2", tmp_path / "checkpoint-2")
    again = adapter_trainer(tmp_path, family, tiny_cache, adapter, resume_from_checkpoint="latest")
    again.train()
    one, two = trained(whole), trained(again)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    first = adapter_trainer(tmp_path / "first", family, tiny_cache, adapter)
    load_adapter_weights(first.model, folder / "checkpoint-2", family=family)
    of_again = adapter_parameters(again.model)
    assert not any(torch.equal(p, of_again[n]) for n, p in adapter_parameters(first.model).items())


def test_the_base_is_measured_without_the_adapter(run, family, tiny_cache, tmp_path):
    """`eval_base_loss` is the loss of the untouched network: also where the adapter begins with a part of it."""
    plain = adapter_trainer(tmp_path, family, tiny_cache, {"rank": 1})
    trainer, *_ = run
    (logged,) = (entry["eval_base_loss"] for entry in trainer.state.log_history if "eval_base_loss" in entry)
    assert logged == pytest.approx(plain.evaluate()["eval_loss"], abs=1e-6)


def test_the_code_of_the_card_loads_it(run, tiny_klein):
    trainer, folder, adapter = run
    text = (folder / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    code = code.replace('.to("cuda")', "").replace("bfloat16", "float32").split("prompt =")[0]
    code = code.replace(f"path/to/{tiny_klein.name}", str(tiny_klein)).replace(f"path/to/{folder.name}", str(folder))
    found = {}
    exec(code, found)
    network = found["pipeline"].transformer
    lokr_like = adapter.get("adapter_type") in ("lokr", "loha", "oft")
    assert ("PeftModel.from_pretrained(pipeline.transformer" in code) == lokr_like
    assert ("load_lora_weights" in code) != lokr_like
    inputs = {}
    hook = network.register_forward_pre_hook(lambda _, args, kwargs: inputs.update(kwargs), with_kwargs=True)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        loss, _ = trainer.family.compute_loss(network.eval(), batch, trainer.args)
        hook.remove()
        torch.testing.assert_close(trainer.model.eval()(**inputs)[0], network(**inputs)[0], rtol=0, atol=1e-5)
    assert loss.isfinite().all()
    kind = {"dora": "A DoRA", "lokr": "A LoKr", "loha": "A LoHa", "oft": "An OFT adapter"}
    assert f"{kind.get(adapter.get('adapter_type'), 'A LoRA')} for" in text
    for name, value in {"rank": 4, "oft_block_size": 8}.items():
        assert (f"| adapter {name} | {value} |" in text) == (name in adapter)
    assert ("| adapter init | `pissa` |" in text) == ("init_lora_weights" in adapter)
    assert ("\n- lora\n" in text) != lokr_like


def test_what_goes_to_the_hub_and_what_the_end_says(run):
    trainer, folder, adapter = run
    files = ["pytorch_lora_weights.safetensors"]
    if adapter.get("adapter_type") in ("lokr", "loha", "oft"):
        files = ["adapter_config.json", "adapter_model.safetensors"]
    assert publishable_files(folder) == sorted(["README.md", "run_facts.json", "training.png", *files])
    said, card = summary(trainer), (folder / "README.md").read_text()
    in_pefts = "adapter_model.safetensors" in files
    reader = "PEFT (`PeftModel.from_pretrained`)" if in_pefts else "diffusers (`load_lora_weights`)"
    assert f"Weights: {folder / files[-1]}, for {reader}\n" in said
    assert f"\n- `{files[-1]}`: for {reader}\n" in card
    # klein's query, key and value are one matrix in kohya's names; OFT and DoRA: see docs/formats.md.
    formats = {"lokr": "comfy", "dora": "kohya", "oft": None}.get(adapter.get("adapter_type"), "kohya|comfy")
    for text, path in ((said, str(folder)), (card, f"path/to/{folder.name}")):
        found = re.findall(r"sciflow-hf export --adapter_path (\S+) --format (\S+) .*", text)
        assert [(path, formats)] * bool(formats) == (
            found if text is card else [(p, "|".join([*re.findall(r"; --format (\w+)", said), f])) for p, f in found]
        )
    assert {file.name for file in (folder / "checkpoint-4").iterdir()} >= set(files)


@pytest.mark.parametrize("kind", ["pissa", "lokr"])
def test_the_average_is_what_is_saved(family, tiny_cache, tmp_path, kind):
    trainer = adapter_trainer(tmp_path, family, tiny_cache, TYPES[kind], ema_decay=0.5)
    trainer.train()
    trainer.save_model()
    average = load_file(tmp_path / "checkpoint-4" / "ema.safetensors")
    assert average.keys() == adapter_parameters(trainer.model).keys()  # not what PiSSA began with
    other = adapter_trainer(tmp_path / "other", family, tiny_cache, TYPES[kind])
    load_adapter_weights(other.model, tmp_path, family=family)
    loaded = adapter_parameters(other.model)
    assert all(torch.equal(loaded[name], value) for name, value in average.items())
    assert not all(torch.equal(p, loaded[n]) for n, p in adapter_parameters(trainer.model).items())


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        (
            "pissa",
            {"rank_pattern": "to_q=3"},
            r"adapter\.rank_pattern: \{'transformer_blocks\.\*\.attn\.to_q': 2\} then",
        ),
        ("pissa", {"init_lora_weights": "gaussian"}, r"adapter\.init: 'pissa' then, None now"),
        ("dora", {"use_rslora": True}, r"adapter\.use_rslora: None then, True now"),
        ("lokr", {"lokr_factor": 4}, r"adapter\.lokr_factor: None then, 4 now"),
        ("lokr", {"adapter_type": "loha"}, r"adapter\.type: 'lokr' then, 'loha' now"),
        ("oft", {"oft_block_size": 4}, r"adapter\.oft_block_size: 8 then, 4 now"),
    ],
)
def test_resuming_with_other_options_is_refused(family, tiny_cache, tmp_path, kind, change, words):
    adapter_trainer(tmp_path, family, tiny_cache, TYPES[kind], max_steps=1, save_steps=1).train()
    other = adapter_trainer(tmp_path, family, tiny_cache, TYPES[kind] | change, resume_from_checkpoint="latest")
    with pytest.raises(sf.SciflowError, match=words):
        other.train()


def test_the_plan_names_the_options(family, tiny_cache, tmp_path):
    trainer = adapter_trainer(tmp_path, family, tiny_cache, TYPES["pissa"])
    said = sf.plan(trainer.model, family, trainer.args, trainer.train_dataset)
    assert "lora rank 4 alpha 6, rank_pattern transformer_blocks.*.attn.to_q=2, init pissa on 16 layers, " in said
    trainer = adapter_trainer(tmp_path, family, tiny_cache, TYPES["oft"])
    assert "oft, oft_block_size 8 on 16 layers, " in sf.plan(trainer.model, family, trainer.args, trainer.train_dataset)
