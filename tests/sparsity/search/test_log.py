"""The log: what a crash leaves is read, and what belongs to another search is refused."""

import json

import pytest

from trisparse.sparsity.search.log import LogError, SearchLog

HEADER = {"settings": {"seed": 0, "iterations": 3}, "model": {"sha256": "abc"}, "versions": {"torch": "2"}}


def written(path, *records):
    log = SearchLog(path, HEADER)
    for record in records:
        log.append(record)
    log.close()
    return path.read_bytes()


def test_records_come_back(tmp_path):
    path = tmp_path / "folder" / "log.jsonl"
    records = [{"kind": "evaluation", "value": 0.1 + 0.2}, {"kind": "reference", "value": 1e-7}]
    content = written(path, *records)
    log = SearchLog(path, HEADER)
    assert log.records == records
    log.append({"kind": "reference"})
    log.close()
    assert path.read_bytes() == content + b'{"kind": "reference"}\n'


def test_a_torn_last_line_is_dropped_and_written_over(tmp_path):
    path = tmp_path / "log.jsonl"
    content = written(path, {"kind": "evaluation", "value": 1})
    path.write_bytes(content + b'{"kind": "evaluation", "val')
    assert written(path, {"kind": "evaluation", "value": 2}) == content + b'{"kind": "evaluation", "value": 2}\n'


def test_a_torn_header_begins_anew(tmp_path):
    path = tmp_path / "log.jsonl"
    content = written(path)
    path.write_bytes(content[:20])
    assert written(path) == content


def test_the_summary_is_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    content = written(path, {"kind": "evaluation"})
    written(path, {"kind": "summary"})
    log = SearchLog(path, HEADER)
    assert log.records == [{"kind": "evaluation"}]
    log.append({"kind": "reference"})
    log.close()
    assert path.read_bytes() == content + b'{"kind": "reference"}\n'


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"settings": {"seed": 1, "iterations": 3}}, "settings.seed was 0 and is now 1"),
        ({"model": {"sha256": "x"}}, "model.sha256 was 'abc' and is now 'x'"),
        ({"settings": {"seed": 0, "iterations": 3, "new": 1}}, "settings.new was None and is now 1"),
        ({"settings": {"iterations": 3}}, "settings.seed was 0 and is now None"),
    ],
)
def test_another_header_is_refused_by_its_first_difference(tmp_path, changed, message):
    path = tmp_path / "log.jsonl"
    written(path)
    with pytest.raises(LogError, match=message):
        SearchLog(path, HEADER | changed)


def test_other_versions_and_more_iterations_are_no_difference(tmp_path):
    path = tmp_path / "log.jsonl"
    written(path)
    SearchLog(path, HEADER | {"versions": {"torch": "3"}, "settings": {"seed": 0, "iterations": 9}}).close()


def test_damage_in_the_middle_is_named(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(written(path) + b"}{\n" + json.dumps({"kind": "evaluation"}).encode() + b"\n")
    with pytest.raises(LogError, match=r"log\.jsonl, line 2 is no JSON"):
        SearchLog(path, HEADER)


def test_another_file_is_no_log(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"kind": "evaluation"}\n')
    with pytest.raises(LogError, match="its first line is no header"):
        SearchLog(path, HEADER)


def test_nan_is_not_written(tmp_path):
    log = SearchLog(tmp_path / "log.jsonl", HEADER)
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.append({"value": float("nan")})
    log.close()


def test_a_log_in_use_is_refused(tmp_path):
    log = SearchLog(tmp_path / "log.jsonl", {"a": 1})
    with pytest.raises(LogError, match="in use: another search runs in this folder"):
        SearchLog(tmp_path / "log.jsonl", {"a": 1})
    log.close()
    SearchLog(tmp_path / "log.jsonl", {"a": 1}).close()


def test_a_foreign_file_is_left_as_it_is(tmp_path):
    file = tmp_path / "log.jsonl"
    for content in ("notes without an end", "notes\n", "[1]\n"):
        file.write_text(content)
        with pytest.raises(LogError):
            SearchLog(file, {"a": 1})
        assert file.read_text() == content


def test_opening_a_finished_log_leaves_its_summary_until_something_is_written(tmp_path):
    file = tmp_path / "log.jsonl"
    log = SearchLog(file, {"a": 1})
    log.append({"kind": "evaluation"})
    log.append({"kind": "summary"})
    log.close()
    before = file.read_text()
    log = SearchLog(file, {"a": 1})
    assert file.read_text() == before
    log.append({"kind": "evaluation", "b": 2})
    log.close()
    assert [json.loads(line)["kind"] for line in file.read_text().splitlines()] == ["header", *["evaluation"] * 2]
