"""Cross-entropy with the classes cut over ranks: every option, as one rank alone has it."""

from unittest.mock import patch

import pytest
import torch
from fusemlp.kernels import launch
from fusemlp.parallel import ColumnParallelLinear, RowParallelLinear, vocab_parallel_cross_entropy
from fusemlp.parallel.collectives import Collective, Ranks, ledger
from losses import OPTIONS
from ranks import everyone, on_ranks, whole
from tolerance import assert_as_close_as_torch
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn import functional as torch_F

ROWS = 7


def made(kind, classes, dtype=torch.float64, places=()):
    logits = (3 * torch.randn(ROWS, classes, *places, dtype=torch.float64)).to(dtype)
    if kind == "probabilities":
        return logits, torch.rand(ROWS, classes, *places, dtype=torch.float64).softmax(1).to(dtype)
    target = torch.randint(0, classes, (ROWS, *places))
    target.view(-1)[0] = -100
    return logits, target


def part(t, mesh, dim=1):
    parts = t.chunk(mesh.size(), dim)
    rank = mesh.get_local_rank()
    return parts[rank] if rank < len(parts) else t.narrow(dim, 0, 0)


def step(logits, target, weight, mesh, **options):
    leaf = logits.detach().clone().requires_grad_()
    if mesh is None:
        loss = torch_F.cross_entropy(leaf, target, weight, **options)
    else:
        loss = vocab_parallel_cross_entropy(leaf, target, weight, mesh=mesh, **options)
    (grad,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, 0.7))
    return loss.detach(), grad


def compare(backend, kind, weighted, smoothing, reduction, classes=16, dtype=torch.float64, places=()):
    mesh = everyone()
    logits, target = made(kind, classes, dtype, places)
    weight = torch.rand(classes, dtype=dtype) if weighted else None
    options = {"label_smoothing": smoothing, "reduction": reduction}
    here = target if kind == "indices" else part(target, mesh)
    with launch.backend(backend):
        ours = step(part(logits, mesh), here, weight, mesh, classes=classes, **options)
    torchs = step(logits, target, weight, None, **options)
    doubles = [t if t is None or not t.is_floating_point() else t.double() for t in (logits, target, weight)]
    truths = step(*doubles, None, **options)
    for which, mine, its, truth in zip(("loss", "gradient"), ours, torchs, truths, strict=True):
        cut = (its, truth) if which == "loss" else (part(its, mesh), part(truth, mesh))
        assert_as_close_as_torch(mine, *cut, which)
    return ours[0]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("kind", "weighted", "smoothing", "reduction"), OPTIONS)
def test_options(kind, weighted, smoothing, reduction, backend):
    first, second = on_ranks(2, compare, backend, kind, weighted, smoothing, reduction)
    assert torch.equal(first, second)


@pytest.mark.gpu
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_ranks_that_share_a_gpu(kind, world):
    on_ranks(world, compare, "triton", kind, True, 0.1, "mean", 200, torch.bfloat16, device="cuda")


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("classes", [1, 9, 37])
def test_parts_of_any_size(classes, backend):
    on_ranks(4, compare, backend, "indices", True, 0.1, "mean", classes)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(dtype, backend):
    on_ranks(2, compare, backend, "indices", False, 0.1, "mean", 200, dtype)


def test_more_dimensions():
    on_ranks(2, compare, "triton", "indices", True, 0.1, "none", 10, torch.float64, (3, 2))


def collectives():
    logits, target = made("indices", 16)
    mesh = everyone()
    shard = part(logits, mesh).requires_grad_()
    with ledger() as found:
        vocab_parallel_cross_entropy(shard, target, mesh=mesh, label_smoothing=0.1).backward()
    return found


@pytest.mark.parametrize("world", [1, 2, 4])
def test_one_collective_of_four_numbers_a_row(world):
    assert on_ranks(world, collectives) == [[Collective("all_gather", 8 * 4 * ROWS * world)]] * world


