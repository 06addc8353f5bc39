"""Names and cells that mean something to rich, matplotlib or the report: printed, drawn and written as they are."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from fusemlp.mlp.training import plots
from fusemlp.mlp.training.command import main
from fusemlp.mlp.training.console import console
from fusemlp.mlp.training.data import Source, load_data
from fusemlp.mlp.training.fonts import drawable
from fusemlp.mlp.training.verify import table
from matplotlib.cbook import is_math_text

FAST = ["--no-verify", "--threads", "1", "--hidden", "8", "--epochs", "1"]
# Keys of scikit-learn's report, markup and an emoji of rich, formulas of matplotlib, and what a legend leaves out.
NAMES = ["accuracy", "macro average", "flow [/h]", "mass [kg]", "[red]", ":warning:", "$a_$ b", r"\\$c\$ $", "_d"]
FILE = "t [b] $x_$ :x: $.csv"


def write(tmp_path, **columns):
    rows = 20 * len(NAMES)
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"in [/put] $": rng.normal(size=rows), "const [/]": 1, "kind": NAMES * 20}).assign(**columns)
    frame.to_csv(tmp_path / FILE, index=False)
    return ["--csv", str(tmp_path / FILE), *FAST, "--out", str(tmp_path / "run")]


def test_classes_of_any_name(tmp_path, capsys):
    given = write(tmp_path, row=np.roll(NAMES * 20, 1), kind="[/]")
    assert main([*given, "--target", "row", "--diagnose"]) == 0
    shown = capsys.readouterr().out
    for name in (*NAMES, "const [/]", FILE.removesuffix(".csv")):
        assert name in shown
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert {*found["classes"]} == {*NAMES}
    assert main(["--predict", str(tmp_path / FILE), "--out", str(tmp_path / "run")]) == 0
    assert list(pd.read_csv(tmp_path / "run" / "predictions.csv"))[:2] == ["row_", "row"]


def test_values_of_any_name(tmp_path, capsys):
    rng = np.random.default_rng(1)
    targets = ["row", "p([/x])", "$y_$ $"]
    given = write(tmp_path, **{name: rng.normal(size=20 * len(NAMES)) for name in targets})
    assert main([*given, "--target", *targets]) == 0
    shown = capsys.readouterr().out
    for name in ("row_", *targets):
        assert name in shown
    assert "probability" not in shown


def test_a_range_test_of_a_file_of_any_name(tmp_path):
    given = write(tmp_path, y=range(20 * len(NAMES)))
    assert main([*given, "--target", "y", "--find-lr"]) == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_drawn_as_it_is(name):
    # What matplotlib does with text that is no formula.
    assert not is_math_text(drawable(name))
    assert drawable(name).replace(r"\$", "$") == name


def test_a_legend_has_every_class(tmp_path):
    write(tmp_path, y=np.roll(NAMES * 20, 1))
    data = load_data(Source(csv=str(tmp_path / FILE), target=["y"]))
    history = [{"epoch": 1, "train_loss": 1.0, "val_loss": 1.0}]
    figures = dict(plots.figures(history, 1, torch.randn(len(data.test), len(NAMES)), data))
    for figure in ("roc", "precision_recall"):
        labels = [text.get_text() for text in figures[figure].axes[0].get_legend().get_texts()]
        assert all(any(label.startswith(drawable(name)) for label in labels) for name in NAMES)


def test_control_characters_are_printed_as_escapes(capsys):
    console.print("a\x1b[31mb\nc")
    assert capsys.readouterr().out == "a\\x1b[31mb\\nc\n"


def test_the_table_of_the_kernels_has_no_markup(capsys):
    console.print(table([{"tensor": "[/x]", "shape": "1", "difference": 0.0, "allowed": 1.0}]))
    shown = capsys.readouterr().out
    assert "[/x]" in shown
    assert "agrees" in shown
    assert "[green]" not in shown
