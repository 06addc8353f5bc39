"""Stored results in the README and the pages of docs/."""

import json
from pathlib import Path

import pandas as pd
import pytest
from fusemlp.bench.__main__ import main
from fusemlp.bench.report import render
from fusemlp.bench.results import environment, write_table

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
        "| quick cross-entropy",
        "| quick linear + cross-entropy",
    ]


def test_the_traffic_table_says_what_is_modelled(results):
    text = render("<!-- begin traffic -->\n<!-- end traffic -->\n", results)
    assert "Times are modelled, not measured: 4.3 TB/s, 770 TFLOP/s, 0 µs per launch." in text


SCALING = """\
| net | efficiency on 2 ranks | efficiency on 4 ranks | pays up to |
| --- | ---: | ---: | ---: |
| wide | 0.90 | 0.75 | 4 ranks |
| narrow | 0.40 | 0.15 | never |

One training step, modelled and not measured: 4.3 TB/s, 770 TFLOP/s, a bus of 450 GB/s for each rank, 10 µs for each \
collective.
"""


def test_the_scaling_table_says_up_to_how_many_ranks_pay(tmp_path):
    columns = ["net", "ranks", "modelled_efficiency", "pays"]
    rows = [
        *(("wide", 1, 1.0, False), ("wide", 2, 0.9, True), ("wide", 4, 0.75, True)),
        *(("narrow", 1, 1.0, False), ("narrow", 2, 0.4, False), ("narrow", 4, 0.15, False)),
    ]
    assumed = {"bandwidth": "4.3 TB/s", "rate": "770 TFLOP/s", "bus_gb_s": 450, "latency_us": 10}
    write_table(pd.DataFrame(rows, columns=columns).assign(**assumed), tmp_path / "scaling", "scaling")
    text = render("<!-- begin scaling -->\n<!-- end scaling -->\n", tmp_path)
    assert text == f"<!-- begin scaling -->\n{SCALING}<!-- end scaling -->\n"


ADVICE = """\
| net | layout | modelled, µs | efficiency | exposed communication | memory, GB |
| --- | ---: | ---: | ---: | ---: | ---: |
| wide | fsdp 8 | 1,200 | 0.50 | 25% | 3.5 |

One training step on 8 ranks, modelled and not measured: 4.3 TB/s, 770 TFLOP/s, 8 ranks in a node, a bus of 450 GB/s \
for each rank and a network of 50 GB/s, 10 µs for each collective and 5 µs for each doubling of its nodes.
"""


def test_the_advice_table_has_the_best_layout_that_fits(tmp_path):
    columns = [
        "net",
        "layout",
        "modelled_us",
        "modelled_efficiency",
        "modelled_exposed_us",
        "modelled_memory_gb",
        "fits",
    ]
    rows = [
        ("wide", "fsdp 8", 1200.0, 0.5, 300.0, 3.5, True),
        ("wide", "tp 8", 1300.0, 0.45, 400.0, 3.5, True),
        ("wide", "dp 8", 1000.0, 0.6, 100.0, 200.0, False),
    ]
    assumed = {"bandwidth": "4.3 TB/s", "rate": "770 TFLOP/s", "bus_gb_s": 450, "network_gb_s": 50, "latency_us": 10}
    table = pd.DataFrame(rows, columns=columns).assign(ranks=8, node_ranks=8, hop_us=5, **assumed)
    write_table(table, tmp_path / "scaling", "advice")
    text = render("<!-- begin advice -->\n<!-- end advice -->\n", tmp_path)
    assert text == f"<!-- begin advice -->\n{ADVICE}<!-- end advice -->\n"


SPEED = "<!-- begin speed -->\n<!-- end speed -->\n"
MEANS = "<!-- begin means -->\n<!-- end means -->\n"


def measured(folder, cuda):
    """Two nets as a GPU (or, without CUDA, a CPU) would have them."""
    folder.mkdir()
    nets = {
        "net": {"fusemlp": 2.0, "torch": 5.0, "GEMM alone": 1.5},
        "other": {"fusemlp": 1.0, "torch": 0.9, "GEMM alone": 0.8},
    }
    rows = [
        {
            "case": net,
            "pass": "training",
            "mode": mode,
            "competitor": name,
            "median_ms": scale * ms,
            "fusemlp_speedup": ms / times["fusemlp"],
        }
        for net, times in nets.items()
        for mode, scale in (("eager, L2 cold", 10), ("CUDA graph", 1))
        for name, ms in times.items()
    ]
    pd.DataFrame(rows).to_csv(folder / "mlp.csv")
    machine = {"device": "a GPU", "torch": "2.11", "triton": "3.6", "cuda": cuda}
    (folder / "environment.json").write_text(json.dumps(machine))


