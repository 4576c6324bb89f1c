"""The private parts of transformers.Trainer that we build on: still there, undone afterwards, equal in effect."""

import copy
import inspect
import threading

import accelerate.optimizer
import pytest
import torch
import transformers.trainer
from trainings import make_trainer
from transformers import Trainer, TrainerCallback

import sciflow_hf as sf
from sciflow_hf.data.batches.threads import Batch, Buffer, ThreadedReader
from sciflow_hf.training.trainer import HOST_KEYS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

# What we override, with the parameters that our version or its callers rely on.
PRIVATE = {
    "_run_epoch": [
        "model", "epoch", "train_dataloader", "steps_in_epoch", "num_update_steps_per_epoch", "trial",
        "ignore_keys_for_eval", "start_time", "resume_from_checkpoint", "epochs_trained",
        "steps_trained_in_current_epoch",
    ],
    "_init_training_state": [
        "max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint", "trial",
    ],
    "_build_accelerator_args": ["kwargs"],
    "_prepare_input": ["data"],
    "_prepare_inputs": ["inputs"],
    "_prepare_for_training": ["max_steps", "train_dataloader", "resume_from_checkpoint"],
    "_clip_grad_norm": ["model"],
    "_get_grad_norm": ["model", "grad_norm"],
    "_save_checkpoint": ["model", "trial"],
    "_get_output_dir": ["trial"],
    "_save": ["output_dir", "state_dict"],
    "_save_optimizer_and_scheduler": ["output_dir"],
    "_load_optimizer_and_scheduler": ["checkpoint"],
    "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
    "_load_best_model": [],
    "_push_from_checkpoint": ["checkpoint_folder"],
    "_finish_current_push": [],
    "_finalize_training": ["trial", "num_train_samples", "start_time"],
}  # fmt: skip
PUBLIC = {
    "set_initial_training_values": ["args", "dataloader"],
    "save_model": ["output_dir", "_internal_call"],
    "training_step": ["model", "inputs", "num_items_in_batch"],
    "compute_loss": ["model", "inputs", "return_outputs", "num_items_in_batch"],
    "evaluation_loop": ["dataloader", "description", "prediction_loss_only", "ignore_keys", "metric_key_prefix"],
    "prediction_step": ["model", "inputs", "prediction_loss_only", "ignore_keys"],
    "get_train_dataloader": [],
    "get_eval_dataloader": ["eval_dataset"],
    "get_test_dataloader": ["test_dataset"],
    "get_optimizer_cls_and_kwargs": ["args", "model"],
    "create_optimizer": ["model"],
    "call_model_init": ["trial"],
    "log": ["logs", "start_time"],
    "train": ["resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
    "init_hf_repo": ["token", "private"],
    "push_to_hub": ["commit_message", "blocking", "token", "revision", "private", "kwargs"],
    "create_model_card": None,  # takes anything
    "hyperparameter_search": None,
    "__init__": None,  # keyword-only, with a family
}
CALLED_BY = {  # who of the Trainer calls them, so that an override is not left lying
    "_inner_training_loop": [
        "set_initial_training_values", "_init_training_state", "_prepare_for_training", "_run_epoch",
        "_finalize_training", "zero_grad",
    ],
    "_run_epoch": [
        "skip_first_batches", "training_step", "_clip_grad_norm", "_get_grad_norm", "zero_grad",
        "current_gradient_accumulation_steps", "set_epoch",
    ],
    "_prepare_for_training": ["create_optimizer", "_load_optimizer_and_scheduler"],
    "_finalize_training": ["_load_best_model", "_finish_current_push"],
    "evaluate": ["evaluation_loop", "get_eval_dataloader"],
    "evaluation_loop": ["prediction_step"],
    "_prepare_inputs": ["_prepare_input"],
    "_maybe_log_save_evaluate": ["_save_checkpoint", "log"],
    "_save_checkpoint": ["save_model", "_push_from_checkpoint", "save_total_limit", "_get_output_dir"],
    "save_model": ["_save"],
    "create_optimizer": ["get_optimizer_cls_and_kwargs"],
    "train": ["_load_from_checkpoint"],
    "training_step": ["_prepare_inputs", "compute_loss", "compute_loss_context_manager"],
}  # fmt: skip


def parameters_of(function):
    return [name for name in inspect.signature(function).parameters if name != "self"]


@pytest.mark.parametrize("name", PRIVATE | PUBLIC)
def test_what_we_override_is_there_with_its_parameters(name):
    wanted = (PRIVATE | PUBLIC)[name]
    assert name in vars(Trainer), f"transformers renamed `Trainer.{name}`: look at sciflow_hf/training/trainer.py"
    if wanted is None:
        return
    stock = inspect.signature(getattr(Trainer, name))
    assert parameters_of(getattr(Trainer, name)) == wanted
    ours = inspect.signature(getattr(sf.DiffusionTrainer, name))
    values = {k: v.kind for k, v in stock.parameters.items() if v.kind is not v.VAR_KEYWORD}
    ours.bind(*values)  # a call by position
    ours.bind(*([1] if "self" in values else []), **{k: 1 for k in values if k != "self"})  # and by name


@pytest.mark.parametrize("caller", CALLED_BY)
def test_the_trainer_still_calls_them(caller):
    used = names_in(getattr(Trainer, caller))
    missing = [name for name in CALLED_BY[caller] if name not in used]
    assert missing == [], f"`Trainer.{caller}` no longer uses them: look at sciflow_hf/training/trainer.py"


def names_in(function):
    """Attributes and globals that the code of a function mentions, in nested functions too."""
    codes, names = [inspect.unwrap(function).__code__], set()
    while codes:
        code = codes.pop()
        names |= {*code.co_names, *code.co_varnames}
        codes += [constant for constant in code.co_consts if inspect.iscode(constant)]
    return names


def test_every_override_is_listed_here():
    """A method of ours that transformers comes to have as well would be an override by accident."""
    ours = {name for name, value in vars(sf.DiffusionTrainer).items() if callable(value) or "method" in str(value)}
    both = {name for name in ours if name in vars(Trainer) and not (name.startswith("__") and name != "__init__")}
    assert both == set(PRIVATE | PUBLIC)


def test_scoped_replacements_are_where_the_trainer_looks():
    assert Trainer._run_epoch.__globals__ is vars(transformers.trainer)
    assert parameters_of(transformers.trainer.skip_first_batches) == ["dataloader", "num_batches"]
    step = accelerate.optimizer.AcceleratedOptimizer
    users = [n for n, f in vars(step).items() if inspect.isfunction(f) and "is_lomo_available" in names_in(f)]
    assert users and parameters_of(accelerate.optimizer.is_lomo_available) == []


# -- in effect -----------------------------------------------------------------------------------------------


@pytest.fixture
def make(tmp_path, family, tiny_cache):
    return lambda **options: make_trainer(tmp_path, family, tiny_cache, **options)


class AtStep(TrainerCallback):
    """Calls something at the start of every step."""

    def __init__(self, action):
        self.action = action

    def on_step_begin(self, args, state, control, **kwargs):
        self.action(state.global_step)


def test_scoped_replacements_are_undone_whatever_happens(make):
    stock = transformers.trainer.skip_first_batches, accelerate.optimizer.is_lomo_available
    inside = []

    def look(step):
        inside.append((transformers.trainer.skip_first_batches, accelerate.optimizer.is_lomo_available))
        if step == 1:
            raise KeyError("in the middle of an epoch")

    trainer = make(callbacks=[AtStep(look)])
    with pytest.raises(KeyError, match="in the middle"):
        trainer.train()
    assert len(inside) == 2 and not any(new is old for pair in inside for new, old in zip(pair, stock, strict=True))
    assert (transformers.trainer.skip_first_batches, accelerate.optimizer.is_lomo_available) == stock
    # Other people's loaders are still skipped by accelerate, and ours skips by itself.
    skip = inside[0][0]
    plain = torch.utils.data.DataLoader(list(range(6)), batch_size=2)
    assert [batch.tolist() for batch in skip(plain, 2)] == [[4, 5]]
    loader = trainer.get_train_dataloader()
    everything = [batch["row"].tolist() for batch in loader]
    assert skip(loader, 2) is loader and [batch["row"].tolist() for batch in loader] == everything[2:]
    make(max_steps=1).train()
    assert (transformers.trainer.skip_first_batches, accelerate.optimizer.is_lomo_available) == stock


def test_zero_grad_of_a_run_is_removed_after_it(make):
    seen = []
    trainer = make(
        max_steps=3, callbacks=[AtStep(lambda step: seen.append(dict(vars(trainer.model)).get("zero_grad")))]
    )
    trainer.train()
    assert len(seen) == 3 and all(callable(function) for function in seen)
    assert "zero_grad" not in vars(trainer.model) and "zero_grad" not in vars(trainer.model_wrapped)
    for parameter in trainer.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    trainer.model.zero_grad()  # torch's own: all of them
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    for parameter in trainer.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    seen[0]()  # the run's: what is trained
    for parameter in trainer.model.parameters():
        assert (parameter.grad is None) == parameter.requires_grad


def test_gradients_start_at_zero_in_every_step(make, monkeypatch):
    trainer = make(max_steps=4, gradient_accumulation_steps=2)
    before = []
    step = trainer.training_step

    def look(*args, **kwargs):
        before.append(any(p.grad is not None for p in trainer.model.parameters()))
        return step(*args, **kwargs)

    monkeypatch.setattr(trainer, "training_step", look)
    trainer.train()
    assert before == [False, True] * 4  # the second micro-batch adds to the first


def test_modules_are_walked_only_when_the_mode_changes(make, monkeypatch):
    def walks(**options):
        trainer = make(overwrite_output_dir=True, **options)
        calls, modes = [], []
        train = trainer.model.train
        monkeypatch.setattr(trainer.model, "train", lambda mode=True: calls.append(mode) or train(mode))
        step = trainer.compute_loss
        monkeypatch.setattr(
            trainer,
            "compute_loss",
            lambda *a, **k: modes.append(all(m.training for m in trainer.model.modules())) or step(*a, **k),
        )
        trainer.train()
        assert modes and all(modes)  # every step was in training mode
        return calls.count(True)

    few, many = walks(max_steps=3), walks(max_steps=12)
    assert few == many <= 2
    evaluated = walks(max_steps=12, eval_fraction=0.3, eval_strategy="steps", eval_steps=4)
    assert few < evaluated <= few + 3  # once after each evaluation
    # The parent walks at every step: when it stops doing so, our override can go.
    assert "train" in names_in(Trainer.training_step)


def test_clipping_takes_the_trained_parameters_and_equals_torch_over_all(make, monkeypatch):
    trainer = make(max_steps=1, max_grad_norm=0.05)
    seen = {}
    clip = trainer.accelerator.clip_grad_norm_

    def look(parameters, *args, **kwargs):
        parameters = list(parameters)
        seen["parameters"] = parameters
        seen["copy"] = copy.deepcopy(trainer.model)
        for left, right in zip(seen["copy"].parameters(), trainer.model.parameters(), strict=True):
            left.grad = None if right.grad is None else right.grad.clone()
        seen["norm"] = clip(parameters, *args, **kwargs)
        seen["after"] = [None if p.grad is None else p.grad.clone() for p in trainer.model.parameters()]
        return seen["norm"]

    monkeypatch.setattr(trainer.accelerator, "clip_grad_norm_", look)
    trainer.train()
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert {id(p) for p in seen["parameters"]} == {id(p) for p in trained} and len(trained) < len(seen["after"]) / 1.5
    norm = torch.nn.utils.clip_grad_norm_(seen["copy"].parameters(), 0.05)  # torch's, over every parameter
    assert norm > 0.05 and torch.equal(norm, seen["norm"])
    for ours, theirs in zip(seen["after"], seen["copy"].parameters(), strict=True):
        assert (ours is None) == (theirs.grad is None) and (ours is None or torch.equal(ours, theirs.grad))
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_without_clipping_the_norm_is_logged_all_the_same(make):
    trainer = make(max_steps=2, max_grad_norm=0.0)
    trainer.train()
    free = make(max_steps=2, max_grad_norm=1e9)
    free.train()
    norms = [[e["grad_norm"] for e in t.state.log_history if "grad_norm" in e] for t in (trainer, free)]
    assert norms[0] == norms[1] and len(norms[0]) == 2


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_step_equals_the_parents(make, accumulation):
    trainer = make()
    trainer.create_optimizer_and_scheduler(1)
    trainer.current_gradient_accumulation_steps = accumulation
    batch = dict(next(iter(trainer.get_train_dataloader())))  # a copy that no step gives back

    def gradients(step):
        trainer.model.zero_grad()
        loss = step(trainer, trainer.model, batch, None)
        return loss, {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}

    ours, our_gradients = gradients(sf.DiffusionTrainer.training_step)
    theirs, their_gradients = gradients(Trainer.training_step)
    assert torch.equal(ours, theirs) and our_gradients.keys() == their_gradients.keys()
    assert all(torch.equal(our_gradients[name], their_gradients[name]) for name in our_gradients)
    mean = trainer.family.compute_loss(trainer.model, batch, trainer.args)[0].mean()
    torch.testing.assert_close(ours, mean.detach() / accumulation)


def test_keys_stay_on_the_host(make, monkeypatch):
    """Moving them to a GPU and reading them there would be a sync per micro-batch."""
    trainer = make(stratified_levels=True)
    batch = next(iter(trainer.get_train_dataloader()))
    copied = []

    def move(data):
        copied.extend(data)
        return {name: value.to("meta") for name, value in data.items()}

    monkeypatch.setattr(trainer, "_prepare_input", move)
    moved = trainer._prepare_inputs(batch)
    assert set(copied) == batch.keys() - set(HOST_KEYS)
    assert {k for k, v in moved.items() if v.device.type == "cpu"} == set(HOST_KEYS) and moved.keys() == batch.keys()
    assert trainer._prepare_inputs({"latents": batch["latents"]}).keys() == {"latents"}  # a batch without keys


def test_page_locked_memory_is_copied_without_waiting(make, monkeypatch):
    trainer, waits = make(), []
    to = torch.Tensor.to

    def look(tensor, *args, **kwargs):
        waits.append(not kwargs.get("non_blocking", False))
        return to(tensor, *args, **kwargs)

    batch = {"latents": torch.randn(3, 4)}
    monkeypatch.setattr(torch.Tensor, "to", look)
    assert torch.equal(trainer._prepare_inputs(batch)["latents"], batch["latents"]) and waits == [True]
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: True)
    waits.clear()
    assert torch.equal(trainer._prepare_inputs(batch)["latents"], batch["latents"]) and waits[0] is False


