"""Peak memory of gradient_norms above the model, as the operating system counts it, against the issue's bar."""

import json
import os
import subprocess
import sys

import pytest

# 24 blocks of 9 MB, and sequences short enough that their activations do not matter. malloc is told to map every
# tensor by itself, so that freed memory is given back and the peak is that of living tensors.
_MEASURE = """
import json, sys, torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from trisparse.sparsity.gradients import gradient_norms
from trisparse.sparsity.targets import find_targets

def status(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024

config = LlamaConfig(
    vocab_size=96, hidden_size=512, intermediate_size=1024, num_hidden_layers=24, num_attention_heads=8,
    num_key_value_heads=4, max_position_embeddings=64,
)
model = LlamaForCausalLM(config).eval()
targets = find_targets(model)
batches = [{"input_ids": torch.arange(32).view(2, 16)}]
gradient_norms(model, targets, batches, compute_dtype=torch.float32, progress=False)  # what is loaded at first use
result = {}
for name, options in {
    "whole": {"mode": "whole"},
    "block": {"mode": "block"},
    "block in bfloat16": {"mode": "block", "dtype": torch.bfloat16},
    "block on disk": {"mode": "block", "path": sys.argv[1]},
}.items():
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    norms = gradient_norms(model, targets, batches, compute_dtype=torch.float32, progress=False, **options)
    result[name] = status("VmHWM") - before
    del norms
weights = [target.weight.numel() for target in targets.found]
first = [target.weight.numel() for target in targets.found if target.block == 0]
print(json.dumps({"peak": result, "weights": sum(weights), "block": sum(first)}))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux to count a process's peak")
def test_peak_memory_above_the_model(tmp_path):
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _MEASURE, tmp_path / "norms.safetensors"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    measured = json.loads(run.stdout.splitlines()[-1])
    peak, statistic, gradients = measured["peak"], 4 * measured["weights"], 4 * measured["block"]
    assert statistic < peak["whole"] < 1.2 * statistic + gradients
    assert statistic < peak["block"] < 1.2 * statistic + gradients
    assert statistic / 2 < peak["block in bfloat16"] < 1.2 * statistic / 2 + gradients
    # On disk nothing of it is left in memory but one block's fp32 sums, while its gradients are made.
    assert gradients < peak["block on disk"] < 0.2 * statistic + gradients
