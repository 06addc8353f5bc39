"""What `explain` says of models, without a GPU."""

import fusemlp
import pytest
import torch
from fusemlp import MLP
from fusemlp.kernels import launch
from torch import nn

WORK = ["forward", "weight gradient", "forward", "input gradient", "weight gradient"]


def test_every_product_of_a_net():
    said = fusemlp.explain(MLP(64, [256], 8, dtype=torch.bfloat16), rows=4096, gpu="H200")
    assert [each.work for each in said] == WORK
    assert [each.layer for each in said] == ["0", "0", "2", "2", "2"]
    assert said.us == pytest.approx(sum(each.us for each in said))


def test_passes_of_batch_norm_and_dropout():
    net = MLP(64, [256], 8, batch_norm=True, dropout=0.1, dtype=torch.bfloat16)
    said = fusemlp.explain(net, rows=65536, gpu="H200")
    assert [each.path for each in said if each.work.startswith("block")] == [
        "passes over 3 activations",
        "passes over 5 activations",
    ]


@pytest.mark.parametrize(
    ("rows", "regime"), [(16, "launch"), (2**20, "memory"), (8192, "compute")], ids=["launch", "memory", "compute"]
)
def test_regimes(rows, regime):
    width = 4096 if regime == "compute" else 64
    said = fusemlp.explain(nn.Linear(width, width, dtype=torch.bfloat16), rows=rows, gpu="H100")
    assert {each.regime for each in said} == {regime}


def test_float32_products_are_cublas():
    said = fusemlp.explain(MLP(64, [256], 8), rows=4096, gpu="H200")
    assert {each.path for each in said} == {"cuBLAS"}
    assert "full precision" in said[0].reason


def test_misaligned_rows_are_copied_first():
    said = fusemlp.explain(nn.Linear(479, 1024, dtype=torch.bfloat16), rows=65536, gpu="H200")
    assert said[0].path.startswith("aligned copies, then ")


def test_any_module_that_holds_linear_layers():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(32, 64), nn.ReLU())
            self.head = nn.Linear(64, 3)

    said = fusemlp.explain(Model().to(torch.bfloat16), rows=512, gpu="A100")
    assert [each.layer for each in said if each.work == "forward"] == ["encoder.0", "head"]


def test_the_table_names_its_columns():
    lines = str(fusemlp.explain(MLP(64, [256], 8, dtype=torch.bfloat16), rows=4096, gpu="H200")).splitlines()
    assert lines[0].split() == ["layer", "work", "path", "reason", "regime", "us"]
    assert len(lines) == 1 + len(WORK)


def test_tensors_are_explained_as_before():
    x = torch.randn(3, 4)
    assert fusemlp.explain(x, None) == launch.explain(x, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu": "H200"}, "rows: None; give the number of rows"),
        ({"rows": 0, "gpu": "H200"}, "rows: 0; give the number of rows"),
        ({"rows": 5}, "gpu: None, and the module is on cpu; name one of H200"),
        ({"rows": 5, "gpu": "C64"}, "gpu: 'C64'"),
    ],
    ids=["no rows", "zero rows", "no GPU", "unknown GPU"],
)
def test_what_is_missing_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        fusemlp.explain(MLP(4, [], 2), **options)
