"""``trisparse bench run tokens``: tokens/s of a whole model, dense against pruned and compressed.

| phase    | one call                                                                          | tokens counted |
|----------|-----------------------------------------------------------------------------------|----------------|
| prefill  | the forward of a prompt: the cache is filled, the logits are the last position's  | of the prompt  |
| decode   | greedy decoding with a static cache; on a GPU each step is one CUDA graph         | new ones       |
| training | forward, backward and AdamW on a batch of windows                                 | of the windows |

Contestants of prefill and decode, for each pattern: "dense" (the model as it is), "masked dense" (pruned, stored
dense), "compressed" for ``prefer="speed"`` and, where its plans differ, "compressed, memory". Of training: "full"
(every weight trains and the mask is applied again), "PERP" (masked LoRA, norms, head), "norms only", each on the masked
dense model, and "PERP, compressed". All take their turn in every round, unless they do not fit the device together;
then ``interleaved`` is false.

Before anything is timed, the logits of every contestant (of each step in decoding, with the tokens that it chose) are
compared with the masked dense model's in a wider dtype: `decoding.Gate`. A wrong one, and one that the device has no
memory for, is left out; what went wrong is raised at the end, after all other rows.

``peak_bytes`` is the model's bytes and the most that torch allocates beyond them in a call: by CUDA's own count
(``max_memory_allocated``), on a CPU by torch's profiler. ``model_bytes`` are parameters, buffers and every copy held.
Plans on a GPU come from times that `trisparse bench tune` measured, else they are the default ones.
"""

from __future__ import annotations

import copy
import gc
import statistics
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trisparse.bench.families.decoding import Decoder, Gate
from trisparse.bench.families.models import LLAMA_2_7B_LAYERS, llama_2_7b, model_bytes, pruned
from trisparse.bench.models import load_causal_lm, model_label
from trisparse.bench.peak_memory import peak_bytes
from trisparse.bench.registry import Measured, Options, benchmark
from trisparse.bench.timing import interleave, timer_for
from trisparse.bench.training_steps import TrainingStep, step_of
from trisparse.retrain.loop import autocast
from trisparse.sparsity.compression import compress
from trisparse.sparsity.linear import SparseLinear
from trisparse.sparsity.mask import check_masks

TRAINING = {
    "full": ("full", False),
    "PERP": ("mask_lora + norms + head", False),
    "norms only": ("norms only", False),
    "PERP, compressed": ("mask_lora + norms + head", True),
}
_ROOM = 0.8  # of the device's memory may be planned for
_WHOLE_7B = 70 << 30  # bytes of a device that holds Llama-2-7B in all its forms


@dataclass(frozen=True)
class Sizes:
    """What runs: (batch, tokens) of prefill and training, (batch, prompt, new tokens) of decoding.

    Training runs for the patterns ``trained`` alone: its speed hardly depends on them.
    """

    patterns: tuple[str, ...]
    trained: tuple[str, ...]
    prefill: tuple[tuple[int, int], ...]
    decode: tuple[tuple[int, int, int], ...]
    training: tuple[tuple[int, int], ...]
    repeats: int


QUICK = Sizes(("2:4", "50%"), ("2:4",), ((1, 256),), ((1, 32, 16), (4, 32, 8)), ((1, 256),), 2)
CPU = Sizes(
    ("2:4", "4:8", "50%"), ("2:4", "50%"), ((1, 256), (4, 256)), tuple((n, 64, 32) for n in (1, 4, 16)), ((2, 512),), 5
)
GPU = Sizes(
    ("2:4", "4:8", "50%"),
    ("2:4", "50%"),
    ((1, 512), (1, 2048), (8, 2048)),
    tuple((n, 64, 64) for n in (1, 2, 4, 8, 16, 32, 64)),
    ((1, 2048),),
    10,
)


