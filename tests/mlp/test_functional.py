"""linear and its chain: values, gradients, contracts."""

import pytest
import torch
from fusemlp.kernels import cost, launch
from fusemlp.mlp import functional as F
from fusemlp.mlp import reference
from fusemlp.mlp.layer import Layer
from fusemlp.mlp.linear import linear_chain
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_as_close_as_torch

ACTIVATIONS = list(reference.ACTIVATIONS)
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def tensors(*shapes, dtype=torch.float32, device="cpu", requires_grad=True):
    made = [torch.randn(s, device=device).to(dtype) for s in shapes]
    return [t.requires_grad_(requires_grad) for t in made]


def forward_and_gradients(fn, args, grad):
    leaves = [t.detach().requires_grad_() for t in args]
    y = fn(*leaves)
    return y, *torch.autograd.grad(y, leaves, grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(50,), (37, 50), (3, 5, 50)], ids=["1d", "2d", "3d"])
def test_three_way(shape, activation, dtype, kernels, device):
    x, b, grad = tensors(shape, (21,), (*shape[:-1], 21), dtype=dtype, device=device)
    w = (torch.randn(21, 50, device=device) / 50**0.5).to(dtype)
    ours = forward_and_gradients(lambda *a: F.linear(*a, activation), (x, w, b), grad)
    torchs = forward_and_gradients(lambda *a: reference.linear(*a, activation), (x, w, b), grad)
    doubles = [t.double() for t in (x, w, b)]
    truths = forward_and_gradients(lambda *a: reference.linear(*a, activation), doubles, grad.double())
    for name, *three in zip(("y", "dx", "dw", "db"), ours, torchs, truths, strict=True):
        assert_as_close_as_torch(*three, name)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation, bias, kernels, device):
    args = tensors((3, 5), (4, 5), *([(4,)] if bias else []), dtype=torch.float64, device=device)
    assert torch.autograd.gradcheck(lambda x, w, b=None: F.linear(x, w, b, activation), args)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradgradcheck(activation, kernels, device):
    args = tensors((2, 3), (4, 3), (4,), dtype=torch.float64, device=device)
    assert torch.autograd.gradgradcheck(lambda x, w, b: F.linear(x, w, b, activation), args)


def chain(x, w1, b1, w2, b2, w3):
    return linear_chain(x, [Layer(w1, b1, "relu"), Layer(w2, b2, "tanh"), Layer(w3)])


CHAIN_SHAPES = [(6, 5), (7, 5), (7,), (4, 7), (4,), (3, 4)]


def test_gradcheck_through_a_chain(kernels, device):
    args = tensors(*CHAIN_SHAPES, dtype=torch.float64, device=device)
    assert torch.autograd.gradcheck(chain, args, fast_mode=True)
    assert torch.autograd.gradgradcheck(chain, args, fast_mode=True)


def test_a_chain_is_one_node_with_one_launch_per_product(kernels, device):
    args = tensors(*CHAIN_SHAPES, device=device)
    with cost.ledger() as ledger:
        y = chain(*args)
        assert type(y.grad_fn).__name__ == "LinearFunctionBackward"
        y.sum().backward()
    names = [entry.name for entry in ledger.launches]
    assert names == ["linear_fwd"] * 3 + ["linear_wgrad", "linear_dgrad"] * 2 + ["linear_dgrad", "linear_wgrad"]


def test_second_derivative_by_hand(kernels, device):
    """y = (w x)^3 through w x, at w = 2, x = 1: the gradient of dy/dw = 3 w^2 x^3 is 6 w x^3 = 12, and by x 36."""
    x, w = torch.ones(1, 1, device=device, requires_grad=True), torch.full((1, 1), 2.0, device=device).requires_grad_()
    (dw,) = torch.autograd.grad(F.linear(x, w) ** 3, w, create_graph=True)
    assert torch.autograd.grad(dw, (w, x))[0].item() == 12
    (dw,) = torch.autograd.grad(F.linear(x, w) ** 3, w, create_graph=True)
    assert torch.autograd.grad(dw, x)[0].item() == 36


