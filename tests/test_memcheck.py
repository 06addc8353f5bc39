"""The checker of memory accesses: planted faults, clean launches, and every kernel of the library."""

from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from fusemlp.kernels import (
    batch_norm,
    config,
    cross_entropy,
    cross_entropy_bwd,
    dropout,
    epilogue,
    gemm,
    launch,
    linear,
    linear_cross_entropy,
    moments,
)
from fusemlp.mlp import MLP, functional
from memcheck import MemoryFault, checked, pytest_configure
from nets import step
from test_gemm import pin
from triton.tools.tensor_descriptor import TensorDescriptor

pytestmark = [
    pytest.mark.usefixtures("kernels", "fresh_plans"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU, where nothing is checked"),
]


@triton.jit
def _copy_kernel(x, y, x_first, x_step, y_first, y_step, size, BLOCK: tl.constexpr):
    """Each program copies `size` elements, one step further than the program before it."""
    offs = tl.arange(0, BLOCK)
    tile = tl.load(x + x_first + tl.program_id(0) * x_step + offs, mask=offs < size)
    tl.store(y + y_first + tl.program_id(0) * y_step + offs, tile, mask=offs < size)


def copy(x, y, programs=2, *, x_first=0, x_step=16, y_first=0, y_step=16, size=16):
    with checked() as kernels:
        _copy_kernel[(programs,)](x, y, x_first, x_step, y_first, y_step, size, BLOCK=16)
    assert kernels == ["_copy_kernel"]


FAULTS = {
    "program 1 reads x[32], past its last element": {"x_first": 1},
    "program 0 reads x[-1], before its first element": {"x_first": -1},
    "program 1 writes y[32], past its last element": {"y_first": 1},
    "program 0 writes y[-1], before its first element": {"y_first": -1},
    "program 1 writes y[8], which program 0 wrote": {"y_step": 8},
}


@pytest.mark.parametrize(("fault", "places"), FAULTS.items(), ids=FAULTS)
def test_a_fault(fault, places):
    with pytest.raises(MemoryFault) as raised:
        copy(torch.arange(64.0)[16:48], torch.empty(64)[16:48], **places)
    assert str(raised.value) == f"_copy_kernel: {fault}; it has shape (32,) and strides (1,)"


RACES = {
    "program 1 writes y[16], which program 0 read": {"x_first": 16},
    "program 1 reads x[16], which program 0 wrote": {"y_first": 16},
    "program 2 writes y[0], which several programs read": {"programs": 3, "x_step": 0, "y_first": 32, "y_step": -16},
}


@pytest.mark.parametrize(("fault", "places"), RACES.items(), ids=RACES)
def test_a_race_in_memory_that_arguments_share(fault, places):
    shared = torch.arange(48.0)
    with pytest.raises(MemoryFault) as raised:
        copy(shared, shared, **places)
    assert str(raised.value).startswith(f"_copy_kernel: {fault};")


def test_a_race_between_elements_of_two_sizes():
    shared = torch.arange(32)
    with pytest.raises(MemoryFault, match=r"program 1 reads x\[16\], which program 0 wrote"):
        copy(shared, shared.view(torch.int32), y_first=32)


def test_a_write_between_rows():
    y = torch.empty(4, 16)[:, :12]
    with pytest.raises(MemoryFault, match=r"program 0 writes y\[12\], in a gap between its elements; .*\(16, 1\)"):
        copy(torch.arange(32.0), y)
    copy(torch.arange(32.0), y, size=12)


@triton.jit
def _count_kernel(counter):
    tl.atomic_add(counter, 1)


@triton.jit
def _lock_kernel(counter):
    tl.atomic_cas(counter, 0, 1)


@pytest.mark.parametrize("kernel", [_count_kernel, _lock_kernel], ids=["rmw", "cas"])
def test_an_atomic_access(kernel):
    with checked(), pytest.raises(MemoryFault, match="kernel: program 0 accesses memory atomically"):
        kernel[(1,)](torch.zeros(1, dtype=torch.int32))


@triton.jit
def _load_either_kernel(x, y):
    tl.load(tl.where(tl.arange(0, 2) == 0, x, y))


@triton.jit
def _load_address_kernel(address):
    tl.load(address.to(tl.pointer_type(tl.float32)))


def test_pointers_that_are_not_of_one_argument():
    x, y = torch.zeros(1), torch.zeros(1)
    for kernel, args in ((_load_either_kernel, (x, y)), (_load_address_kernel, (x.data_ptr(),))):
        with checked(), pytest.raises(MemoryFault, match="program 0 uses pointers that are not of one"):
            kernel[(1,)](*args)


@triton.jit
def _double_in_turns_kernel(tensors, N, BLOCK: tl.constexpr):
    x, y = tensors
    for first in range(tl.program_id(0) * BLOCK, N, tl.num_programs(0) * BLOCK):
        offs = first + tl.arange(0, BLOCK)
        tl.store(y + offs, 2 * tl.load(x + offs, mask=offs < N), mask=offs < N)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_clean_persistent_loop(in_place):
    x = torch.arange(100.0)
    y = x.clone() if in_place else torch.empty(100)
    with checked():
        _double_in_turns_kernel[(2,)]((y if in_place else x, y), 100, BLOCK=16)
    assert torch.equal(y, 2 * x)


def test_clean_reads_of_what_others_read():
    y = torch.empty(32)
    copy(torch.arange(24.0), y, x_step=8)
    assert y.tolist() == [*range(16), *range(8, 24)]


@triton.jit
def _copy_box_kernel(x, y):
    col = tl.program_id(0) * 16
    y.store([0, col], x.load([0, col]))


def test_a_box_that_a_descriptor_clips():
    x, y = torch.randn(5, 24, dtype=torch.float16), torch.zeros(5, 32, dtype=torch.float16)
    boxed = [TensorDescriptor(t, [5, 24], list(t.stride()), [8, 16]) for t in (x, y[:, :24])]
    with checked():
        _copy_box_kernel[(2,)](*boxed)
    assert torch.equal(y, torch.nn.functional.pad(x, (0, 8)))
    too_wide = TensorDescriptor(y[:, :24], [4, 32], [32, 1], [8, 16])
    with checked(), pytest.raises(MemoryFault, match=r"program 1 writes y\[24\], in a gap"):
        _copy_box_kernel[(2,)](boxed[0], too_wide)


def test_a_bias_too_short_for_a_product():
    x, w, b = torch.randn(7, 5), torch.randn(21, 5), torch.randn(20)
    with checked(), pytest.raises(MemoryFault, match=r"_gemm_kernel: program 0 reads epilogue_args\[0\]\[20\], past"):
        linear.linear_fwd(x, w, b)


def test_a_product_told_of_a_row_too_many(monkeypatch):
    launch_right = launch.launch

    def launch_wrong(kernel, programs, device, a, b, out, row_sum, args, M, *rest, **meta):
        launch_right(kernel, programs, device, a, b, out, row_sum, args, M + 1, *rest, **meta)

    monkeypatch.setattr(launch, "launch", launch_wrong)
    with checked(), pytest.raises(MemoryFault, match=r"_gemm_kernel: program 0 reads a\[35\], past its last element"):
        linear.linear_fwd(torch.randn(7, 5), torch.randn(21, 5))


def test_a_product_whose_tiles_overlap():
    overlapping = torch.empty(2000).as_strided((90, 21), (20, 1))
    with checked(), pytest.raises(MemoryFault, match=r"_gemm_kernel: program 1 writes out\[1280\], which program 0"):
        gemm.gemm("test", torch.randn(90, 5), torch.randn(5, 21), overlapping)


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels and epilogues launched so far."""
    names, launch_it = set(), launch.launch

    def launch_and_note(kernel, *args, **meta):
        names.update(fn.__name__ for fn in (kernel, meta.get("EPILOGUE")) if fn is not None)
        launch_it(kernel, *args, **meta)

    monkeypatch.setattr(launch, "launch", launch_and_note)
    return names


def leaf(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def train(activation, dtype=torch.float32, rows=37, **options):
    net = MLP(40, (72, 24), 16, activation=activation, dtype=dtype, **options)
    step(net, torch.randn(rows, 40, dtype=dtype))
    with torch.no_grad():
        net.eval()(torch.randn(rows, 40, dtype=dtype))


def products():
    for activation in (None, "relu", "gelu", "tanh"):
        train(activation)
        functional.linear(leaf(37, 50), leaf(21, 50), leaf(21), activation).sum().backward()


def blocks():
    train("relu", batch_norm=True, dropout=0.3)
    train("gelu", torch.bfloat16, dropout=0.3)
    functional.batch_norm_act_dropout(leaf(90, 150, 3), None, None, leaf(150), training=True, p=0.2).sum().backward()
    functional.batch_norm(leaf(90, 150), torch.zeros(150), torch.ones(150), None, leaf(150)).sum().backward()


def losses():
    for rows, classes in ((37, 21), (3, 5000)):
        indices, weight = torch.randint(classes, (rows,)), torch.rand(classes)
        probabilities = torch.rand(rows, classes).softmax(1)
        for target in (indices, probabilities):
            functional.cross_entropy(leaf(rows, classes), target, weight, label_smoothing=0.1).backward()
            functional.cross_entropy(leaf(rows, classes), target, reduction="none").sum().backward()


def losses_of_chunks():
    options = SimpleNamespace(batch_chunk_size=9, chunking_method="batch")
    given = leaf(37, 24), leaf(21, 24), torch.randint(21, (37,))
    loss = functional.linear_cross_entropy(*given, linear_bias=leaf(21), options=options)
    (3 * loss).backward()


def split_products():
    functional.linear(leaf(700, 50), leaf(13, 50), leaf(13)).sum().backward()


def described_products(monkeypatch):
    pin(monkeypatch, config.TMA_16BIT[2])
    for activation in ("relu", "gelu"):
        train(activation, torch.float16, rows=70)
    train("relu", torch.float16, rows=70, batch_norm=True)


def test_the_option_is_refused_on_a_gpu(pytestconfig, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(pytestconfig.option, "memcheck", True)
    with pytest.raises(pytest.UsageError, match="here they run on a GPU"):
        pytest_configure(pytestconfig)


def test_every_kernel_and_epilogue_is_clean(launched, monkeypatch):
    with checked():
        products()
        blocks()
        functional.dropout(leaf(37, 150)).sum().backward()
        losses()
        losses_of_chunks()
        split_products()
        described_products(monkeypatch)
    modules = batch_norm, cross_entropy, cross_entropy_bwd, dropout, gemm, linear, linear_cross_entropy, moments
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    public = {name: fn for name, fn in vars(epilogue).items() if not name.startswith("_")}
    epilogues = {name for name, fn in public.items() if getattr(fn, "arg_names", [])[:1] == ["acc"]}
    assert launched == kernels | epilogues
