"""What people point at a model: export, tracers, counters, checkpoints and the arguments that they get wrong."""

import fusemlp
import numpy as np
import pytest
import torch
from fusemlp import MLP
from fusemlp.kernels import launch
from fusemlp.kernels.cost import ledger
from fusemlp.mlp import functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"])


def a_net(**options):
    return MLP(6, [8, 8], 3, **{"batch_norm": True, "dropout": 0.25} | options)


@BACKENDS
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_batch_norm_of_cumulative_averages(training, backend):
    ours, torchs = fusemlp.BatchNorm1d(4, momentum=None), nn.BatchNorm1d(4, momentum=None)
    x = torch.randn(7, 4)
    with launch.backend(backend):
        for norm in (ours, torchs):
            norm(x + 1)
            norm.train(training)
        torch.testing.assert_close(ours(x), torchs(x))


@pytest.mark.parametrize("make", [lambda: a_net().eval(), lambda: fusemlp.BatchNorm1d(6).eval()], ids=["MLP", "norm"])
def test_export_keeps_the_batch_dynamic(make):
    net = make()
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(net, (torch.randn(5, 6),), dynamic_shapes=dynamic).module()
    x = torch.randn(9, 6)
    torch.testing.assert_close(exported(x), net(x))


def test_onnx_runs_another_batch_size(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    net, path = a_net().eval(), tmp_path / "net.onnx"
    batch = torch.export.Dim("batch")
    torch.onnx.export(net, (torch.randn(5, 6),), path, dynamic_shapes=({0: batch},), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = torch.randn(9, 6)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), net(x).detach())


def gradients(net, x, again):
    """The gradients of a net, from two backward passes through one graph or of a gradient penalty."""
    torch.manual_seed(5)
    loss = net(x).square().sum()
    if again == "retained":
        loss.backward(retain_graph=True)
        loss.backward()
    else:
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        grad.square().sum().backward()
    return [p.grad for p in net.parameters()]


@BACKENDS
@pytest.mark.parametrize("again", ["retained", "penalty"])
def test_backward_through_recomputed_layers_twice(again, backend):
    plain, recomputing = a_net(dropout=0.0).double(), a_net(dropout=0.0, checkpoint=True).double()
    recomputing.load_state_dict(plain.state_dict())
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    with launch.backend(backend):
        torch.testing.assert_close(gradients(recomputing, x, again), gradients(plain, x, again))


@BACKENDS
@pytest.mark.parametrize(
    ("shape", "strides"),
    [((4, 6, 5), (30, 5, 1)), ((4, 6, 5), (30, 1, 6)), ((2, 6, 3, 5), (90, 15, 5, 1)), ((2, 6, 3, 5), (90, 1, 30, 6))],
    ids=["NCL", "NLC", "NCHW", "NHWC"],
)
def test_batch_norm_keeps_the_memory_format(shape, strides, backend):
    x = torch.empty_strided(shape, strides).normal_()
    with launch.backend(backend):
        y = F.batch_norm(x, None, None, training=True)
    # PyTorch returns a contiguous tensor for every three-dimensional input.
    assert y.stride() == ((30, 5, 1) if len(shape) == 3 else strides)


@pytest.mark.parametrize("make", [a_net, lambda: nn.Sequential(a_net()), lambda: nn.Sequential(*a_net())],
                         ids=["MLP", "inside", "layers"])  # fmt: skip
def test_symbolic_trace(make):
    net = make().eval()
    traced = torch.fx.symbolic_trace(net)
    x = torch.randn(5, 6)
    torch.testing.assert_close(traced(x), net(x))


def test_symbolic_trace_sees_a_child_as_one_node():
    names = [node.target for node in torch.fx.symbolic_trace(nn.Sequential(a_net(), nn.ReLU())).graph.nodes]
    assert names == ["input", "0", "1", "output"]


def test_symbolic_trace_sees_a_function_as_one_node():
    def function(input, weight):
        return F.linear(input, weight, activation="relu")

    traced = torch.fx.symbolic_trace(function)
    assert [node.target for node in traced.graph.nodes] == ["input", "weight", F.linear, "output"]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:DeprecationWarning")
