"""A rank that ends in the middle of training: the others end too, at once, and know which it was."""

import os
import signal
import time
from unittest.mock import patch

import pytest
import torch
from fusemlp.kernels import launch
from fusemlp.parallel import ParallelMLP
from fusemlp.parallel.training import lost_ranks as module
from fusemlp.parallel.training.lost_ranks import enlist, lost_ranks
from ranks import TIMEOUT, everyone, on_ranks

VICTIM = 1


def lose_a_rank(backend):
    enlist()
    net = ParallelMLP(5, [8, 16], 4, mesh=everyone(), batch_norm=True)
    with launch.backend(backend):
        net(torch.randn(6, 5)).sum().backward()
        if torch.distributed.get_rank() == VICTIM:
            os.kill(os.getpid(), signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(RuntimeError):
            net(torch.randn(6, 5))
    assert lost_ranks() == [VICTIM]
    assert time.monotonic() - began < TIMEOUT.total_seconds() / 2


@pytest.mark.parametrize("debug", ["OFF", "DETAIL"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_killed_rank_is_named_by_all_others(backend, debug):
    on_ranks(4, lose_a_rank, backend, debug=debug, killed=VICTIM)


def leave():
    """All but the first at once; the first sees them end."""
    enlist()
    torch.distributed.barrier()
    if torch.distributed.get_rank():
        with patch.object(module, "PATIENCE", 0.0):
            assert lost_ranks() == []
    else:
        assert lost_ranks() == []


def test_a_rank_that_leaves_is_not_lost():
    on_ranks(3, leave)