@benchmark(
    "tokens",
    "tokens/s, peak memory and bytes of a whole model: prefill, decode, training",
    devices=("cpu", "cuda"),
    takes=("dtype", "model", "repeats"),
)
def tokens(options: Options) -> Iterator[Measured]:
    """SmolLM2 on a CPU, random weights of Llama-2-7B's shape on a GPU, or ``--model``.

    Raises:
        RuntimeError: contestants are wrong or raised; at the end, after all others.
    """
    device = options.device
    dtype = options.dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    sizes = QUICK if options.quick else GPU if device.type == "cuda" else CPU
    title, model = _model(options, dtype)
    problems: list[str] = []
    for pattern in sizes.patterns:
        wanted = [name for name in _names(sizes, pattern) if options.wants(name)]
        if not wanted:
            continue
        about = {"model": title, "pattern": pattern, "dtype": str(dtype).removeprefix("torch.")}
        about["memory"] = "max_memory_allocated" if device.type == "cuda" else "torch.profiler"
        family = Family(model, pattern, about, options.repeats or sizes.repeats)
        for name, measure in family.phases(sizes, wanted):
            if name not in wanted:
                continue
            try:
                row = measure()
            except Exception as problem:  # of the reference, or of a contestant while it was timed
                problems.append(f"{name}: {problem}")
            else:
                if row.seconds:
                    yield row
        problems += family.problems
    if problems:
        raise RuntimeError("; ".join(problems))


def _names(sizes: Sizes, pattern: str) -> Iterator[str]:
    yield from (f"prefill {batch}x{length}, {pattern}" for batch, length in sizes.prefill)
    yield from (f"decode {batch}x{new}, {pattern}" for batch, _, new in sizes.decode)
    if pattern in sizes.trained:
        yield from (f"training {batch}x{length}, {pattern}" for batch, length in sizes.training)


def _model(options: Options, dtype: torch.dtype) -> tuple[str, Any]:
    """(title, model); of Llama-2-7B as many blocks as the device has room for in all forms, and few if quick."""
    device = options.device
    if options.model is not None or device.type != "cuda":
        return model_label(options.model), load_causal_lm(options.model, dtype)[0].to(device)
    whole = torch.cuda.get_device_properties(device).total_memory >= _WHOLE_7B
    layers = 4 if options.quick else LLAMA_2_7B_LAYERS if whole else 12
    title = "Llama-2-7B, random weights"
    return title + (f", {layers} of its blocks" if layers < LLAMA_2_7B_LAYERS else ""), llama_2_7b(
        dtype, device, layers
    )