def test_jit_trace_where_the_kernels_serve(kernels):
    net, x = a_net(dropout=0.0).eval(), torch.randn(5, 6)
    traced = torch.jit.trace(net, (x,))
    torch.testing.assert_close(traced(torch.ones(3, 6)), net(torch.ones(3, 6)))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_strided_nested_input():
    x = torch.nested.nested_tensor([torch.randn(2, 6), torch.randn(4, 6)])
    layer = fusemlp.Linear(6, 3)
    for part, whole in zip(layer(x).unbind(), x.unbind(), strict=True):
        torch.testing.assert_close(part, layer(whole))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_flops_are_those_of_torch(backend):
    net, x = a_net(), torch.randn(5, 6, requires_grad=True)
    with launch.backend(backend), FlopCounterMode(display=False) as counter:
        net(x).sum().backward()
    products = [(5, 6, 8), (5, 8, 8), (5, 8, 3)]
    assert counter.get_total_flops() == 3 * sum(2 * m * k * n for m, k, n in products)


def test_profiler_names_the_kernels(kernels):
    with torch.profiler.profile() as profile:
        a_net()(torch.randn(5, 6))
    assert {"fusemlp::linear_fwd", "fusemlp::batch_norm_fwd"} <= {event.key for event in profile.key_averages()}


def test_shapes_on_meta(kernels):
    net = a_net(device="meta")
    assert net(torch.empty(5, 6, device="meta")).shape == (5, 3)


@BACKENDS
@pytest.mark.parametrize("logits", [torch.float32, torch.bfloat16], ids=str)
def test_probabilities_of_float64(logits, backend):
    x, target = torch.randn(5, 4, dtype=logits), torch.rand(5, 4, dtype=torch.float64)
    with launch.backend(backend):
        found = F.cross_entropy(x, target)
    torch.testing.assert_close(found, nn.functional.cross_entropy(x, target))


def test_empty_ledger_says_why():
    with ledger() as seen, launch.backend("torch"):
        a_net()(torch.randn(5, 6))
    assert "PyTorch" in str(seen)


def test_repr_of_the_linear_cross_entropy_is_torchs():
    if not hasattr(nn, "LinearCrossEntropyLoss"):
        pytest.skip("PyTorch has LinearCrossEntropyLoss since version 2.13")
    ours, torchs = (m.LinearCrossEntropyLoss(4, 3, bias=True, label_smoothing=0.1) for m in (fusemlp, nn))
    assert repr(ours) == repr(torchs)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: a_net()(np.ones((5, 6))), TypeError, "input: ndarray; must be a torch.Tensor"),
        (lambda: a_net()(torch.ones(5, 6).double()), TypeError, r"call \.float\(\) or \.double\(\) on the input"),
        (lambda: a_net(dropout=None), TypeError, "dropout: None; must be a number between 0 and 1"),
        (lambda: a_net(dropout="0.5"), TypeError, "dropout: '0.5'; must be a number between 0 and 1"),
        (lambda: a_net(batch_norm=nn.BatchNorm1d), TypeError, "batch_norm: .*BatchNorm1d.*; must be True or False"),
        (lambda: fusemlp.explain(a_net()), ValueError, "rows: None; give the number of rows"),
        (lambda: fusemlp.explain(), ValueError, "what: nothing; give tensors or one module"),
        (lambda: a_net(out_activation="softmax"), ValueError, "out_activation: 'softmax'; allowed are"),
    ],
    ids=["array", "float64", "no dropout", "dropout", "batch norm", "rows", "explain", "out_activation"],
)  # fmt: skip
def test_messages(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("hidden", [(8, 4), np.array([8, 4]), range(8, 3, -4)], ids=["tuple", "array", "range"])
def test_widths_are_any_sequence(hidden):
    net = MLP(np.int64(6), hidden, 3, out_activation="sigmoid")
    assert [(m.in_features, m.out_features) for m in net if isinstance(m, nn.Linear)] == [(6, 8), (8, 4), (4, 3)]
    assert isinstance(net[-1], nn.Sigmoid)
