"""The benchmark of image classifiers, cut short, and the example in docs/vision.md."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

from trisparse.bench import digits

DOCS = Path(__file__).resolve().parents[2] / "docs" / "vision.md"


def test_every_row_is_written_and_shown(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(digits, "RESULTS", tmp_path / "digits.json")
    monkeypatch.setattr(digits, "SEEDS", (0,))
    monkeypatch.setattr(digits, "SPARSITIES", ("95%",))
    monkeypatch.setattr(digits, "VISION_PRESETS", ("bn-recalibrate", "norms"))
    threads = torch.get_num_threads()
    digits.main()
    torch.set_num_threads(threads)
    written = json.loads((tmp_path / "digits.json").read_text())
    assert written["how"] == "python -m trisparse.bench.digits"
    assert [(row["groups"], row["schedule"]) for row in written["rows"]] == [
        ("dense", ""), ("pruned", ""), ("bn-recalibrate", "ALLR"), ("norms", "ALLR"), ("full", "FT"),
        ("full", "LRW"), ("full", "SLR"), ("full", "CLR"), ("full", "LLR"),
    ]  # fmt: skip
    accuracies = [row["accuracy"] for row in written["rows"]]
    assert accuracies[1] < min(accuracies[2:]) <= max(accuracies[2:]) <= accuracies[0] + 0.02
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 9
    assert shown[3].split() == ["norms", "ALLR", "1.46%", f"{accuracies[3]:.1%}"]


def test_the_example_in_the_docs_runs(capsys):
    code = re.search(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL).group(1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        exec(compile(code, str(DOCS), "exec"), {})
    torch.set_num_threads(threads)
    shown = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines())
    assert list(shown) == ["dense", "pruned", "bn-recalibrate", "biases", "norms", "linear-probing", "full"]
    assert float(shown["full"].rstrip("%")) > float(shown["bn-recalibrate"].rstrip("%")) + 10
