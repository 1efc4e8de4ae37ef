"""The fitness: the same number as sparsify and perplexity give, on a model that is untouched afterwards."""

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from trisparse.sparsity.batches import calibration_batches
from trisparse.sparsity.metric import parse
from trisparse.sparsity.perplexity import perplexity
from trisparse.sparsity.search.evaluator import Evaluator, compute_dtype, perplexity_of
from trisparse.sparsity.search.measure import (
    Statistics,
    data_hash,
    load_statistics,
    measure,
    model_hash,
    save_statistics,
)
from trisparse.sparsity.search.race import Reference
from trisparse.sparsity.sparsify import sparsify
from trisparse.sparsity.targets import find_targets

CALIBRATION = torch.randint(0, 96, (4, 64), generator=torch.Generator().manual_seed(1))
WINDOWS = torch.randint(0, 96, (3, 128), generator=torch.Generator().manual_seed(2))


def evaluator_of(model, **options):
    targets = find_targets(model)
    batches = calibration_batches(model, CALIBRATION, samples=4, seq_len=64)
    statistics = measure(model, targets, batches, gradients=True, progress=False)
    return Evaluator(model, targets.found, statistics, WINDOWS, **{"sparsity": 0.5, "dtype": torch.float32, **options})


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor), name


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2)
    ).eval()


def mixtral():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(
        vocab_size=96, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.2, **shape
    )
    return MixtralForCausalLM(config).eval()


@pytest.mark.parametrize("make", [None, gpt2, mixtral], ids=["llama", "gpt2-transposed", "mixtral-experts"])
@pytest.mark.parametrize("expression", ["abs(W) * X", "abs(W)", "sqr(W) * X + mms(W) * norm2(X)"])
def test_fitness_is_the_perplexity_that_sparsify_leaves(model, make, expression):
    model = model if make is None else make()
    before = snapshot(model)
    with evaluator_of(model) as evaluator:
        outcome = evaluator.evaluate(parse(expression))
    assert_unchanged(model, before)
    sparsify(model, "50%", expression, CALIBRATION, samples=4, seq_len=64, propagate="dense", progress=False)
    assert perplexity_of(outcome.segments, WINDOWS) == pytest.approx(perplexity(model, WINDOWS, seq_len=128), rel=1e-6)
    assert outcome.tokens == 3 * 128
    assert len(outcome.segments) == 3 * 2


def test_one_evaluation_leaves_nothing_for_the_next(model):
    with evaluator_of(model) as evaluator:
        first = evaluator.evaluate(parse("abs(W)")).segments
        other = evaluator.evaluate(parse("-abs(W)")).segments
        assert evaluator.evaluate(parse("abs(W)")).segments == first
    assert other != first


def test_gradients_reach_the_score(model):
    with evaluator_of(model) as evaluator:
        assert evaluator.evaluate(parse("abs(W) * G")).segments != evaluator.evaluate(parse("abs(W)")).segments


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_model_comes_back_after_an_error(model, error):
    model.model.layers[0].train()
    before = snapshot(model)

    def fail(*_):
        raise error

    model.lm_head.register_forward_hook(fail)
    with pytest.raises(error), evaluator_of(model, dtype=torch.bfloat16) as evaluator:
        evaluator.evaluate(parse("abs(W)"))
    assert_unchanged(model, before)
    assert model.model.layers[0].training
    assert not model.model.layers[1].training


def test_bf16_computes_in_bf16_and_ranks_in_fp32(model):
    dtypes = []
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda m, args: dtypes.append(args[0].dtype))
    evaluator = evaluator_of(model, dtype=torch.bfloat16)
    dtypes.clear()
    weight = model.model.layers[0].self_attn.q_proj.weight
    dense = weight.data.clone()
    with evaluator:
        evaluator.evaluate(parse("abs(W)"))
        kept = weight.data != 0
        assert weight.dtype == torch.bfloat16
    assert set(dtypes) == {torch.bfloat16}
    assert torch.equal(kept.sum(1), torch.full((32,), 16))
    assert float(dense.abs().masked_fill(~kept, math.inf).min(1).values.sub(
        dense.abs().masked_fill(kept, 0).max(1).values).min()) >= 0  # fmt: skip