class Family:
    """A dense model, and its forms pruned to one pattern.

    Args:
        model: dense; stays as it is.
        pattern: as text.
        about: parameters of every row.
        repeats: rounds.

    Attributes:
        problems: a line for each contestant that was left out because it is wrong or raised.
    """

    def __init__(self, model: Any, pattern: str, about: Mapping[str, Any], repeats: int) -> None:
        self.model, self.pattern, self.about, self.repeats = model, pattern, about, repeats
        first = next(model.parameters())
        self.device, self.dtype = first.device, first.dtype
        self.masked = pruned(model, pattern)
        self.problems: list[str] = []

    def phases(self, sizes: Sizes, wanted: Collection[str]) -> Iterator[tuple[str, Callable[[], Measured]]]:
        """What measures each row, by its name; nothing is compressed unless a row ``wanted`` needs it."""
        if any(not name.startswith("training") for name in wanted):
            forms = self.forms()
            for batch, length in sizes.prefill:
                yield f"prefill {batch}x{length}, {self.pattern}", partial(self.prefill, forms, batch, length)
            for batch, prompt, new in sizes.decode:
                yield f"decode {batch}x{new}, {self.pattern}", partial(self.decode, forms, batch, prompt, new)
            del forms
        for batch, length in sizes.training:
            yield f"training {batch}x{length}, {self.pattern}", partial(self.training, batch, length)

    @contextmanager
    def _may_fail(self, case: str, contestant: str) -> Iterator[None]:
        """Note that the contestant has no room, or add what went wrong to the problems; the others go on."""
        try:
            yield
        except torch.OutOfMemoryError:
            _left_out(case, contestant)
        except Exception as problem:
            self.problems.append(f"{case}: {contestant}: {problem}")

    def forms(self) -> dict[str, Any]:
        """The contestants of prefill and decode."""
        found = {"dense": self.model, "masked dense": self.masked, "compressed": self.compressed("speed")}
        small = self.compressed("memory")
        if _plans(small) != _plans(found["compressed"]):
            found["compressed, memory"] = small
        return found

    def compressed(self, prefer: Any) -> Any:
        """A compressed copy of the masked model."""
        own = copy.deepcopy(self.masked)
        compress(own, prefer=prefer)
        return own

    def ids(self, batch: int, length: int) -> Tensor:
        """Random token ids [batch, length]."""
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, vocabulary, (batch, length), generator=generator).to(self.device)

    def prefill(self, forms: Mapping[str, Any], batch: int, length: int) -> Measured:
        """The row of prefill; a contestant that is wrong or does not fit the device is left out."""
        ids = self.ids(batch, length)

        def forward(model: Any) -> Tensor:
            with torch.no_grad():
                logits: Tensor = model(ids, use_cache=True, logits_to_keep=1).logits
            return logits

        runs, metrics = {}, {}
        gate = Gate(self.masked)
        title = f"prefill {batch}x{length}, {self.pattern}"
        for name, model in forms.items():
            with self._may_fail(title, name):
                if name != "dense":
                    gate.logits(name, ids, forward(model))
                call = _call(forward, model)
                metrics[name] = self._memory(model, call)
                runs[name] = call
            _free()
        seconds = interleave(runs, self.repeats, timer_for(self.device))
        parameters = {"phase": "prefill", "batch": batch, "tokens": batch * length, "interleaved": True}
        return self._measured(title, parameters, "dense", batch * length, seconds, metrics)

    def decode(self, forms: Mapping[str, Any], batch: int, prompt: int, new: int) -> Measured:
        """The row of decoding; a contestant that is wrong or whose caches do not fit the device is left out."""
        ids = self.ids(batch, prompt)
        runs: dict[str, Callable[[], Any]] = {}
        metrics: dict[str, dict[str, float]] = {}
        gate = Gate(self.masked)
        title = f"decode {batch}x{new}, {self.pattern}"
        chosen: Tensor | None = None  # tokens of the masked dense model
        for name in ("masked dense", *(name for name in forms if name != "masked dense")):
            made: list[Decoder] = []

            def build(model: Any = forms[name], made: list[Decoder] = made) -> None:
                made.append(Decoder(model, ids, new))
                made[0](2)  # every step needs the same memory

            with self._may_fail(title, name):
                metrics[name] = self._memory(forms[name], build)
                if name != "dense":
                    fed = gate.decoding(name, made[0])
                    chosen = fed if name == "masked dense" else chosen
                    if chosen is not None:
                        metrics[name]["same_tokens"] = float(torch.equal(fed, chosen))
                runs[name] = made[0]
            made.clear()
            _free()
        runs = {name: runs[name] for name in forms if name in runs}
        seconds = interleave(runs, self.repeats, timer_for(self.device))
        parameters = {"phase": "decode", "batch": batch, "prompt": prompt, "tokens": batch * new, "interleaved": True}
        return self._measured(title, parameters, "dense", batch * new, seconds, metrics)

    def training(self, batch: int, length: int) -> Measured:
        """The row of training, each contestant on a copy of its own; what is wrong or has no room is left out."""
        windows = self.ids(batch, length)
        dtype = None if self.dtype == torch.float32 else self.dtype
        title = f"training {batch}x{length}, {self.pattern}"
        steps: dict[str, TrainingStep] = {}
        metrics: dict[str, dict[str, float]] = {}
        seconds: dict[str, list[float]] = {}
        timer = timer_for(self.device)
        right: list[str] = []
        together = self._room_for_training()
        gate = Gate(self.masked)
        for name, (kind, packed) in TRAINING.items():
            own = self.compressed("memory") if packed else copy.deepcopy(self.masked)

            def train(name: str = name, kind: str = kind, own: Any = own) -> None:
                steps[name] = step_of(kind, own, checkpointing=self.device.type == "cuda", dtype=dtype)
                for _ in range(2):  # the optimizer's state is there in the second one
                    steps[name](windows)

            with self._may_fail(title, name):
                if kind != "full":  # which is the masked dense model itself
                    self._gate_training(gate, name, kind, copy.deepcopy(own), windows, dtype)
                with self._alone(together):
                    metrics[name] = self._memory(own, train)
                    taken = {} if together else interleave({name: _call(steps[name], windows)}, self.repeats, timer)
                check_masks(steps[name].module)
                seconds |= taken
                right.append(name)
            if not together or name not in right:
                steps.pop(name, None)
            del own, train
            _free()
        if together:
            seconds = interleave({name: _call(step, windows) for name, step in steps.items()}, self.repeats, timer)
        parameters = {"phase": "training", "batch": batch, "tokens": batch * length, "interleaved": together}
        return self._measured(title, parameters, "full", batch * length, seconds, metrics)

    def _gate_training(
        self, gate: Gate, name: str, kind: str, own: Any, windows: Tensor, dtype: torch.dtype | None
    ) -> None:
        """Adapters start at zero, so that the logits before the first step are the masked dense model's."""
        module = step_of(kind, own, checkpointing=False, dtype=dtype).module.eval()
        with torch.no_grad(), autocast(self.device, dtype):
            gate.logits(name, windows, module(windows).logits)

    @contextmanager
    def _alone(self, together: bool) -> Iterator[None]:
        """Move the dense models off the device meanwhile, unless all contestants fit ``together``."""
        if together:
            yield
            return
        held = (self.model, self.masked)
        for model in held:
            model.cpu()
        _free()
        try:
            yield
        finally:
            for model in held:
                model.to(self.device)

    def _room_for_training(self) -> bool:
        """Whether all contestants fit at once: full fine-tuning takes four times the model, the others little more."""
        if self.device.type != "cuda":
            return True
        free, _ = torch.cuda.mem_get_info(self.device)
        return (4 + len(TRAINING)) * model_bytes(self.masked) <= _ROOM * free

    def _memory(self, model: Any, run: Callable[[], Any]) -> dict[str, float]:
        """``model_bytes`` and ``peak_bytes`` of a model in ``run``, which is called once."""
        held = model_bytes(model)
        if self.device.type != "cuda":
            return {"model_bytes": float(held), "peak_bytes": float(held + peak_bytes(run))}
        _free()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        torch.cuda.synchronize(self.device)
        beyond = torch.cuda.max_memory_allocated(self.device) - before
        return {"model_bytes": float(held), "peak_bytes": float(held + beyond)}

    def _measured(
        self,
        name: str,
        parameters: Mapping[str, Any],
        baseline: str,
        count: int,
        seconds: Mapping[str, list[float]],
        metrics: Mapping[str, dict[str, float]],
    ) -> Measured:
        found = {
            contestant: {"tokens_per_s": count / statistics.median(taken), **metrics[contestant]}
            for contestant, taken in seconds.items()
        }
        return Measured(name, {**self.about, **parameters}, found, seconds, baseline)


def _call(function: Callable[[Any], Any], argument: Any) -> Callable[[], Any]:
    return lambda: function(argument)


def _plans(model: Any) -> list[str]:
    return [str(layer.plan) for layer in model.modules() if isinstance(layer, SparseLinear)]


def _left_out(case: str, contestant: str) -> None:
    print(f"{case}: {contestant} is left out, the device has no memory for it", file=sys.stderr)


def _free() -> None:
    """Give back what nothing holds any more: models refer to themselves in cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
