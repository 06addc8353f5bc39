"""That PyTorch's competitors are PyTorch's alone."""

import sys
from pathlib import Path

import pytest
import torch
from fusemlp.bench import mlp, ops
from fusemlp.bench.cases import NETS, QUICK_LAYERS, QUICK_NETS, QUICK_OPERATIONS, NetCase
from fusemlp.bench.competitors import (
    CEILING,
    NET_COMPETITORS,
    NET_PASSES,
    layer_call,
    layer_operands,
    net_call,
    net_operands,
)
from fusemlp.mlp import MLP, reference
from fusemlp.mlp.modules import BatchNorm1d

# The compiler's own.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

EVERYTHING = NetCase("everything", 16, 8, (12, 12), 4, batch_norm=True, dropout=0.25, dtype=torch.float32)
CASES = [*NETS, *QUICK_NETS, EVERYTHING]
OTHERS = [name for name in NET_COMPETITORS if name != "fusemlp"]
META, CPU = torch.device("meta"), torch.device("cpu")


def ours_among(net):
    return {type(module).__name__ for module in net.modules() if type(module).__module__.startswith("fusemlp")}


@pytest.mark.parametrize("competitor", OTHERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_competitor_holds_a_module_of_ours(case, competitor):
    # max-autotune is for CUDA alone; the ceiling makes its own weights.
    device = META if competitor == CEILING else torch.device("cuda")
    assert not ours_among(NET_COMPETITORS[competitor](case, case.build(META), device))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_truth_holds_no_module_of_ours(case):
    net = mlp.true_net(case, META)
    assert not ours_among(net)
    assert {tensor.dtype for tensor in net.state_dict().values()} <= {torch.float64, torch.int64}


@pytest.mark.parametrize("activation", [name for name in reference.ACTIVATIONS if name])
def test_the_net_of_torchs_modules_is_the_net(activation):
    net = MLP(8, (12, 12), 4, activation=activation, batch_norm=True, dropout=0.25)
    torchs = NET_COMPETITORS["torch"](EVERYTHING, net, CPU)
    assert repr(list(torchs)) == repr(list(net))
    assert list(torchs.state_dict()) == list(net.state_dict())
    x = torch.randn(16, 8)
    torch.manual_seed(1)
    theirs = torchs(x)
    torch.manual_seed(1)
    torch.testing.assert_close(theirs, net(x), rtol=0, atol=0)


def test_parameters_and_buffers_are_the_nets_own():
    net = EVERYTHING.build(CPU)
    torchs = NET_COMPETITORS["torch"](EVERYTHING, net, CPU)
    assert all(a is b for a, b in zip(torchs.parameters(), net.parameters(), strict=True))
    for _ in range(2):
        net_call(torchs, net_operands(EVERYTHING, CPU), "training")()
    assert [module.num_batches_tracked.item() for module in net if isinstance(module, BatchNorm1d)] == [2, 2]
    assert all(a is b for a, b in zip(torchs.buffers(), net.buffers(), strict=True))


OPTIONS = {
    "eps and momentum": {"eps": 1e-2, "momentum": None},
    "not affine": {"affine": False},
    "no running statistics": {"track_running_stats": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_of_batch_norm_are_kept(options):
    net = torch.nn.Sequential(BatchNorm1d(8, **options))
    (torchs,) = NET_COMPETITORS["torch"](EVERYTHING, net, CPU)
    assert repr(torchs) == repr(net[0])
    assert torchs.state_dict().keys() == net[0].state_dict().keys()


QUICK = [(mlp, case, which) for case in QUICK_NETS for which in NET_PASSES]
# "both" runs backward too.
QUICK += [(ops, case, which) for case in QUICK_OPERATIONS for which in ("forward", "both")]


@pytest.mark.parametrize(("command", "case", "which"), QUICK, ids=lambda each: getattr(each, "name", None))
def test_no_competitor_runs_our_code(command, case, which):
    # What the compiler has made of PyTorch's is not Python.
    without = "torch.compile"
    if command is mlp:
        makers = mlp.makers(mlp.nets(case, CPU, without), case, which, CPU)
    else:
        makers = ops.makers(case, which, CPU, without)
    calls = {name: make(0) for name, make in makers.items()}
    assert {name for name, call in calls.items() if files_run(call) & OURS} == {"fusemlp"}


FOLDER = Path(mlp.__file__).parents[1]
OURS = {*FOLDER.glob("mlp/*.py"), *FOLDER.glob("kernels/*.py")}


def files_run(call):
    """The files whose functions a call runs, in this thread: on a CPU, backward too."""
    ran = set()
    sys.setprofile(lambda frame, event, _: ran.add(Path(frame.f_code.co_filename)))
    try:
        call()
    finally:
        sys.setprofile(None)
    return ran


@pytest.mark.parametrize(("which", "donated"), [("backward", False), ("both", True)])
def test_a_backward_that_runs_again_gives_no_memory_away(which, donated):
    seen = []

    def noting(input, weight, bias):
        seen.append(torch._functorch.config.donated_buffer)
        return torch.nn.functional.linear(input, weight, bias)

    layer_call(noting, layer_operands(QUICK_LAYERS[0], torch.device("cpu")), which)()
    assert seen == [donated]
