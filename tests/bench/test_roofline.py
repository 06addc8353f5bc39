import pandas as pd
import pytest
import torch
from fusemlp.bench import plot, roofline
from fusemlp.bench.__main__ import main
from fusemlp.bench.cases import LayerCase, NetCase
from fusemlp.bench.roofline import Ceilings, Work

CASE = LayerCase("by hand", rows=2, in_features=3, out_features=5, dtype=torch.float32)
# X 6, W 15, b 5, Y 10 elements of 4 bytes.
LAYER_WORK = {
    "forward": (2 * 2 * 3 * 5, 4 * (6 + 15 + 5 + 10)),
    "backward": (4 * 2 * 3 * 5, 4 * (10 + 6 + 15 + 5 + 15 + 6)),
    "both": (6 * 2 * 3 * 5, 4 * (36 + 57)),
}


@pytest.mark.parametrize(("which", "work"), LAYER_WORK.items(), ids=LAYER_WORK)
def test_work_of_a_layer_by_hand(which, work):
    assert roofline.layer_work(CASE, which) == Work(*work)


def test_first_layer_has_no_input_gradient():
    assert roofline.layer_work(CASE, "backward", input_grad=False) == Work(2 * 2 * 3 * 5, 4 * (10 + 6 + 15 + 5))


NET_WORK = {
    "inference": (60 + 20, 144 + 4 * (10 + 5 + 1 + 2)),
    "training": (180 - 60 + 60, 144 + 144 + 4 * 18 + 4 * 33),
}


@pytest.mark.parametrize(("which", "work"), NET_WORK.items(), ids=NET_WORK)
def test_work_of_a_net_by_hand(which, work):
    assert roofline.net_work(NetCase("net", 2, 3, (5,), 1, dtype=torch.float32), which) == Work(*work)


def test_ridge_in_flop_per_byte():
    assert Ceilings(copy_gb_s=4000, gemm_tflops=800).ridge == 200


REGIMES = {
    "compute": (Work(8 * 10**12, 10**9), 10, "compute"),
    "memory": (Work(10**9, 4 * 10**9), 10, "memory"),
    "launch": (Work(8 * 10**6, 4 * 10**3), 10, "launch"),
}


@pytest.mark.parametrize(("work", "host_us", "regime"), REGIMES.values(), ids=REGIMES)
def test_regime(work, host_us, regime):
    assert Ceilings(copy_gb_s=4000, gemm_tflops=800).regime(work, host_us) == regime


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("roofline")
    assert main(["roofline", "--quick", "--filter", "quick", "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("name", ["ceilings.csv", "ceilings.json", "roofline.csv", "roofline.png", "environment.json"])
def test_command_writes(out, name):
    assert (out / name).stat().st_size


def test_every_case_and_pass_has_a_row(out):
    assert len(pd.read_csv(out / "roofline.csv")) == 3 + 2 * 2


def test_copy_bandwidth_is_that_of_a_memory(out):
    assert 0.1 < pd.read_csv(out / "ceilings.csv")["copy_gb_s"][0] < 20_000


def test_picture_has_every_roof_and_point(out):
    ceilings, points = pd.read_csv(out / "ceilings.csv"), pd.read_csv(out / "roofline.csv")
    assert len(plot.roofline(ceilings, points).axes[0].lines) == len(ceilings) + len(points)
