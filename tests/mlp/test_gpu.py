"""What only a GPU can show. Each is reported as not run where there is none."""

import pytest
import torch
from fusemlp.kernels import launch
from fusemlp.mlp import MLP, reference
from fusemlp.mlp import functional as F
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
