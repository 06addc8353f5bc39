"""The GPU's clock while it is measured; a stand-in plays nvidia-smi."""

import math
import time
from types import SimpleNamespace

import pytest
import torch
from fusemlp.bench.clock import Clock, watch

PRINTED = {
    "three samples": ("1980, 400.5\\n1755, 650.0\\n1740, 640.0\\n", Clock(1755.0, 640.0)),
    "cut short": ("1980, 400.5\\n17", Clock(1980.0, 400.5)),
    "power not known": ("1980, [N/A]\\n", Clock()),
    "nothing": ("", Clock()),
}


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Makes a program of this name that prints a text and then waits to be stopped."""

    def install(printed):
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\nprintf '{printed}'\nexec sleep 60\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="0"))

    return install


@pytest.mark.parametrize(("printed", "expected"), PRINTED.values(), ids=PRINTED)
def test_medians_of_what_it_prints(printed, expected, nvidia_smi):
    nvidia_smi(printed)
    with watch(torch.device("cuda")) as clock:
        time.sleep(0.3)
    assert repr(clock) == repr(expected)


def test_a_cpu_has_none():
    with watch(torch.device("cpu")) as clock:
        pass
    assert math.isnan(clock.sm_mhz)
