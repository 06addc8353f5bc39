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
from fusemlp.parallel.training.lost_ranks import count_step, enlist, hung_ranks, lost_ranks
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


def stand_still(how):
    """The victim stands still, or goes no further; the others name it."""
    with patch.object(module, "BEAT", 0.05), patch.object(module, "PATIENCE", 0.0):
        enlist()
        count_step()
        torch.distributed.barrier()
        if torch.distributed.get_rank() != VICTIM:
            count_step()
            time.sleep(0.5)
            assert lost_ranks() == []
            assert hung_ranks() == [VICTIM]
        elif how == "stopped":
            if (child := os.fork()) == 0:
                time.sleep(3)
                os.kill(os.getppid(), signal.SIGCONT)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGSTOP)
            os.waitpid(child, 0)
        else:
            time.sleep(2)


@pytest.mark.skipif(os.name != "posix", reason="stops a process")
@pytest.mark.parametrize("how", ["stopped", "behind"])
def test_a_rank_that_hangs_is_named_by_all_others(how):
    on_ranks(3, stand_still, how)
