"""A streamed prune that was cut off goes on from its last finished block, and ends with the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trisparse.sparsity.allocation import PerLayer
from trisparse.sparsity.calibration import BlockRunner
from trisparse.sparsity.streaming.journal import Journal, JournalError
from trisparse.sparsity.streaming.model_on_disk import ModelOnDisk
from trisparse.sparsity.streaming.output import work_folder
from trisparse.sparsity.streaming.stream import stream_sparsify

TOKENS = torch.randint(0, 48, (6, 16), generator=torch.Generator().manual_seed(0))


class Killed(BaseException):
    """Stands for kill -9: nothing handles it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def prune(folder, out, **options):
    batches = [{"input_ids": part} for part in TOKENS.split(2)]
    arguments = {"sparsity": "50%", "method": "wanda", "data": batches, "device": "cpu", "progress": False}
    return stream_sparsify(folder, out, **(arguments | options))


def content_of(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


class Operations:
    """Counts what makes something durable or visible, and fails at one of them, before or after it is done."""

    def __init__(self, monkeypatch, fail_at, *, after=False):
        self.count = 0
        for owner, name in ((os, "fsync"), (os, "replace"), (Path, "rename"), (shutil, "rmtree")):
            real = (lambda *args: None) if name == "fsync" else getattr(owner, name)  # the disk is no part of this test

            def operation(*args, real=real, **options):
                self.count += 1
                if self.count == fail_at and not after:
                    raise Killed
                result = real(*args, **options)
                if self.count == fail_at:
                    raise Killed
                return result

            monkeypatch.setattr(owner, name, operation)


@pytest.mark.parametrize(("hidden_states", "propagate"), [("memory", "block"), ("disk", "block"), ("memory", "dense")])
def test_a_run_that_ends_at_any_write_is_taken_up_again(folder, tmp_path, monkeypatch, hidden_states, propagate):
    options = {"hidden_states": hidden_states, "propagate": propagate}
    with monkeypatch.context() as patched:
        operations = Operations(patched, 0)
        report = prune(folder, tmp_path / "whole", **options)
        total = operations.count
    assert total > 25
    expected = content_of(tmp_path / "whole")
    step = 1 if hidden_states == "memory" and propagate == "block" else 4
    for fail_at in range(1, total + 1, step):
        out = tmp_path / str(fail_at)
        with monkeypatch.context() as patched:
            Operations(patched, fail_at, after=fail_at % 2 == 0)
            with pytest.raises(Killed):
                prune(folder, out, **options)
        with monkeypatch.context() as patched:
            Operations(patched, 0)
            again = prune(folder, out, **options)
        assert content_of(out) == expected, fail_at
        assert not work_folder(out).exists()
        assert [(row.name, row.kept) for row in again.targets] == [(row.name, row.kept) for row in report.targets]
        assert again.skipped == report.skipped


def cut_off_in_the_last_block(folder, out, monkeypatch, **options):
    real, calls = BlockRunner.measure, []

    def second_fails(self, *args):
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        return real(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(BlockRunner, "measure", second_fails)
        with pytest.raises(Killed) as error:
            prune(folder, out, **options)
    return error


@pytest.mark.parametrize("hidden_states", ["memory", "disk"])
def test_finished_blocks_are_not_measured_again(folder, tmp_path, monkeypatch, hidden_states):
    error = cut_off_in_the_last_block(folder, tmp_path / "out", monkeypatch, hidden_states=hidden_states)
    assert "2 of 3 parts are finished" in error.value.__notes__[0]
    runs = {"measure": 0, "run": 0}
    for name in runs:
        real = getattr(BlockRunner, name)

        def counted(self, *args, real=real, name=name):
            runs[name] += 1
            return real(self, *args)

        monkeypatch.setattr(BlockRunner, name, counted)
    prune(folder, tmp_path / "out", hidden_states=hidden_states)
    # In memory, the hidden states behind the first block come from running it once more, pruned.
    assert runs == {"measure": 1, "run": 1 if hidden_states == "memory" else 0}


def test_hidden_states_that_were_removed_are_computed_again(folder, tmp_path, monkeypatch):
    prune(folder, tmp_path / "whole", hidden_states="disk")
    cut_off_in_the_last_block(folder, tmp_path / "out", monkeypatch, hidden_states="disk")
    shutil.rmtree(states := work_folder(tmp_path / "out") / "hidden-states-0")
    real, held = ModelOnDisk.loaded, []

    def watched(self, part, shard=None):
        held.append((part, sorted(path.name for path in states.glob("*"))))
        if held[-1][0] == 2 and len(held) == 3:
            (states / "behind-0" / "000002.safetensors").unlink()  # as if it had been killed before it was written
            (states / "behind-0" / "complete").unlink()
            raise Killed
        return real(self, part, shard)

    with monkeypatch.context() as patched:
        patched.setattr(ModelOnDisk, "loaded", watched)
        with pytest.raises(Killed):
            prune(folder, tmp_path / "out", hidden_states="disk")
    # Outside of the blocks, the finished block once more, and the next one; what entered the first is gone by then.
    assert held == [(0, []), (1, ["behind--1"]), (2, ["behind-0"])]
    prune(folder, tmp_path / "out", hidden_states="disk")
    assert content_of(tmp_path / "out") == content_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": "2:4"}, r"differs in sparsity \(.*sparsity=0.5.* then, 'NM\(n=2, m=4\)' now\)"),
        ({"sparsity": 0.5 + 1e-9}, r"differs in sparsity \(.*sparsity=0.5, .* then, .*sparsity=0.500000001, .* now\)"),
        ({"allocation": "erk"}, "differs in allocation"),
        ({"method": "abs(W)", "data": None}, "differs in data .*, shape of the data .*, method"),
        ({"propagate": "dense"}, r"differs in propagate \('block' then, 'dense' now\)"),
        ({"hidden_states": "disk"}, "differs in hidden_states"),
        ({"data": [{"input_ids": TOKENS[:2]}]}, "differs in data"),
        ({"exclude": "*q_proj*"}, r"differs in exclude \(None then"),
        ({"dtype": torch.float64}, "differs in dtype"),
    ],
)
def test_another_call_does_not_go_on(folder, tmp_path, monkeypatch, options, message):
    out = tmp_path / "out"
    cut_off_in_the_last_block(folder, out, monkeypatch)
    before = sorted(work_folder(out).rglob("*"))
    with pytest.raises(JournalError, match=message):
        prune(folder, out, **options)
    assert sorted(work_folder(out).rglob("*")) == before
    prune(folder, out)


