"""Check that all ranks have the same model, plan, seed or options before anything is sharded."""

import hashlib
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from ..mlp.errors import ArgumentValueError
from .collectives import Ranks

# Elements that are copied to the host at once for their digest.
CHUNK = 2**22


def check_alike(ranks: Ranks, device_type: str, **facts: Any) -> None:
    """Check that values are the same on every rank.

    The ranks exchange a 64-bit digest of each value's `repr` in a single all-gather. Values of any type and length can
    therefore be compared without a deadlock.

    Args:
        ranks: The ranks. All of them must call this function with the same names.
        device_type: Device of the exchanged tensor, "cpu" or "cuda".
        **facts: The values to compare, by the name that the error message uses.

    Raises:
        ValueError: On every rank, if a value differs from that of the first rank. The message lists the names and the
            ranks.
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
        raise ArgumentValueError("; ".join(found))


# By group, the sizes that `check_parts` has found right.
_compared: WeakKeyDictionary[dist.ProcessGroup, set[tuple[int, int | None]]] = WeakKeyDictionary()


def check_parts(ranks: Ranks, device_type: str, name: str, part: int, whole: int | None) -> None:
    """Check that each rank holds its part of a dimension, as `Ranks.part` cuts it.

    When a group has these sizes for the first time, the ranks exchange them in an all-gather and wait for it. Later
    calls do nothing, so that the check may stand in every step. If a rank's part is wrong in a later call, that rank
    alone raises the error: the others may not wait.

    Args:
        ranks: The ranks. All of them must call this function.
        device_type: See `check_alike`.
        name: The name of the tensor for the error message.
        part: Size of this rank's part.
        whole: Size of the whole dimension. None if it is not known; then all parts must be equal.

    Raises:
        ValueError: If a rank has another part, or another whole than the first rank; in the first call on every rank.
    """
    compared = _compared.setdefault(ranks.group, set())
    if (part, whole) in compared:
        return
    own = None if whole is None else ranks.part(whole)
    if compared and own is not None and part != own.stop - own.start:
        raise ArgumentValueError(
            f"{name}: {part} classes on rank {ranks.rank}; of {whole} classes it has {own.stop - own.start}"
        )
    mine = torch.tensor([part, -1 if whole is None else whole], device=device_type)
    all_of_them = [torch.empty_like(mine) for _ in range(ranks.size)]
    dist.all_gather(all_of_them, mine, group=ranks.group)
    parts, wholes = torch.stack(all_of_them).t().tolist()
    if len({*wholes}) > 1:
        given = [each if each >= 0 else None for each in wholes]
        raise ArgumentValueError(f"classes: {given} on the ranks; must be the same")
    if whole is None and len({*parts}) > 1:
        unequal = f"{name}: {parts} classes on the ranks"
        raise ArgumentValueError(f"{unequal}; if they are not equal, give their sum as classes")
    cuts = [] if whole is None else [ranks.part(whole, rank) for rank in range(ranks.size)]
    if whole is not None and parts != (expected := [cut.stop - cut.start for cut in cuts]):
        raise ArgumentValueError(f"{name}: {parts} classes on the ranks; {whole} classes are cut into {expected}")
    compared.add((part, whole))


def random_state(device_type: str) -> str:
    """A digest of the state of PyTorch's random number generators: the CPU's and, for "cuda", the current GPU's."""
    states = [torch.get_rng_state()]
    if device_type == "cuda":
        states.append(torch.cuda.get_rng_state())
    return hashlib.sha256(b"".join(state.numpy().tobytes() for state in states)).hexdigest()


def shapes(module: nn.Module) -> list[tuple[Any, ...]]:
    """The name, shape and dtype of every parameter and buffer of a module, and whether it needs a gradient."""
    return [(name, tuple(t.shape), t.dtype, t.requires_grad) for name, t in _tensors(module)]


def values(module: nn.Module) -> str:
    """A digest of the bytes of every parameter and buffer. Those on the meta device have none."""
    digest = hashlib.blake2b(digest_size=16)
    for _, t in _tensors(module):
        if not t.is_meta:
            for part in (t.to_local() if isinstance(t, DTensor) else t).detach().reshape(-1).split(CHUNK):
                digest.update(part.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]