def readers():
    return [t for t in threading.enumerate() if t.name == "reader"]


def test_steps_give_their_batches_back(make, monkeypatch):
    """Not before their backward, and all of them: training, evaluation and `debug_batch`."""
    trainer = make(max_steps=4, gradient_accumulation_steps=3, eval_fraction=0.3)  # an epoch, with a tail
    given, released, buffers = [], [], []
    make_buffer = Buffer.__init__
    monkeypatch.setattr(Buffer, "__init__", lambda self, **kw: buffers.append(self) or make_buffer(self, **kw))
    take, give_back = ThreadedReader.__next__, Batch.release
    monkeypatch.setattr(ThreadedReader, "__next__", lambda self: given.append(take(self)) or given[-1])
    monkeypatch.setattr(Batch, "release", lambda self: released.append(self) or give_back(self))
    backward = trainer.accelerator.backward

    def look(loss, **kwargs):
        assert given[len(released)]  # not yet empty
        backward(loss, **kwargs)
        assert given[len(released)]

    monkeypatch.setattr(trainer.accelerator, "backward", look)
    trainer.train()
    steps = len(trainer.get_train_dataloader())
    assert len(given) == steps and all(a is b for a, b in zip(given, released, strict=True))
    assert not any(given) and not readers() and len(buffers) == 2 * 3 + 1
    trainer.evaluate()
    assert len(given) == len(released) == steps + len(trainer.get_eval_dataloader())
    sf.debug_batch(trainer)
    assert len(given) == len(released) and not any(given) and not readers()