def test_another_allocation_by_less_than_its_text_shows_does_not_go_on(folder, tmp_path, monkeypatch):
    values = {"*.mlp.*": 0.5}
    cut_off_in_the_last_block(folder, tmp_path / "out", monkeypatch, allocation=PerLayer(values))
    other = PerLayer({"*.mlp.*": 0.5 + 1e-9})
    assert str(other) == str(PerLayer(values))
    with pytest.raises(JournalError, match=r"differs in allocation .*, patterns "):
        prune(folder, tmp_path / "out", allocation=other)


def test_another_source_does_not_go_on(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "model")
    cut_off_in_the_last_block(tmp_path / "model", tmp_path / "out", monkeypatch)
    os.utime(tmp_path / "model" / "model.safetensors", (0, 0))
    with pytest.raises(JournalError, match="differs in weights"):
        prune(tmp_path / "model", tmp_path / "out")


def test_two_processes_do_not_write_the_same_folder(tmp_path):
    first = Journal(tmp_path, {"a": 1})
    with pytest.raises(JournalError, match="another process is at work"):
        Journal(tmp_path, {"a": 1})
    first.close()
    Journal(tmp_path, {"a": 1}).close()


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    journal = Journal(tmp_path, {"a": 1})
    journal.write({"part": 0})
    journal.close()
    file = tmp_path / "journal.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"part": 1, "mas')
    again = Journal(tmp_path, {"a": 1})
    assert again.lines == [{"part": 0}]
    again.write({"part": 1})
    again.close()
    assert file.read_bytes() == whole + b'{"part": 1}\n'


def test_settings_may_change_as_long_as_nothing_is_finished(tmp_path):
    Journal(tmp_path, {"a": 1}).close()
    journal = Journal(tmp_path, {"a": 2})
    journal.write({"part": 0})
    journal.close()
    with pytest.raises(JournalError, match=r"differs in a \(2 then, 1 now\)"):
        Journal(tmp_path, {"a": 1})


def test_a_damaged_or_foreign_journal(tmp_path):
    file = tmp_path / "journal.jsonl"
    file.write_text("{]\n{}\n")
    with pytest.raises(JournalError, match="is damaged"):
        Journal(tmp_path, {})
    file.write_text(json.dumps({"version": 2, "settings": {}}) + "\n{}\n")
    with pytest.raises(JournalError, match="another version"):
        Journal(tmp_path, {})


def test_random_kills():
    """Real kill -9 of a process of its own; `trisparse bench run stream-kills` makes twenty."""
    command = [sys.executable, "-m", "trisparse.bench.studies.stream_kills", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    assert len(rows) == 2
    assert all(row["same"] for row in rows)
