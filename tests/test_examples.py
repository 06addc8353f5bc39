"""The scripts of examples/, each in a process of its own, as a reader runs them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
MAX_LINES = 60
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def run(*arguments):
    """What Python prints; on a CPU PyTorch serves, and nothing is interpreted."""
    environment = {k: v for k, v in os.environ.items() if k not in ("FUSEMLP_BACKEND", "TRITON_INTERPRET")}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def found(pattern, printed):
    """The groups of the one line that matches."""
    (groups,) = re.findall(f"^{pattern}$", printed, re.MULTILINE)
    return groups


def check_accuracy(printed):
    assert float(found(r"test accuracy after \d+ epochs on \w+: (\S+)", printed)) > 0.95


def check_agreement(printed):
    assert found(r"stem.0 +Linear +fused +(.+)", printed) == "one layer with BatchNorm1d, ReLU, Dropout"
    assert float(found(r"outputs agree; largest difference: (\S+)", printed)) < 1e-2
    assert found(r"Choice\(backend='(.+)', reason='.+'\)", printed) in ("torch", "triton")


def check_losses(printed):
    torchs, fusemlps = map(float, found(r"loss: torch (\S+), fusemlp (\S+)", printed))
    assert fusemlps == pytest.approx(torchs, rel=1e-3)
    assert float(found(r"as a module: (\S+)", printed)) == pytest.approx(torchs, rel=1e-3)
    for name in ("input", "weight", "bias"):
        assert float(found(rf"gradient of {name}: largest difference (\S+) of the largest entry", printed)) < 1e-2


def check_two_ranks(printed):
    assert found(r"ranks: (\d) \(\w+\), each with \(128, 64\) of weight \(256, 64\)", printed) == "2"
    before, after = map(float, found(r"loss before the step (\S+), after it (\S+)", printed))
    assert after < before


def check_devices(printed):
    assert found(r"devices: (.+)", printed)
    steps = re.findall(r"^step \d: loss on one device (\S+), on \d (\S+)$", printed, re.MULTILINE)
    assert len(steps) == 5
    for alone, spread in steps:
        assert float(spread) == pytest.approx(float(alone), rel=1e-3)


def check_regimes(printed):
    assert float(found(r"\w+: .+, ridge at (\S+) FLOP per byte", printed)) > 0
    regimes = re.findall(r"^\S+ -> \S+, \d+ rows: .* (launch|memory|compute)-bound: ", printed, re.MULTILINE)
    assert len(regimes) == 4
    assert regimes[0] == "launch"


CHECKS = {
    "train_mlp": check_accuracy,
    "fuse_into_a_model": check_agreement,
    "last_layer_and_loss": check_losses,
    "layers_on_devices": check_devices,
    "tensor_parallel": check_two_ranks,
    "read_a_roofline": check_regimes,
}


@pytest.mark.parametrize("name", CHECKS)
def test_an_example_prints_what_it_promises(name):
    launcher = (*TORCHRUN, "2") if name == "tensor_parallel" else ()
    CHECKS[name](run(*launcher, str(EXAMPLES / f"{name}.py")))


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == CHECKS.keys()


@pytest.mark.parametrize("name", CHECKS)
def test_an_example_is_short_and_says_what_it_shows(name):
    lines = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MAX_LINES
    assert lines[0].startswith('"""')
