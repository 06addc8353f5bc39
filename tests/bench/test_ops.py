import warnings

import pandas as pd
import pytest
import torch
from fusemlp.bench import mlp, ops, plot
from fusemlp.bench.__main__ import main
from fusemlp.bench.cases import QUICK_NETS, BlockCase, LossCase, NetCase
from fusemlp.bench.competitors import LAYER_COMPETITORS, NET_COMPETITORS, net_call, net_operands
from fusemlp.bench.roofline import Work
from fusemlp.kernels import launch

# The compiler's own.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

PASSES = {"ops": ["forward", "backward", "both"], "mlp": ["inference", "training"]}


@pytest.fixture(scope="module", params=PASSES)
def command(request):
    return request.param


@pytest.fixture(scope="module")
def out(command, tmp_path_factory):
    out = tmp_path_factory.mktemp(command)
    with warnings.catch_warnings():
        # The compiler's own.
        warnings.filterwarnings("ignore", module=r"torch\.")
        assert main([command, "--quick", "--filter", "32 -> 48|plain", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def table(command, out):
    return pd.read_csv(out / f"{command}.csv")


@pytest.mark.parametrize("suffix", ["csv", "json", "png"])
def test_command_writes(command, out, suffix):
    assert (out / f"{command}.{suffix}").stat().st_size


def test_every_pass_is_measured(command, table):
    assert list(table["pass"].unique()) == PASSES[command]


def test_every_competitor_takes_part(command, table):
    registry = LAYER_COMPETITORS if command == "ops" else NET_COMPETITORS
    absent = set() if torch.cuda.is_available() else {"torch.compile max-autotune"}
    assert set(table["competitor"]) == set(registry) - absent


def test_right_results_are_timed(table):
    assert (table["median_ms"].notna() == table["fault"].isna()).all()


def test_speedup_is_a_ratio_of_medians(table):
    first = table.iloc[:2]
    assert first["fusemlp_speedup"][1] == pytest.approx(first["median_ms"][1] / first["median_ms"][0])


def test_rows_are_told_apart_by_text(table):
    assert not table.duplicated(["case", "pass", "mode", "competitor"]).any()


def test_picture_has_a_bar_for_every_competitor(command, table):
    labels = plot.speedups(table, command).axes[0].get_legend_handles_labels()[1]
    assert set(labels) == set(table["competitor"]) - {"fusemlp"}


def test_saved_activations_count_each_storage_once():
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    x = torch.randn(32, 8)
    # The input, and the ReLU's output, which both ReLU and the layer above keep.
    assert mlp.saved_mib(net, lambda: net(x)) == 4 * 32 * (8 + 16) / 2**20


# Two products; PyTorch's ReLU is a launch of its own, which reads and writes 16 x 16 floats.
LAUNCHED = {"fusemlp": (2, 0), "torch": (3, 2 * 4 * 16 * 16)}


@pytest.mark.parametrize(("competitor", "expected"), LAUNCHED.items(), ids=LAUNCHED)
def test_launches_and_the_bytes_they_move(competitor, expected, device, monkeypatch):
    # The interpreter works with operators of PyTorch, which would be counted.
    monkeypatch.setattr(launch, "launch", lambda *_, **__: None)
    case = NetCase("tiny", 16, 16, (16,), 16, dtype=torch.float32)
    net = mlp.nets(case, device)[competitor]
    x, *_ = operands = net_operands(case, device)
    with launch.backend("triton"):
        counted = mlp.launched(net, net_call(net, operands, "inference"))
    products = 2 * 4 * (2 * x.numel() + 16 * 16 + 16)
    assert (counted["launches"], counted["moved_mb"]) == (expected[0], (products + expected[1]) / 1e6)


def test_compiled_code_is_not_counted(device):
    net = mlp.nets(QUICK_NETS[0], device)["torch.compile"]
    assert mlp.launched(net, list) == {}


def test_every_type_is_measured(tmp_path):
    arguments = ["ops", "--quick", "--filter", "32 ->", "--dtype", "float64", "bfloat16", "--out", str(tmp_path)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\.")
        assert main(arguments) == 0
    assert list(pd.read_csv(tmp_path / "ops.csv")["dtype"].unique()) == ["float64", "bfloat16"]


def test_all_nets_of_a_case_have_equal_parameters():
    made = mlp.nets(QUICK_NETS[0], torch.device("cpu"))
    assert all(map(torch.equal, made["fusemlp"].parameters(), made["torch"].parameters()))


BAD = {
    "no such case": (["--filter", "nothing"], "argument --filter: 'nothing' matches no case\n"),
    "no expression": (
        ["--filter", "("],
        "argument --filter: '(' is not a regular expression: missing ), unterminated subpattern at position 0\n",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("name", ["roofline", "ops", "mlp", "regimes"])
def test_bad_arguments_give_one_line(name, arguments, message, capsys):
    assert main([name, *arguments]) == 2
    assert capsys.readouterr().err == f"fusemlp-bench {name}: error: {message}"


BESIDE = {
    "quick BN": {"fusemlp", "torch", "torch.compile"},
    "quick cross-entropy": {"fusemlp", "torch", "torch.compile"},
    "quick linear . cross": {"fusemlp", "torch", "torch.compile", "torch linear_cross_entropy"},
}


@pytest.mark.parametrize(("case", "competitors"), BESIDE.items(), ids=BESIDE)
def test_what_is_beside_the_layers_is_measured_too(case, competitors, tmp_path):
    assert main(["ops", "--quick", "--filter", case, "--out", str(tmp_path)]) == 0
    table = pd.read_csv(tmp_path / "ops.csv")
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        competitors = competitors - {"torch linear_cross_entropy"}
    assert competitors <= set(table["competitor"])
    assert list(table["pass"].unique()) == PASSES["ops"]
    assert table["fault"].isna().all()
    assert (table["median_ms"] > 0).all()


# Elements of (64, 48) in float32; (64, 32) and (48, 32).
WORK = {
    "normalised": (BlockCase("", 64, 48, dtype=torch.float32), "both", Work(0, 4 * 8 * 64 * 48)),
    "layer norm": (BlockCase("", 64, 48, norm="layer", dtype=torch.float32), "both", Work(0, 4 * 5 * 64 * 48)),
    "dropout": (BlockCase("", 64, 48, norm=None, dtype=torch.float32), "both", Work(0, 4 * 4 * 64 * 48)),
    "loss": (LossCase("", 64, 48, dtype=torch.float32), "both", Work(0, 4 * 3 * 64 * 48)),
    "linear loss": (
        LossCase("", 64, 48, 32, dtype=torch.float32), "forward", Work(2 * 64 * 48 * 32, 4 * (64 * 32 + 48 * 32))
    ),
}  # fmt: skip


@pytest.mark.parametrize(("case", "which", "expected"), WORK.values(), ids=WORK)
def test_work_by_hand(case, which, expected):
    assert ops.work(case, which) == expected
