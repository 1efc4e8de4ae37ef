"""What a bug report needs is there, agrees with the machine, and names no path of it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from trisparse import env


def test_versions_and_hardware() -> None:
    found = env.environment()
    assert found["packages"]["torch"] == torch.__version__
    assert set(found["packages"]) == set(env.PACKAGES)
    assert found["python"] == platform.python_version()
    assert found["cpu"]["cores"] == os.cpu_count()
    assert found["cpu"]["threads"] == torch.get_num_threads()
    assert found["cpu"]["model"]
    assert 0.1 < found["cpu"]["memory_gib"] < 2**16
    assert len(found["cuda"]["devices"]) == torch.cuda.device_count()


def test_no_path_of_the_machine() -> None:
    text = json.dumps(env.environment())
    assert str(Path.home()) not in text
    assert str(Path(env.__file__).parent) not in text
    assert not [part for part in text.split('"') if part.startswith("/")]


def test_absent_packages_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "PACKAGES", ("torch", "no-such-package"))
    assert env.environment()["packages"] == {"torch": torch.__version__, "no-such-package": None}


def test_commit_and_dirty_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(env, "_ROOT", tmp_path)

    def git(*words: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "core.hooksPath=", *words]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    def state() -> tuple[str | None, bool | None]:
        found = env.environment()
        return found["commit"], found["dirty"]

    assert state() == (None, None)  # no checkout
    git("init", "-q")
    assert state() == (None, None)  # no commit yet
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    assert state() == (git("rev-parse", "HEAD"), False)
    (tmp_path / "untracked").write_text("a")
    assert state()[1] is False
    (tmp_path / "file").write_text("b")
    assert state() == (git("rev-parse", "HEAD"), True)
    (tmp_path / "site-packages").mkdir()  # installed inside somebody else's checkout
    monkeypatch.setattr(env, "_ROOT", tmp_path / "site-packages")
    assert state() == (None, None)


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    found = env.environment()
    assert (found["commit"], found["dirty"]) == (None, None)


def test_cuda_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="NVIDIA A100", major=8, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    run = env._run
    monkeypatch.setattr(
        env, "_run", lambda *command, folder=None: "580.1\n580.1" if command[0] == "nvidia-smi" else run(*command)
    )
    assert env.environment()["cuda"] == {
        "version": "13.0",
        "driver": "580.1",
        "devices": [{"name": "NVIDIA A100", "capability": "8.0", "memory_gib": 80.0, "bf16_is_fast": True}],
    }


def test_the_processor_has_a_name_without_procfs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda path: False)
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(env, "_run", lambda *command, folder=None: "Apple M9" if command[0] == "sysctl" else None)
    assert env.environment()["cpu"]["model"] == "Apple M9"
