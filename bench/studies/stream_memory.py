"""Peak memory of a streamed prune, against its bar: four blocks, the hidden states and 600 MB.

Prunes SmolLM2-135M (30 blocks, by the command line) and a random Llama of 3 GB (30 blocks, written for this and removed
afterwards) in a process of their own, whose VmHWM (the most memory that it ever had resident) is read when it ends.
``bar_bytes`` is the bar.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, LlamaConfig

from trisparse.bench.registry import Measured, Options, benchmark
from trisparse.bench.smollm2 import smollm2_path

_ALLOWED = 600 * 2**20
_SHAPE: dict[str, Any] = {
    "hidden_size": 1536,
    "intermediate_size": 3520,
    "num_hidden_layers": 30,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "vocab_size": 8192,
    "max_position_embeddings": 512,
}

# What the child runs; sys.argv: folder, out, samples, tokens of a sequence, and how data comes.
_CHILD = """
import json, sys
folder, out, samples, seq_len, data = sys.argv[1:]
def prune():
    if data == "pydoc":
        from trisparse.cli import main
        sys.argv[1:] = ["prune", folder, "--stream", "--out", out, "--sparsity", "50%", "--method", "wanda",
                        "--data", data, "--samples", samples, "--seq-len", seq_len, "--json"]
        main()
    else:
        import torch
        from trisparse.sparsity.hardware import free_memory_at_once
        from trisparse.sparsity.streaming.stream import stream_sparsify
        free_memory_at_once()
        tokens = torch.randint(0, 8192, (int(samples), int(seq_len)), generator=torch.Generator().manual_seed(0))
        stream_sparsify(folder, out, "50%", "wanda", tokens, samples=int(samples), seq_len=int(seq_len), progress=False)
try:
    prune()
except SystemExit as end:
    if end.code:
        raise
lines = open("/proc/self/status").read().splitlines()
print("peak", next(line for line in lines if line.startswith("VmHWM")).split()[1], file=sys.stderr)
"""


def write_llama(folder: Path) -> None:
    """A Llama with random fp32 weights in ``folder``, one shard at a time."""
    config = LlamaConfig(**_SHAPE, dtype="float32", architectures=["LlamaForCausalLM"], tie_word_embeddings=False)
    config.save_pretrained(folder)
    hidden, inner = config.hidden_size, config.intermediate_size
    generator = torch.Generator().manual_seed(0)
    names: dict[str, str] = {}

    def write(file: str, shapes: dict[str, tuple[int, ...]]) -> None:
        weights = {
            name: torch.randn(shape, generator=generator).mul_(0.02) if len(shape) == 2 else torch.ones(shape)
            for name, shape in shapes.items()
        }
        save_file(weights, folder / file, metadata={"format": "pt"})
        names.update(dict.fromkeys(shapes, file))

    vocabulary = (config.vocab_size, hidden)
    write("outside.safetensors", {"model.embed_tokens.weight": vocabulary, "lm_head.weight": vocabulary,
                                  "model.norm.weight": (hidden,)})  # fmt: skip
    for index in range(config.num_hidden_layers):
        shapes: dict[str, tuple[int, ...]] = {f"self_attn.{n}_proj.weight": (hidden, hidden) for n in "qkvo"}
        shapes |= {"mlp.gate_proj.weight": (inner, hidden), "mlp.up_proj.weight": (inner, hidden)}
        shapes |= {"mlp.down_proj.weight": (hidden, inner)}
        shapes |= {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
        write(f"block-{index}.safetensors", {f"model.layers.{index}.{name}": s for name, s in shapes.items()})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def measure(name: str, folder: Path, samples: int, seq_len: int, data: str) -> Measured:
    """Prune ``folder`` in a process of its own; its peak memory, and the bar.

    Raises:
        RuntimeError: it failed.
    """
    config = AutoConfig.from_pretrained(folder)
    block = _bytes_of(folder, "model.layers.0.")
    hidden = samples * seq_len * config.hidden_size * 4
    with tempfile.TemporaryDirectory(prefix="stream-memory-") as work:
        command = [sys.executable, "-c", _CHILD, str(folder), f"{work}/out", str(samples), str(seq_len), data]
        start = time.perf_counter()
        without_gpu = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # which a streamed prune takes where there is one
        done = subprocess.run(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False, env=without_gpu
        )
        seconds = time.perf_counter() - start
        found = [line.split()[1] for line in done.stderr.splitlines() if line.startswith("peak ")]
        if done.returncode or not found:
            raise RuntimeError(f"the streamed prune of {name} failed: {done.stderr}")
    bar = 4 * block + hidden + _ALLOWED
    parameters = {
        "model": name,
        "blocks": config.num_hidden_layers,
        "model_bytes": _bytes_of(folder, ""),
        "block_bytes": block,
        "tokens": samples * seq_len,
    }
    peak = int(found[0]) * 1024
    metrics = {"peak_bytes": peak, "bar_bytes": bar, "hidden_states_bytes": hidden, "share_of_bar": peak / bar}
    return Measured(name, parameters, {"streamed": metrics}, {"streamed": [seconds]})


def _bytes_of(folder: Path, prefix: str) -> int:
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name.startswith(prefix):
                    weight = file.get_slice(name)
                    total += torch.Size(weight.get_shape()).numel() * (4 if weight.get_dtype() == "F32" else 2)
    return total


@benchmark("stream-memory", "peak memory of a streamed prune, of SmolLM2 and of a model of 3 GB")
def stream_memory(options: Options) -> Iterator[Measured]:
    """Both models; with ``quick`` SmolLM2 alone."""
    if options.wants("SmolLM2-135M"):
        yield measure("SmolLM2-135M", smollm2_path(), 32, 512, "pydoc")
    if not options.quick and options.wants("random Llama"):
        with tempfile.TemporaryDirectory(prefix="random-llama-") as folder:
            write_llama(Path(folder))
            yield measure("random Llama", Path(folder), 8, 128, "random")
