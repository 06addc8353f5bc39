"""Dropout: exact, repeatable, independent of how a matrix is cut."""

import math

import pytest
import torch
from fusemlp.kernels import launch
from fusemlp.mlp import MLP, Dropout
from fusemlp.mlp import functional as F
from tolerance import assert_as_close_as_torch

if launch.HAS_TRITON:
    from fusemlp.kernels import config, random
    from fusemlp.kernels import dropout as kernel

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def kept(rows, columns, p, seed=1, stream=0, device="cpu", row=0, column=0):
    """Which elements of a matrix are kept."""
    ones = torch.ones(rows, columns, device=device)
    seeds = torch.tensor([seed], device=device)
    return kernel.dropout(ones, p, seeds, stream, row, column)[0] != 0


@pytest.fixture(scope="module")
def large():
    """2^20 keep-bits at p = 0.3, in one launch."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with launch.backend("triton"):
        return kept(2**10, 2**10, 0.3, device=device)


def standard_errors(keep, p):
    """How far the mean is from 1 - p, in standard errors of independent draws."""
    return (keep.double().mean().item() - (1 - p)) / math.sqrt(p * (1 - p) / keep.numel())


@pytest.mark.parametrize(
    "part",
    [
        pytest.param(lambda keep: keep, id="all"),
        *(pytest.param(lambda keep, i=i: keep[:, i::8], id=f"column {i} of 8") for i in range(8)),
    ],
)
def test_keep_rate(part, large):
    assert abs(standard_errors(part(large), 0.3)) < 4


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 8, 16, 32, 64, 512], ids="columns {}".format)
def test_columns_are_independent(lag, large):
    both = large[:, lag:] & large[:, :-lag]
    assert abs(standard_errors(both, 1 - 0.7**2)) < 4.5


@pytest.mark.parametrize("lag", [1, 2, 8, 32, 128, 512], ids="rows {}".format)
def test_rows_are_independent(lag, large):
    both = large[lag:] & large[:-lag]
    assert abs(standard_errors(both, 1 - 0.7**2)) < 4.5


def test_no_two_rows_are_the_same(large):
    assert len(torch.unique(large, dim=0)) == len(large)


def test_no_two_columns_are_the_same(large):
    assert len(torch.unique(large, dim=1)) == large.shape[1]


@pytest.mark.parametrize("change", [{"seed": 2}, {"seed": 2**40 + 1}, {"stream": 1}, {"row": 1 << 32}], ids=str)
def test_every_part_of_the_key_counts(change, kernels, device):
    first, second = kept(64, 64, 0.5, device=device), kept(64, 64, 0.5, device=device, **change)
    assert abs(standard_errors(first == second, 0.5)) < 4


@pytest.mark.parametrize("p", [1e-3, 0.1, 0.5, 0.9, 1 - 1e-9])
def test_threshold_is_full_width(p):
    assert random.threshold(p) == pytest.approx(p * 2**32, abs=1)


@pytest.mark.parametrize("elements", [512, 1024, 8192], ids="{} elements".format)
def test_the_mask_does_not_depend_on_tiles(elements, kernels, device, monkeypatch):
    expected = kept(100, 150, 0.3, device=device)
    monkeypatch.setattr(config, "POINTWISE_ELEMENTS", elements)
    assert torch.equal(kept(100, 150, 0.3, device=device), expected)


@pytest.mark.parametrize(("row", "column"), [(0, 8), (5, 16), (7, 3), (1, 1)], ids=str)
def test_a_shard_drops_what_the_whole_drops_there(row, column, kernels, device):
    whole = kept(40, 60, 0.3, device=device)
    shard = kept(40 - row, 60 - column, 0.3, device=device, row=row, column=column)
    assert torch.equal(shard, whole[row:, column:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(37,), (9, 37), (3, 5, 37), (8, 1)], ids=str)
def test_values_and_gradients(shape, dtype, kernels, device):
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    torch.manual_seed(3)
    y = F.dropout(x, 0.3)
    keep = (y != 0).to(dtype)
    truth = x.detach().double() * keep.double() / 0.7
    assert_as_close_as_torch(y.detach(), x.detach() * keep * (1 / 0.7), truth, "y")
    dy = torch.randn_like(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert_as_close_as_torch(dx, dy * keep * (1 / 0.7), dy.double() * keep.double() / 0.7, "dx")


def test_the_scale_in_float64_keeps_its_digits(kernels, device):
    kept = F.dropout(torch.ones(8, 8, dtype=torch.float64, device=device), 0.3)
    assert kept[kept != 0].sub(1 / 0.7).abs().max() < 1e-15


def test_gradcheck(kernels, device):
    x = torch.randn(3, 5, dtype=torch.float64, device=device, requires_grad=True)

    def seeded(x):
        torch.manual_seed(0)
        return F.dropout(x, 0.4) ** 2

    assert torch.autograd.gradcheck(seeded, x)
    assert torch.autograd.gradgradcheck(seeded, x)


def test_a_seed_repeats_itself_and_two_layers_differ(kernels, device):
    x = torch.ones(32, 32, device=device)
    torch.manual_seed(5)
    first, second = F.dropout(x), F.dropout(x)
    torch.manual_seed(5)
    assert torch.equal(F.dropout(x), first)
    assert not torch.equal(second, first)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_certain_probabilities(p, backend, device):
    x = torch.randn(4, 5, device=device, requires_grad=True)
    y = F.dropout(x, p)
    assert torch.equal(y, x * (1 - p))
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.full_like(x, 1 - p))


def test_evaluation_changes_nothing(backend, device):
    x = torch.randn(4, 5, device=device)
    assert Dropout(0.5).eval()(x) is x


@pytest.mark.parametrize("view", [lambda t: t.t(), lambda t: t[:, ::2], lambda t: t[:1].expand(6, 10)])
def test_strides_do_not_matter(view, kernels, device):
    x = view(torch.randn(6, 10, device=device))
    results = []
    for each in (x, x.contiguous()):
        torch.manual_seed(1)
        results.append(F.dropout(each, 0.3))
    assert torch.equal(*results)


def test_an_empty_tensor_stays_empty(backend, device):
    assert F.dropout(torch.empty(0, 5, device=device)).shape == (0, 5)


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan])
def test_what_is_no_probability_is_refused(p, backend):
    with pytest.raises(ValueError, match="p: "):
        F.dropout(torch.ones(2, 2), p)


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_inplace_changes_the_input_as_torchs_does(training, p, backend, device):
    results = []
    for kind in (Dropout, torch.nn.Dropout):
        torch.manual_seed(0)
        leaf = torch.ones(8, 8, device=device, requires_grad=True)
        x = leaf * 2
        y = kind(p, inplace=True).train(training)(x)
        assert y is x
        (x * x.detach()).sum().backward()  # the input is used again
        results.append((x, leaf.grad))
    assert all(map(torch.equal, *results))


def test_inplace_refuses_a_leaf_as_torchs_does(backend, device):
    x = torch.ones(8, 8, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf Variable"):
        Dropout(inplace=True)(x)


def test_it_looks_like_torchs():
    assert repr(Dropout(0.3)) == repr(torch.nn.Dropout(0.3))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled(kernels, device):
    x = torch.randn(16, 24, device=device, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: F.dropout(x, 0.3), fullgraph=True, backend="aot_eager")
    y = compiled(x)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], (y != 0) * (1 / 0.7))


@pytest.mark.parametrize("checkpoint", [False, True], ids=["keeping", "recomputing"])
def test_the_same_seed_gives_the_same_training_run(checkpoint, kernels, device):
    def train():
        torch.manual_seed(0)
        net = MLP(6, (16, 16), 3, dropout=0.4, batch_norm=True, checkpoint=checkpoint, device=device)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        x = torch.randn(20, 6, device=device)
        for _ in range(3):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
        return [*net.parameters(), *net.buffers()]

    assert all(map(torch.equal, train(), train()))
