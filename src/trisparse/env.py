"""What a bug report needs: versions, commit, processor, memory and devices; no path of the user's machine."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from trisparse.sparsity.hardware import bf16_is_fast, cpu_features

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "datasets",
    "accelerate",
    "numpy",
    "safetensors",
)


_ROOT = Path(__file__).resolve().parents[2]  # of the checkout, where there is one


def environment() -> dict[str, Any]:
    """The versions and the hardware that results depend on, ready for JSON.

    Keys: ``trisparse``, ``commit`` and ``dirty`` (both None outside a git checkout), ``python``, ``os``,
    ``packages`` (name to version, None where absent), ``cpu`` (model, cores, threads that torch uses,
    features, whether bf16 is fast, memory in GiB), ``cuda`` (the version torch was built for, the driver's,
    both None without, and one entry for each device).
    """
    commit, dirty = _commit()
    return {
        "trisparse": _version("trisparse"),
        "commit": commit,
        "dirty": dirty,
        "python": platform.python_version(),
        "os": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": {
            "model": cpu_model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "features": cpu_features(),
            "bf16_is_fast": bf16_is_fast(torch.device("cpu")),
            "memory_gib": _memory_gib(),
        },
        "cuda": {
            "version": torch.version.cuda,
            "driver": _driver(),
            "devices": [_device(i) for i in range(torch.cuda.device_count())],
        },
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _run(*command: str, folder: Path | None = None) -> str | None:
    """The standard output of a command; None where it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _commit() -> tuple[str | None, bool | None]:
    """Commit of the checkout that the package is run from, and whether its tracked files are changed.

    Results of benchmarks do not count: the first ones would make all that follow look changed.
    """
    if checkout() is None:
        return None, None
    commit = _run("git", "rev-parse", "HEAD", folder=_ROOT)
    if not commit:
        return None, None
    status = ("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)bench/results")
    return commit, bool(_run(*status, folder=_ROOT))


def checkout() -> Path | None:
    """The root of the checkout that the package is run from; None where it is installed."""
    return _ROOT if (_ROOT / ".git").exists() else None  # an installed one may lie inside another project's checkout


def cpu_model() -> str:
    """The processor as it calls itself."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    name = _run("sysctl", "-n", "machdep.cpu.brand_string") if platform.system() == "Darwin" else None
    return name or platform.processor() or platform.machine()


def _memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _driver() -> str | None:
    if torch.version.cuda is None or not torch.cuda.is_available():
        return None
    answer = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return answer.splitlines()[0] if answer else None


def _device(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "bf16_is_fast": bf16_is_fast(torch.device("cuda", index)),
    }
