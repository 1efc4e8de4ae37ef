"""Tiny random models with 2:4 masks on every linear of their blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from trisparse.retrain.perp import PERPConfig, RetrainReport, retrain
from trisparse.retrain.sparse_lora_config import SparseLoraConfig, sparse_lora_modules
from trisparse.sparsity.linear import SparseLinear
from trisparse.sparsity.mask import Mask, attach, masks_sha256
from trisparse.sparsity.pattern import NM, Pattern

VOCABULARY = 48


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def prune_24(module: nn.Module) -> None:
    """Magnitude 2:4 on one linear or Conv1D."""
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    transposed = isinstance(module, Conv1D)
    matrix = (weight.t() if transposed else weight).detach().abs()
    groups = matrix.reshape(-1, 4)
    keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.topk(2, dim=1).indices, True)
    attach(module, "weight", Mask.from_matrix(keep.view_as(matrix), weight.shape, NM(2, 4), transposed=transposed))


_SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_LLAMA = {**_SMALL, "intermediate_size": 24, "num_key_value_heads": 1, "max_position_embeddings": 32}


def _build(kind: str) -> transformers.PreTrainedModel:
    """A tiny random model, pruned, in training mode."""
    configs: dict[str, Callable[[], transformers.PretrainedConfig]] = {
        "llama": lambda: transformers.LlamaConfig(**_LLAMA, tie_word_embeddings=False),
        "llama-tied": lambda: transformers.LlamaConfig(**_LLAMA, tie_word_embeddings=True),
        "opt": lambda: transformers.OPTConfig(
            **_SMALL, ffn_dim=24, max_position_embeddings=32, word_embed_proj_dim=16, dropout=0.0
        ),
        "opt-dropout": lambda: transformers.OPTConfig(
            **_SMALL, ffn_dim=24, max_position_embeddings=32, word_embed_proj_dim=16, dropout=0.1
        ),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        ),
        "qwen3": lambda: transformers.Qwen3Config(**_LLAMA, head_dim=8),
        "gemma3": lambda: transformers.Gemma3TextConfig(**_LLAMA, head_dim=8, sliding_window=8),
        "mixtral": lambda: transformers.MixtralConfig(**_LLAMA, num_local_experts=2),
    }  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(configs[kind]())
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            prune_24(module)
    return model.train()


@pytest.fixture
def tokens() -> torch.Tensor:
    """[8, 16] fixed token ids."""
    return torch.randint(0, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def build() -> Callable[[str], transformers.PreTrainedModel]:
    """``build(kind)``: a tiny random model, pruned, in training mode."""
    return _build


@pytest.fixture(scope="session")
def build_model() -> Callable[[str], transformers.PreTrainedModel]:
    """``build``, for fixtures that outlive a test."""
    return _build


@pytest.fixture(scope="session")
def digits() -> tuple[Any, Any]:
    """((1400 images, labels), (397 images, labels))."""
    from trisparse.bench.studies import (
        digits as bench,
    )  # not at the top: processes that the tests start import this file, too

    return bench.digits()


@pytest.fixture(scope="session")
def trained_resnet(digits: tuple[Any, Any]) -> nn.Module:
    """A small ResNet trained on ``digits``, in eval mode; to be copied, not changed."""
    from trisparse.bench.studies import digits as bench

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = bench.trained_resnet(digits[0], seed=0).eval()
    torch.set_num_threads(threads)
    return model


QUICK = PERPConfig(
    rank=4, alpha=8, learning_rate=1e-2, steps=3, batch_size=2, gradient_accumulation=1, seq_len=16, dtype="fp32"
)


def _quick(**changes: Any) -> PERPConfig:
    return PERPConfig(**{**vars(QUICK), **changes})


def _run(model: Any, data: Any, **changes: Any) -> RetrainReport:
    return retrain(model, data, _quick(**changes), progress=False)


def _snapshot(model: Any) -> dict[str, Any]:
    """All that a failed run must leave as it was."""
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "parameters": [(name, id(param)) for name, param in model.named_parameters()],
        "requires_grad": [param.requires_grad for param in model.parameters()],
        "dtypes": [param.dtype for param in model.parameters()],
        "training": [module.training for module in model.modules()],
        "config": model.config.to_dict(),
        "ties": dict(model.all_tied_weights_keys),
        "masks": masks_sha256(model),
        "peft": hasattr(model, "peft_config"),
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "forward": "forward" in vars(model),
        "checkpointing": model.is_activation_checkpointing,
    }


def _assert_same(model: Any, before: dict[str, Any]) -> None:
    after = _snapshot(model)
    state, state_before = after.pop("state"), before["state"]
    assert all(torch.equal(state[name], state_before[name]) for name in state_before | state)
    assert after == {key: value for key, value in before.items() if key != "state"}


@pytest.fixture
def quick() -> Callable[..., PERPConfig]:
    """``quick(**changes)``: a config for three steps on ``tokens``."""
    return _quick


@pytest.fixture
def run() -> Callable[..., RetrainReport]:
    """``run(model, data, **changes)``: retrain with the quick config."""
    return _run


@pytest.fixture
def snapshot() -> Callable[[Any], dict[str, Any]]:
    """``snapshot(model)``: all that a failed run must leave as it was."""
    return _snapshot


@pytest.fixture
def assert_same() -> Callable[[Any, dict[str, Any]], None]:
    """``assert_same(model, snapshot)``: nothing has changed since."""
    return _assert_same


class SparseLora:
    """Compressed layers under adapters with random factors, and the plain formulas of what they compute."""

    rank = 4
    scale = 2.0

    def dense(
        self, pattern: Pattern, kind: type = nn.Linear, rows: int = 24, cols: int = 32, dtype: Any = torch.float64
    ) -> nn.Module:
        """A linear with a random mask of ``pattern``."""
        score = torch.rand(rows, cols, generator=torch.Generator().manual_seed(0))
        if isinstance(pattern, NM):
            groups = score.view(rows, -1, pattern.m)
            keep = torch.zeros_like(groups, dtype=torch.bool)
            keep = keep.scatter_(-1, groups.topk(pattern.n, dim=-1).indices, True).view(rows, cols)
        else:
            keep = score > 0.5
        torch.manual_seed(0)
        layer = Conv1D(rows, cols) if kind is Conv1D else nn.Linear(cols, rows)
        nn.init.normal_(layer.bias)
        layer = layer.to(dtype)  # the same numbers in every dtype
        attach(layer, "weight", Mask.from_matrix(keep, layer.weight.shape, pattern, transposed=kind is Conv1D))
        return layer

    def sparse(self, pattern: Pattern = NM(2, 4), **options: Any) -> SparseLinear:  # noqa: B008
        """The same, compressed."""
        return SparseLinear.from_dense(self.dense(pattern, **options))

    def config(
        self, variant: Any, rank: int = rank, targets: tuple[str, ...] = ("0",), start: Any = False, **options: Any
    ) -> SparseLoraConfig:
        """The factors are random unless ``start`` says otherwise."""
        options = {"lora_alpha": self.scale * rank, "init_lora_weights": start, **options}
        return sparse_lora_modules(LoraConfig(r=rank, target_modules=list(targets), **options), variant)

    def wrapped(
        self, variant: Any, pattern: Pattern = NM(2, 4), rank: int = rank, start: Any = False,  # noqa: B008
        options: Any = None, **layer: Any,
    ) -> tuple[SparseLinear, PeftModel, Any]:  # fmt: skip
        """(the compressed layer, the model, the adapter's layer)."""
        base = self.sparse(pattern, **layer)
        peft = get_peft_model(nn.Sequential(base), self.config(variant, rank, start=start, **(options or {})))
        return base, peft, peft.base_model.model[0]

    def factors(self, wrapper: Any, name: str = "default") -> tuple[Tensor, Tensor]:
        """A and B."""
        return wrapper.lora_A[name].weight, wrapper.lora_B[name].weight

    def formula(
        self, variant: str, x: Tensor, weight: Tensor, keep: Tensor, bias: Tensor, a: Tensor, b: Tensor,
        scale: float = scale,
    ) -> Tensor:  # fmt: skip
        """What a variant computes, on dense tensors."""
        if variant in ("lora", "lora_prune"):
            return F.linear(x, weight, bias) + scale * F.linear(F.linear(x, a), b)
        effective = weight + keep * (scale * (b @ a)) if variant == "mask_lora" else weight * (b @ a)
        return F.linear(x, effective, bias)


@pytest.fixture
def lora() -> SparseLora:
    """Compressed layers under adapters, and their formulas."""
    return SparseLora()
