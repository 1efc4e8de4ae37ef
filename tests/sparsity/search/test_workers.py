"""Workers: a local Ray cluster gives the run that this process gives."""

import json

import pytest

from trisparse.sparsity.search.workers import default_batch


def records(folder):
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if "seconds" not in k} for record in found]


@pytest.fixture
def cluster(monkeypatch):
    """A local Ray cluster with two processors; its own log folder ends with it."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def test_two_ray_workers_give_the_run_of_one_process(cluster, searching, tmp_path):
    assert default_batch("ray") == 1  # one machine, no GPU
    searching(tmp_path / "local", batch=2)
    searching(tmp_path / "ray", batch=2, workers="ray")
    assert records(tmp_path / "ray") == records(tmp_path / "local")
    assert cluster.is_initialized()  # it was there before the search


def test_batches_are_bred_from_the_pool_at_their_start(searching, tmp_path):
    searching(tmp_path, batch=4, iterations=3)
    found = [record for record in records(tmp_path) if record["kind"] == "evaluation"]
    for number, record in enumerate(found):
        assert all(parent < 8 + 4 * ((number - 8) // 4) for parent in record["parents"])
    assert [record["slot"] for record in found[8:]] == [0, 1, 2, 3] * 3


def test_unknown_workers_are_refused(searching, tmp_path):
    with pytest.raises(ValueError, match="workers must be one of local, ray, got 'slurm'"):
        searching(tmp_path, workers="slurm")
    assert default_batch("local") == 1


def test_missing_ray_is_named_with_its_remedy(searching, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'trisparse\[search\]'"):
        searching(tmp_path, workers="ray")
