"""The table of docs/clients.md has what tests/mlp/test_clients.py runs."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_use_is_in_the_table_and_works():
    source = (ROOT / "tests" / "mlp" / "test_clients.py").read_text()
    page = (ROOT / "docs" / "clients.md").read_text()
    tested = re.findall(r'^@client\(\s*"([^"]+)",\s*"([^"]+)"', source, re.MULTILINE)
    rows = re.findall(r"^\| ([\w-]+) \| [\w.+]+ \| (.+) \| works \|$", page, re.MULTILINE)
    assert sorted(rows) == sorted(set(tested)), "run `make clients`"
