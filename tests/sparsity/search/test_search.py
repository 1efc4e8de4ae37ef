"""Whole searches on a tiny model: reproducible, resumable after a SIGKILL, with results that sparsify takes."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trisparse.sparsity.metric import METRICS, Metric, parse
from trisparse.sparsity.search import SearchSettings, search
from trisparse.sparsity.search.log import LogError
from trisparse.sparsity.sparsify import sparsify

HERE = Path(__file__).parent


def lines(folder):
    """The records of a log without what depends on time."""
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if "seconds" not in k} for record in found]


def evaluations(folder):
    return [record for record in lines(folder) if record["kind"] == "evaluation"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished search: its folder and its result."""
    sys.path.insert(0, str(HERE))
    try:
        from conftest import run_search
    finally:
        sys.path.pop(0)
    folder = tmp_path_factory.mktemp("whole")
    return folder, run_search(folder)


def test_log_has_header_references_every_evaluation_and_summary(whole):
    folder, result = whole
    records = lines(folder)
    assert [record["kind"] for record in records] == ["header", *["reference"] * 3, *["evaluation"] * 14, "summary"]
    assert result.evaluations == 14
    assert result.finished
    assert records[0]["settings"] == SearchSettings(population=8, iterations=6, top=3).to_dict() | {
        "start_from": [],
        "dtype": "float32",
    }
    assert [record["name"] for record in records[1:4]] == ["magnitude", "wanda", "pruner-zero"]
    assert records[-1]["tokens"] == sum(record["tokens"] for record in evaluations(folder)) == result.tokens
    assert records[-1]["full_tokens"] == result.full_tokens == 14 * 6 * 64


def test_no_metric_is_evaluated_twice(whole):
    found = evaluations(whole[0])
    assert len({record["simplified"] for record in found}) == len(found)
    assert len({record["fingerprint"] for record in found}) == len(found)
    assert sum(count for record in found for count in record["skipped"].values()) > 0


def test_offspring_come_from_two_of_the_best_at_that_time(whole):
    found = evaluations(whole[0])
    assert all(record["origin"] == "random" for record in found[:8])
    for number, record in enumerate(found[8:], start=8):
        assert record["origin"].startswith("crossover")
        measured = [n for n in range(number) if found[n]["perplexity"] is not None]
        best = sorted(measured, key=lambda n: (sum(found[n]["segments"]), n))[:3]
        assert len(set(record["parents"])) == 2
        assert set(record["parents"]) <= set(best)


def test_best_is_the_least_perplexity_and_sparsify_takes_it(whole, model):
    folder, result = whole
    found = [record for record in evaluations(folder) if record["perplexity"] is not None]
    assert result.best[0].perplexity == min(record["perplexity"] for record in found)
    metric = Metric.load(folder / "best.json")
    assert metric.infix == result.best[0].expression
    assert "data" in json.loads((folder / "best.json").read_text())
    data = torch.randint(0, 96, (4, 64), generator=torch.Generator().manual_seed(1))
    report = sparsify(model, "50%", folder / "best.json", data, samples=4, seq_len=64, progress=False)
    assert report.sparsity == 0.5


def test_the_same_seed_gives_the_same_run_and_another_one_another(whole, searching, tmp_path):
    searching(tmp_path / "same")
    assert lines(tmp_path / "same") == lines(whole[0])
    searching(tmp_path / "other", seed=1)
    assert evaluations(tmp_path / "other") != evaluations(whole[0])


# Ends a search by a real SIGKILL after so many lines; with "torn", in the middle of the next line.
KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from trisparse.sparsity.search.log import SearchLog
whole, left = SearchLog.append, [int(sys.argv[3])]
def append(log, record):
    if not left[0]:
        if sys.argv[4] == "torn":
            log._file.write(b'{"kind": "evaluation", "iteration"')
            log._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    whole(log, record)
