"""Models that loop, skip, mix dtypes or fail, and what is left of them afterwards."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from trisparse.retrain.perp import PERPConfig, retrain
from trisparse.sparsity.batches import calibration_batches
from trisparse.sparsity.calibration import walk
from trisparse.sparsity.capture import BlocksNotChainedError
from trisparse.sparsity.checkpoint import CheckpointError, load, save
from trisparse.sparsity.mask import masks
from trisparse.sparsity.sparsify import sparsify
from trisparse.sparsity.statistics import InputStatistics
from trisparse.sparsity.targets import find_targets


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return torch.tanh(self.inner(x))


class Looped(nn.Module):
    """Runs its two blocks ``rounds`` times."""

    def __init__(self, rounds):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.rounds = rounds

    def forward(self, x):
        for _ in range(self.rounds):
            for layer in self.layers:
                x = layer(x)
        return x


def test_blocks_that_run_several_times_are_measured_every_time():
    data = [torch.rand(8, 4)]
    with pytest.raises(BlocksNotChainedError, match=r"at layers\.0.*propagate='dense'"):
        sparsify(Looped(5), "50%", "wanda", data, progress=False)
    model = Looped(5)
    targets = find_targets(model)
    ((group, statistics),) = walk(model, targets, calibration_batches(model, data), propagate="dense")
    assert [target.name for target in group] == ["layers.0.inner.weight", "layers.1.inner.weight"]
    assert [int(statistics._counts[target.name]) for target in group] == [40, 40]


def test_blocks_of_a_tower_that_is_not_used_are_named():
    class TwoTowers(nn.Module):
        def __init__(self):
            super().__init__()
            self.vision, self.text = Looped(1), Looped(1)

        def forward(self, x):
            return self.text(x)

    model = TwoTowers()
    report = sparsify(model, "50%", "wanda", [torch.rand(8, 4)], progress=False)
    assert [row.name for row in report.targets] == ["text.layers.0.inner.weight", "text.layers.1.inner.weight"]
    unused = [row.name for row in report.skipped if row.reason == "no calibration input reached it"]
    assert unused == ["vision.layers.0.inner.weight", "vision.layers.1.inner.weight"]


def test_stacks_are_pruned_in_the_order_in_which_they_run():
    class DecoderFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder, self.encoder = Looped(1), Looped(1)

        def forward(self, x):
            return self.decoder(self.encoder(x))

    report = sparsify(DecoderFirst(), "50%", "wanda", [torch.rand(8, 4)], progress=False)
    assert [row.name.split(".")[0] for row in report.targets] == ["encoder", "encoder", "decoder", "decoder"]


def test_blocks_that_return_dicts_work_densely():
    class Dicts(Looped):
        def forward(self, x):
            for layer in self.layers:
                x = layer(x)["out"]
            return x

    model = Dicts(1)
    for layer in model.layers:
        layer.forward = lambda x, inner=layer.inner: {"out": inner(x)}
    with pytest.raises(BlocksNotChainedError):
        sparsify(model, "50%", "wanda", [torch.rand(8, 4)], progress=False)
    assert sparsify(model, "50%", "wanda", [torch.rand(8, 4)], propagate="dense", progress=False).sparsity == 0.5


@pytest.mark.parametrize("propagate", ["block", "dense", "linear"])
def test_a_block_that_mixes_dtypes_runs_in_its_own(propagate, monkeypatch):
    from trisparse.sparsity import calibration

    class Mixed(Block):
        def forward(self, x):
            return self.inner(torch.tanh(x) * torch.ones(x.shape[-1]))  # fp32, whatever x is

    model = Looped(1)
    model.layers[1] = Mixed()
    monkeypatch.setattr(calibration, "bf16_is_fast", lambda device: True)
    report = sparsify(model, "50%", "wanda", [torch.rand(8, 4)], propagate=propagate, progress=False)
    assert report.sparsity == 0.5
    with pytest.raises(RuntimeError):
        sparsify(model, "50%", "wanda", [torch.rand(8, 4)], dtype=torch.bfloat16, progress=False)


def test_linear_ranks_the_weights_and_not_their_bf16_copies():
    torch.manual_seed(0)
    hashes = []
    for propagate in ("block", "linear"):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Sequential(nn.Linear(256, 256)), nn.Sequential(nn.Linear(256, 256)))
        model = nn.ModuleDict({"stack": model})
        model.forward = model["stack"].forward
        x = torch.rand(4, 256).bfloat16().float()
        sparsify(model, "50%", "wanda", [x], propagate=propagate, dtype=torch.bfloat16, progress=False)
        hashes.append(masks(model)["stack.0.0.weight"].sha256)
    assert hashes[0] == hashes[1]


def test_modes_and_implementation_come_back_after_a_failure(model_named, tokens):
    model = model_named("mixtral").train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    implementation = model.config._experts_implementation
    sparsify(model, "50%", "wanda", tokens, seq_len=16, progress=False)
    assert [module.training for module in model.modules()] == before
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="overflow") as caught:
        sparsify(model, "50%", "wanda", tokens, seq_len=16, progress=False)
    assert caught.value.__traceback__ is not None  # it keeps the frames alive, as a notebook does
    assert [module.training for module in model.modules()] == before
    assert model.config._experts_implementation == implementation


def test_pruning_again_takes_the_pruned_weights_first(model_named):
    model = model_named("llama")
    sparsify(model, "50%", "magnitude", progress=False)
    first = {name: mask.dense() for name, mask in masks(model).items()}
    sparsify(model, "75%", "random", progress=False)
    for name, mask in masks(model).items():
        assert not (mask.dense() & ~first[name]).any()


def test_padding_does_not_count_where_a_block_flattens_its_tokens():
    layer = nn.Linear(2, 2)
    target = find_targets(layer).found[0]
    statistics = InputStatistics([target])
    x = torch.tensor([[[3.0, 0.0], [100.0, 100.0]]])
    with statistics.observing(), statistics.call(torch.tensor([[True, False]])):
        layer(x.flatten(0, 1))
    assert statistics.rms(target).tolist() == [[3.0, 0.0]]


def measured(layer, x, valid=None, *, hessians=False):
    target = find_targets(layer).found[0]
    statistics = InputStatistics([target], hessians=hessians)
    with statistics.observing(), statistics.call(valid):
        layer(x)
    return statistics.rms(target).tolist()


def test_padding_does_not_count_in_a_convolution_over_the_tokens():
    conv = nn.Conv1d(2, 2, 3, padding=1, bias=False)
    x = torch.tensor([[[3.0, 100.0], [1.0, 100.0]]])  # [samples, channels, tokens]
    assert measured(conv, x, torch.tensor([[True, False]])) == [[3.0] * 3 + [1.0] * 3]
    assert measured(conv, x[..., :1]) == [[3.0] * 3 + [1.0] * 3]


@pytest.mark.parametrize(
    ("layer", "shape", "hessians"),
    [
        (nn.Linear(4, 2), (3, 4), False),  # an expert that three of four tokens were routed to
        (nn.Conv1d(4, 2, 3, stride=2), (1, 4, 8), False),  # before tokens are made: twice as many places
        (nn.Conv1d(4, 2, 1), (2, 4, 2), False),  # as many places as tokens, but others
        (nn.Conv2d(4, 2, 1), (1, 4, 2, 2), False),
        (nn.Conv1d(4, 2, 3), (1, 4, 4), True),  # a window of tokens and padding
    ],
)
def test_padding_that_cannot_be_told_apart_is_refused(layer, shape, hessians):
    x, valid = torch.rand(shape), torch.tensor([[True, True, False, False]])
    with pytest.raises(ValueError, match="data is padded, and calibration cannot leave padding out of weight: pack it"):
        measured(layer, x, valid, hessians=hessians)
    measured(layer, x, hessians=hessians)


def test_experts_that_are_modules_cannot_take_padded_data():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

        def forward(self, x, attention_mask=None):
            rows, out = x.flatten(0, 1), torch.zeros(x.numel() // 4, 4)
            for i, expert in enumerate(self.experts):
                mine = torch.arange(len(rows)) % 2 == i
                out[mine] = expert(rows[mine])
            return out.view(x.shape)

    batch = {"x": torch.rand(2, 4, 4), "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])}
    model = Experts()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"cannot leave padding out of experts\.0\.weight: pack it"):
        sparsify(model, "50%", "wanda", [batch], propagate="dense", progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    sparsify(model, "50%", "wanda", [{"x": batch["x"]}], propagate="dense", progress=False)


@pytest.mark.parametrize("sparsity", ["50%", "50% global"])
def test_data_that_reaches_no_target_is_an_error(sparsity):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(ValueError, match="reaches none of the weights"):
        sparsify(Model(), sparsity, "wanda", [torch.rand(2, 4)], include="unused", propagate="dense", progress=False)


def test_a_peft_model_is_refused(model_named):
    wrapped = get_peft_model(model_named("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="wrapped by PEFT"):
        sparsify(wrapped, "50%", progress=False)


def test_one_batch_by_itself_is_data(model_named, tokens):
    report = sparsify(model_named("llama"), "50%", data={"input_ids": tokens}, progress=False)
    assert report.samples == 8


def test_encoder_decoder_models_prune_but_do_not_retrain(tokens):
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(
        T5Config(vocab_size=96, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )
    batch = {"input_ids": tokens, "decoder_input_ids": tokens[:, :4]}
    assert sparsify(model, "50%", "wanda", batch, propagate="dense", progress=False).sparsity == 0.5
    with pytest.raises(ValueError, match="causal language model"):
        retrain(model, tokens, PERPConfig(groups=("lora",)))


@pytest.fixture
def saved(model_named, tmp_path):
    model = model_named("llama")
    sparsify(model, "2:4", progress=False)
    return save(model, tmp_path / "pruned")


def drop_embedding(path):
    weights = load_file(path / "model.safetensors")
    del weights["model.embed_tokens.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_embedding, "missing keys model.embed_tokens.weight"),
        (lambda p: (p / "model.safetensors").write_bytes(b"\x10" * 100), "cannot be read"),
        (lambda p: (p / "model.safetensors").unlink(), "cannot be read"),
        (lambda p: (p / "config.json").write_text("{"), "config.json is damaged"),
        (lambda p: (p / "config.json").unlink(), "has no trisparse.json"),
    ],
)
def test_damaged_weights_are_a_checkpoint_error(saved, damage, message):
    damage(saved)
    with pytest.raises(CheckpointError, match=message):
        load(saved)


def test_a_module_that_does_not_fit_stays_as_it_was(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8))
    sparsify(model, "2:4", progress=False)
    save(model, tmp_path / "plain")
    other = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"1\.weight"):
        load(tmp_path / "plain", into=other)
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())
    again = nn.Sequential(nn.Linear(8, 8))
    sparsify(again, "1:4", progress=False)
    assert str(masks(load(tmp_path / "plain", into=again))["0.weight"].pattern) == "2:4"


def test_an_interrupted_replacement_keeps_the_old_checkpoint(saved, model_named, monkeypatch):
    from pathlib import Path

    real, count = Path.rename, [0]

    def fails_second(self, target):
        count[0] += 1
        if count[0] == 2:
            raise OSError("disk gone")
        return real(self, target)

    model = load(saved)
    monkeypatch.setattr(Path, "rename", fails_second)
    with pytest.raises(OSError, match="disk gone"):
        save(model, saved)
    monkeypatch.undo()
    assert len(masks(load(saved))) == 21
