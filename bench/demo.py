"""The demo: prune a real language model, measure it, retrain it, save it, load it back, all on a CPU."""

from __future__ import annotations

import math
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from trisparse.bench.smollm2 import load_smollm2
from trisparse.retrain.perp import PERPConfig, retrain
from trisparse.sparsity.checkpoint import save
from trisparse.sparsity.data import token_windows
from trisparse.sparsity.perplexity import perplexity
from trisparse.sparsity.progress import counting_bar, quiet_transformers
from trisparse.sparsity.sparsify import sparsify
from trisparse.sparsity.text import pydoc_text

PROMPT = "In Python, a list is"


@dataclass(frozen=True)
class DemoScale:
    """How much data the demo takes; sequences of ``seq_len`` tokens."""

    seq_len: int
    calibration: int
    test: int
    retrain: PERPConfig


FULL = DemoScale(
    seq_len=512,
    calibration=32,
    test=16,
    retrain=PERPConfig(steps=60, batch_size=2, gradient_accumulation=1, seq_len=512, learning_rate=1e-3),
)
QUICK = DemoScale(
    seq_len=256,
    calibration=16,
    test=8,
    retrain=PERPConfig(steps=12, batch_size=2, gradient_accumulation=1, seq_len=256, learning_rate=1e-3),
)

PRUNED = (("magnitude", "50%"), ("wanda", "50%"), ("wanda", "2:4"))


def run_demo(scale: DemoScale, *, out: Path | None = None, quiet: bool = False) -> dict[str, Any]:
    """Run the demo and return its figures; tables go to standard output unless ``quiet``.

    ``out`` keeps the saved model. ``same_perplexity`` in the result says whether the model that
    ``AutoModelForCausalLM.from_pretrained`` loaded has the perplexity of the one that was saved.
    """
    start = time.perf_counter()
    console = Console(quiet=quiet, width=100, highlight=False)
    console.print("SmolLM2-135M on the Python documentation: prune, measure, retrain, save, load")
    dense, tokenizer = load_smollm2()
    original = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    test = token_windows(pydoc_text("test"), tokenizer=tokenizer, seq_len=scale.seq_len, samples=scale.test)
    calibration = pydoc_text("calibration")

    def measure(model: Any) -> float:
        with counting_bar("perplexity", enabled=not quiet) as progress:
            return perplexity(model, test, seq_len=scale.seq_len, progress=progress)

    def pruned(method: str, sparsity: str) -> tuple[Any, dict[str, Any]]:
        dense.load_state_dict(original)
        report = sparsify(
            dense,
            sparsity,
            method,
            calibration,
            tokenizer=tokenizer,
            samples=scale.calibration,
            seq_len=scale.seq_len,
            progress=not quiet,
        )
        return dense, {"sparsity": report.sparsity, "seconds": report.seconds}

    rows: list[dict[str, Any]] = [{"model": "dense", "perplexity": measure(dense), "sparsity": 0.0, "seconds": 0.0}]
    texts = {"dense": _generate(dense, tokenizer)}
    for method, sparsity in PRUNED:
        model, figures = pruned(method, sparsity)
        rows.append({"model": f"{method} {sparsity}", "perplexity": measure(model), **figures})
    table = Table(title=f"perplexity on {test.numel():,} held-out tokens (less is better)", title_justify="left")
    table.add_column("model")
    for heading in ("perplexity", "sparsity", "seconds to prune"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(row["model"], f"{row['perplexity']:.2f}", f"{row['sparsity']:.4%}", f"{row['seconds']:.1f}")
    console.print(table)

    model, _ = pruned(*PRUNED[0])
    before = rows[1]["perplexity"]
    texts["magnitude 50%"] = _generate(model, tokenizer)
    report = retrain(model, pydoc_text("train"), scale.retrain, tokenizer=tokenizer, progress=not quiet)
    after = measure(model)
    texts["magnitude 50% + PERP"] = _generate(model, tokenizer)
    console.print(_retrain_table(before, after, report))

    with ExitStack() as stack:
        folder = out or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trisparse-"))) / "demo"
        save(model, folder, tokenizer=tokenizer)
        with quiet_transformers():
            reloaded = AutoModelForCausalLM.from_pretrained(folder).eval()
        again = measure(reloaded)
        same = math.isclose(again, after, rel_tol=1e-6)
        sentence = _generate(reloaded, tokenizer)
    console.print(
        f"saved, loaded with from_pretrained: perplexity {again:.4f}, {'the same' if same else 'NOT the same'}"
    )
    for name, text in (*texts.items(), ("loaded back", sentence)):
        console.print(f"  {name + ':':22} {text}", markup=False, soft_wrap=True)
    seconds = time.perf_counter() - start
    console.print(f"{seconds:.0f} s in all" + (f"; the model is in {out}" if out else ""))
    return {
        "scale": asdict(scale),
        "models": rows,
        "retraining": {"perplexity_before": before, "perplexity_after": after, **report.to_dict()},
        "perplexity_reloaded": again,
        "same_perplexity": same and sentence == texts["magnitude 50% + PERP"],
        "texts": texts,
        "seconds": seconds,
    }


def _retrain_table(before: float, after: float, report: Any) -> Table:
    table = Table(title="PERP retraining of magnitude 50%", title_justify="left", show_header=False)
    table.add_row("perplexity", f"{before:.2f} -> {after:.2f}")
    groups = ", ".join(f"{name} {count:,}" for name, count in report.trainable.items())
    table.add_row("trainable", f"{report.trainable_share:.2%} ({groups})")
    table.add_row("trained on", f"{report.tokens:,} tokens in {report.seconds:.0f} s")
    table.add_row("train tokens/s", f"{report.tokens_per_second:.0f}")
    table.add_row("peak memory", f"{report.peak_memory_bytes / 2**20:,.0f} MiB")
    if report.untied_head:
        table.add_row("head", f"untied from the embedding: {report.added_parameters:,} parameters more")
    return table


@torch.no_grad()
def _generate(model: Any, tokenizer: Any, new_tokens: int = 24) -> str:
    """Greedy continuation of the prompt, on one line."""
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return " ".join(tokenizer.decode(output[0], skip_special_tokens=True).split())
