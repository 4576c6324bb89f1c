"""Keyed randomness: a sample's random numbers follow from (seed, epoch, position), never from a running state."""

from collections.abc import Iterable, Mapping, Sequence

import torch

_MASK = (1 << 64) - 1


def _mix(z: int) -> int:
    """Finaliser of SplitMix64 (Steele, Lea and Flood 2014, figure 17): every input bit reaches every output bit."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return z ^ (z >> 31)


def hash64(*parts: int | str) -> int:
    """A 64-bit hash of integers and strings, the same on every machine and for ever.

    Args:
        parts: integers of any size and sign, and strings (hashed as UTF-8). Order matters.

    Returns:
        An integer in [0, 2**64).
    """
    state = 0
    for part in parts:
        if isinstance(part, str):
            data = part.encode()
            words = [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)] + [len(data) ^ _MASK]
        else:
            words = [part & _MASK]
        for word in words:
            state = _mix((state + 0x9E3779B97F4A7C15 & _MASK) ^ _mix(word))
    return state


def noise_keys(seed: int, epoch: int, positions: Iterable[int]) -> torch.Tensor:
    """Keys of the samples at `positions` of the epoch's order: (B,), int64 (the hash's bits, so often negative)."""
    return torch.tensor([hash64(seed, epoch, p) for p in positions], dtype=torch.uint64).view(torch.int64)


def step_keys(seed: int, epoch: int, positions: Iterable[int], total_batch: int) -> torch.Tensor:
    """Keys of the optimizer steps that hold the samples at `positions`: (B,), int64; one step, one key."""
    hashes = [hash64(seed, epoch, "step", p // total_batch) for p in positions]
    return torch.tensor(hashes, dtype=torch.uint64).view(torch.int64)


def signed64(key: int) -> int:
    """The same 64 bits as an int64 tensor holds them."""
    return key - (1 << 64) if key >> 63 else key


def generator(key: int, stream: str, *, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one sample and one `stream` ("noise", "level", ...).

    torch keeps only the low 32 bits of a CPU seed, so the 64-bit key is folded by hash first.
    """
    return torch.Generator(device).manual_seed(hash64(key, stream) & 0xFFFFFFFF)


def sample_keys(batch: Mapping[str, torch.Tensor], batch_size: int) -> torch.Tensor:
    """The keys of a batch, (B,) int64; fresh ones from torch's default generator where a loader gave none."""
    if "noise_key" in batch:
        return batch["noise_key"]
    return torch.randint(-(1 << 63), (1 << 63) - 1, (batch_size,), dtype=torch.int64)


def randn(
    keys: torch.Tensor | Sequence[int],
    shape: torch.Size | Sequence[int],
    *,
    stream: str = "noise",
    device: torch.device | str = "cpu",
    draw_on_cpu: bool = False,
) -> torch.Tensor:
    """Standard normal noise of `shape` (B, ...), float32, on `device`, one sample per key.

    Args:
        draw_on_cpu: draw with the CPU's generator and copy. CPU and CUDA streams differ, so evaluation uses this
            to get the same noise on every machine.
    """
    source = "cpu" if draw_on_cpu else device
    rows = [
        torch.randn(*shape[1:], generator=generator(int(key), stream, device=source), device=source) for key in keys
    ]
    return torch.stack(rows).to(device)


def uniform(keys: torch.Tensor | Sequence[int], *, stream: str) -> torch.Tensor:
    """Uniform numbers in [0, 1): (B,), float64, on the CPU, one per key."""
    return torch.tensor([(hash64(int(key), stream) >> 11) * 2.0**-53 for key in keys], dtype=torch.float64)
