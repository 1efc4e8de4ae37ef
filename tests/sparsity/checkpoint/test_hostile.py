"""Folders made to do harm: each is refused at once, with its file named, and takes neither memory nor a prompt."""

import json
import os
import shutil
import signal
import struct
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from trisparse.sparsity.checkpoint import CheckpointError, load, save
from trisparse.sparsity.foreign.compressed_tensors import sparse_format
from trisparse.sparsity.foreign.survey import survey
from trisparse.sparsity.sparsify import sparsify

VECTORS = Path(__file__).parent / "vectors"
NAME = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def foreign(tmp_path):
    """A copy of a sparse-bitmask checkpoint."""
    shutil.copytree(VECTORS / "bitmask-fp32-odd", tmp_path / "c", ignore=shutil.ignore_patterns("expected*"))
    return tmp_path / "c"


@pytest.fixture
def two_four(tmp_path):
    """A copy of a sparse-24-bitmask checkpoint."""
    shutil.copytree(VECTORS / "24-bf16", tmp_path / "c", ignore=shutil.ignore_patterns("expected*"))
    return tmp_path / "c"


@pytest.fixture(params=["foreign", "ours"])
def any_folder(request, foreign, model_named, tmp_path):
    """A foreign checkpoint, and one of ours."""
    if request.param == "foreign":
        return foreign
    model = model_named("llama")
    sparsify(model, "2:4", "magnitude", progress=False)
    return save(model, tmp_path / "ours")


def edit_config(folder, change):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")


def replaced(part, make):
    def change(tensors):
        tensors[f"{NAME}.{part}"] = make(tensors[f"{NAME}.{part}"])

    return change


def flip_first(bits):
    bits[0, 0] ^= 1
    return bits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced("shape", lambda t: torch.tensor([1 << 40, 1 << 20])), "is .* and not the bits of"),
        (replaced("shape", lambda t: torch.tensor([-16, 16])), r"says \[-16, 16\]"),
        (replaced("shape", lambda t: torch.tensor([0, 1 << 62])), "says"),
        (replaced("shape", lambda t: torch.tensor([])), "no shape"),
        (replaced("shape", lambda t: torch.tensor([16.0, 16.0])), "no shape"),
        (replaced("bitmask", flip_first), "holds .* weights, and its bits"),
        (replaced("bitmask", lambda t: t.to(torch.int8)), "is torch.int8"),
        (replaced("compressed", lambda t: t[:-1]), "holds .* weights, and its bits"),
        (replaced("compressed", lambda t: t.to(torch.int32)), "has dtype"),
        (replaced("row_offsets", lambda t: t + 1), "does not say where"),
        (replaced("row_offsets", lambda t: t.to(torch.int32)), "does not say where"),
        (lambda t: t.pop(f"{NAME}.row_offsets"), "without row_offsets"),
        (lambda t: t.pop(f"{NAME}.compressed"), "lacks compressed"),
        (lambda t: t.update({f"{NAME}.weight": torch.zeros(16, 16)}), "dense and compressed"),
        (
            lambda t: t.update({f"{NAME}.weight.{p}": t[f"{NAME}.{p}"].clone() for p in ("shape", "bitmask")}),
            "of one weight",
        ),
        (lambda t: t.pop("model.norm.weight"), "missing keys model.norm.weight|has .* weights, and a model"),
        (lambda t: t.update(more=torch.zeros(3)), "unexpected keys more"),
    ],
)
def test_tensors_of_a_bitmask_checkpoint_must_fit(foreign, change, message):
    edit_tensors(foreign, change)
    with pytest.raises(CheckpointError, match=message):
        load(foreign)


def test_padding_bits_must_be_zero(foreign):
    def change(tensors):
        tensors["model.layers.0.mlp.down_proj.bitmask"][0, -1] |= 1 << 7  # 27 columns: bits 3 and up of the last byte

    edit_tensors(foreign, change)
    with pytest.raises(CheckpointError, match="bits beyond the last column"):
        load(foreign)


def test_two_of_every_four_are_kept(two_four):
    def change(tensors):
        bits = tensors[f"{NAME}.bitmask"]
        bits[0, 0], bits[0, 1] = 0b11110000, 0b00110011  # eight bits, as before

    edit_tensors(two_four, change)
    with pytest.raises(CheckpointError, match="two of every four"):
        load(two_four)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(num_hidden_layers=10**9), "num_hidden_layers"),
        (lambda c: c.update(num_hidden_layers=10**9, model_type="qwen2"), "num_hidden_layers"),
        (lambda c: c.update(num_labels=10**9), "num_labels"),
        (lambda c: c.update(hidden_size=1 << 40), "weights, and a model|describes no|the file.s"),
        (lambda c: c.update(vocab_size=1 << 40), "weights, and a model|fit"),
        (lambda c: c.update(architectures=["__loader__"]), "no model __loader__|has no"),
        (lambda c: c.update(architectures=[["x"]]), "no model|damaged|has no"),
        (lambda c: c.update(model_type="nothing"), "damaged"),
        (lambda c: c.update(hidden_act="__import__"), "describes no|cannot be read|damaged|fit"),
    ],
)
def test_a_config_cannot_ask_for_more_than_there_is(any_folder, change, message):
    edit_config(any_folder, change)
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=message):
        load(any_folder)
    assert time.monotonic() - start < 10


