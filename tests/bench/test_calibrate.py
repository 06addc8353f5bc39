"""Figures of a GPU: measured into a file, and read back."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from fusemlp.bench import calibrate
from fusemlp.bench.__main__ import main
from fusemlp.kernels import config, gpu
from fusemlp.kernels.gpu import H200, nearest, read


def test_without_a_gpu_it_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(calibrate, "default_device", lambda: torch.device("cpu"))
    assert main(["calibrate", str(tmp_path / "gpu.json")]) == 2
    assert "PyTorch finds no NVIDIA GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_file_that_exists_is_kept(tmp_path, capsys):
    (tmp_path / "gpu.json").write_text("mine")
    assert main(["calibrate", str(tmp_path / "gpu.json")]) == 2
    assert "gpu.json exists" in capsys.readouterr().err
    assert (tmp_path / "gpu.json").read_text() == "mine"


def test_what_is_measured_is_read_back(tmp_path, monkeypatch):
    found = replace(H200, name="NVIDIA H200", copy_tb_s=4.0, launch_us=2.0)
    monkeypatch.setattr(calibrate, "default_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(calibrate, "measure", lambda _: found)
    assert main(["calibrate", str(tmp_path / "gpu.json")]) == 0
    assert asdict(read(tmp_path / "gpu.json")) == asdict(found)


def test_bandwidth_of_l2_by_hand():
    # 2 x 2 tiles of 64 x 64 in 2 steps of 64 each load 2 x 64 x 64 elements of 2 bytes: 131,072 bytes in 1 us.
    tile = config.POINTER_16BIT[1]
    assert calibrate.l2_bandwidth(tile, 128, 1.0) == pytest.approx(4 * 2 * 2 * 64 * 64 * 2 / 1e6)


@pytest.mark.parametrize("content", ["", "{}", json.dumps({"name": "GPU"})], ids=["empty", "no figures", "one figure"])
def test_a_file_without_figures_is_refused(content, tmp_path):
    (tmp_path / "gpu.json").write_text(content)
    with pytest.raises(ValueError, match=r"FUSEMLP_GPU: .*gpu.json holds no figures of a GPU"):
        read(tmp_path / "gpu.json")


@pytest.mark.parametrize(
    ("name", "capability", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", (9, 0), "H100"),
        ("NVIDIA A100-SXM4-80GB", (8, 0), "A100"),
        ("NVIDIA L40S", (8, 9), "RTX 4090"),
        ("NVIDIA RTX PRO 6000", (12, 0), "B200"),
        ("NVIDIA A10", (8, 6), "A100"),
    ],
    ids=["H100", "A100", "same architecture", "newer", "between"],
)
def test_the_nearest_gpu_of_the_table(name, capability, expected):
    assert nearest(name, capability).name == expected


def test_more_multiprocessors_have_more_bandwidth():
    twice = H200.scaled(264)
    assert (twice.copy_tb_s, twice.gemm_tflop_s) == (2 * H200.copy_tb_s, 2 * H200.gemm_tflop_s)
    assert twice.launch_us == H200.launch_us


@pytest.mark.gpu
def test_on_this_gpu(tmp_path):
    assert main(["calibrate", str(tmp_path / "gpu.json")]) == 0
    found = read(tmp_path / "gpu.json")
    table = gpu.nearest(found.name, found.capability).scaled(found.sms)
    assert all(0.3 < getattr(found, name) / getattr(table, name) < 3 for name in calibrate.FIGURES)
