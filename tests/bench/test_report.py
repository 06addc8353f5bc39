"""Stored results in a README."""

import pandas as pd
import pytest
from fusemlp.bench.__main__ import main
from fusemlp.bench.report import render

README = "before\n<!-- begin codegen -->\nold\n<!-- end codegen -->\nafter\n"
CODEGEN = """\
before
<!-- begin codegen -->
| architecture | kernels compiled | most registers | largest stack, bytes |
| --- | ---: | ---: | ---: |
| sm_90 | 2 | 168 | 0 |
| sm_100 | 1 | 200 | 16 |
<!-- end codegen -->
after
"""


@pytest.fixture
def results(tmp_path):
    (tmp_path / "codegen").mkdir()
    pd.DataFrame({"registers": [168, 40], "stack": [0, 0]}).to_csv(tmp_path / "codegen" / "sm_90.csv")
    pd.DataFrame({"registers": [200], "stack": [16]}).to_csv(tmp_path / "codegen" / "sm_100.csv")
    main(["traffic", "--quick", "--out", str(tmp_path / "traffic")])
    return tmp_path


@pytest.fixture
def readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(README, encoding="utf-8")
    return path


def test_a_section_is_replaced(results):
    assert render(README, results) == CODEGEN


def test_the_traffic_table_has_a_row_per_case(results):
    text = render("<!-- begin traffic -->\n<!-- end traffic -->\n", results)
    assert [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| quick")] == [
        "| quick plain",
        "| quick BN + dropout",
    ]


def test_the_traffic_table_says_what_is_modelled(results):
    text = render("<!-- begin traffic -->\n<!-- end traffic -->\n", results)
    assert "Times are modelled, not measured: 4.3 TB/s, 770 TFLOP/s, 0 µs per launch." in text


def test_text_without_sections_stays(results):
    assert render("as it was\n", results) == "as it was\n"


def test_check_changes_nothing(results, readme):
    assert main(["report", "--check", "--readme", str(readme), "--results", str(results)]) == 1
    assert readme.read_text(encoding="utf-8") == README


def test_check_passes_after_a_report(results, readme):
    assert main(["report", "--readme", str(readme), "--results", str(results)]) == 0
    assert main(["report", "--check", "--readme", str(readme), "--results", str(results)]) == 0


@pytest.mark.parametrize(
    ("section", "message"),
    [("traffic", "traffic.csv: no such table"), ("speed", "section 'speed': allowed are traffic, codegen")],
)
def test_what_it_cannot_render_is_one_line(section, message, readme, tmp_path, capsys):
    readme.write_text(README.replace("codegen", section), encoding="utf-8")
    assert main(["report", "--readme", str(readme), "--results", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
