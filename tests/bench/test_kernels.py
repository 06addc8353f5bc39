"""The kernels of a training step, one by one."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from fusemlp.bench import kernels, mlp
from fusemlp.bench.__main__ import main
from fusemlp.bench.cases import QUICK_NETS, QUICK_OPERATIONS

STORED = Path(kernels.__file__).parent / "results" / "nvidia-h200" / "kernels.csv"
COLUMNS = ["case", "pass", "competitor", "number", "kernel", "us"]
CPU = torch.device("cpu")
CASES = {"net": (QUICK_NETS[0], "training"), "operation": (QUICK_OPERATIONS[0], "both")}
WITHOUT = "compile|alone"  # which take long, or tell little, on a CPU


@pytest.fixture
def seen(monkeypatch):
    """A profiler that sees two kernels in each call, one of them with a long name."""

    def two(call, device):
        call()
        return [("gemm", 3.0), ("void at::native::" + 200 * "x", 0.5)]

    monkeypatch.setattr(mlp, "kernels", two)


@pytest.mark.parametrize(("case", "which"), CASES.values(), ids=CASES)
def test_a_row_per_kernel_in_order(case, which, seen):
    rows = kernels.profile_case(case, CPU, WITHOUT)
    assert [tuple(row.values()) for row in rows] == [
        (case.name, which, competitor, number, name, us)
        for competitor in ("fusemlp", "torch")
        for number, (name, us) in enumerate([("gemm", 3.0), ("void at::native::" + 93 * "x", 0.5)])
    ]


def test_columns(seen):
    assert [*kernels.profile_case(QUICK_NETS[0], CPU, WITHOUT)[0]] == COLUMNS


def fails():
    raise RuntimeError("no memory")


def test_who_fails_is_named_and_the_others_profiled(seen, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "competitors", lambda *_: ("both", {"bad": lambda _: fails, "good": lambda _: list}))
    rows = kernels.profile_case(QUICK_NETS[0], CPU, "")
    assert {row["competitor"] for row in rows} == {"good"}
    assert capsys.readouterr().out == "not profiled: bad, quick plain: failed: RuntimeError: no memory\n"


def test_the_stored_table_is_as_the_command_writes_it():
    assert [*pd.read_csv(STORED).columns] == COLUMNS


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_nothing_is_profiled(tmp_path, capsys):
    assert main(["kernels", "--quick", "--out", str(tmp_path / "out")]) == 2
    assert "PyTorch finds no NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.gpu
def test_our_kernels_are_seen(tmp_path):
    assert main(["kernels", "--quick", "--filter", "plain", "--without", WITHOUT, "--out", str(tmp_path)]) == 0
    table = pd.read_csv(tmp_path / "kernels.csv")
    assert "_gemm_kernel" in [*table["kernel"][table["competitor"] == "fusemlp"]]
