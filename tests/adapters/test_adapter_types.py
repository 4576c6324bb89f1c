"""Every type of adapter on every family: it begins as the base, trains, and stock libraries read what is saved."""

import pytest
import torch
from adapter_bench import FAMILIES, Bench, make_tiny_family, randomise, values
from trainings import same

import sciflow_hf as sf
from sciflow_hf.adapters.files import load_adapter_weights, save_adapter
from sciflow_hf.adapters.layers import adapter_disabled, adapter_facts, adapter_parameters

LOW = {"rank": 4, "lora_alpha": 6}
PATTERNS = {"rank_pattern": "to_q=2,to_k=6", "alpha_pattern": {"to_v": 1, "to_q": 5}}
KINDS = {
    "rslora": LOW | PATTERNS | {"use_rslora": True},
    "pissa": LOW | PATTERNS | {"use_rslora": True, "init_lora_weights": "pissa_niter_4"},
    "dora": LOW | PATTERNS | {"adapter_type": "dora"},
    "lokr": LOW | PATTERNS | {"adapter_type": "lokr"},
    "loha": LOW | PATTERNS | {"adapter_type": "loha"},
    "oft": {"adapter_type": "oft", "oft_block_size": 4},
}
MORE_KINDS = {  # what does not depend on the family
    "plain pissa": LOW | PATTERNS | {"init_lora_weights": "pissa"},
    "olora": LOW | {"init_lora_weights": "olora"},
    "orthogonal": LOW | {"init_lora_weights": "orthogonal"},
    "orthogonal dora": LOW | {"init_lora_weights": "orthogonal", "adapter_type": "dora"},
    "lokr of both factors": {"adapter_type": "lokr", "rank": 1, "lora_alpha": 3, "lokr_factor": 4}
    | {"lokr_decompose_both": True},
}
LINEAR_ONLY = ("pissa", "oft")
"""Refused for the convolutions that SDXL's `full` has."""
PAIRS = [(name, kind) for name in FAMILIES for kind in KINDS] + [("flux2_klein", kind) for kind in MORE_KINDS]


@pytest.fixture(scope="session")
def bench(tmp_path_factory):
    """A function: name of a family -> its `Bench`, made once."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = Bench(make_tiny_family(name, folder), folder)
        return made[name]

    return get


@pytest.mark.promise("E09")
@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_it_trains_and_stock_libraries_load_it(bench, tmp_path, name, kind):
    here, options = bench(name), (KINDS | MORE_KINDS)[kind]
    if name == "sdxl" and kind in LINEAR_ONLY:
        with pytest.raises(sf.SciflowError, match=r"does not go with convolutions: down_blocks\.0\.resnets\.0\.conv1"):
            here.adapted(**options)
        options = options | {"lora_layers": "standard"}
    model = here.adapted(**options)
    torch.testing.assert_close(here.output(model), here.base, rtol=0, atol=1e-5)

    randomise(model)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    before, trained = values(model), [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == len(before) and {p.dtype for p in trained} == {torch.float32}
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0)
    here.loss(model).mean().backward()
    optimizer.step()
    assert [n for n, value in adapter_parameters(model).items() if torch.equal(value, before[n])] == []
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    expected = here.output(model)
    assert (expected - here.base).abs().max() > 0.01
    with adapter_disabled(model):
        assert torch.equal(here.output(model), here.base)
    assert torch.equal(here.output(model), expected)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == before.keys()

    save_adapter(model, tmp_path, family=here.family)
    exact = here.exact_output(model)
    torch.testing.assert_close(exact.float(), expected, rtol=0, atol=1e-3)
    stock = here.stock_output(tmp_path, adapter_facts(model)["type"])
    torch.testing.assert_close(stock, exact, rtol=0, atol=1e-9)

    resumed = here.adapted(seed=2, **options)
    load_adapter_weights(resumed, tmp_path, family=here.family)
    every = dict(resumed.named_parameters())
    assert all(torch.equal(every[n], p) for n, p in model.named_parameters())
    assert torch.equal(here.output(resumed), expected)
    onward = here.adapted(adapter_path=str(tmp_path))
    torch.testing.assert_close(here.exact_output(onward), exact, rtol=0, atol=1e-9)
    assert all(p.requires_grad for p in adapter_parameters(onward).values())
    if "init" not in adapter_facts(model):
        assert adapter_facts(onward) == adapter_facts(model) and same(values(onward), values(model))
