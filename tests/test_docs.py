"""What the README and the docs name is there: records of numbers, benchmarks, modules and pages."""

import importlib.util
import re
from pathlib import Path

import pytest

from trisparse.bench.registry import benchmarks

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_measure_exist(page):
    text = page.read_text()
    known = benchmarks()
    lines = [
        re.sub(r"--(only|model|scale|repeats|device) \S+", "", line)
        for line in re.findall(r"trisparse bench run ([^`\n#]+)", text)
    ]
    named = [word for line in lines for word in line.split()]
    wrong = [name for name in named if re.fullmatch(r"[a-z][\w/-]*", name) and name not in known and name[-1] != "/"]
    assert wrong == []
    modules = re.findall(r"python -m (trisparse[\w.]*)", text)
    assert [name for name in modules if importlib.util.find_spec(name.rstrip(".")) is None] == []
