"""The checks of PERPConfig's numbers and of how the loop runs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from trisparse.retrain.processes import SHARDINGS

if TYPE_CHECKING:
    from trisparse.retrain.perp import PERPConfig

DTYPES = ("auto", "fp32", "bf16", "fp16")
LEARNING_RATES = (5e-6, 1e-5, 5e-5, 1e-4, 5e-4)

# Trainer's integrations that write into output_dir; without one that is a temporary folder
_IN_OUTPUT_DIR = ("tensorboard", "codecarbon", "all")


def check_loop_options(config: PERPConfig) -> None:
    """Raise a ValueError that names the field, its value and what is allowed."""
    if config.dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {config.dtype!r}")
    for name, least in (("rank", 1), ("steps", 1), ("grid_steps", 1), ("seq_len", 2), ("seed", 0)):
        if not _is_integer(value := getattr(config, name), least):
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    for name in ("batch_size", "gradient_accumulation", "save_steps", "save_total_limit", "guard_every"):
        value = getattr(config, name)
        if value is not None and not _is_integer(value, 1):
            raise ValueError(f"{name} must be an integer of at least 1 or None, got {value!r}")
    if config.learning_rate != "grid" and not _is_number(config.learning_rate, above=0):
        raise ValueError(f"learning_rate must be a number above 0 or 'grid', got {config.learning_rate!r}")
    rates = config.learning_rates
    sequence = not isinstance(rates, str) and hasattr(rates, "__len__") and len(rates) > 0
    if not sequence or not all(_is_number(rate, above=0) for rate in rates) or len(set(rates)) < len(rates):
        raise ValueError(f"learning_rates must be one or more different numbers above 0, got {rates!r}")
    for name in ("weight_decay", "max_grad_norm"):
        if not _is_number(value := getattr(config, name), least=0):
            raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
    for name in ("alpha", "temperature"):
        if not _is_number(value := getattr(config, name), above=0):
            raise ValueError(f"{name} must be a number above 0, got {value!r}")
    if not _is_number(weight := config.distillation_weight, above=0) or weight > 1:
        raise ValueError(f"distillation_weight must be a number in (0, 1], got {weight!r}")
    if not _is_number(config.warmup_ratio, least=0) or config.warmup_ratio >= 1:
        raise ValueError(f"warmup_ratio must be a number in [0, 1), got {config.warmup_ratio!r}")
    if config.sharding not in SHARDINGS:
        raise ValueError(f"sharding must be one of {', '.join(SHARDINGS)}, got {config.sharding!r}")
    if not isinstance(config.gradient_checkpointing, bool):
        raise ValueError(f"gradient_checkpointing must be True or False, got {config.gradient_checkpointing!r}")
    if not isinstance(config.resume, bool) and config.resume != "auto":
        raise ValueError(f"resume must be True, False or 'auto', got {config.resume!r}")
    if config.output_dir is None and config.save_steps is not None:
        raise ValueError(f"save_steps={config.save_steps} needs output_dir: where do the checkpoints go?")
    if config.output_dir is None and config.resume:
        raise ValueError(f"resume={config.resume!r} needs output_dir: where are the checkpoints?")
    if isinstance(config.report_to, str):
        raise ValueError(f"report_to must be a sequence of names such as ('wandb',), got {config.report_to!r}")
    if config.output_dir is None and (writers := [name for name in config.report_to if name in _IN_OUTPUT_DIR]):
        raise ValueError(f"report_to={', '.join(writers)} needs output_dir: its files lie there")


def save_every(config: PERPConfig) -> int | None:
    """Steps from one checkpoint to the next: a tenth of the run where ``output_dir`` is given alone."""
    if config.output_dir is None:
        return None
    return config.save_steps or math.ceil(config.steps / 10)


def _is_integer(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any, *, above: float = -math.inf, least: float = -math.inf) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return False
    return value > above and value >= least
