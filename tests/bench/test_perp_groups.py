"""The ablation of Table 13 on a tiny model, and its command line."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from torch import nn

from trisparse.bench import perp_groups
from trisparse.bench.perp_groups import COMBINATIONS, as_line, heading, measure
from trisparse.retrain.perp import PERPConfig
from trisparse.sparsity.sparsify import sparsify

SMALL = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIG = PERPConfig(rank=4, alpha=8, steps=4, seq_len=16, gradient_accumulation=1, learning_rate=2e-2, dtype="fp32")


def model_of(kind):
    torch.manual_seed(0)
    if kind == "opt":
        config = transformers.OPTConfig(**SMALL, ffn_dim=24, max_position_embeddings=32, word_embed_proj_dim=16)
    else:
        config = transformers.LlamaConfig(**SMALL, intermediate_size=24, max_position_embeddings=32)
    model = transformers.AutoModelForCausalLM.from_config(config)
    # the usual start makes logits of almost 0, whose loss hardly changes
    for param in model.parameters():
        if param.ndim > 1:
            nn.init.normal_(param, std=0.3)
    return model


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 48, (8, 16), generator=torch.Generator().manual_seed(1))


def test_sixteen_combinations_in_the_order_of_the_paper():
    assert len(COMBINATIONS) == len(set(COMBINATIONS)) == 16
    assert COMBINATIONS[:6] == ((), ("biases",), ("norms",), ("head",), ("lora",), ("biases", "norms"))
    assert COMBINATIONS[-1] == ("biases", "norms", "head", "lora")


def test_every_row_retrains_a_fresh_copy(tokens):
    model = model_of("opt")
    sparsify(model, "50%", "magnitude", progress=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = list(measure(model, tokens, tokens, CONFIG))
    assert [tuple(row["groups"]) for row in rows] == list(COMBINATIONS)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(row["missing"] for row in rows)
    assert rows[0]["trainable_share"] == 0
    shares = {tuple(row["groups"]): row["trainable_share"] for row in rows}
    for groups, share in shares.items():
        assert share == pytest.approx(sum(shares[(group,)] for group in groups)), groups
    assert all(row["perplexity"] < rows[0]["perplexity"] for row in rows[1:])
    assert len({row["perplexity"] for row in rows}) == 16


def test_a_group_that_the_model_lacks_is_marked(tokens):
    model = model_of("llama")
    sparsify(model, "50%", "magnitude", progress=False)
    rows = {tuple(row["groups"]): row for row in measure(model, tokens, tokens, CONFIG)}
    assert rows[("biases",)] == {**rows[()], "groups": ["biases"], "missing": ["biases"]}
    assert rows[("biases", "norms")]["perplexity"] == rows[("norms",)]["perplexity"]
    assert as_line(rows[("biases", "norms")]).split()[:2] == ["-", "yes"]
    assert len(as_line(rows[()])) == len(heading())


def test_the_command(tmp_path, capsys, monkeypatch):
    model = model_of("llama")
    model.save_pretrained(tmp_path)
    vocabulary = {"<unk>": 0, **{f"w{i}": i for i in range(1, 48)}}
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>").save_pretrained(tmp_path)
    text = " ".join(f"w{1 + i * i % 47}" for i in range(600))
    monkeypatch.setattr(perp_groups, "pydoc_text", lambda split: [text])
    arguments = ["--model", str(tmp_path), "--steps", "1", "--seq-len", "16", "--test", "2", "--rank", "2"]
    perp_groups.main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 16
    assert lines[0] == "magnitude 50%, 1 steps of 2 x 16 tokens"
    perp_groups.main([*arguments, "--targets", "q_proj,v_proj", "--json"])
    result = json.loads(capsys.readouterr().out)
    # two blocks, A [2, 16] and B [2, 16] on each of q_proj and v_proj
    assert {row["trainable"]["lora"] for row in result["rows"] if "lora" in row["groups"]} == {2 * 2 * 2 * (16 + 16)}
    assert result["settings"]["targets"] == "q_proj,v_proj"
    assert len(result["rows"]) == 16
    assert result["settings"]["steps"] == 1
    assert str(tmp_path) not in json.dumps(result)
