"""Tiny models with random weights, one for each architecture that must work."""

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
)

VOCABULARY = 96
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_NEOX = {name: value for name, value in _SHAPE.items() if name != "num_key_value_heads"}
_OPT = {name: value for name, value in _NEOX.items() if name != "intermediate_size"}

LANGUAGE_MODELS = {
    "opt": lambda: OPTForCausalLM(OPTConfig(**_OPT, ffn_dim=48, word_embed_proj_dim=32)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SHAPE)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**_SHAPE, tie_word_embeddings=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_SHAPE, sliding_window=8)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**_SHAPE, num_local_experts=4, num_experts_per_tok=2)),
    "gpt-oss": lambda: GptOssForCausalLM(
        GptOssConfig(**_SHAPE, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=8)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
        )
    ),
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_NEOX)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SHAPE, head_dim=8)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **_SHAPE,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    ),
}


def make_model(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if name == "resnet":
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 1], layer_type="basic")
        return ResNetForImageClassification(config).eval()
    return LANGUAGE_MODELS[name]().eval()


@pytest.fixture(params=list(LANGUAGE_MODELS))
def language_model(request: pytest.FixtureRequest) -> torch.nn.Module:
    """Each language model in turn."""
    return make_model(request.param)


@pytest.fixture
def model_named():
    """Function that makes a model by name."""
    return make_model


@pytest.fixture
def tokens() -> torch.Tensor:
    """Eight sequences of 16 token ids."""
    return torch.randint(0, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(1))
