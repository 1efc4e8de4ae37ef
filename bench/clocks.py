"""A GPU's clocks and what throttles them, beside every row that was timed on it."""

from __future__ import annotations

import subprocess

import torch

_FIELDS = {
    "sm_mhz": "clocks.sm",
    "mem_mhz": "clocks.mem",
    "sm_max_mhz": "clocks.max.sm",
    "throttle_reasons": "clocks_throttle_reasons.active",
    "temperature_c": "temperature.gpu",
    "power_w": "power.draw",
}


def clocks(device: torch.device) -> dict[str, str] | None:
    """What nvidia-smi says of ``device`` now; None for a CPU, or where nvidia-smi is missing or fails.

    ``throttle_reasons`` is NVML's bit mask: 0 (or 1, idle) means that nothing slows the GPU down.
    """
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)  # CUDA_VISIBLE_DEVICES renumbers, the UUID stays
    command = ["nvidia-smi", f"--id=GPU-{properties.uuid}", f"--query-gpu={','.join(_FIELDS.values())}"]
    try:
        done = subprocess.run(
            [*command, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_clocks(done.stdout)


def parse_clocks(line: str) -> dict[str, str]:
    """The fields of nvidia-smi's one line of CSV."""
    return dict(zip(_FIELDS, (value.strip() for value in line.strip().split(",")), strict=True))