def test_hessian_equals_torch(kernels, device):
    x, w, b = tensors((4, 3), (2, 3), (2,), dtype=torch.float64, device=device)
    ours = torch.autograd.functional.hessian(lambda w: F.linear(x, w, b, "silu").square().sum(), w)
    torchs = torch.autograd.functional.hessian(lambda w: reference.linear(x, w, b, "silu").square().sum(), w)
    torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize(
    ("frozen", "expected"),
    [
        ("", ["wgrad", "dgrad", "dgrad", "wgrad"]),
        ("x", ["wgrad", "dgrad", "wgrad"]),
        ("x w1 b1", ["wgrad"]),
        ("w2 b2", ["dgrad", "dgrad", "wgrad"]),
        ("w1 b1 w2 b2", ["dgrad", "dgrad"]),
        ("x w1 w2", ["dgrad"]),
        ("x w1 b1 w2", []),
    ],
)
def test_frozen_tensors_cost_nothing(frozen, expected, kernels, device):
    named = dict(zip(("x", "w1", "b1", "w2", "b2"), tensors(*CHAIN_SHAPES[:5], device=device), strict=True))
    for name in frozen.split():
        named[name].requires_grad_(False)
    x, w1, b1, w2, b2 = named.values()
    y = linear_chain(x, [Layer(w1, b1, "relu"), Layer(w2, b2)])
    with cost.ledger() as ledger:
        y.sum().backward()
    assert [entry.name.removeprefix("linear_") for entry in ledger.launches] == expected
    z = reference.linear(reference.linear(x, w1, b1, "relu"), w2, b2)
    wanted = [t for t in named.values() if t.requires_grad]
    for ours, torchs in zip((t.grad for t in wanted), torch.autograd.grad(z.sum(), wanted), strict=True):
        torch.testing.assert_close(ours, torchs)
    assert all(t.grad is None for t in named.values() if not t.requires_grad)


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_zero_stride_gradient(activation, kernels, device):
    args = tensors((6, 5), (4, 5), (4,), device=device)
    ours = torch.autograd.grad(F.linear(*args, activation).sum(), args)
    torchs = torch.autograd.grad(reference.linear(*args, activation).sum(), args)
    torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("view", [lambda t: t.t().contiguous().t(), lambda t: t.repeat_interleave(2, 1)[:, ::2]])
def test_non_contiguous_inputs(view, kernels, device):
    x, w = tensors((6, 10), (8, 10), device=device)
    ours = forward_and_gradients(F.linear_relu, (view(x), view(w)), torch.ones(6, 8, device=device))
    torchs = forward_and_gradients(F.linear_relu, (x, w), torch.ones(6, 8, device=device))
    torch.testing.assert_close(ours, torchs)


def test_backward_twice_gives_the_same_bits(kernels, device):
    args = tensors(*CHAIN_SHAPES, device=device)
    y = chain(*args).sum()
    first = torch.autograd.grad(y, args, retain_graph=True)
    second = torch.autograd.grad(y, args)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_one_tensor_in_two_places_gets_both_gradients(kernels, device):
    (x,) = tensors((3, 3), dtype=torch.float64, device=device)
    assert torch.autograd.gradcheck(lambda x: F.linear(x, x, activation="tanh"), x)
    assert torch.autograd.gradgradcheck(lambda x: F.linear(x, x, activation="tanh"), x)


def test_nothing_passed_is_overwritten(kernels, device):
    args = tensors((6, 5), (4, 5), (4,), device=device)
    copies = [t.detach().clone() for t in args]
    F.linear(*args, "relu").sum().backward()
    assert all(torch.equal(t, copy) for t, copy in zip(args, copies, strict=True))