SearchLog.append = append
from conftest import run_search
run_search(sys.argv[2], batch=int(sys.argv[5]))
"""


@pytest.mark.parametrize(("count", "how", "batch"), [(6, "whole", 1), (10, "torn", 3)])
def test_killed_search_goes_on_to_the_same_end(whole, searching, tmp_path, count, how, batch):
    folder = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED, str(HERE), str(folder), str(count), how, str(batch)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    content = (folder / "log.jsonl").read_bytes()
    assert content.count(b"\n") == count
    assert content.endswith(b"\n") == (how == "whole")
    searching(folder, batch=batch)
    expected = whole[0]
    if batch != 1:
        expected = tmp_path / "whole"
        searching(expected, batch=batch)
    assert lines(folder) == lines(expected)
    assert (folder / "log.jsonl").read_bytes().startswith(content[: content.rfind(b"\n") + 1])


def test_finished_search_is_read_from_its_log(whole, searching, monkeypatch):
    folder, result = whole
    before = lines(folder)
    monkeypatch.setattr("trisparse.sparsity.search.evaluator.Evaluator.evaluate", None)
    again = searching(folder)
    assert lines(folder) == before
    assert again == result


def test_more_iterations_continue_a_search(whole, searching, tmp_path):
    searching(tmp_path / "short", iterations=2)
    searching(tmp_path / "short", iterations=6)
    assert lines(tmp_path / "short")[1:] == lines(whole[0])[1:]
    with pytest.raises(LogError, match=r"has 4 evaluations more than iterations=2 makes"):
        searching(tmp_path / "short", iterations=2)


def test_other_settings_in_the_same_folder_are_refused(whole, searching):
    before = lines(whole[0])
    with pytest.raises(LogError, match=r"settings\.seed was 0 and is now 5"):
        searching(whole[0], seed=5)
    with pytest.raises(LogError, match=r"data\.evaluation was"):
        searching(whole[0], windows=5)
    assert lines(whole[0]) == before


def test_a_log_that_other_code_wrote_is_refused(whole, searching, tmp_path):
    content = (whole[0] / "log.jsonl").read_text().splitlines(keepends=True)
    content[6] = content[6].replace('"simplified": "', '"simplified": "2 * ')
    tmp_path.joinpath("log.jsonl").write_text("".join(content))
    with pytest.raises(LogError, match="after 2 evaluations it has simplified '2 \\* "):
        searching(tmp_path)


def test_time_limit_ends_between_rounds_and_the_search_goes_on(whole, searching, tmp_path):
    result = searching(tmp_path, time_limit=0.0)
    assert not result.finished
    assert "the same command goes on" in str(result)
    assert lines(tmp_path) == lines(whole[0])[: len(lines(tmp_path))]
    assert searching(tmp_path).finished
    assert lines(tmp_path) == lines(whole[0])


def test_random_search_breeds_nothing(searching, tmp_path):
    searching(tmp_path, strategy="random")
    assert {record["origin"] for record in evaluations(tmp_path)} == {"random"}


def test_search_can_start_from_known_metrics(searching, tmp_path):
    searching(tmp_path, start_from=("wanda", "abs(W) * sqrt(G)"), iterations=0)
    first, second, third = evaluations(tmp_path)[:3]
    assert (first["expression"], first["origin"], first["same_as"]) == ("abs(W) * X", "given", "wanda")
    assert first["tokens"] == 0  # the reference had measured it
    assert first["perplexity"] == lines(tmp_path)[2]["perplexity"]
    assert second["expression"] == "abs(W) * sqrt(G)"
    assert third["origin"] == "random"
    with pytest.raises(ValueError, match="start_from cannot take 'random'"):
        searching(tmp_path / "other", start_from=("random",))


def test_without_g_no_gradient_is_computed(searching, tmp_path, monkeypatch):
    monkeypatch.setattr("trisparse.sparsity.search.measure.gradient_norms", None)
    searching(tmp_path, inputs="WX")
    assert all("G" not in record["operations"] for record in evaluations(tmp_path))
    assert [r["name"] for r in lines(tmp_path) if r["kind"] == "reference"] == ["magnitude", "wanda"]


def test_a_metric_that_overflows_is_logged_and_the_search_goes_on(searching, tmp_path):
    result = searching(tmp_path, start_from=("exp(W * 1000000)",), iterations=1)
    record = evaluations(tmp_path)[0]
    assert record["dropped"].endswith("is not finite")
    assert record["perplexity"] is None
    assert result.counts["dropped"] >= 1
    assert result.finished


def test_exhausted_space_is_logged(searching, tmp_path, monkeypatch):
    monkeypatch.setattr("trisparse.sparsity.search.propose._ATTEMPTS", 1)
    monkeypatch.setattr("trisparse.sparsity.search.propose.random_tree", lambda rng, settings: parse("abs(W)"))
    result = searching(tmp_path, strategy="random")
    assert result.counts["exhausted"] == 13
    assert result.evaluations == 1
    assert searching(tmp_path, strategy="random") == result


def test_model_is_the_same_afterwards_and_the_library_is_not_changed(model, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    known = dict(METRICS)
    data = torch.randint(0, 96, (4, 64), generator=torch.Generator().manual_seed(1))
    settings = SearchSettings(population=3, iterations=1, top=2)
    search(model, data, data, out=tmp_path, settings=settings, samples=2, seq_len=64, windows=2, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert known == METRICS
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_statistics_of_other_layers_or_damaged_ones_are_measured_again(searching, tmp_path):
    options = {"population": 2, "iterations": 0, "top": 2}
    searching(tmp_path / "fresh", **options)
    searching(tmp_path / "reused", include="*layers.0*", **options)
    for damage in (False, True):
        (tmp_path / "reused" / "log.jsonl").unlink()
        if damage:
            (tmp_path / "reused" / "statistics.safetensors").write_bytes(b"torn")
        searching(tmp_path / "reused", **options)
        assert lines(tmp_path / "reused") == lines(tmp_path / "fresh")


def test_a_population_below_the_tournament_still_fills_it(searching, tmp_path):
    result = searching(tmp_path, population=3, iterations=12, top=4)
    assert len(result.best) == 4  # else there is nothing to race against


def test_a_pruned_model_is_refused_before_anything_is_measured(model, tmp_path):
    sparsify(model, "2:4", progress=False)
    with pytest.raises(ValueError, match="model is pruned already"):
        search(model, torch.zeros(4, 64).long(), torch.zeros(4, 64).long(), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