def test_code_of_the_folder_is_neither_run_nor_offered(any_folder, monkeypatch):
    (any_folder / "evil.py").write_text("raise SystemExit('ran')")
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit_config(any_folder, lambda c: c.update(auto_map=auto, model_type="evil"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked the user"))
    with pytest.raises(CheckpointError):
        load(any_folder)


def test_an_index_names_files_of_its_folder_alone(foreign, tmp_path):
    (foreign / "model.safetensors").rename(tmp_path / "model.safetensors")
    names = list(load_file(tmp_path / "model.safetensors"))
    for place in ("../model.safetensors", str(tmp_path / "model.safetensors"), "model.bin", 3, ""):
        index = {"weight_map": dict.fromkeys(names, place)}
        (foreign / "model.safetensors.index.json").write_text(json.dumps(index))
        for read in (load, survey):
            with pytest.raises(CheckpointError, match="no safetensors file of the"):
                read(foreign)


def test_a_header_that_lies_is_refused(foreign):
    file = foreign / "model.safetensors"
    data = file.read_bytes()
    for length in (1 << 62, len(data), 0):
        file.write_bytes(struct.pack("<Q", length) + data[8:])
        with pytest.raises(CheckpointError, match="header"):
            load(foreign)
    header = {"x": {"dtype": "F32", "shape": [1 << 40, 1 << 22], "data_offsets": [0, 16]}}
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    with pytest.raises(CheckpointError, match="does not fit its bytes"):
        survey(foreign)


def test_nested_and_doubled_json_is_refused(foreign):
    (foreign / "config.json").write_text("[" * 200_000)
    for read in (load, sparse_format, survey):
        with pytest.raises(CheckpointError, match=r"config.json|trisparse.json"):
            read(foreign)
    (foreign / "config.json").write_text('{"a": 1, "a": 2}')
    with pytest.raises(CheckpointError, match="there twice"):
        sparse_format(foreign)


def test_other_formats_of_compressed_tensors_are_refused(foreign):
    edit_config(foreign, lambda c: c["quantization_config"]["sparsity_config"].update(format="marlin-24"))
    with pytest.raises(CheckpointError, match="format 'marlin-24'"):
        load(foreign)
    edit_config(foreign, lambda c: c["quantization_config"].update(config_groups={"group_0": {}}))
    with pytest.raises(CheckpointError, match="is quantized"):
        load(foreign)


@pytest.fixture
def dense_form(model_named, tmp_path):
    """A checkpoint of ours with dense weights."""
    model = model_named("llama")
    sparsify(model, "2:4", "magnitude", progress=False)
    return save(model, tmp_path / "dense", form="dense")


@pytest.mark.parametrize("method", ["bitnet", "fp8", "nothing", None, ["trisparse"]])
def test_the_quantizer_of_another_method_is_not_asked(dense_form, method):
    def change(config):
        config.update(vocab_size=1 << 22, quantization_config={"quant_method": method})

    edit_config(dense_form, change)
    start = time.monotonic()
    with pytest.raises(CheckpointError, match="quantization_config that is none of ours"):
        load(dense_form)
    assert time.monotonic() - start < 5


def test_a_quantizer_is_not_hidden_in_the_text_config(any_folder):
    edit_config(any_folder, lambda c: c.update(text_config={"quantization_config": {"quant_method": "bitnet"}}))
    with pytest.raises(CheckpointError, match="quantization_config inside another config"):
        load(any_folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(attn_implementation="evil/kernel"),
        lambda c: c.update(_attn_implementation="evil/kernel@main:name"),
        lambda c: c.update(attn_implementation={"": "sdpa", "text_config": "evil/kernel"}),
        lambda c: c.update(text_config={"_attn_implementation": "evil/kernel"}),
        lambda c: c.update(experts_implementation="evil/kernel"),
    ],
)
def test_no_kernel_is_fetched(any_folder, change, monkeypatch):
    fetched = lambda *_, **__: pytest.fail("it fetches a kernel")  # noqa: E731
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", fetched)
    edit_config(any_folder, change)
    with pytest.raises(CheckpointError, match="none is fetched"):
        load(any_folder)


@pytest.mark.parametrize("form", ["dense", "compressed"])
def test_an_adapter_in_the_folder_is_not_put_on_the_model(model_named, form, tmp_path):
    model = model_named("llama")
    sparsify(model, "2:4", "magnitude", progress=False)
    folder = save(model, tmp_path / "pruned", form=form)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"holds an adapter, adapter_config.json.*PeftModel.from_pretrained"):
        load(folder)
    if form == "compressed":
        with pytest.raises(CheckpointError, match="holds an adapter"):
            AutoModelForCausalLM.from_pretrained(folder)


def test_other_files_of_weights_are_not_named(any_folder):
    shutil.copyfile(any_folder / "model.safetensors", any_folder / "other.safetensors")
    edit_config(any_folder, lambda c: c.update(transformers_weights="other.safetensors"))
    with pytest.raises(CheckpointError, match="names weights of its own"):
        load(any_folder)


def test_the_index_of_an_earlier_save_is_not_read(any_folder):
    """transformers leaves it there, and takes the one file as well."""
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (any_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    load(any_folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "trisparse.json", "trisparse_masks.safetensors"])
def test_a_pipe_is_not_waited_for(dense_form, name):
    (dense_form / name).unlink()
    os.mkfifo(dense_form / name)
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    signal.alarm(5)
    try:
        with pytest.raises(CheckpointError, match=r"it is no file|plain module"):
            load(dense_form)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
