"""Measured rates and bandwidth from files: what is looked up, how it is carried over, and files of no use."""

import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from fusemlp.bench import measured
from fusemlp.bench.__main__ import main
from fusemlp.bench.cases import NETS
from fusemlp.bench.cluster import Cluster, Device
from fusemlp.bench.layout import Layout
from fusemlp.bench.measured import nearest, needed_times, rate_like_measured, read_measured
from fusemlp.bench.parallel_step import net_step
from fusemlp.kernels.cost_model import Gemm, cublas_us
from fusemlp.kernels.gpu import H200

STORED = Path(measured.__file__).parent / "results"
CEILINGS = "dtype,copy_gb_s,gemm_tflops\nbfloat16,4000,700\nfloat32,4000,50\n"
PRODUCTS = (
    "kind,M,N,K,us,cublas_us,fault\n"
    "plain,4096,4096,4096,200,190,\n"
    "relu,4096,4096,4096,230,190,\n"
    "relu,4096,4096,4096,210,190,\n"
    "wgrad,1024,1024,8192,,50,it failed\n"
)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "ceilings.csv").write_text(CEILINGS, encoding="utf-8")
    (tmp_path / "products.csv").write_text(PRODUCTS, encoding="utf-8")
    return tmp_path


def test_nearest_is_by_log_distance():
    table = pd.DataFrame({"M": [100, 1000], "N": [8, 8], "K": [8, 8], "tflops": [1.0, 2.0]})
    assert [nearest(table, "tflops")(M, 8, 8) for M in (310, 320)] == [1.0, 2.0]


def test_sizes_that_are_no_multiples_of_8_are_like_each_other():
    table = pd.DataFrame({"M": [64, 64], "N": [64, 64], "K": [480, 13], "tflops": [1.0, 2.0]})
    assert [nearest(table, "tflops")(64, 64, K) for K in (479, 472)] == [2.0, 1.0]


def test_of_a_shape_the_fastest_variant_with_its_activation_counts(folder):
    assert needed_times(folder / "products.csv").to_dict("records") == [
        {"M": 1024, "N": 1024, "K": 8192, "us": 50},
        {"M": 4096, "N": 4096, "K": 4096, "us": 210},
    ]


def test_a_measured_shape_has_its_measured_time(folder):
    rate = read_measured(folder).rate_tflop_s
    assert rate(4096, 4096, 4096, torch.bfloat16) == pytest.approx(2 * 4096**3 / 210e6)


def test_other_shapes_are_modelled_like_the_nearest():
    times = pd.DataFrame([{"M": 4096, "N": 4096, "K": 4096, "us": 2 * cublas_us(Gemm(4096, 4096, 4096), H200)}])
    us = 2 * 4096 * 2048 * 4096 / (1e6 * rate_like_measured(times, H200)(4096, 2048, 4096))
    assert us == pytest.approx(2 * cublas_us(Gemm(4096, 2048, 4096), H200))


def test_times_on_an_h200_are_carried_over_within_20_percent():
    times = needed_times(STORED / "nvidia-h200" / "products.csv")
    errors = []
    for left_out, (M, N, K, us) in zip(times.index, times.itertuples(index=False), strict=True):
        rate = rate_like_measured(times.drop(left_out), H200)
        errors.append(math.log(2 * M * N * K / (1e6 * rate(M, N, K)) / us))
    assert math.sqrt(sum(error**2 for error in errors) / len(errors)) == pytest.approx(0.2, abs=0.01)


def test_one_rank_takes_as_long_as_steps_measured_on_an_h200():
    found = read_measured(STORED / "nvidia-h200")
    device = Device(found.bandwidth_tb_s, found.rate_tflop_s, H200.launch_us)
    table = pd.read_csv(STORED / "nvidia-h200" / "mlp.csv").query(
        "competitor == 'fusemlp' and mode == 'CUDA graph' and `pass` == 'training'"
    )
    measured_us = 1e3 * table.set_index("case")["median_ms"]
    ratios = [net_step(case, Layout(), Cluster(device, 450)).products_us / measured_us[case.name] for case in NETS]
    assert min(ratios) > 0.6
    assert max(ratios) < 1.3
    assert 0.8 < math.prod(ratios) ** (1 / len(ratios)) < 1


