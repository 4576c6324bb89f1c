"""Edits: what a stock pipeline gives its network, and mistakes in how sources are shown, the same for every family."""

import contextlib

import torch


class Caught(Exception):
    """Ends a pipeline's call."""


def stock_inputs(pipeline, *, step, **call):
    """What the pipeline's own call gives its network at one of its steps; the rest is not drawn."""
    seen = []

    def hook(module, args, inputs):
        seen.append(inputs)
        if len(seen) > step:
            raise Caught

    handle = pipeline.transformer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with contextlib.suppress(Caught):
            pipeline(**call)
    finally:
        handle.remove()
    return seen[step]


def our_inputs(family, model, batch, noisy_latents, levels):
    """What `predict` gives the network, and the prediction."""
    seen = {}
    handle = model.register_forward_pre_hook(lambda module, args, inputs: seen.update(inputs), with_kwargs=True)
    try:
        with torch.no_grad():
            return seen, family.predict(model, batch, noisy_latents, levels)
    finally:
        handle.remove()


def unequal(ours, theirs):
    """The inputs that are not equal, bit for bit; ids may be whole numbers here and floats there."""

    def equal(one, other):
        if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
            return one.shape == other.shape and torch.equal(one.double(), other.double())
        return (one or None) == (other or None)  # no attention_kwargs are as good as {}

    return sorted(name for name in ours.keys() | theirs.keys() if not equal(ours.get(name), theirs.get(name)))


def rows_of(inputs):
    """The inputs of several calls with batch 1 as those of one batch; ids without a batch axis stand once."""
    first = inputs[0]
    once = {name for name, value in first.items() if isinstance(value, torch.Tensor) and name.endswith("_ids")}
    once = {name for name in once if first[name].ndim == 2}

    def joined(name, values):
        if isinstance(values[0], torch.Tensor) and name not in once:
            return torch.cat(values)
        return [shape for value in values for shape in value] if name == "img_shapes" else values[0]

    return {name: joined(name, [each[name] for each in inputs]) for name in first}


# ---- mistakes ----


def _sources(change):
    """A mistake in the clean sources: a function (family, list of them, batch) -> list."""

    def apply(monkeypatch, family):
        right = type(family).clean_sources

        def wrong(self, batch):
            return change(self, right(self, batch), batch)

        monkeypatch.setattr(type(family), "clean_sources", wrong)

    return apply


def _raw(family, sources, batch):
    """Sources that are not normalised: their statistics are put back."""
    mean, std = family.latent_statistics()
    return [source * std + mean for source in sources]


def _noised(family, sources, batch):
    return [0.5 * s + 0.5 * torch.randn(s.shape, generator=torch.Generator().manual_seed(1)) for s in sources]


def of_network(change):
    """A mistake in what the network is given: a function (inputs, number of the target's tokens) -> changes."""

    def apply(monkeypatch, family):
        right = type(family).predict

        def wrong(self, model, batch, noisy_latents, levels):
            tokens = self.image_seq_len(noisy_latents)
            handle = model.register_forward_pre_hook(
                lambda module, args, inputs: (args, inputs | change(inputs, tokens)), with_kwargs=True
            )
            try:
                return right(self, model, batch, noisy_latents, levels)
            finally:
                handle.remove()

        monkeypatch.setattr(type(family), "predict", wrong)

    return apply


def _cut_at_the_end(monkeypatch, family):
    """The prediction is taken from the last tokens instead of the first."""
    right = type(family).predict

    def wrong(self, model, batch, noisy_latents, levels):
        tokens = self.image_seq_len(noisy_latents)
        handle = model.register_forward_hook(lambda module, args, output: (output[0].roll(tokens, 1),))
        try:
            return right(self, model, batch, noisy_latents, levels)
        finally:
            handle.remove()

    monkeypatch.setattr(type(family), "predict", wrong)


def in_front(inputs, tokens):
    """Sources before the noisy tokens, with the ids or shapes that belong to them."""
    changes = {"hidden_states": inputs["hidden_states"].roll(-tokens, 1)}
    if "img_ids" in inputs:
        changes["img_ids"] = inputs["img_ids"].roll(-tokens, inputs["img_ids"].ndim - 2)
    if "img_shapes" in inputs:
        changes["img_shapes"] = [[*shapes[1:], shapes[0]] for shapes in inputs["img_shapes"]]
    return changes


def _tokens_in_front(inputs, tokens):
    return {"hidden_states": inputs["hidden_states"].roll(-tokens, 1)}


def _same_place(inputs, tokens):
    """Sources at the place of the target: ids without their offset."""
    ids = inputs["img_ids"].clone()
    ids[..., 0] = 0
    return {"img_ids": ids}


MISTAKES = {
    "sources that are not normalised": _sources(_raw),
    "noise on the sources": _sources(_noised),
    "another row's sources": _sources(lambda family, sources, batch: [s.roll(1, 0) for s in sources]),
    "the target as its source": _sources(lambda family, sources, batch: [family.clean_latents(batch)] * len(sources)),
    "mirrored sources": _sources(lambda family, sources, batch: [s.flip(-1) for s in sources]),
    "sources upside down": _sources(lambda family, sources, batch: [s.flip(-2) for s in sources]),
    "negated sources": _sources(lambda family, sources, batch: [-s for s in sources]),
    "no sources": _sources(lambda family, sources, batch: []),
    "a source twice": _sources(lambda family, sources, batch: [*sources, sources[-1]]),
    "sources in front": of_network(in_front),
    "sources in front with the target's places": of_network(_tokens_in_front),
    "the output cut at the wrong end": _cut_at_the_end,
}
TWO = {
    "sources swapped": _sources(lambda family, sources, batch: sources[::-1]),
    "only the first source": _sources(lambda family, sources, batch: sources[:1]),
}
IDS = {"ids without the offset": of_network(_same_place)}


def instead_of(method, wrong):
    """A mistake in another method of the family."""
    return lambda monkeypatch, family: monkeypatch.setattr(type(family), method, wrong)


def _sampled(self, pixel_values, encoders):
    """A draw of the posterior instead of its mode."""
    frames = [2] if "Qwen" in type(encoders.vae).__name__ else []
    with torch.no_grad():
        drawn = encoders.vae.encode(pixel_values.unsqueeze(2) if frames else pixel_values).latent_dist
        drawn = drawn.sample(torch.Generator().manual_seed(0))
    return {"latents": drawn.squeeze(2) if frames else drawn}


MISTAKES["a draw of the posterior"] = instead_of("encode_images", _sampled)
