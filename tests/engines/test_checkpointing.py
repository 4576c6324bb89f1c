"""`--activation_checkpointing_share`: the same bits, which blocks keep their activations, and what that costs."""

import re

import pytest
import torch
from family_steps import FAMILIES, Step
from torch.utils.flop_counter import FlopCounterMode
from trainings import losses, make_args, make_trainer, same, trained

import sciflow_hf as sf
from sciflow_hf.engines import checkpointing
from sciflow_hf.engines.checkpointing import blocks_of, computed_again, share_of
from sciflow_hf.engines.memory import USABLE, MemoryOptions, estimate, extra_arithmetic
from sciflow_hf.report.plan import tokens_of

SHARES = (0.0, 0.5, 1.0)


@pytest.fixture(scope="module")
def steps(tmp_path_factory, tiny_pipelines):
    """A step of each family that adapts a published network."""
    args = make_args(tmp_path_factory.mktemp("out"))
    return {name: Step(name, tiny_pipelines[name], args) for name in FAMILIES}


@pytest.mark.promise("B11")
def test_twenty_steps_are_the_same_bits(tmp_path, family, even_cache):
    """Of an adapter and of the complete network."""
    for adapter, shares in (({"rank": 4}, SHARES), ({"no_adapter": True}, SHARES[:2])):
        runs = []
        for share in shares:
            run = make_trainer(
                tmp_path, family, even_cache, adapter=adapter, activation_checkpointing_share=share, max_steps=20
            )
            run.train()
            assert run.model.gradient_checkpointing is (share > 0) is run.args.activation_checkpointing
            runs.append(run)
        assert all(same(trained(runs[0]), trained(run)) and losses(run) == losses(runs[0]) for run in runs)
        assert len(set(losses(runs[0]))) == 20


@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_blocks_keep_theirs_in_the_order_of_computing(steps, name):
    """Seen by hooks: each block computes once, the first ones once more in the backward pass."""
    step = steps[name]
    order = []
    blocks = blocks_of(step.model)
    hooks = [block.register_forward_pre_hook(lambda *args, path=path: order.append(path)) for path, block in blocks]
    paths = [path for path, _ in blocks]
    try:
        for share in (0.5, 1 / len(blocks)):
            checkpointing.enable(step.model, step.model, share)
            loss, _ = step.run(step.model.train())
            assert order == paths and len(paths) > 1, "as they are listed"
            order.clear()
            loss.sum().backward()
            again = [path for path in reversed(order) if not (name == "sdxl" and path == "mid_block.resnets.0")]
            first = paths[: computed_again(len(paths), share)]
            assert again == [path for path in first if path != "mid_block.resnets.0"]
            order.clear()
    finally:
        step.model.disable_gradient_checkpointing()
        for hook in hooks:
            hook.remove()


def test_arithmetic_is_as_estimated(family, even_cache, tmp_path):
    """Matrix products of a step, counted by torch."""
    tokens, args = {"tokens": 36, "image_tokens": 24}, make_args(tmp_path)
    batch = {"latents": torch.zeros(1, 4, 8, 12), "prompt_embeds": torch.zeros(1, 12, 48)}
    for whole in (False, True):
        counts = {}
        for share in (0, 0.5, 1):
            model = family.load_model(dtype=torch.float32)
            sf.add_adapter(model, sf.AdapterArguments(rank=1, no_adapter=whole), family=family)
            if share:
                checkpointing.enable(model, model, share)
            with FlopCounterMode(display=False) as counter:
                family.compute_loss(model.train(), batch, args)[0].sum().backward()
            counts[share] = counter.get_total_flops()
        for share in (0.5, 1):
            extra = extra_arithmetic(model, share, **tokens)
            assert counts[share] / counts[0] - 1 == pytest.approx(extra, rel=0.35), (whole, share)


def test_the_share_decides_over_the_switch(tmp_path):
    cases = ((0.0, True, 0), (0.25, None, 0.25), (0.25, False, 0.25), (None, True, 1), (None, None, 0))
    for share, switch, found in cases:
        args = make_args(tmp_path, activation_checkpointing_share=share, activation_checkpointing=switch)
        assert share_of(args) == found and args.activation_checkpointing is (found > 0)
    options = MemoryOptions.of(make_args(tmp_path))
    quarter, all_of_them = "--activation_checkpointing_share 0.25", "--activation_checkpointing"
    for share, flags in ((0.0, "as it is"), (0.25, quarter), (1.0, all_of_them)):
        assert options.with_share(share).flags(options) == flags and options.with_share(share).share == share
    half = options.with_share(0.5)
    assert half.with_share(1.0).flags(half) == "--activation_checkpointing_share 1.0"
    with pytest.raises(sf.SciflowError, match=r"`activation_checkpointing_share` 1.5: 0 to 1"):
        make_args(tmp_path, activation_checkpointing_share=1.5)
    with pytest.raises(sf.SciflowError, match="`--activation_checkpointing` of all blocks"):
        make_args(tmp_path, activation_checkpointing_share=0.5, quantize_base="torchao_fp8")
    with pytest.raises(sf.SciflowError, match="for some of them use `--activation_checkpointing_share`"):
        make_args(tmp_path, activation_checkpointing=True, activation_checkpointing_kwargs={"every_n_layers": 2})


def test_a_network_without_named_blocks_has_all_or_none():
    network = torch.nn.Linear(2, 2)
    assert blocks_of(network) == []
    with pytest.raises(sf.SciflowError, match="Linear does not name its blocks"):
        checkpointing.enable(network, network, 0.5)


def test_a_dry_run_lists_shares_and_names_the_least_that_fits(tmp_path, family, even_cache):
    """The least is an edge: with one block less it does not fit."""
    network = family.load_model(dtype=torch.float32, meta=True)
    model, cache = sf.add_adapter(network, sf.AdapterArguments(rank=4), family=family), sf.load_cache(even_cache)
    sizes, blocks = tokens_of(cache, family), len(blocks_of(model))

    def needed(again):
        options = MemoryOptions.of(make_args(tmp_path)).with_share(round(again / blocks, 3))
        return estimate(model, model, make_args(tmp_path), options=options, **sizes).total

    totals = [needed(again) for again in range(blocks + 1)]
    assert totals[:-1] == sorted(totals[:-1], reverse=True) and totals[-2] <= totals[-1], "the last block is free"
    for memory, told in (
        (totals[1] * 1.0001, f"--activation_checkpointing_share {round(1 / blocks, 3):g} is the least that"),
        (totals[1] * 0.9999, f"--activation_checkpointing_share {round(2 / blocks, 3):g} is the least that"),
        (min(totals) * 0.9999, "no share"),
    ):
        args = make_args(tmp_path, memory_gb=memory / USABLE / 1e9, activation_checkpointing_share=0.1)
        text = sf.plan(model, family, args, cache)
        table = text.split("Activation checkpointing by share, estimated\n")[1].split("\n\n")[0].splitlines()[1:]
        assert table[-1].startswith(f"{told} fits into 90% of "), table
        rows = [re.split(r"\s{2,}", line) for line in table[1:-1]]
        assert [row[0] for row in rows] == ["0", "0.1 (this run)", "0.25", "0.5", "0.75", "1"]
        assert [row[1] for row in rows][::5] == [f"0 of {blocks}", f"{blocks} of {blocks}"]
        assert rows[0][3] == "0%" and 35 < int(rows[-1][3].rstrip("%")) <= 50