def second_derivatives():
    """Of a scalar that is the same on every rank; the truth differentiates the whole logits."""
    mesh = everyone()
    logits, target = made("indices", 8)
    whole = logits.clone().requires_grad_()
    (grad,) = torch.autograd.grad(torch_F.cross_entropy(whole, target), whole, create_graph=True)
    (truth,) = torch.autograd.grad((grad**2).sum(), whole)
    with launch.backend("triton"):
        here = part(logits, mesh).clone().requires_grad_()
        loss = vocab_parallel_cross_entropy(here, target, mesh=mesh)
        (grad,) = torch.autograd.grad(loss, here, create_graph=True)
        # The other ranks' terms reach this rank's logits through the sums that all share.
        (seen,) = torch.autograd.grad((grad**2).sum(), here)
    return seen, part(truth, mesh)


def test_second_derivatives():
    for seen, truth in on_ranks(2, second_derivatives):
        torch.testing.assert_close(seen, truth)


BAD = {
    "logits_shard": (ValueError, "logits_shard: ", lambda x, t, m: ((x[0], t), {})),
    "target": (ValueError, "target: shape", lambda x, t, m: ((x, t[:3]), {})),
    "weight": (
        ValueError,
        r"weight: shape \(8,\); expected \(C,\) = \(16,\)",
        lambda x, t, m: ((x, t, torch.ones(8)), {"classes": 16}),
    ),
    "classes": (
        ValueError,
        r"logits_shard: \[8, 8\] classes on the ranks; 20 classes are cut into \[10, 10\]",
        lambda x, t, m: ((x, t), {"classes": 20}),
    ),
    "replicated": (
        ValueError,
        r"logits_shard: a DTensor with placements \(Replicate\(\),\)",
        lambda x, t, m: ((distribute_tensor(x, m, [Replicate()]), t), {}),
    ),
    "reduction": (ValueError, "reduction: 'max'", lambda x, t, m: ((x, t), {"reduction": "max"})),
    "index": (IndexError, "target: 16; class indices go from 0 to 15", lambda x, t, m: ((x, t + 16), {})),
}


def refuse(case):
    error, message, given = BAD[case]
    mesh = everyone()
    logits, _ = made("indices", 16)
    args, options = given(part(logits, mesh), torch.zeros(ROWS, dtype=torch.int64), mesh)
    with pytest.raises(error, match=message):
        vocab_parallel_cross_entropy(*args, mesh=mesh, **options)


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    on_ranks(2, refuse, case)


def wrong_parts(cut, classes, weighted):
    """What is said of the parts of 10 classes that `cut` makes."""
    mesh = everyone()
    logits, target = made("indices", 10)
    weight = torch.ones(10, dtype=logits.dtype) if weighted else None
    with pytest.raises(ValueError, match="classes") as error:
        vocab_parallel_cross_entropy(
            CUTS[cut](logits, mesh), target, weight, mesh=mesh, classes=classes[mesh.get_local_rank()]
        )
    return str(error.value)


CUTS = {
    "whole": lambda logits, mesh: logits,
    "chunk": part,
    "tensor_split": lambda logits, mesh: logits.tensor_split(mesh.size(), 1)[mesh.get_local_rank()],
}
WRONG_PARTS = {
    "whole logits, classes": ("whole", [10] * 4, False, "[10, 10, 10, 10] classes on the ranks; 10 classes are cut"),
    "whole logits, weight": ("whole", [None] * 4, True, "[10, 10, 10, 10] classes on the ranks; 10 classes are cut"),
    "other parts": ("tensor_split", [10] * 4, False, "[3, 3, 2, 2] classes on the ranks; 10 classes are cut"),
    "unequal, no classes": (
        "chunk",
        [None] * 4,
        False,
        "[3, 3, 3, 1] classes on the ranks; if they are not equal, give",
    ),
    "other classes": ("chunk", [10, 10, 10, 11], False, "classes: [10, 10, 10, 11] on the ranks"),
    "classes of one": ("chunk", [10, None, None, None], False, "classes: [10, None, None, None] on"),
}


@pytest.mark.parametrize(("cut", "classes", "weighted", "message"), WRONG_PARTS.values(), ids=WRONG_PARTS)
def test_wrong_parts_are_an_error_on_every_rank(cut, classes, weighted, message):
    (said,) = {*on_ranks(4, wrong_parts, cut, classes, weighted)}
    assert message in said


