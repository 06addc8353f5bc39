"""What the ranks of a sharded net, or of a run, must agree on: checked once, before anything is cut."""

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .collectives import Ranks


def check_alike(ranks: Ranks, device_type: str, **facts: Any) -> None:
    """Raise ValueError on every rank, naming the facts and the ranks, if they differ from rank 0's.

    One all-gather of a digest for each fact, so that nothing else has to match for it to end.
    """
    digests = [hashlib.sha256(repr(fact).encode()).digest()[:8] for fact in facts.values()]
    mine = torch.tensor([int.from_bytes(each, "big", signed=True) for each in digests], device=device_type)
    all_of_them = [torch.empty_like(mine) for _ in range(ranks.size)]
    dist.all_gather(all_of_them, mine, group=ranks.group)
    table = torch.stack(all_of_them).cpu()
    found = []
    for name, column in zip(facts, table.t(), strict=True):
        first, *differ = [
            str(dist.get_global_rank(ranks.group, rank))
            for rank in (0, *(column != column[0]).nonzero()[:, 0].tolist())
        ]
        if differ:
            who = f"rank {differ[0]} differs" if len(differ) == 1 else f"ranks {', '.join(differ)} differ"
            found.append(f"{name}: {who} from rank {first}")
    if found:
        raise ValueError("; ".join(found))


def random_state(device_type: str) -> str:
    """A digest of where the random generators stand."""
    states = [torch.get_rng_state()]
    if device_type == "cuda":
        states.append(torch.cuda.get_rng_state())
    return hashlib.sha256(b"".join(state.numpy().tobytes() for state in states)).hexdigest()


def shapes(module: nn.Module) -> list[tuple[Any, ...]]:
    """Names, shapes and dtypes of all that a module holds."""
    held = [*module.named_parameters(), *module.named_buffers()]
    return [(name, tuple(t.shape), t.dtype) for name, t in held]


def values(module: nn.Module) -> list[float]:
    """A sum of each parameter's values."""
    return [float(parameter.detach().double().sum()) for parameter in module.parameters()]
