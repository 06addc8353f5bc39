"""What only a GPU can show. Each is reported as not run where there is none."""

import copy

import pytest
import torch
from fusemlp.kernels import launch
from fusemlp.mlp import MLP, make_graphed_step, reference
from fusemlp.mlp import functional as F
from fusemlp.mlp.graphed_step import EAGER_STEPS
from tolerance import assert_as_close_as_torch

pytestmark = pytest.mark.gpu


NETS = {"plain": {}, "batch norm": {"batch_norm": True}, "dropout": {"batch_norm": True, "dropout": 0.1}}


def net_and_input(rows=512, **arguments):
    net = MLP(256, [512, 384], 64, device="cuda", dtype=torch.bfloat16, **arguments)
    return net, torch.randn(rows, 256, device="cuda", dtype=torch.bfloat16)


def gradients(net, x):
    return torch.autograd.grad(net(x).square().mean(), list(net.parameters()))


def aside(warm_up):
    """On a stream of its own, as is asked for before a capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        warm_up()
    torch.cuda.current_stream().wait_stream(side)


def test_auto_serves_bfloat16_by_triton_and_float64_by_torch():
    x = torch.ones(4, 4, device="cuda")
    assert launch.explain(x.bfloat16()).backend == "triton"
    assert launch.explain(x.double()).backend == "torch"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
def test_tma_main_loop_three_way(dtype, activation, kernels):
    def eighths(*shape):
        return (torch.randint(-8, 9, shape, device="cuda") / 8).to(dtype)

    # Sums of their products are exact, so that no rounding decides what a ReLU lets through.
    x, w, b, grad = eighths(4096, 2048), eighths(1536, 2048) / 32, eighths(1536), eighths(4096, 1536)

    def run(fn, *args):
        leaves = [t.detach().requires_grad_() for t in args]
        y = fn(*leaves, activation)
        return y, *torch.autograd.grad(y, leaves, grad.to(y.dtype))

    ours, torchs = run(F.linear, x, w, b), run(reference.linear, x, w, b)
    truths = run(reference.linear, x.double(), w.double(), b.double())
    for name, *three in zip(("y", "dx", "dw", "db"), ours, torchs, truths, strict=True):
        assert_as_close_as_torch(*three, name)


@pytest.mark.parametrize("arguments", [NETS["plain"], NETS["batch norm"]], ids=["plain", "batch norm"])
def test_a_training_step_in_a_cuda_graph(arguments):
    net, x = net_and_input(**arguments)
    expected = gradients(net, x)
    aside(lambda: gradients(net, x))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(net, x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, gradients(net, x), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_every_replay_of_a_cuda_graph_drops_anew():
    x = torch.ones(512, 512, device="cuda")
    aside(lambda: F.dropout(x))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = F.dropout(x)
    graph.replay()
    first = captured.clone()
    graph.replay()
    assert (captured != first).float().mean() > 0.4


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")
@pytest.mark.parametrize("arguments", NETS.values(), ids=NETS)
def test_no_host_synchronisation(arguments):
    net, x = net_and_input(**arguments)
    gradients(net, x)
    try:
        torch.cuda.set_sync_debug_mode("error")
        gradients(net, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("arguments", NETS.values(), ids=NETS)
def test_same_bits_every_time(arguments):
    net, x = net_and_input(65536, **arguments)
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        results.append(gradients(net, x))
    first, second = results
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_kernels_run_on_the_current_stream():
    net, x = net_and_input()
    with torch.no_grad():
        expected = net(x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)
            late = net(x * 1)
        assert not stream.query()
        stream.synchronize()
    assert torch.equal(late, expected)


@pytest.mark.parametrize("shape", [(64, 65536), (65536, 64), (8192, 1024)], ids=str)
def test_batch_norm_of_large_matrices(shape, kernels):
    x, grad = (torch.randn(shape, device="cuda") for _ in range(2))

    def run(x, grad):
        leaf = x.detach().requires_grad_()
        y = F.batch_norm(leaf, None, None, training=True)
        return y, *torch.autograd.grad(y, leaf, grad)

    ours = run(x, grad)
    with launch.backend("torch"):
        torchs, truths = run(x, grad), run(x.double(), grad.double())
    for three in zip(ours, torchs, truths, strict=True):
        assert_as_close_as_torch(*three)


def test_relu_propagates_nan():
    x = torch.full((64, 64), float("nan"), device="cuda", dtype=torch.bfloat16)
    assert F.linear_relu(x, torch.eye(64, device="cuda", dtype=torch.bfloat16)).isnan().all()


# torch.compile instantiates the Function it traces, and warns of it, of what it imports, and of the user's precision.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores .* available but not enabled:UserWarning")
def test_compiles_with_inductor():
    net, x = net_and_input()
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True)
    torch.testing.assert_close(gradients(compiled, x), gradients(net, x))


def steps_of(net, optimizer, batches, change=lambda position, optimizer: None):
    """The losses of a loop over batches."""
    losses = []
    for position, (x, target) in enumerate(batches):
        change(position, optimizer)
        loss = F.cross_entropy(net(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def graphed_steps_of(net, optimizer, batches, change=lambda position, optimizer: None):
    step = make_graphed_step(net, F.cross_entropy, optimizer, batches[0])
    losses = []
    for position, batch in enumerate(batches):
        change(position, optimizer)
        losses.append(step(*batch))
    return torch.stack(losses)


def batches_of(count, rows=512):
    for _ in range(count):
        yield torch.randn(rows, 256, device="cuda", dtype=torch.bfloat16), torch.randint(64, (rows,), device="cuda")


def smaller_rate(position, optimizer):
    if position == 6:
        optimizer.param_groups[0]["lr"] = 0.001


def loaded_state(position, optimizer):
    if position == 6:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


CHANGES = {"no change": lambda position, optimizer: None, "rate": smaller_rate, "loaded": loaded_state}
OPTIMIZERS = {
    "SGD": lambda net: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9),
    "AdamW": lambda net: torch.optim.AdamW(net.parameters(), lr=0.01, capturable=True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_graphed_steps_are_those_of_a_loop(optimizer, change):
    net, _ = net_and_input(batch_norm=True)
    twin, batches = copy.deepcopy(net), list(batches_of(9))
    losses = graphed_steps_of(net, optimizer(net), batches, change)
    assert torch.equal(losses, steps_of(twin, optimizer(twin), batches, change))
    assert all(map(torch.equal, net.state_dict().values(), twin.state_dict().values()))


def test_graphed_steps_take_batches_from_the_host():
    net, _ = net_and_input()
    losses = graphed_steps_of(net, OPTIMIZERS["SGD"](net), [(x.cpu(), t.cpu()) for x, t in batches_of(1)] * 6)
    assert (losses.diff() < 0).all()


def test_a_graphed_step_that_waits_for_the_gpu_says_so():
    net, _ = net_and_input()
    x, target = next(batches_of(1))

    def loss(y, target):
        value = F.cross_entropy(y, target)
        return value / value.item()

    step = make_graphed_step(net, loss, OPTIMIZERS["SGD"](net), (x, target))
    for _ in range(EAGER_STEPS):
        step(x, target)
    with pytest.raises(RuntimeError, match="wait for the GPU"):
        step(x, target)
    assert torch.rand(8, device="cuda").std() > 0, "PyTorch cannot draw after the failed capture"


def test_a_graphed_step_needs_a_capturable_optimizer():
    net, _ = net_and_input()
    optimizer = torch.optim.AdamW(net.parameters())
    with pytest.raises(ValueError, match="capturable=True"):
        make_graphed_step(net, F.cross_entropy, optimizer, next(batches_of(1)))
