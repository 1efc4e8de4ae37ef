"""The benchmark tokens on a tiny model: what it times is what it says, and a wrong contestant is left out."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from trisparse.bench.families import tokens
from trisparse.bench.families.decoding import Decoder, Gate, wide_logits
from trisparse.bench.families.models import model_bytes, pruned
from trisparse.bench.families.tokens import Sizes
from trisparse.bench.registry import Options, benchmarks
from trisparse.bench.training_steps import step_of
from trisparse.sparsity.backends import BACKENDS
from trisparse.sparsity.compression import compress

SIZES = Sizes(("2:4",), ("2:4",), ((1, 8),), ((2, 4, 6),), ((1, 8),), 2)


@pytest.fixture
def model(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama / "dense", dtype=torch.float32).eval()


@pytest.fixture
def quick(monkeypatch, tiny_llama):
    """``quick(only=...)``: the rows on the tiny model."""
    monkeypatch.setattr(tokens, "QUICK", SIZES)

    def run(**options):
        return list(benchmarks()["tokens"].run(Options(quick=True, model=str(tiny_llama / "dense"), **options)))

    return run


@pytest.fixture
def until_it_raises(monkeypatch, tiny_llama):
    """``until_it_raises(only=...)``: the rows on the tiny model, and what it raised behind them."""
    monkeypatch.setattr(tokens, "QUICK", SIZES)

    def run(**options):
        rows = []
        with pytest.raises(RuntimeError) as raised:
            rows.extend(benchmarks()["tokens"].run(Options(quick=True, model=str(tiny_llama / "dense"), **options)))
        return rows, str(raised.value)

    return run


def wrong(monkeypatch, factor=1.001):
    run = BACKENDS["compressed"].run
    broken = replace(BACKENDS["compressed"], run=lambda layer, x, lora: run(layer, x, lora) * factor)
    monkeypatch.setitem(BACKENDS, "compressed", broken)


def prompt(batch=2, length=4):
    return torch.randint(0, 16, (batch, length), generator=torch.Generator().manual_seed(3))


def test_rows_of_every_phase(quick, model):
    rows = quick()
    assert [row.name for row in rows] == ["prefill 1x8, 2:4", "decode 2x6, 2:4", "training 1x8, 2:4"]
    for row in rows:
        training = row.parameters["phase"] == "training"
        assert row.baseline == ("full" if training else "dense")
        forms = list(tokens.TRAINING) if training else ["dense", "masked dense", "compressed"]
        assert list(row.seconds) == list(row.metrics) == forms
        assert row.kind == "measurement"
        assert row.parameters["interleaved"] is True
        assert row.parameters["model"] == "dense"
        for name, seconds in row.seconds.items():
            assert len(seconds) == 2
            found = row.metrics[name]
            assert found["tokens_per_s"] == pytest.approx(row.parameters["tokens"] / (sum(seconds) / 2))
            assert found["peak_bytes"] > found["model_bytes"]
        if row.parameters["phase"] == "decode":
            assert row.parameters["tokens"] == 12
            assert [found.get("same_tokens") for found in row.metrics.values()] == [None, 1.0, 1.0]
    prefill, _, training = rows
    assert prefill.metrics["dense"]["model_bytes"] == 4 * sum(param.numel() for param in model.parameters()) + 2 * 16
    assert prefill.metrics["compressed"]["model_bytes"] < prefill.metrics["dense"]["model_bytes"]
    assert training.metrics["full"]["peak_bytes"] > training.metrics["norms only"]["peak_bytes"]


def test_only(quick):
    assert [row.name for row in quick(only="decode 2x6, 2:4")] == ["decode 2x6, 2:4"]
    assert not quick(only="no such row")


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_wrong_backend_is_left_out_and_the_others_go_on(until_it_raises, monkeypatch, phase):
    wrong(monkeypatch)
    (row,), problem = until_it_raises(only=phase)
    assert list(row.seconds) == list(row.metrics) == ["dense", "masked dense"]
    assert f"{phase} " in problem
    assert "compressed is wrong and is not timed: its logits" in problem


def test_all_phases_run_and_what_went_wrong_is_raised_at_the_end(until_it_raises, monkeypatch):
    wrong(monkeypatch)
    rows, problem = until_it_raises()
    assert [row.parameters["phase"] for row in rows] == ["prefill", "decode", "training"]
    assert list(rows[2].seconds) == list(tokens.TRAINING)  # which takes another product
    assert [part in problem for part in ("prefill 1x8", "decode 2x6", "training 1x8")] == [True, True, False]


def test_a_phase_that_cannot_be_timed_does_not_stop_the_next(until_it_raises, monkeypatch):
    def broken(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(tokens.Family, "prefill", broken)
    rows, problem = until_it_raises()
    assert [row.parameters["phase"] for row in rows] == ["decode", "training"]
    assert problem == "prefill 1x8, 2:4: no such kernel"


def test_a_wrong_adapter_is_left_out_of_training(until_it_raises, monkeypatch):
    import trisparse.retrain.sparse_lora as layer

    product = layer.masked_product
    monkeypatch.setattr(layer, "masked_product", lambda *args, **how: product(*args, **how) * 1.001)
    (row,), problem = until_it_raises(only="training")
    assert "PERP, compressed is wrong and is not timed" in problem
    assert list(row.seconds) == ["full", "PERP", "norms only"]


def test_decoding_is_what_generate_gives(model):
    ids = prompt()
    fed, logits = Decoder(model, ids, 6).transcript()
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        generated = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=7)
    assert torch.equal(generated, torch.cat([fed, logits[:, -1].argmax(-1, keepdim=True)], 1))


def test_each_call_starts_behind_the_prompt_again(model):
    decoder = Decoder(model, prompt(), 6)
    first = decoder().clone()
    decoder(2)
    assert torch.equal(decoder(), first)
    assert int(decoder.cache.layers[0].cumulative_length) == 10


def test_a_cache_that_is_not_set_back_is_caught(model, monkeypatch):
    masked = pruned(model, "50%")
    decoder = Decoder(masked, prompt(), 6)
    decoder(2)
    monkeypatch.setattr(decoder, "_start", lambda: None)
    decoder.new_tokens = 4
    with pytest.raises(RuntimeError, match="masked dense is wrong"):
        Gate(masked).decoding("masked dense", decoder)


def test_a_sliding_cache_is_refused(model):
    model.config.layer_types = ["sliding_attention", "sliding_attention"]
    model.config.sliding_window = 4
    with pytest.raises(ValueError, match="LlamaForCausalLM has layers whose cache slides"):
        Decoder(model, prompt(), 6)


def test_wide_logits_are_those_of_the_wide_model_and_leave_it_as_it_was(model):
    before = {name: param.clone() for name, param in model.named_parameters()}
    own = wide_logits(model, prompt(), torch.float64)
    assert own.dtype == torch.float64
    assert all(param.dtype == torch.float32 and torch.equal(param, before[n]) for n, param in model.named_parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        wide = copy.deepcopy(model).double()(prompt(), use_cache=False).logits
        narrow = model(prompt(), use_cache=False).logits
    assert float((own - wide).abs().max()) < 1e-9
    assert float((narrow - wide).abs().max()) > 1e-9


def test_another_model_does_not_pass_the_gate(model):
    masked = pruned(model, "50%")
    with pytest.raises(RuntimeError, match="other is wrong"), torch.no_grad():
        Gate(masked).logits("other", prompt(), pruned(model, "2:4")(prompt()).logits)


def test_bytes_of_a_model_count_every_copy_once(model):
    own = pruned(model, "2:4")
    dense = model_bytes(own)
    assert dense == model_bytes(model)
    weights = sum(module.weight.nbytes for name, module in own.named_modules() if name.endswith("_proj"))
    report = compress(own)
    assert report.dense_bytes == weights
    assert model_bytes(own) == dense - weights + report.bytes


def test_a_model_on_a_gpu_is_of_llama_2_7b_s_shape():
    from trisparse.bench.families.models import llama_2_7b

    made = llama_2_7b(torch.bfloat16, torch.device("meta"))
    assert sum(param.numel() for param in made.parameters()) == 6_738_415_616


def test_one_after_the_other_where_there_is_no_room_for_all(quick, monkeypatch):
    monkeypatch.setattr(tokens.Family, "_room_for_training", lambda self: False)
    (row,) = quick(only="training")
    assert row.parameters["interleaved"] is False
    assert list(row.seconds) == list(row.metrics) == list(tokens.TRAINING)


def test_what_has_no_room_in_prefill_is_left_out(quick, monkeypatch, capsys):
    def logits(self, name, ids, found):
        if name == "compressed":
            raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Gate, "logits", logits)
    (row,) = quick(only="prefill")
    assert list(row.seconds) == list(row.metrics) == ["dense", "masked dense"]
    assert "prefill 1x8, 2:4: compressed is left out" in capsys.readouterr().err


def test_what_has_no_room_is_left_out_and_said(quick, monkeypatch, capsys):
    def decoder(model, ids, new):
        if any(type(module).__name__ == "SparseLinear" for module in model.modules()):
            raise torch.OutOfMemoryError("no room")
        return Decoder(model, ids, new)

    def step(kind, model, **how):
        if kind == "full":
            raise torch.OutOfMemoryError("no room")
        return step_of(kind, model, **how)

    monkeypatch.setattr(tokens, "Decoder", decoder)
    monkeypatch.setattr(tokens, "step_of", step)
    _, decode, training = quick()
    assert list(decode.seconds) == list(decode.metrics) == ["dense", "masked dense"]
    assert list(training.seconds) == list(training.metrics) == ["PERP", "norms only", "PERP, compressed"]
    said = capsys.readouterr().err
    assert "decode 2x6, 2:4: compressed is left out, the device has no memory for it" in said
    assert "training 1x8, 2:4: full is left out" in said
