"""Runs the kernel tests under Triton's interpreter, which must be chosen before Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
FILES = [
    "test_triton.py",
    "test_triton_shapes.py",
    "test_metric_triton.py",
    "test_linear_triton.py",
    "test_masked_lora_triton.py",
    "test_obs_triton.py",
]


@pytest.fixture(scope="module")
def running():
    """One process for each file, all at once: the interpreter takes one core and most of the suite's time."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-cov"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = {
        name: subprocess.Popen([*command, str(HERE / name)], env=environment, cwd=HERE.parents[1], **pipes)
        for name in FILES
    }
    yield processes
    for process in processes.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("name", FILES)
def test_kernels_interpreted(name, running):
    printed, _ = running[name].communicate()
    assert running[name].returncode == 0, printed[-7000:]
    assert "passed" in printed
    assert "skipped" not in printed.splitlines()[-1]
