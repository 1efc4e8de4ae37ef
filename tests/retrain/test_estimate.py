"""The plan of a retraining: counts that match the run, and memory against what a run allocates."""

from __future__ import annotations

import copy
import json
import weakref

import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trisparse.retrain.estimate import retraining_plan
from trisparse.retrain.perp import PERPConfig, retrain
from trisparse.sparsity.mask import attach, masks


class Allocated(TorchDispatchMode):
    """Bytes of the storages that appear and live inside, at their peak; views of the model's own are not new."""

    def __init__(self, model):
        super().__init__()
        self.now = self.peak = 0
        self.alive = {}
        self.own = {param.untyped_storage()._cdata for param in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive and storage._cdata not in self.own:
                    self.alive[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.free, storage._cdata)
        return out

    def free(self, key):
        self.now -= self.alive.pop(key, 0)


@pytest.fixture
def llama(build):
    """Small, and large enough that tensors outweigh everything else; pruned 2:4."""
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **shape, num_key_value_heads=2, vocab_size=1024, max_position_embeddings=128, tie_word_embeddings=False
        )
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            keep = torch.arange(module.in_features).expand(module.out_features, -1) % 4 < 2
            mask = next(iter(masks(build("llama")).values()))
            attach(module, "weight", type(mask).from_matrix(keep, module.weight.shape, mask.pattern))
    return model


