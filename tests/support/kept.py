"""Memory that autograd holds between the two passes of a network, counted on tensors without values."""

import torch


class _FlashAttention(torch.autograd.Function):
    """Keeps for its backward pass what fused attention keeps: no matrix of tokens by tokens."""

    @staticmethod
    def forward(ctx, query, key, value):
        found = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, found)
        return found

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError


def kept_bytes(network, forward, monkeypatch):
    """Bytes of the storages that `forward()` leaves to the backward pass, parameters apart."""
    parameters = {p.untyped_storage()._cdata for p in network.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            storages[storage._cdata] = (storage.nbytes(), tensor)  # kept alive, so that no other gets its address
        return tensor

    def attention(query, key, value, **options):
        return _FlashAttention.apply(query, key, value)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(size for size, _ in storages.values())
