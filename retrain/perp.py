"""PERP: parameter-efficient retraining after pruning (Zimmer et al.; section 3 and Appendix A).

Biases, norms, a LoRA on the output head and a LoRA on every pruned layer train; all other weights are frozen and have
neither gradient nor optimizer state. Afterwards everything is merged: the model has the architecture that it had
before, and every pruned weight is still zero. Full retraining with the masks held is there to compare with.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainerCallback

from trisparse.retrain.adapters import Adapted, is_tied, other_ties
from trisparse.retrain.batch_settings import BatchSettings, batch_settings
from trisparse.retrain.distillation import check_teacher
from trisparse.retrain.effective_sparsity import effective_sparsity
from trisparse.retrain.groups import GROUPS, ParameterGroups, group_names, parameter_groups
from trisparse.retrain.loop import random_state_kept
from trisparse.retrain.loop_options import LEARNING_RATES, check_loop_options
from trisparse.retrain.lora import fills_zeros
from trisparse.retrain.lora_layer import VARIANTS, Variant
from trisparse.retrain.lr_grid import choose_learning_rate
from trisparse.retrain.precision import computing_dtype
from trisparse.retrain.processes import Sharding, check_same_run, chosen_sharding, join, process_count
from trisparse.retrain.report import RetrainReport
from trisparse.retrain.run import Run
from trisparse.retrain.run_folder import MarkComplete, last_checkpoint, run_identity
from trisparse.retrain.sharding import check_can_shard, training_device
from trisparse.sparsity.data import token_windows
from trisparse.sparsity.linear import SparseLinear
from trisparse.sparsity.mask import check_masks, masks
from trisparse.sparsity.modes import evaluating
from trisparse.sparsity.targets import is_peft_wrapped


@dataclass(frozen=True)
class PERPConfig:
    """How to retrain. The batch, the accumulation, the warm-up and the weight decay are the paper's (Appendix A).

    Attributes:
        groups: a preset, each of which holds those before it: "biases", "norms", "linear-probing", "perp", "full"; or
            which of "biases", "norms", "head" and "lora" train, or "full". It is a tuple of groups afterwards.
        variant: LoRA of the pruned layers: "lora", "lora_prune", "mask_lora" or "scale_lora"; lora_layer.py has the
            formulas. The head's is plain LoRA, as it is not pruned.
        rank: rank of every LoRA.
        alpha: the LoRAs' scaling is s = alpha / rank; "scale_lora" has none.
        targets: names of the pruned layers that get a LoRA, shell-style patterns such as "q_proj" or "model.layers.0";
            None is all. The paper's Table 1 is ("q_proj", "v_proj"), which trains less than a third of that.
        merge: whether the adapters are merged in the end. False leaves them on the model, under which it stays frozen;
            ``report.peft_model.save_pretrained(folder, save_embedding_layers=False)`` saves them. The variant "lora"
            demands it, unless whole rows are pruned.
        learning_rate: AdamW's peak; "grid" tries ``learning_rates`` and takes the one of the lowest validation loss.
        learning_rates: of the grid; by default the paper's.
        grid_steps: steps of each of its short runs, with a warm-up and a decay of their own.
        steps: optimizer steps.
        batch_size: windows per forward, on each device; None is the paper's for the model's size, see
            :func:`trisparse.retrain.batch_settings.paper_batch`.
        gradient_accumulation: forwards per step; None likewise.
        seq_len: tokens per window.
        warmup_ratio: share of the steps in which the rate rises; it falls linearly to 0 after them.
        weight_decay: AdamW's.
        max_grad_norm: clipping of the gradient's l2 norm; 0 turns it off.
        gradient_checkpointing: keep one activation per block and compute the others twice.
        seed: of the LoRAs' start, of the order of the data and of dropout.
        dtype: "fp32"; "bf16" (autocast; what trains stays fp32); "fp16" (autocast with scaled gradients, on CUDA
            alone); "auto" is bf16 where it is the faster one, or where the model is in bf16.
        output_dir: folder for the Trainer's checkpoints; none are written without it.
        save_steps: steps from one checkpoint to the next; None is a tenth of the steps. The last step has one too.
        save_total_limit: checkpoints of the run that stay, the last ones; None is all.
        resume: go on from the last complete checkpoint of the same run in ``output_dir``; where there is none yet, True
            raises and "auto" starts anew.
        guard_every: check after every so many steps that each pruned weight is zero; None only at the end.
        distillation_weight: α of the teacher's part of the loss, if there is a teacher; see
            :mod:`trisparse.retrain.distillation`.
        temperature: T of the same.
        report_to: Trainer's integrations, such as ("wandb",) or ("tensorboard",); some need ``output_dir``.
        sharding: of several processes: "none" (DDP: each holds the whole model) or "fsdp" (FSDP2: each holds its part
            of every weight, and blocks are gathered as they run; a model on the CPU trains on the process's GPU then,
            if there is one). "accelerate launch --use_fsdp --fsdp_version 2" means "fsdp".

    Raises:
        ValueError: names the field, its value and what is allowed.
    """

    groups: str | Sequence[str] = "perp"
    variant: Variant = "mask_lora"
    rank: int = 16
    alpha: float = 32
    targets: str | Sequence[str] | None = None
    merge: bool = True
    learning_rate: float | Literal["grid"] = 5e-4
    learning_rates: Sequence[float] = LEARNING_RATES
    grid_steps: int = 20
    steps: int = 100
    batch_size: int | None = None
    gradient_accumulation: int | None = None
    seq_len: int = 512
    warmup_ratio: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    seed: int = 0
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    output_dir: str | Path | None = None
    save_steps: int | None = None
    save_total_limit: int | None = 2
    resume: bool | Literal["auto"] = False
    guard_every: int | None = None
    distillation_weight: float = 0.5
    temperature: float = 2.0
    report_to: Sequence[str] = ()
    sharding: Sharding = "none"

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", group_names(self.groups))
        if self.variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {self.variant!r}")
        if not isinstance(self.merge, bool):
            raise ValueError(f"merge must be True or False, got {self.merge!r}")
        if self.targets is not None:
            patterns = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)
            if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
                raise ValueError(f"targets must be one or more patterns of names or None, got {self.targets!r}")
            if "lora" not in self.groups:
                raise ValueError(f"targets are of the group 'lora', which is not in groups={self.groups}")
            object.__setattr__(self, "targets", patterns)
        if not self.merge and "full" in self.groups:
            raise ValueError("merge must be True for groups='full', which has no adapters, got False")
        check_loop_options(self)
        object.__setattr__(self, "learning_rates", tuple(self.learning_rates))
        object.__setattr__(self, "report_to", tuple(self.report_to))


_DEFAULT = PERPConfig()


def retrain(
    model: Any,
    data: Any,
    config: PERPConfig = _DEFAULT,
    *,
    tokenizer: Any = None,
    validation: Any = None,
    teacher: Any = None,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
) -> RetrainReport:
    """Retrain a pruned causal language model in place, keeping its zeros.

    Whatever is wrong with the arguments raises before anything changes, and a failure or an interrupt while
    training leaves the model as it was, but for ``.grad``, which is cleared. Modes, flags and the config are put
    back; with ``config.merge`` False the adapters stay on, and what is under them stays frozen. A head that shares the
    input embedding gets a weight of its own when it is merged, as its LoRA changes the head alone
    (``tie_word_embeddings`` is False from then on; the report says so).

    Under ``torchrun`` or ``accelerate launch`` every process calls this with the same arguments and the whole model;
    they share the windows of a step among them (DDP), end with the same weights, and the first one writes the
    checkpoints. With ``config.sharding`` "fsdp" the weights are split while training. If one process fails alone then,
    the others' parts are lost to it, and a note on the exception says so.

    Args:
        model: a transformers causal language model with attached masks (:mod:`trisparse.sparsity.mask`), or compressed
            (:func:`trisparse.sparsity.compression.compress`), which it stays.
        data: to train on; token ids or text, see :func:`trisparse.sparsity.data.token_windows`.
        config: what trains, and how.
        tokenizer: for text.
        validation: data whose loss is measured before and after, and by which ``learning_rate="grid"`` chooses.
        teacher: the dense model, on the same device, to distil from; stays as it is.
        progress: show a progress bar on stderr.
        callbacks: of the Trainer, such as :class:`trisparse.retrain.freezing.FreezingCallback`; not of the grid's
            short runs. What the method ``identity`` of one returns must be the same when a run resumes; one without
            it is not compared.

    Raises:
        ValueError: the model, the data or the checkpoints do not fit ``config``.
        MaskError: a pruned weight is not zero.
        RetrainError: the loss, the gradient or a trained parameter became NaN or infinite.
    """
    config = replace(config, sharding=chosen_sharding(config.sharding))
    sharded = config.sharding == "fsdp"
    check_grid(config, validation)
    groups = parameter_groups_for(model, config)
    dtype = autocast_dtype(model, config)
    total = parameter_count(model)
    batch = batch_settings(config, total)
    if teacher is not None:
        check_teacher(teacher, model)
    windows, held_out = training_windows(model, data, validation, config, batch, tokenizer)
    identity: dict[str, Any] = {}
    if config.output_dir is not None or process_count() > 1:
        compared = held_out if config.learning_rate == "grid" else None  # it chooses the rate, else it is only measured
        identity = run_identity(
            config, batch, dtype, model, windows, validation=compared, teacher=teacher, callbacks=callbacks
        )
    if process_count() > 1:
        join(training_device(model) if sharded else next(model.parameters()).device)
        check_same_run(identity)
    resume_from: Path | None = None
    chosen: dict[str, Any] = {}
    if config.resume:
        folder = Path(str(config.output_dir))
        resume_from, chosen = last_checkpoint(folder, identity, required=config.resume is True)
    run = Run(model, groups, windows, held_out, config, batch, dtype, teacher, progress)

    with random_state_kept(), nullcontext() if teacher is None else evaluating(teacher):
        if not chosen:
            chosen = {"learning_rate": config.learning_rate, "grid": None}
        if chosen["learning_rate"] == "grid":
            rate, tried = choose_learning_rate(config.learning_rates, run.validation_loss_of)
            chosen = {"learning_rate": rate, "grid": list(tried.items())}
        mark = () if config.output_dir is None else (MarkComplete(identity, chosen, config.save_total_limit),)
        watch, memory, adapted, losses = run.train(
            config, chosen["learning_rate"], resume_from=resume_from, callbacks=(*callbacks, *mark)
        )
        added = 0
        if isinstance(adapted, Adapted) and not config.merge:
            adapted.keep()
        else:
            added = adapted.merge()
    check_masks(model)
    return RetrainReport(
        steps=config.steps,
        tokens=config.steps * batch.windows * process_count() * config.seq_len,
        seconds=watch.seconds,
        trainable=adapted.trainable,
        total_parameters=total,
        losses=watch.losses,
        peak_memory_bytes=memory.bytes,
        untied_head=added > 0,
        added_parameters=added,
        missing=[group for group in config.groups if not getattr(groups, group)],
        not_covered=list(groups.not_covered) if "lora" in config.groups else [],
        effective_sparsity=effective_sparsity(model).total if masks(model) else None,
        validation_loss=(losses[0], losses[1]) if held_out is not None else None,
        learning_rate=chosen["learning_rate"],
        grid=None if chosen["grid"] is None else dict(chosen["grid"]),
        batch=(batch.size, batch.accumulation, process_count()),
        resumed_at=watch.resumed_at,
        skipped_steps=watch.skipped,
        peft_model=adapted.peft if isinstance(adapted, Adapted) and not config.merge else None,
    )


def parameter_groups_for(model: Any, config: PERPConfig) -> ParameterGroups:
    """The groups of ``model``, checked against ``config``; see :func:`retrain` for what raises."""
    if is_peft_wrapped(model):
        raise ValueError("model is wrapped by PEFT already: merge_and_unload() or unload() it first")
    if not callable(getattr(model, "get_output_embeddings", None)) or not hasattr(model, "config"):
        raise ValueError(f"model must be a transformers causal language model, got {type(model).__name__}")
    if getattr(model.config, "is_encoder_decoder", False) or not model.can_generate():
        raise ValueError(f"model must be a causal language model, got {type(model).__name__}")
    if any(param.is_meta for param in model.parameters()):
        raise ValueError("model is on the meta device: it has no weights to retrain")
    if "lora" in config.groups and not masks(model):
        raise ValueError("model has no masks, and groups asks for 'lora': prune it first, or leave 'lora' out")
    check_masks(model)
    groups = parameter_groups(model)
    if config.sharding == "fsdp":
        if _compressed_layers(model):
            raise ValueError(
                "sharding='fsdp' splits parameters, and compressed layers hold buffers: decompress() the model first, "
                "or leave it out (DDP)"
            )
        check_can_shard(model)
    if "full" in config.groups and _compressed_layers(model):
        raise ValueError("groups asks for 'full', and model holds compressed layers: decompress() it first")
    if "lora" in config.groups:
        groups = groups.only(config.targets)
    if not any(getattr(groups, group) for group in config.groups):
        raise ValueError(f"model has nothing to train in groups={tuple(config.groups)}; it has {_present(groups)}")
    merged = [name for group in ("lora", "head") if group in config.groups for name in getattr(groups, group)]
    if config.variant == "lora" and config.merge:
        full = next((name for name in merged if fills_zeros(model.get_submodule(name))), None)
        if full is not None:
            raise ValueError(
                f"variant='lora' cannot be merged: it would fill the zeros of {full}. merge=False leaves the adapters "
                "on the model; lora_prune, mask_lora and scale_lora can be merged"
            )
    untied = config.merge and "head" in config.groups and groups.head and is_tied(model, groups.head[0])
    if untied and (ties := other_ties(model, groups.head[0])):
        raise ValueError(
            f"groups asks for 'head', whose weight is the input embedding's, and untying it would untie "
            f"{', '.join(ties)} too: leave 'head' out"
        )
    return groups


def parameter_count(model: Any) -> int:
    """Parameters of ``model``, pruned ones and those of compressed layers included, a shared one once."""
    compressed = sum(layer.in_features * layer.out_features for layer in _compressed_layers(model))
    return int(sum(param.numel() for param in model.parameters()) + compressed)


def _compressed_layers(model: Any) -> list[SparseLinear]:
    return [module for module in model.modules() if isinstance(module, SparseLinear)]


def _present(groups: ParameterGroups) -> str:
    return ", ".join(group for group in GROUPS[:-1] if getattr(groups, group)) or "none of the groups"


def autocast_dtype(model: Any, config: PERPConfig) -> torch.dtype | None:
    """The dtype to compute in under autocast, or None for the model's own fp32.

    Raises:
        ValueError: fp32 or fp16 asked for a model in another dtype, fp16 off CUDA or sharded, or a model in fp16.
    """
    device = next(model.parameters()).device if config.sharding == "none" else training_device(model)
    dtypes = {param.dtype for param in model.parameters()} | {layer.values.dtype for layer in _compressed_layers(model)}
    if torch.float16 in dtypes:
        raise ValueError("model is in fp16, whose gradients underflow: load it in bf16 or fp32")
    if torch.bfloat16 in dtypes and config.dtype in ("fp32", "fp16"):
        raise ValueError(f"dtype={config.dtype!r} needs a model in fp32, this one is in bf16: call model.float() first")
    if config.dtype == "fp16" and config.sharding == "fsdp":
        raise ValueError(
            "dtype='fp16' scales the gradients, and with sharding='fsdp' a process sees the overflows of its part "
            "alone: take 'bf16'"
        )
    if config.dtype == "fp16" and device.type != "cuda":
        raise ValueError(f"dtype='fp16' needs a model on CUDA, this one is on {device}: take 'bf16' or 'fp32'")
    return computing_dtype(config.dtype, device, dtypes)


def check_grid(config: PERPConfig, validation: Any) -> None:
    """Raise a ValueError where the learning rate is to be chosen by a loss that is not measured."""
    if config.learning_rate == "grid" and validation is None:
        raise ValueError("learning_rate='grid' chooses by the loss on validation data: pass validation")


def check_length(model: Any, config: PERPConfig) -> None:
    """Raise a ValueError where the windows are longer than the model's context."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and config.seq_len > longest:
        raise ValueError(f"seq_len={config.seq_len} is more than the model's maximum of {longest} positions")


def training_windows(
    model: Any,
    data: Any,
    validation: Any,
    config: PERPConfig,
    batch: BatchSettings,
    tokenizer: Any,
    *,
    runs: int = 1,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Windows to train on, [n, seq_len], as many as ``runs`` runs of ``config`` read, and those to measure on.

    Raises:
        ValueError: windows longer than the model's context, or fewer than one batch.
    """
    check_length(model, config)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    samples = runs * config.steps * batch.windows * process_count()
    cut = {"tokenizer": tokenizer, "seq_len": config.seq_len, "vocab_size": vocabulary}
    windows = token_windows(data, samples=samples, seed=config.seed, **cut)
    if len(windows) < batch.size:
        raise ValueError(
            f"data is shorter than one batch: {len(windows)} windows of seq_len={config.seq_len} tokens, and "
            f"batch_size={batch.size}"
        )
    return windows, None if validation is None else token_windows(validation, **cut)
