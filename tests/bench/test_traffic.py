"""The traffic ledger: formulas by hand, PyTorch's operators, the floor, and what the kernels really touch."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from fusemlp.bench.__main__ import main
from fusemlp.bench.cases import LOSSES, NETS, QUICK_NETS, LossCase, NetCase
from fusemlp.bench.roofline import Ceilings
from fusemlp.bench.traffic import AtenTraffic, count_eager, count_floor, count_fusemlp, modelled_us
from fusemlp.kernels import cost
from fusemlp.kernels.batch_norm import batch_norm_fwd, merge_grad_sums
from fusemlp.kernels.cost import Launch
from fusemlp.kernels.dropout import dropout
from fusemlp.kernels.linear import (
    activation_bwd,
    linear_dgrad,
    linear_dgrad_dropout,
    linear_fwd,
    linear_fwd_norm,
    linear_wgrad,
)
from fusemlp.kernels.moments import column_moments
from torch.nn import functional as F
from triton.runtime.interpreter import InterpreterBuilder

SMALL = NetCase("small", 6, 13, (20, 24), 5, dtype=torch.float32)
PLAIN = [case for case in NETS if not case.batch_norm]
# With fewer rows, partial sums of weight gradients are as large as the activations, but stay in L2.
LARGE = [case for case in PLAIN if case.rows >= 4096]


def total(layers, field="bytes"):
    return sum(getattr(each, field) for layer in layers for each in layer)


def test_fusemlp_by_hand():
    # Elements of X, W, b, Y: 78, 260, 20, 120; then 120, 480, 24, 144; then 144, 120, 5, 30. Each of the two bit masks
    # has 8 bytes a row. No K is long enough to be split.
    mask = 6 * 8
    assert count_fusemlp(SMALL) == [
        [
            Launch("linear_fwd", 2 * 6 * 260, 4 * (78 + 260 + 20 + 120) + mask),
            Launch("linear_wgrad", 2 * 6 * 260, 4 * (120 + 78 + 260 + 20)),
        ],
        [
            Launch("linear_fwd", 2 * 6 * 480, 4 * (120 + 480 + 24 + 144) + mask),
            Launch("linear_wgrad", 2 * 6 * 480, 4 * (144 + 120 + 480 + 24)),
            Launch("linear_dgrad", 2 * 6 * 480, 4 * (144 + 480 + 120) + mask),
        ],
        [
            Launch("linear_fwd", 2 * 6 * 120, 4 * (144 + 120 + 5 + 30)),
            Launch("linear_wgrad", 2 * 6 * 120, 4 * (30 + 144 + 120 + 5)),
            Launch("linear_dgrad", 2 * 6 * 120, 4 * (30 + 120 + 144) + mask),
        ],
    ]


def test_eager_by_hand():
    first, second, _ = count_eager(SMALL)
    assert first == [
        Launch("aten.addmm", 2 * 6 * 260, 4 * (78 + 260 + 20 + 120)),
        Launch("aten.relu", 0, 4 * (120 + 120)),
        Launch("aten.threshold_backward", 0, 4 * (120 + 120 + 120)),
        Launch("aten.mm", 2 * 6 * 260, 4 * (120 + 78 + 260)),
        Launch("aten.sum", 0, 4 * (120 + 20)),
    ]
    assert [each.name for each in second[2:]] == ["aten.threshold_backward", "aten.mm", "aten.mm", "aten.sum"]


@pytest.mark.parametrize(
    ("operation", "launches"),
    [
        pytest.param(
            lambda x, w: F.linear(x, w, w[:, 0]),
            [Launch("aten.addmm", 2 * 6 * 13 * 20, 2 * (78 + 260 + 20 + 120))],
            id="linear",
        ),
        pytest.param(lambda x, _: x.relu(), [Launch("aten.relu", 0, 2 * (78 + 78))], id="relu"),
        pytest.param(
            lambda x, _: torch.ops.aten.threshold_backward(x, x, 0),
            [Launch("aten.threshold_backward", 0, 2 * 3 * 78)],
            id="threshold_backward",
        ),
        pytest.param(
            lambda x, _: torch.native_dropout(x, 0.5, True),
            [Launch("aten.native_dropout", 0, 2 * (78 + 78) + 78)],
            id="dropout",
        ),
        pytest.param(lambda x, _: x.add_(1), [Launch("aten.add_", 0, 2 * (78 + 78))], id="in-place"),
        pytest.param(lambda x, _: x.t().view(13, 2, 3).detach(), [], id="view"),
        pytest.param(lambda x, _: torch.empty_like(x).new_empty(3), [], id="allocation"),
    ],
)
def test_one_operator(operation, launches):
    x, w = (torch.empty(rows, 13, dtype=torch.bfloat16, device="meta") for rows in (6, 20))
    with cost.ledger() as ledger, AtenTraffic():
        operation(x, w)
    assert ledger.launches == launches


def test_floor_by_hand():
    forward, backward = 478 + 768 + 299, 478 + (768 + 480 + 120) + (299 + 120 + 144)
    assert total(count_floor(SMALL)) == 4 * (forward + backward)


def test_floor_of_batch_norm():
    normalised = count_floor(replace(SMALL, batch_norm=True))
    assert total(normalised) - total(count_floor(SMALL)) == 4 * 6 * 6 * (20 + 24)


def test_launches_of_a_hidden_block():
    first, _ = count_fusemlp(QUICK_NETS[1])
    assert [each.name for each in first] == [
        "aten.randint",
        *("linear_fwd", "batch_norm_moments", "batch_norm_moments_merge", "batch_norm_fwd"),
        *("batch_norm_grad_sums", "batch_norm_grad_sums_merge", "batch_norm_bwd", "linear_wgrad"),
    ]


NORMALISED = [case for case in NETS if case.batch_norm]


@pytest.mark.parametrize("case", NORMALISED, ids=lambda case: case.name)
def test_a_hidden_block_moves_eight_activations_beside_its_products(case):
    plain = replace(case, batch_norm=False, dropout=0.0)
    activation = case.rows * sum(case.hidden_features) * case.dtype.itemsize
    # Partial sums of 128 rows and more, parameters and masks of a sixteenth: small change.
    extra = total(count_fusemlp(case)) - total(count_fusemlp(plain))
    assert 7.8 * activation < extra < 8.2 * activation


@pytest.mark.parametrize("case", NETS, ids=lambda case: case.name)
def test_launches_for_each_layer(case):
    # Operands whose rows do not start at multiples of 16 bytes are copied first.
    launches = sum(each.name != "align" for layer in count_fusemlp(case) for each in layer)
    assert launches <= (8 if case.batch_norm else 3) * (len(case.hidden_features) + 1)


@pytest.mark.parametrize("count", [count_fusemlp, count_eager], ids=["fusemlp", "eager"])
@pytest.mark.parametrize("case", NETS, ids=lambda case: case.name)
def test_every_layer_computes_its_own_products(case, count):
    products = ("linear_fwd", "linear_wgrad", "linear_dgrad", "aten.addmm", "aten.mm")
    layers = [sum(each.flops for each in layer if each.name in products) for layer in count(case)]
    assert layers == [total([layer], "flops") for layer in count_floor(case)]


@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_large_plain_nets_are_near_the_floor(case):
    assert total(count_fusemlp(case)) <= 1.3 * total(count_floor(case))


def passes(layers, case):
    return total(layers) / (case.rows * case.classes * case.dtype.itemsize)


def test_passes_of_a_loss():
    """Ours reads the logits, and reads them and writes the gradient. PyTorch reads them and writes logarithms of the
    probabilities, fills their gradient with zeros, and from both writes that of the logits."""
    case = LossCase("many classes", 4096, 8192)
    assert 3 <= passes(count_fusemlp(case), case) < 3.01
    assert 6 <= passes(count_eager(case), case) < 6.01


@pytest.mark.parametrize("case", [case for case in LOSSES if case.in_features is None], ids=lambda case: case.name)
def test_a_loss_moves_fewer_bytes_than_eager(case):
    assert total(count_fusemlp(case)) < 0.75 * total(count_eager(case))


def test_a_linear_layer_and_its_loss_compute_no_logits_twice():
    """And so can take no more than 22 ms at the rate and bandwidth measured on an H200."""
    (case,) = [case for case in LOSSES if case.in_features is not None]
    counted = count_fusemlp(case)
    products = [each for each in counted[0] if each.name in ("linear_fwd", "linear_dgrad", "linear_wgrad")]
    assert sum(each.flops for each in products) == total(count_floor(case), "flops")
    assert modelled_us(counted[0], Ceilings(4300, 770), 5) < 22_000


def test_a_launch_takes_the_longer_of_its_transfers_and_its_arithmetic():
    launches = [Launch("", flops=770_000_000, bytes=4_000_000), Launch("", flops=1_540_000_000, bytes=4_000_000)]
    assert modelled_us(launches, Ceilings(copy_gb_s=4000, gemm_tflops=770), launch_us=5) == (1 + 5) + (2 + 5)


def ones(width):
    """Statistics and parameters of a normalisation."""
    return torch.ones(4, width).unbind()


def bf16(*shape):
    return torch.randn(shape, dtype=torch.bfloat16)


@pytest.fixture
def touched(monkeypatch):
    """Bytes of each load and store of the interpreter."""
    touched = []

    def counted(access):
        def count(builder, ptrs, *args):
            mask = args[1] if access is store else args[0]
            size = ptrs.get_element_ty().primitive_bitwidth // 8
            touched.append(size * np.count_nonzero(np.broadcast_to(mask.data, ptrs.data.shape)))
            return access(builder, ptrs, *args)

        return count

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted(load))
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counted(store))
    return touched


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")
@pytest.mark.usefixtures("kernels", "fresh_plans")
@pytest.mark.parametrize(
    "launch_one",
    [
        pytest.param(lambda: linear_fwd(bf16(13, 37), bf16(50, 37), bf16(50)), id="fwd"),
        pytest.param(lambda: linear_fwd(bf16(13, 37), bf16(50, 37), bf16(50), "relu", True), id="fwd-bitmask"),
        pytest.param(lambda: linear_fwd(bf16(13, 37), bf16(64, 37), None, "silu", True), id="fwd-preact"),
        pytest.param(lambda: linear_dgrad(bf16(13, 37), bf16(37, 50)), id="dgrad"),
        pytest.param(
            lambda: linear_dgrad(bf16(13, 37), bf16(37, 50), "relu", torch.zeros(13, 8, dtype=torch.uint8)),
            id="dgrad-bitmask",
        ),
        pytest.param(lambda: linear_dgrad(bf16(13, 37), bf16(37, 50), "tanh", bf16(13, 50)), id="dgrad-postact"),
        pytest.param(lambda: linear_wgrad(bf16(37, 13), bf16(37, 50), True), id="wgrad"),
        pytest.param(lambda: linear_wgrad(bf16(512, 13), bf16(512, 50), True), id="wgrad-split"),
        pytest.param(lambda: linear_fwd_norm(bf16(13, 37), bf16(50, 37), None, *ones(50), 1e-5, None), id="fwd-norm"),
        pytest.param(
            lambda: linear_dgrad_dropout(bf16(13, 37), bf16(37, 50), bf16(13, 50), "relu", 0.0, None),
            id="dgrad-x",
        ),
        pytest.param(lambda: batch_norm_fwd(bf16(30, 100), *ones(100), 1e-5, "relu", 0.0, None), id="norm-fwd"),
        pytest.param(lambda: merge_grad_sums(torch.ones(2, 5, 30), torch.ones(30), torch.ones(30)), id="norm-merge"),
        pytest.param(lambda: dropout(bf16(30, 100), 0.5, torch.ones(1, dtype=torch.int64)), id="dropout"),
        pytest.param(
            lambda: activation_bwd(bf16(30, 100), "relu", torch.zeros(30, 16, dtype=torch.uint8)), id="act-bitmask"
        ),
        pytest.param(lambda: activation_bwd(bf16(30, 100), "silu", bf16(30, 100)), id="act-preact"),
    ],
)
def test_a_launch_of_one_tile_touches_what_it_reports(launch_one, touched):
    with cost.ledger() as ledger:
        launch_one()
    assert sum(touched) == ledger.bytes


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")
def test_moments_read_the_first_tile_of_a_range_again(kernels, touched):
    with cost.ledger() as ledger:
        column_moments(bf16(30, 100), None, None, None, 0.1)
    assert sum(touched) == ledger.bytes + 2 * 30 * 100


def test_tables_are_written(tmp_path):
    assert main(["traffic", "--quick", "--out", str(tmp_path)]) == 0
    totals, layers = (pd.read_csv(tmp_path / f"{name}.csv") for name in ("traffic", "traffic_layers"))
    counted = ["launches", "bytes", "flops"]
    pd.testing.assert_frame_equal(
        totals.set_index(["case", "what"])[counted].sort_index(), layers.groupby(["case", "what"])[counted].sum()
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["--filter", "nothing"], "'nothing' matches no case"), (["--flops", "0"], "argument --flops: 0.0; must be")],
    ids=["filter", "ceiling"],
)
def test_what_it_cannot_use_is_one_line(argv, message, capsys):
    assert main(["traffic", *argv]) == 2
    assert message in capsys.readouterr().err