def test_output_of_relu_may_be_changed_in_place(kernels, device):
    args = tensors((6, 5), (4, 5), device=device)
    y = F.linear_relu(*args)
    expected = torch.autograd.grad(y.sum(), args, retain_graph=True)
    y.mul_(0)
    y.add_(F.linear_relu(*args))
    torch.testing.assert_close(torch.autograd.grad(y.sum(), args), expected)


def test_changing_what_backward_needs_is_noticed(kernels, device):
    x, w = tensors((6, 5), (4, 5), device=device)
    y = F.linear(x, w, activation="sigmoid")
    with torch.no_grad():
        y.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, backend, device):
    x, w, b = tensors((6, 5), (4, 5), (4,), device=device)
    with launch.backend(backend), torch.autocast(device.type, dtype):
        y = F.linear(x, w, b, "relu")
    with torch.autocast(device.type, dtype):
        z = reference.linear(x, w, b, "relu")
    assert y.dtype is dtype
    torch.testing.assert_close(y, z)
    ours, torchs = (torch.autograd.grad(out.sum(), (x, w, b)) for out in (y, z))
    assert {g.dtype for g in ours} == {torch.float32}
    torch.testing.assert_close(ours, torchs, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_autocast_leaves_float64_alone(backend, device):
    args = tensors((6, 5), (4, 5), dtype=torch.float64, device=device)
    with launch.backend(backend), torch.autocast(device.type, torch.bfloat16):
        assert F.linear(*args).dtype is torch.float64


def test_second_derivative_inside_autocast_keeps_float32(kernels, device):
    x, w = tensors((6, 5), (4, 5), dtype=torch.float64, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        (dw,) = torch.autograd.grad(F.linear(x, w, activation="tanh").sum(), w, create_graph=True)
        ours = torch.autograd.grad(dw.square().sum(), x)
    (dw,) = torch.autograd.grad(reference.linear(x, w, activation="tanh").sum(), w, create_graph=True)
    torch.testing.assert_close(ours, torch.autograd.grad(dw.square().sum(), x))


# torch.compile instantiates the Function it traces, and warns of it.
traced = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@traced
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compile_has_no_graph_break(backend, device):
    args = tensors(*CHAIN_SHAPES, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    with launch.backend(backend):
        ours = torch.autograd.grad(compiled(*args).sum(), args)
        eager = torch.autograd.grad(chain(*args).sum(), args)
    torch.testing.assert_close(ours, eager)


@traced
def test_compiled_code_launches_what_eager_does(kernels, device):
    args = tensors(*CHAIN_SHAPES, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    compiled(*args).sum().backward()
    with cost.ledger() as ours:
        compiled(*args).sum().backward()
    with cost.ledger() as eager:
        chain(*args).sum().backward()
    assert sorted(map(repr, ours.launches)) == sorted(map(repr, eager.launches))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_torch_func_transforms(kernels, device):
    x, w, b = tensors((6, 5), (4, 5), (4,), dtype=torch.float64, device=device, requires_grad=False)
    per_sample = torch.func.vmap(lambda row: F.linear(row, w, b, "gelu"))(x)
    torch.testing.assert_close(per_sample, reference.linear(x, w, b, "gelu"))
    _, tangent = torch.func.jvp(lambda x: F.linear(x, w, b, "gelu"), (x,), (torch.ones_like(x),))
    _, expected = torch.func.jvp(lambda x: reference.linear(x, w, b, "gelu"), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, expected)


@pytest.mark.parametrize(("rows", "features"), [(0, 5), (6, 0), (0, 0)])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_empty_inputs_give_what_torch_gives(rows, features, activation, kernels, device):
    args = tensors((rows, features), (4, features), (4,), device=device)
    grad = torch.ones(rows, 4, device=device)
    ours = forward_and_gradients(lambda *a: F.linear(*a, activation), args, grad)
    torchs = forward_and_gradients(lambda *a: reference.linear(*a, activation), args, grad)
    torch.testing.assert_close(ours, torchs)


def test_without_gradients_nothing_is_kept(kernels, device):
    args = tensors((6, 5), (4, 5), device=device)
    with torch.no_grad(), cost.ledger() as ledger:
        y = F.linear_relu(*args)
    assert not y.requires_grad
    assert ledger.bytes == 4 * (6 * 5 + 4 * 5 + 6 * 4)


layouts = st.sampled_from(["contiguous", "transposed", "strided", "expanded"])


def lay_out(t, layout):
    if layout == "transposed":
        return t.t().contiguous().t()
    if layout == "strided":
        return torch.stack((t, t), -1).flatten(-2)[:, ::2]
    return t[:1].expand_as(t) if layout == "expanded" else t


# On a GPU nearly every example compiles kernels of its own.
@settings(max_examples=12 if torch.cuda.is_available() else 40)
@given(
    rows=st.integers(1, 80),
    features=st.integers(1, 80),
    width=st.integers(1, 80),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(ACTIVATIONS),
    x_layout=layouts,
    w_layout=layouts,
    bias=st.booleans(),
)
def test_any_shape_dtype_and_layout(rows, features, width, dtype, activation, x_layout, w_layout, bias, pytestconfig):
    torch.manual_seed(pytestconfig.getoption("seed"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = lay_out(torch.randn(rows, features, device=device).to(dtype), x_layout)
    w = lay_out((torch.randn(width, features, device=device) / features**0.5).to(dtype), w_layout)
    args = (x, w, torch.randn(width, device=device).to(dtype)) if bias else (x, w)
    grad = torch.randn(rows, width, device=device).to(dtype) / max(rows, width) ** 0.5

    def reference_linear(x, w, b=None):
        return reference.linear(x, w, b, activation)

    with launch.backend("triton"):
        ours = forward_and_gradients(lambda x, w, b=None: F.linear(x, w, b, activation), args, grad)
    torchs = forward_and_gradients(reference_linear, args, grad)
    truths = forward_and_gradients(reference_linear, [t.double() for t in args], grad.double())
    for name, *three in zip(("y", "dx", "dw", "db"), ours, torchs, truths, strict=False):
        assert_as_close_as_torch(*three, name)


ones = torch.ones
BAD_INPUT = [
    pytest.param((ones(3, 5), ones(4, 6)), {}, ValueError, r"input: shape \(3, 5\).*in_features = 6", id="features"),
    pytest.param((ones(()), ones(4, 6)), {}, ValueError, r"input: shape \(\)", id="scalar-input"),
    pytest.param((ones(3, 5), ones(2, 4, 5)), {}, ValueError, r"weight: shape \(2, 4, 5\)", id="weight-3d"),
    pytest.param((ones(3, 5), ones(4, 5), ones(5)), {}, ValueError, r"bias: shape \(5,\).*\(4,\)", id="bias-shape"),
    pytest.param((ones(3, 5), ones(4, 5).half()), {}, TypeError, "weight: dtype torch.float16", id="weight-dtype"),
    pytest.param((ones(3, 5), ones(4, 5), ones(4).double()), {}, TypeError, "bias: dtype", id="bias-dtype"),
    pytest.param((ones(3, 5).long(), ones(4, 5)), {}, TypeError, "input: dtype torch.int64", id="integer-input"),
    pytest.param((ones(3, 5), ones(4, 5, device="meta")), {}, ValueError, "weight: on meta", id="weight-device"),
    pytest.param((ones(3, 5), ones(4, 5), ones(4, device="meta")), {}, ValueError, "bias: on meta", id="bias-device"),
    pytest.param((ones(3, 5), ones(4, 5)), {"activation": "rele"}, ValueError, "activation: 'rele'.*'relu'", id="name"),
    pytest.param(([[1.0]], ones(1, 1)), {}, TypeError, "input: list", id="not-a-tensor"),
    pytest.param((ones(3, 5), None), {}, TypeError, "weight: NoneType", id="no-weight"),
]


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), BAD_INPUT)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_bad_input_names_the_argument(args, kwargs, error, message, backend):
    with launch.backend(backend), pytest.raises(error, match=message):
        F.linear(*args, **kwargs)


def test_lectures_chain_rule_by_hand(kernels, device):
    """f_0 = b0 + w0 x, h_1 = sin f_0, f_1 = b1 + w1 h_1, h_2 = exp f_1, f_2 = b2 + w2 h_2, h_3 = cos f_2."""
    x, (b0, w0), (b1, w1), (b2, w2) = 0.7, (0.3, 1.1), (-0.2, 0.8), (0.5, 0.6)
    as_tensors = [
        tuple(torch.tensor(v, dtype=torch.float64, device=device) for v in ([[w]], [b]))
        for b, w in ((b0, w0), (b1, w1), (b2, w2))
    ]
    params = [t.requires_grad_() for pair in as_tensors for t in pair]
    h = torch.tensor([[x]], dtype=torch.float64, device=device)
    for (w, b), fn in zip(as_tensors, (torch.sin, torch.exp, torch.cos), strict=True):
        h = fn(F.linear(h, w, b))
    grads = [g.item() for g in torch.autograd.grad(h, params)]
    f0 = b0 + w0 * x
    h1 = torch.tensor(f0, dtype=torch.float64).sin().item()
    h2 = torch.tensor(b1 + w1 * h1, dtype=torch.float64).exp().item()
    df2 = -torch.tensor(b2 + w2 * h2, dtype=torch.float64).sin().item()
    df1 = df2 * w2 * h2
    df0 = df1 * w1 * torch.tensor(f0, dtype=torch.float64).cos().item()
    assert grads == pytest.approx([df0 * x, df0, df1 * h1, df1, df2 * h2, df2], rel=1e-12)


def test_lectures_softmax_gradient(kernels, device):
    """Three classes, y = [0, 1, 0], L = -log P_2: dL/dO = [P_1, P_2 - 1, P_3], dL/dW its outer product with M_L."""
    m, w, b = tensors((1, 2), (3, 2), (3,), dtype=torch.float64, device=device)
    logits = F.linear(m, w, b)
    loss = -torch.log_softmax(logits, 1)[0, 1]
    dlogits, dw, db = torch.autograd.grad(loss, (logits, w, b))
    expected = torch.softmax(logits.detach(), 1) - torch.tensor([[0.0, 1.0, 0.0]], device=device)
    torch.testing.assert_close(dlogits, expected)
    torch.testing.assert_close(dw, expected.t() @ m.detach())
    torch.testing.assert_close(db, expected[0])


def test_explain_says_which_and_why(device):
    x, w = tensors((3, 5), (4, 5), device=device)
    with launch.backend("torch"):
        assert launch.explain(x, w) == launch.Choice("torch", "asked for by name")
    with launch.backend("triton"):
        assert launch.explain(x, w).backend == "triton"
        assert launch.explain(x[:0], w).backend == "torch"
    if device.type == "cpu":
        assert launch.explain(x, w) == launch.Choice("torch", "tensors on cpu are served by PyTorch")


def test_sparse_weights_go_to_torch(kernels, device):
    x, w = tensors((2, 4), (3, 4), device=device, requires_grad=False)
    torch.testing.assert_close(F.linear(x, w.to_sparse()), x @ w.t())


def test_meta_tensors_have_shapes():
    x, w = torch.empty(3, 5, device="meta"), torch.empty(4, 5, device="meta")
    assert F.linear_relu(x, w).shape == (3, 4)


def test_triton_by_name_where_it_cannot_run_is_an_error(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRET", False)
    x = torch.empty(3, 5)
    with launch.backend("triton"), pytest.raises(RuntimeError, match="needs CUDA tensors"):
        launch.explain(x)


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend: 'cuda' is not one of auto, triton, torch"), launch.backend("cuda"):
        pass