def test_scores_that_are_not_finite_drop_the_metric(model):
    with evaluator_of(model) as evaluator:
        outcome = evaluator.evaluate(parse("exp(W * 1000000)"))
        assert outcome.dropped == "a score of model.layers.0.self_attn.q_proj.weight is not finite"
        assert (outcome.segments, outcome.tokens) == ((), 0)
        assert evaluator.evaluate(parse("abs(W)")).dropped is None


def test_a_sum_that_overflows_is_no_reason(model):
    with evaluator_of(model) as evaluator:
        assert evaluator.evaluate(parse("abs(W) * 1e38")).dropped is None


def test_likelihood_that_is_nan_drops_the_metric(model):
    with evaluator_of(model) as evaluator:
        model.lm_head.register_forward_hook(lambda module, args, output: output * math.nan)
        outcome = evaluator.evaluate(parse("abs(W)"))
    assert outcome.dropped == "the pruned model gives NaN"
    assert outcome.tokens == 128


def test_a_race_stops_the_evaluation(model):
    with evaluator_of(model) as evaluator:
        full = evaluator.evaluate(parse("abs(W)"))
        outcome = evaluator.evaluate(parse("-abs(W)"), Reference(tuple(value / 4 for value in full.segments)))
    assert outcome.stopped == "total"
    assert outcome.tokens == 128
    assert full.segments[:2] != outcome.segments


def test_threads_are_as_before_and_make_no_difference(model):
    threads = torch.get_num_threads()
    expression = parse("sqr(W) * X + mms(G) * norm2(X)")
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            with evaluator_of(model) as evaluator:
                found.append(evaluator.evaluate(expression).segments)
                evaluator.evaluate(parse("exp(W * 1000000)"))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert found[0] == pytest.approx(found[1], abs=1e-3)


def test_unreached_weights_stay_dense(model):
    targets = find_targets(model)
    reached = {targets.found[0].name: torch.ones(1, 32)}
    with Evaluator(model, targets.found, Statistics(reached, None), WINDOWS, sparsity=0.5, dtype=torch.float32) as one:
        one.evaluate(parse("abs(W)"))
        assert float((targets.found[0].weight == 0).float().mean()) == 0.5
        assert not bool((targets.found[1].weight == 0).any())


def test_pruned_and_broken_models_are_refused(model):
    evaluator = evaluator_of(model)
    with pytest.raises(RuntimeError, match="not open"):
        evaluator.evaluate(parse("abs(W)"))
    sparsify(model, "50%", "magnitude", progress=False)
    with pytest.raises(ValueError, match="pruned already"):
        evaluator_of(model)


def test_weights_that_are_not_finite_are_refused(model):
    targets = find_targets(model)
    with torch.no_grad():
        targets.found[3].weight[0, 0] = math.inf
    with pytest.raises(ValueError, match=r"NaN or Inf weights: model\.layers\.0\.self_attn\.o_proj"):
        Evaluator(model, targets.found, Statistics({}, None), WINDOWS, sparsity=0.5)


def test_statistics_come_back_from_their_file_only_with_their_key(model, tmp_path):
    targets = find_targets(model)
    batches = calibration_batches(model, CALIBRATION, samples=4, seq_len=64)
    statistics = measure(model, targets, batches, gradients=True, progress=False)
    path = tmp_path / "statistics.safetensors"
    assert load_statistics(path, "a") is None
    save_statistics(statistics, path, "a")
    assert load_statistics(path, "b") is None
    loaded = load_statistics(path, "a")
    assert loaded is not None
    for kind in ("x", "g"):
        one, other = getattr(loaded, kind), getattr(statistics, kind)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in other)
    assert measure(model, targets, batches, gradients=False).g is None


def test_hashes_tell_models_and_data_apart(model):
    first = model_hash(model)
    assert model_hash(model) == first
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    assert model_hash(model) != first
    assert data_hash([WINDOWS]) != data_hash([WINDOWS.reshape(6, 64)])
    assert data_hash([WINDOWS]) == data_hash([WINDOWS.clone()])


def test_compute_dtype_of_a_bf16_model_is_its_own(model):
    assert compute_dtype(model.to(torch.float16)) == torch.float16