@pytest.mark.parametrize(
    ("groups", "checkpointing", "attention"),
    [
        (("norms",), False, "sdpa"),
        (("norms",), True, "sdpa"),
        (("norms",), False, "eager"),
        (("norms", "head", "lora"), False, "sdpa"),
        (("norms", "head", "lora"), True, "sdpa"),
        (("full",), False, "sdpa"),
    ],
)
def test_memory_is_within_a_tenth_of_what_a_run_allocates(
    llama, snapshot, assert_same, groups, checkpointing, attention
):
    llama.set_attn_implementation(attention)
    config = PERPConfig(
        groups=groups, rank=8, steps=2, batch_size=4, gradient_accumulation=2, seq_len=128, dtype="fp32",
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    before = snapshot(llama)
    plan = retraining_plan(llama, config)
    assert_same(llama, before)
    with Allocated(llama) as allocated:
        report = retrain(llama, torch.randint(0, 1024, (16, 128)), config, progress=False)
    trained = 4 * sum(report.trainable.values())
    memory = plan.memory
    assert (memory.gradients, memory.optimizer) == (trained, 2 * trained)
    own = 4 * sum(param.numel() for param in llama.parameters())
    added = 0 if groups == ("full",) else trained  # the adapters and the norms' copies
    assert own + added <= memory.weights <= 1.05 * own + added
    assert memory.total - memory.weights == pytest.approx(allocated.peak, rel=0.1)
    assert memory.total == memory.weights + memory.gradients + memory.optimizer + memory.activations


def test_checkpointing_and_fewer_groups_take_less(llama):
    def activations(**changes):
        config = PERPConfig(**{"batch_size": 2, "seq_len": 128, "dtype": "fp32", **changes})
        return retraining_plan(llama, config).memory.activations

    assert activations(gradient_checkpointing=True) < 0.8 * activations()
    assert activations(groups=("norms",)) < activations()
    assert activations(batch_size=4) == pytest.approx(2 * activations(), rel=0.05)
    assert not llama.is_activation_checkpointing


def test_counts_are_those_of_the_run(build, tokens, quick):
    model = build("llama-tied")
    config = quick(learning_rate="grid", learning_rates=(1e-3, 1e-2), grid_steps=2, gradient_accumulation=2)
    plan = retraining_plan(model, config, validation=tokens)
    report = retrain(model, tokens, config, validation=tokens, progress=False)
    for name in (
        "trainable",
        "total_parameters",
        "missing",
        "not_covered",
        "steps",
        "batch",
        "tokens",
        "trainable_share",
    ):
        assert getattr(plan, name) == getattr(report, name), name
    assert plan.grid_steps == 4
    values = json.loads(json.dumps(plan.to_dict()))
    assert values["tokens"] == report.tokens
    assert values["memory"]["total"] == plan.memory.total
    assert "norms" in str(plan)
    assert f"3 ({report.tokens:,} tokens)" in str(plan)
    assert "steps of the grid" in str(plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plan_of_full_retraining_writes_nothing(build, quick, tmp_path, monkeypatch, snapshot, assert_same, dtype):
    def written(*args, **kwargs):
        raise OSError("a plan wrote a file")

    monkeypatch.setattr("trisparse.retrain.full.tempfile.TemporaryFile", written)
    model = build("llama").to(dtype)
    before = snapshot(model)
    config = quick(groups="full", dtype="auto", output_dir=tmp_path / "run")
    plan = retraining_plan(model, config)
    assert plan.trainable == {"full": plan.total_parameters}
    assert_same(model, before)
    assert not (tmp_path / "run").exists()
    with pytest.raises(OSError, match="wrote a file"):  # as a run does, so that a failure can put the weights back
        retrain(model, torch.zeros(8, 16, dtype=torch.long), config, progress=False)


def test_a_teacher_counts(build, quick):
    model, teacher = build("llama"), build("qwen3")
    alone, beside = retraining_plan(model, quick()), retraining_plan(model, quick(), teacher=teacher)
    size = 4 * sum(param.numel() for param in teacher.parameters())
    assert size <= beside.memory.weights - alone.memory.weights <= size + 1024  # and its buffers
    assert beside.memory.activations - alone.memory.activations == 3 * 4 * 2 * 16 * 48


def test_two_processes_have_buckets_and_twice_the_tokens(build, quick, monkeypatch):
    alone = retraining_plan(build("llama"), quick())
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    two = retraining_plan(build("llama"), quick())
    assert two.memory.gradients == 2 * alone.memory.gradients
    assert (two.tokens, two.batch) == (2 * alone.tokens, (2, 1, 2))


def test_sharding_takes_a_part_and_what_is_gathered(build, quick, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    model = build("llama")
    whole, sharded = (retraining_plan(model, quick(groups="full", sharding=how)).memory for how in ("none", "fsdp"))
    # 16 wide, 24 inside, 8 keys and values: 16·(16 + 8 + 8 + 16) + 3·16·24 + 2·16; twice 48·16 and a norm outside
    block, outside = 4 * 1952, 4 * 1552
    everything = 2 * block + outside
    buffers = whole.weights - everything
    assert sharded.weights == everything // 4 + everything + buffers  # two blocks: all of them are gathered
    assert sharded.gradients == everything // 4 + everything
    assert sharded.optimizer == 2 * everything // 4 == whole.optimizer // 4
    assert sharded.activations == whole.activations
    model.model.layers.extend(build("llama").model.layers)  # two more, which are not gathered at once
    deeper = retraining_plan(model, quick(groups="norms", sharding="fsdp")).memory
    assert deeper.gradients == 4 * 16 * (9 / 4 + 1 + 4)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ValueError, match="one: start them by torchrun"):
        retraining_plan(model, quick(sharding="fsdp"))


def test_what_does_not_fit_is_refused(build, quick, snapshot, assert_same):
    model = build("llama")
    before = snapshot(model)
    for changes, match in (({"groups": ("biases",)}, "nothing to train"), ({"seq_len": 64}, "maximum of 32")):
        with pytest.raises(ValueError, match=match):
            retraining_plan(model, quick(**changes))
    with pytest.raises(ValueError, match=r"learning_rate='grid' .* pass validation"):
        retraining_plan(model, quick(learning_rate="grid"))
    with pytest.raises(ValueError, match="share parameters"):
        retraining_plan(model, quick(), teacher=copy.copy(model))
    assert_same(model, before)