@pytest.mark.parametrize("where", ["training", "evaluation"])
def test_no_thread_survives_an_error(make, monkeypatch, where):
    trainer = make(eval_fraction=0.3)
    alive = []

    def fail(*args, **kwargs):
        alive.extend(readers())
        raise KeyError("in the step")

    monkeypatch.setattr(trainer, "compute_loss" if where == "training" else "_grid_losses", fail)
    with pytest.raises(KeyError, match="in the step") as caught:
        trainer.train() if where == "training" else trainer.evaluate()
    assert len(alive) == 2 and not readers()  # while the traceback keeps the iterator
    assert caught.value.__traceback__ is not None


def test_a_failed_save_leaves_the_options_as_they_were(make, monkeypatch):
    trainer = make(max_steps=1, save_strategy="steps", save_steps=1, save_total_limit=3)

    def full(*args, **kwargs):
        raise PermissionError("Not yours")

    monkeypatch.setattr(trainer, "_save", full)
    with pytest.raises(PermissionError, match="Not yours"):
        trainer.train()
    assert trainer.args.save_total_limit == 3


def test_stock_optimizers_come_from_the_parent(make):
    args = make(optim="adamw_torch", weight_decay=0.1).args
    assert sf.DiffusionTrainer.get_optimizer_cls_and_kwargs(args) == Trainer.get_optimizer_cls_and_kwargs(args)
    prodigy, kwargs = sf.DiffusionTrainer.get_optimizer_cls_and_kwargs(make(optim="prodigy", learning_rate=0.7).args)
    assert prodigy.__name__ == "Prodigy" and kwargs["lr"] == 0.7