def test_speed_is_in_multiples_of_fusemlps_time_in_graphs(tmp_path):
    measured(tmp_path / "gpu", "13.0")
    text = render(SPEED, tmp_path)
    assert "a GPU, torch 2.11, Triton 3.6" in text
    assert "| net | training | 2 | 2.50x |" in text


def test_the_mean_speed_is_geometric_and_of_each_mode(tmp_path):
    measured(tmp_path / "gpu", "13.0")
    text = render(MEANS, tmp_path)
    assert "a GPU, torch 2.11, Triton 3.6" in text
    assert "| training | CUDA graph | 1.50x |" in text
    assert "| training | eager, L2 cold | 1.50x |" in text


@pytest.mark.parametrize("section", [pytest.param(SPEED, id="speed"), pytest.param(MEANS, id="means")])
def test_speed_of_a_cpu_is_not_reported(section, tmp_path):
    measured(tmp_path / "cpu", None)
    assert "No GPU has been measured yet." in render(section, tmp_path)


def test_claims_are_reported_with_their_machine(tmp_path):
    (tmp_path / "cpu").mkdir()
    claim = {"number": "1", "claim": "it is fast", "verdict": "confirmed", "rule": "above 1", "measured": "2x"}
    claim |= {"timed": True, "run": "quick", "interference": 1.0449}
    write_table(pd.DataFrame([claim]), tmp_path / "cpu", "claims")
    text = render("<!-- begin claims -->\n<!-- end claims -->\n", tmp_path)
    assert "| 1 | it is fast | confirmed | above 1 | 2x |" in text
    assert f"Measured on a {environment()['device']}" in text
    assert "in a quick run. A product that was repeated throughout the run took 1.04 times as long" in text


def test_pictures_are_drawn_beside_their_tables(results, readme, tmp_path):
    quick = tmp_path / "cpu"
    assert main(["roofline", "--quick", "--filter", "32", "--out", str(quick)]) == 0
    (quick / "roofline.png").unlink()
    assert main(["report", "--pages", str(readme), "--results", str(tmp_path)]) == 0
    assert (quick / "roofline.png").stat().st_size


def test_text_without_sections_stays(results):
    assert render("as it was\n", results) == "as it was\n"


def test_check_changes_nothing(results, readme):
    assert main(["report", "--check", "--pages", str(readme), "--results", str(results)]) == 1
    assert readme.read_text(encoding="utf-8") == README


def test_check_passes_after_a_report(results, readme):
    assert main(["report", "--pages", str(readme), "--results", str(results)]) == 0
    assert main(["report", "--check", "--pages", str(readme), "--results", str(results)]) == 0


@pytest.fixture
def checkout(readme, tmp_path, monkeypatch):
    """A folder with a README and a page of docs/, as the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text(README, encoding="utf-8")
    return tmp_path


def test_the_readme_and_every_page_of_docs_are_brought_up_to_date(results, checkout):
    assert main(["report", "--results", str(results)]) == 0
    assert (checkout / "README.md").read_text(encoding="utf-8") == CODEGEN
    assert (checkout / "docs" / "page.md").read_text(encoding="utf-8") == CODEGEN


def test_check_names_each_page_that_is_out_of_date(results, checkout, capsys):
    (checkout / "README.md").write_text(CODEGEN, encoding="utf-8")
    assert main(["report", "--check", "--results", str(results)]) == 1
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == [str(Path("docs/page.md"))]


def test_no_page_is_written_if_one_cannot_be_rendered(results, checkout):
    (checkout / "docs" / "page.md").write_text(README.replace("codegen", "magic"), encoding="utf-8")
    assert main(["report", "--results", str(results)]) == 2
    assert (checkout / "README.md").read_text(encoding="utf-8") == README


def test_a_page_that_is_not_there_is_named(results, readme, capsys):
    assert main(["report", "--pages", str(readme), "missing.md", "--results", str(results)]) == 2
    assert "argument --pages: missing.md: no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("traffic", "traffic.csv: no such table"),
        (
            "magic",
            "section 'magic': allowed are traffic, scaling, advice, codegen, speed, means, claims, predicted",
        ),
    ],
)
def test_what_it_cannot_render_is_one_line(section, message, readme, tmp_path, capsys):
    readme.write_text(README.replace("codegen", section), encoding="utf-8")
    assert main(["report", "--pages", str(readme), "--results", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
