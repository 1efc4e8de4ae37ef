"""vLLM itself on a GPU: a compressed checkpoint against the same model stored dense, both in vLLM."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trisparse.sparsity.checkpoint import save
from trisparse.sparsity.sparsify import sparsify

# A process of its own gives the device's memory back when it ends.
_RUN = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

if __name__ == "__main__":
    folder, texts, options = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    model = LLM(model=folder, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=96, gpu_memory_utilization=0.3,
                **options)
    sampling = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=1, detokenize=False)
    found = model.generate([TokensPrompt(prompt_token_ids=ids) for ids in texts], sampling)
    read = [[entry[token].logprob for token, entry in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
            for ids, output in zip(texts, found, strict=True)]
    print("LOGPROBS", json.dumps(read))
"""


def logprobs(folder, texts, script, **options):
    """What vLLM gives each token of ``texts`` after those before it."""
    command = [sys.executable, script, folder, json.dumps(texts), json.dumps(options)]
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "WARNING"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert ended.returncode == 0, ended.stderr[-4000:]
    (line,) = [line for line in ended.stdout.splitlines() if line.startswith("LOGPROBS ")]
    return torch.tensor([value for row in json.loads(line.removeprefix("LOGPROBS ")) for value in row])


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="vLLM's wheel needs a CUDA device")
@pytest.mark.parametrize(
    ("pattern", "options"),
    [
        ("2:4", {}),  # sparse tensor cores, compiled and captured in CUDA graphs
        ("50%", {}),  # compressed to 32 tokens, dense beyond
        ("50%", {"additional_config": {"trisparse": {"prefer": "memory"}}}),
        ("1:4", {"enforce_eager": True}),
    ],
)
def test_vllm_is_as_close_to_fp32_as_with_dense_weights(tmp_path, pattern, options):
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads, initializer_range=0.08)).to(torch.bfloat16).eval()
    sparsify(model, pattern, "magnitude", progress=False)
    model.save_pretrained(tmp_path / "dense")
    save(model, tmp_path / "compressed")
    script = tmp_path / "run.py"
    script.write_text(_RUN)
    texts = [torch.randint(128, (length,)).tolist() for length in (3, 20, 64)]  # prefilled by every step of the plan
    exact = []
    for ids in texts:
        tokens = torch.tensor([ids])
        with torch.no_grad():
            found = model.float()(input_ids=tokens, use_cache=False).logits[0, :-1].log_softmax(-1)
        exact.append(found.gather(1, tokens[0, 1:, None])[:, 0])
    exact = torch.cat(exact)
    dense = logprobs(tmp_path / "dense", texts, script, enforce_eager=True)
    compressed = logprobs(tmp_path / "compressed", texts, script, **options)
    error, allowed = (compressed - exact).abs().max(), 2 * (dense - exact).abs().max() + 1e-3
    assert exact.std() > 10 * allowed, "the model is too uniform for the comparison to see a wrong weight"
    assert error <= allowed
