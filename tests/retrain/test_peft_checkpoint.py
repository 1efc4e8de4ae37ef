"""Adapters on checkpoints, by PEFT's own functions: after ``import trisparse`` they know variants and compressed layers."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from trisparse.retrain.perp import retrain
from trisparse.retrain.sparse_lora import PlainSparseLora, SparseLoraLinear
from trisparse.retrain.sparse_lora_config import SparseLoraConfig
from trisparse.sparsity.checkpoint import load, save
from trisparse.sparsity.mask import check_masks, masks_sha256

LOADERS = {
    "dense": lambda folder: load(folder),
    "compressed": lambda folder: load(folder, form="compressed"),
    "from_pretrained": lambda folder: AutoModelForCausalLM.from_pretrained(folder).eval(),
}


@pytest.fixture(scope="module")
def reload_adapters() -> Any:
    def reload(model: Any, folder: Path) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Unexpected keyword arguments")  # a variant that is dropped
            return PeftModel.from_pretrained(model, str(folder)).eval()

    return reload


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(tokens).logits
    return found


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(("name", "variant"), [("llama-tied", "mask_lora"), ("llama", "lora"), ("gpt2", "scale_lora")])
def test_retrained_adapters_come_back_and_merge(
    build: Any, tokens: Any, quick: Any, tmp_path: Path, reload_adapters: Any, name: str, variant: str, loader: str
) -> None:
    save(build(name), tmp_path / "base")
    report = retrain(LOADERS[loader](tmp_path / "base"), tokens, quick(merge=False, variant=variant), progress=False)
    trained = report.peft_model.eval()
    wanted = logits(trained, tokens)
    trained.save_pretrained(tmp_path / "adapters", save_embedding_layers=False)
    base = LOADERS[loader](tmp_path / "base")
    digest, before = masks_sha256(base), logits(base, tokens)
    assert not torch.equal(before, wanted), "the training must matter"
    back = reload_adapters(base, tmp_path / "adapters")
    assert torch.equal(logits(back, tokens), wanted)
    compressed = any(isinstance(module, SparseLoraLinear) for module in back.modules())
    assert compressed == (loader != "dense")
    if variant == "lora":
        with pytest.raises(ValueError, match="stay separate"):
            back.merge_and_unload()
        return
    if name == "llama-tied":
        with pytest.warns(UserWarning, match="lm_head shared the weight of the embedding"):
            merged = back.merge_and_unload()
    else:
        merged = back.merge_and_unload()
    check_masks(merged)
    assert masks_sha256(merged) == digest
    torch.testing.assert_close(logits(merged, tokens), wanted, rtol=1e-4, atol=1e-5)
    save(merged, tmp_path / "merged")
    again = load(tmp_path / "merged", form="dense" if loader == "dense" else "compressed")
    assert torch.equal(logits(again, tokens), logits(merged, tokens))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_stock_peft_trains_on_a_compressed_model(
    build: Any, tokens: Any, tmp_path: Path, reload_adapters: Any, name: str
) -> None:
    save(build(name), tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["c_attn", "c_proj"] if name == "gpt2" else ["q_proj", "down_proj"])
    model = get_peft_model(LOADERS["compressed"](tmp_path / "base"), config)
    assert sum(isinstance(module, PlainSparseLora) for module in model.modules()) > 0
    before = logits(model.eval(), tokens)
    optimizer = torch.optim.Adam([param for param in model.parameters() if param.requires_grad], lr=1e-2)
    for _ in range(3):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    wanted = logits(model, tokens)
    assert not torch.equal(before, wanted)
    model.save_pretrained(tmp_path / "adapters")
    assert type(PeftConfig.from_pretrained(str(tmp_path / "adapters"))) is LoraConfig
    back = reload_adapters(LOADERS["compressed"](tmp_path / "base"), tmp_path / "adapters")
    assert torch.equal(logits(back, tokens), wanted)
    with pytest.raises(ValueError, match="stay separate"):
        back.merge_and_unload()
    onto_dense = reload_adapters(LOADERS["dense"](tmp_path / "base"), tmp_path / "adapters")
    torch.testing.assert_close(logits(onto_dense, tokens), wanted, rtol=1e-4, atol=1e-5)


def test_a_second_adapter_is_of_its_own_variant(build: Any, tokens: Any, quick: Any, tmp_path: Path) -> None:
    save(build("llama"), tmp_path / "base")
    report = retrain(load(tmp_path / "base"), tokens, quick(merge=False, variant="lora_prune"), progress=False)
    report.peft_model.save_pretrained(tmp_path / "adapters", save_embedding_layers=False)
    config = PeftConfig.from_pretrained(str(tmp_path / "adapters"))
    assert isinstance(config, SparseLoraConfig)
    assert config.variant == "lora_prune"
    model = PeftModel.from_pretrained(LOADERS["compressed"](tmp_path / "base"), str(tmp_path / "adapters"))
    model.load_adapter(str(tmp_path / "adapters"), "again")
    found = {tuple(module.variant.values()) for module in model.modules() if isinstance(module, SparseLoraLinear)}
    assert found == {("lora_prune", "lora_prune")}


@pytest.mark.parametrize("order", ["import trisparse, peft", "import peft, trisparse"])
def test_registered_whichever_is_imported_first(order: str) -> None:
    code = (
        f"import sys; {order}; import trisparse; from peft import PeftConfig; "
        "assert not [name for name in sys.modules if name.startswith('trisparse.retrain.sparse_lora')]; "
        "config = PeftConfig.from_peft_type(peft_type='LORA', variant='mask_lora', task_type='CAUSAL_LM'); "
        "assert type(config).__name__ == 'SparseLoraConfig', config; "
        "import peft.tuners.lora.model as model; "
        "assert model.dispatch_default.of_trisparse; "
        "trisparse.retrain.peft_registration._register(); "
        "assert not hasattr(model.dispatch_default.__wrapped__, 'of_trisparse')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_trisparse_imports_neither_peft_nor_torch() -> None:
    code = "import sys, trisparse; assert not {'peft', 'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
