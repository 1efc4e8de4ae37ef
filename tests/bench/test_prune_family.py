"""The benchmark "prune": the usual implementations choose what ours choose, and rounds are put together right."""

from __future__ import annotations

import pytest
import torch
import transformers

from trisparse.bench.families import prune, prune_process
from trisparse.bench.registry import Options
from trisparse.bench.usual_pruning import (
    SparseGPTLayer,
    prune_as_usual,
    prune_by_gradients_as_usual,
    prune_magnitude_as_usual,
)
from trisparse.sparsity.sparsify import sparsify


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
        max_position_embeddings=32,
    )
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()


TOKENS = torch.randint(0, 64, (6, 16), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("pattern", "n_of_m"), [("50%", None), ("2:4", (2, 4)), ("4:8", (4, 8))])
def test_usual_wanda_is_our_wanda_in_blocks(pattern, n_of_m):
    usual, ours = llama(), llama()
    prune_as_usual(usual, TOKENS, "wanda", 0.5, n_of_m)
    sparsify(
        ours, pattern, "wanda", TOKENS, samples=6, seq_len=16, propagate="block", dtype=torch.float32, progress=False
    )
    for name, weight in usual.state_dict().items():
        assert torch.equal(weight, ours.state_dict()[name]), name


def test_usual_sparsegpt_by_hand():
    # x = [[1, 1], [0, 1]]: H = 2/2 [[1, 1], [1, 2]] + 0.01 · 1.5 I. With w = (1, 3), half of it is pruned: by
    # w² / U_jj² the first goes, and the second takes up (1 / U_00) U_01.
    linear = torch.nn.Linear(2, 1, bias=False)
    linear.weight.data = torch.tensor([[1.0, 3.0]])
    layer = SparseGPTLayer(linear, 0.4, None)
    for row in ([[1.0, 1.0]], [[0.0, 1.0]]):
        layer.add(torch.tensor(row))
    assert torch.allclose(layer.hessian, torch.tensor([[1.0, 1.0], [1.0, 2.0]]))
    layer.prune()
    # the best w_1 for w_0 = 0 under the damped H: w_1 + H_01 / H_11
    assert torch.allclose(linear.weight.data, torch.tensor([[0.0, 3.0 + 1 / 2.015]]))


def test_the_usual_sparsegpt_prunes_half():
    model = llama()
    prune_as_usual(model, TOKENS, "sparsegpt", 0.5, (2, 4))
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            groups = module.weight.data.reshape(-1, 4)
            assert ((groups != 0).sum(1) <= 2).all()


def test_usual_magnitude_is_our_layer_wide_magnitude():
    usual, ours = llama(), llama()
    prune_magnitude_as_usual(usual, 0.5)
    sparsify(ours, "50% layer", "magnitude", progress=False)
    for name, weight in ours.state_dict().items():
        # The usual threshold is the first of the kept half and goes too.
        assert (weight != usual.state_dict()[name]).sum() <= (1 if "proj" in name else 0), name


@pytest.mark.parametrize(("pattern", "n_of_m"), [("50%", None), ("2:4", (2, 4))])
def test_usual_pruner_zero_is_ours(pattern, n_of_m, tmp_path, monkeypatch):
    monkeypatch.setenv("TRISPARSE_CACHE", str(tmp_path))
    usual, ours = llama(), llama()
    prune_by_gradients_as_usual(usual, TOKENS, 0.5, n_of_m)
    sparsify(ours, pattern, "pruner-zero", TOKENS, samples=6, seq_len=16, dtype=torch.float32, progress=False)
    for name, weight in ours.state_dict().items():
        differ = (weight != usual.state_dict()[name]).float().mean()
        assert differ <= (0.02 if "proj" in name else 0), name  # gradients are summed in another order


def found(seconds, peak=100, sparsity=0.5):
    return {"seconds": seconds, "perplexity": 20 + seconds, "peak_bytes": peak, "sparsity": sparsity}


def jobs_of(method="wanda", ways=("usual", "block")):
    return [prune.Job(method, "50%", how, "smollm2", "cpu", "float32", 8, 256, 4) for how in ways]


def test_rounds_are_interleaved_and_a_contestant_that_fails_is_left_out():
    asked = []

    def run(job):
        asked.append(job.how)
        if job.how == "dense" and len(asked) > 3:
            raise RuntimeError("out of memory")
        return found(len(asked), sparsity=0.3 if job.how == "linear" else 0.5)

    result, problems = prune.run_rounds(jobs_of(ways=("usual", "linear", "dense")), 3, run)
    assert asked == ["usual", "linear", "dense", "usual", "dense", "usual"]
    assert result.keys() == {"usual"}
    assert [one["seconds"] for one in result["usual"]] == [1, 4, 6]
    assert problems == [
        "trisparse, propagate=linear: pruned 0.300 of the weights and not 0.500",
        "trisparse, propagate=dense: out of memory",
    ]


def test_the_cases_and_their_metrics():
    numbers = iter(range(1, 100))
    options = Options(quick=True, repeats=2, only="wanda")
    (case,) = prune.measure(options, lambda job: found(s := next(numbers), peak=10 * s))
    assert case.name == "wanda 50%, SmolLM2-135M, 8x256 tokens"
    assert case.seconds == {"usual": [1, 3], "trisparse": [2, 4]}
    assert case.metrics["usual"] == {"perplexity": 21, "peak_bytes": 30, "sparsity": 0.5}
    assert (case.baseline, case.parameters["sparsity"], case.parameters["samples"]) == ("usual", 0.5, 8)


def test_what_failed_is_raised_after_all_others():
    def run(job):
        if job.method == "magnitude":
            raise RuntimeError("no memory")
        return found(1)

    measured = prune.measure(Options(quick=True), run)
    cases = [next(measured).parameters["method"] for _ in range(3)]
    assert cases == ["wanda", "sparsegpt", "pruner-zero"]
    with pytest.raises(
        RuntimeError, match=r"magnitude 50% layer, SmolLM2-135M, 8x256 tokens: usual: no memory; .*trisparse"
    ):
        next(measured)


@pytest.mark.parametrize("how", ["usual", "block"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "pruner-zero"])
def test_a_process_finds_all_of_it(method, how, monkeypatch):
    monkeypatch.setenv("TRISPARSE_CACHE", "")  # so that it is set back
    monkeypatch.setattr(prune_process, "_load", lambda job: (llama(), None))
    monkeypatch.setattr(prune_process, "token_windows", lambda *_, samples, seq_len, **__: TOKENS[:samples, :seq_len])
    monkeypatch.setattr(prune_process, "keep_freed_memory", lambda: None)  # it would stay for the other tests
    pattern = "50% layer" if method == "magnitude" else "2:4"
    result = prune_process.found_by(prune.Job(method, pattern, how, "tiny", "cpu", "float32", 4, 16, 2))
    assert abs(result["sparsity"] - 0.5) < 0.01
    assert result["seconds"] > 0
    assert result["perplexity"] > 1
    assert result["peak_bytes"] > result["model_bytes"] > 0


def test_a_process_that_fails_says_why():
    job = prune.Job("wanda", "50%", "block", "/nowhere/at/all", "cpu", "float32", 4, 16, 2)
    with pytest.raises(RuntimeError, match=r"ended with code 1: .*nowhere"):
        prune.in_a_process(job)