def test_other_types_have_the_rate_of_large_products(folder):
    assert read_measured(folder).rate_tflop_s(8, 8, 8, torch.float32) == 50


def test_without_products_every_shape_has_the_rate_of_large_ones(folder):
    (folder / "products.csv").unlink()
    assert read_measured(folder).rate_tflop_s(8, 8, 8, torch.bfloat16) == 700


def test_bandwidth_and_sources_are_those_of_the_folder(folder):
    found = read_measured(folder)
    assert (found.bandwidth_tb_s, found.bandwidth_said) == (4, f"4 TB/s (measured, {folder.name}/ceilings.csv)")
    assert found.rate_said == f"measured rates of {folder.name}/products.csv (16-bit types) and ceilings.csv (others)"


@pytest.mark.parametrize("name", ["nvidia-h200", "cpu"])
def test_stored_results_can_be_used(name):
    assert read_measured(STORED / name).rate_tflop_s(1024, 1024, 1024, torch.bfloat16) > 0


BAD_RATES = {
    "missing": (None, "no such file"),
    "empty": (b"", "No columns to parse from file"),
    "column": (b"M,N,rate\n1,2,3\n", "has no column K, tflops; must have M, N, K, tflops"),
    "rows": (b"M,N,K,tflops\n", "has no rows"),
    "text": (b"M,N,K,tflops\n1,2,3,4\n1,2,3,fast\n", "row 2: M, N, K, tflops must be positive numbers"),
    "zero": (b"M,N,K,tflops\n0,2,3,4\n", "row 1: M, N, K, tflops must be positive numbers"),
    "ragged": (b"M,N,K,tflops\n1,2,3,4\n1,2,3,4,5\n", "Expected 4 fields in line 3, saw 5"),
    "binary": (b"\x89PNG\xff\xfe", "can't decode"),
}


@pytest.mark.parametrize(("contents", "message"), BAD_RATES.values(), ids=BAD_RATES)
def test_rates_it_cannot_use_are_one_line(contents, message, tmp_path, capsys):
    path = tmp_path / "rates.csv"
    if contents is not None:
        path.write_bytes(contents)
    assert main(["scaling", "--quick", "--rates", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"argument --rates: {path}: " in error
    assert message in error
    assert error.count("\n") == 1


BAD_RESULTS = {
    "ceilings": ("ceilings.csv", None, "ceilings.csv: no such file"),
    "dtype": ("ceilings.csv", "copy_gb_s,gemm_tflops\n1,2\n", "has no column dtype; must have dtype, copy_gb_s"),
    "bandwidth": ("ceilings.csv", CEILINGS.replace("4000", "-1"), "row 1: copy_gb_s, gemm_tflops must be positive"),
    "type": ("ceilings.csv", CEILINGS.replace("float32", "float64"), "has no row for float32; has bfloat16, float64"),
    "products": ("products.csv", "M,N,K\n1,2,3\n", "products.csv: has no column kind, us, cublas_us"),
}


@pytest.mark.parametrize(("name", "contents", "message"), BAD_RESULTS.values(), ids=BAD_RESULTS)
def test_results_it_cannot_use_are_one_line(name, contents, message, folder, capsys):
    (folder / name).unlink()
    if contents is not None:
        (folder / name).write_text(contents, encoding="utf-8")
    assert main(["scaling", "--quick", "--measured", str(folder)]) == 2
    error = capsys.readouterr().err
    assert f"argument --measured: {folder}" in error
    assert message in error
    assert error.count("\n") == 1


def test_a_folder_that_is_not_there_is_one_line(tmp_path, capsys):
    assert main(["scaling", "--quick", "--measured", str(tmp_path / "none")]) == 2
    assert f"argument --measured: {tmp_path / 'none'}: no such folder" in capsys.readouterr().err