def exchanges():
    """The number of exchanges of sizes in two steps with and two without the number of classes."""
    mesh = everyone()
    logits, target = made("indices", 16)
    with patch.object(torch.distributed, "all_gather", wraps=torch.distributed.all_gather) as gather:
        for classes in (None, None, 16, 16):
            vocab_parallel_cross_entropy(part(logits, mesh), target, mesh=mesh, classes=classes)
    return gather.call_count


def test_sizes_are_exchanged_once():
    assert on_ranks(2, exchanges) == [2, 2]


def of_a_weight():
    """The weight tells the number of classes."""
    mesh = everyone()
    logits, target = made("indices", 9)
    weight = torch.rand(9, dtype=logits.dtype)
    torch.testing.assert_close(step(part(logits, mesh), target, weight, mesh)[0], step(logits, target, weight, None)[0])


def of_a_dtensor(backend):
    """A DTensor tells the number of classes, and gets its gradient as one."""
    mesh = everyone()
    logits, target = made("indices", 9)
    expected = step(logits, target, None, None)
    with launch.backend(backend):
        loss, grad = step(distribute_tensor(logits, mesh, [Shard(1)]), target, None, mesh)
    torch.testing.assert_close((loss, whole(grad)), expected)


def test_a_weight_tells_the_number_of_classes():
    on_ranks(4, of_a_weight)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_dtensor_of_logits(backend):
    on_ranks(4, of_a_dtensor, backend)


def no_rows(backend):
    mesh = everyone()
    with launch.backend(backend):
        for reduction in ("none", "sum", "mean"):
            logits = torch.randn(0, 8, requires_grad=True)
            target = torch.empty(0, dtype=torch.int64)
            ours = vocab_parallel_cross_entropy(logits, target, mesh=mesh, reduction=reduction)
            torchs = torch.nn.functional.cross_entropy(torch.randn(0, 16), target, reduction=reduction)
            torch.testing.assert_close(ours.detach(), torchs, equal_nan=True)
            ours.sum().backward()
            assert logits.grad.shape == (0, 8)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_rows(backend):
    on_ranks(2, no_rows, backend)


def compiled(backend):
    mesh = everyone()
    logits, target = part(torch.randn(6, 16), mesh), torch.randint(16, (6,))
    found = []
    for function in (
        vocab_parallel_cross_entropy,
        torch.compile(vocab_parallel_cross_entropy, fullgraph=True, backend="aot_eager"),
    ):
        leaf = logits.clone().requires_grad_()
        with launch.backend(backend):
            loss = function(leaf, target, mesh=mesh)
            loss.backward()
        found.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiled(backend):
    on_ranks(2, compiled, backend)


def slices(split):
    """The lecture's gradients of the last layer's parts. Row split is over classes, column split over inputs."""
    torch.manual_seed(1)
    mesh = everyone()
    ranks = Ranks.of(mesh)
    x, target = torch.randn(6, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, 5])
    options = {"mesh": mesh, "dtype": torch.float64}
    if split == "rows":
        layer = ColumnParallelLinear(8, 6, **options)
        loss = vocab_parallel_cross_entropy(layer(x), target, mesh=mesh)
        mine, inputs = ranks.part(6), slice(None)
    else:
        layer = RowParallelLinear(8, 6, input_is_parallel=False, **options)
        loss = torch_F.cross_entropy(layer(x), target)
        mine, inputs = slice(None), ranks.part(8)
    loss.backward()
    weight, bias = (whole(p).detach() for p in (layer.weight, layer.bias))
    error = ((x @ weight.T + bias).softmax(1) - torch.eye(6, dtype=torch.float64)[target]) / 6  # (P - Y) / rows
    torch.testing.assert_close(layer.weight.grad.to_local(), error[:, mine].T @ x[:, inputs])
    torch.testing.assert_close(layer.bias.grad.to_local(), error[:, mine].sum(0))


@pytest.mark.parametrize("split", ["rows", "columns"])
def test_slices_of_p_minus_y(split):
    on_ranks(2, slices, split)
