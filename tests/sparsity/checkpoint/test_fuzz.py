"""Damaged and hostile checkpoints: an error or the right masks, never a crash, a hang, much memory or a wrong mask.

TRISPARSE_FUZZ_EXAMPLES is the number of damaged folders of each form; the nightly workflow tries many more. What a
checkpoint does not hash is the values of its weights: a flipped bit in them gives another number of the same place, as
in any file of safetensors. All else must be as saved: which weights are kept, and every shape and name. The formats
of others have no hash of their masks either: of these, bits that still make up a mask of the format are taken.
"""

import json
import os
import re
import resource
import shutil
import struct
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from trisparse.sparsity.checkpoint import CheckpointError, load, save
from trisparse.sparsity.foreign.semi_structured import load_semi_structured, save_semi_structured
from trisparse.sparsity.mask import MaskError, masks, masks_sha256
from trisparse.sparsity.sparsify import sparsify

USUAL = 60
EXAMPLES = int(os.environ.get("TRISPARSE_FUZZ_EXAMPLES", USUAL))
VECTORS = Path(__file__).parent / "vectors"
MEMORY = 1 << 30  # bytes more than before that no file of a few kB may take
HASHED = ("two-four", "loose", "dense")
REFUSED = (CheckpointError, MaskError)


def tiny(**changes):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(**(shape | changes), vocab_size=12, max_position_embeddings=32, bos_token_id=1, eos_token_id=2)
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Small folders of every form that is read, and what each one must be read as."""
    folder = tmp_path_factory.mktemp("whole")
    two_four = tiny()
    sparsify(two_four, "2:4", "magnitude", progress=False)
    save(two_four, folder / "two-four", max_shard_size="4KB")
    loose = tiny(tie_word_embeddings=True)
    sparsify(loose, "50%", "magnitude", include=["*q_proj*", "*down_proj*"], progress=False)
    sparsify(loose, "4:8", "magnitude", include=["*v_proj*"], progress=False)
    sparsify(loose, "20% layer", "magnitude", include=["*k_proj*", "*o_proj*"], progress=False)
    save(loose, folder / "loose")
    save(loose, folder / "dense", form="dense")
    for name in ("24-fp16-odd", "bitmask-bf16-sharded"):
        shutil.copytree(VECTORS / name, folder / name)
        (folder / name / "expected.safetensors").unlink()
    wide = tiny(hidden_size=64, num_key_value_heads=2)
    sparsify(wide, "2:4", "magnitude", progress=False)
    save_semi_structured(wide, folder / "semi")
    return {path: read(path) for path in sorted(folder.iterdir())}


def read(folder):
    """What has to be right of a loaded checkpoint: names, shapes and dtypes of the weights, and the masks."""
    model = load_semi_structured(folder, "cpu") if folder.name == "semi" else load(folder)
    weights = {name: (tuple(w.shape), w.dtype) for name, w in model.state_dict().items()}
    alive = {}
    if folder.name == "semi":  # has no masks: the places are what the metadata says
        alive = {name: (w != 0).sum().item() for name, w in model.state_dict().items()}
    return masks_sha256(model), {name: str(mask.pattern) for name, mask in masks(model).items()}, weights, alive


def memory():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def mutations():
    """Functions that damage the bytes of a file."""
    place = st.floats(0, 1, exclude_max=True)
    flip = st.tuples(place, st.integers(0, 7)).map(lambda a: lambda data: flipped(data, int(a[0] * len(data)), a[1]))
    header = st.tuples(place, st.integers(0, 255)).map(lambda a: lambda data: header_byte(data, a[0], a[1]))
    cut = place.map(lambda share: lambda data: data[: int(share * len(data))])
    longer = st.binary(min_size=1, max_size=64).map(lambda more: lambda data: data + more)
    hostile = st.sampled_from([b"0", b"-1", b"99999999999999999999", b"1e400", b'"x"', b"null", b"[]", b"{}", b"true"])
    number = st.tuples(place, hostile).map(lambda a: lambda data: replaced_number(data, a[0], a[1]))
    block = st.tuples(place, st.binary(min_size=8, max_size=64)).map(lambda a: lambda data: block_at(data, *a))
    swap = st.tuples(place, place).map(lambda a: lambda data: swapped_names(data, *a))
    one = st.one_of(flip, flip, header, number, number, swap, cut, longer, block)
    return st.lists(one, min_size=1, max_size=3)


def flipped(data, at, bit):
    return data if not data else data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def header_byte(data, share, byte):
    """Change a byte of the first kilobyte, where a header or the settings stand."""
    at = int(share * min(len(data), 1024))
    return data if not data else data[:at] + bytes([byte]) + data[at + 1 :]


def block_at(data, share, block):
    at = int(share * len(data))
    return data[:at] + block + data[at + len(block) :]


def replaced_number(data, share, number):
    """Put something else in place of a number in JSON, and mend the length of a safetensors header."""
    if data[:1] != b"{" and len(data) > 8:
        (length,) = struct.unpack("<Q", data[:8])
        header, rest = data[8 : 8 + length], data[8 + length :]
    else:
        header, rest = data, None
    found = list(re.finditer(rb"(?<=[\[:, ])-?\d+(\.\d+)?", header))
    if not found:
        return data
    match = found[int(share * len(found))]
    header = header[: match.start()] + number + header[match.end() :]
    return header if rest is None else struct.pack("<Q", len(header)) + header + rest


def swapped_names(data, first, second):
    """Exchange two names of one length, of tensors or settings."""
    end = 8 + struct.unpack("<Q", data[:8])[0] if data[:1] != b"{" and len(data) > 8 else len(data)
    names = sorted(set(re.findall(rb'"([^"]+)":', data[:end])))
    if not names:
        return data
    one = names[int(first * len(names))]
    alike = [name for name in names if len(name) == len(one)]
    other = alike[int(second * len(alike))]
    both = {b'"%b":' % one: b'"%b":' % other, b'"%b":' % other: b'"%b":' % one}
    return re.sub(b"|".join(map(re.escape, both)), lambda match: both[match[0]], data[:end]) + data[end:]


def damage(folder, draw):
    """Damage a file of ``folder`` and return its name."""
    files = sorted(file for file in folder.iterdir() if file.suffix in (".json", ".safetensors"))
    file = draw(st.sampled_from(files))
    data = before = file.read_bytes()
    for change in draw(mutations()):
        data = change(data)
    file.write_bytes(data)
    return file.name, data == before


def check(folder, expected, what):
    before, start = memory(), time.monotonic()
    try:
        found = read(folder)
    except REFUSED:
        found = None
    assert memory() - before < MEMORY, what
    assert time.monotonic() - start < 30, what
    if found is not None:
        if folder.name in HASHED:
            assert found[0] == expected[0], what
            # A pattern's name is not hashed: another that the mask has as well, such as another scope, is taken.
            assert found[1] == expected[1] or what.endswith(".json"), what
        assert {n: s for n, (s, _) in found[2].items()} == {n: s for n, (s, _) in expected[2].items()}, what
        assert found[3].keys() == expected[3].keys(), what
    return found


KINDS = ["two-four", "loose", "dense", "24-fp16-odd", "bitmask-bf16-sharded", "semi"]


FUZZING = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=EXAMPLES == USUAL,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_refused_or_read_right(checkpoints, kind, tmp_path):
    whole, expected = next((path, value) for path, value in checkpoints.items() if path.name == kind)
    outcomes = {"refused": 0, "read": 0}

    @FUZZING
    @given(st.data())
    def one(data):
        folder = tmp_path / kind
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        name, same = damage(folder, data.draw)
        outcomes["refused" if check(folder, expected, f"{kind}/{name}") is None else "read"] += not same

    one()
    print(kind, outcomes)
    assert outcomes["refused"] > EXAMPLES // 3


AUTO = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.A", "evil.B"]}
QUANTIZERS = [{"quant_method": name} for name in ("bitnet", "fp8", "trisparse", "compressed-tensors", 3)]
KEYS = {  # of config.json
    "quantization_config": [*QUANTIZERS, {}, [], "x", 3],
    "compression_config": [*QUANTIZERS, {"sparsity_config": {"format": "sparse-bitmask"}}],
    "text_config": [{"quantization_config": QUANTIZERS[0]}, {"attn_implementation": "evil/kernel"}, [], 3],
    "attn_implementation": ["evil/kernel", "evil/kernel@main:a", "sdpa", "eager", {"": "evil/kernel"}, 3],
    "_attn_implementation": ["evil/kernel", {"x": "evil/kernel"}],
    "experts_implementation": ["evil/kernel", "eager"],
    "transformers_weights": ["other.safetensors", "../other.safetensors", "adapter_model.bin", "", 3],
    "auto_map": [AUTO, {}, 3],
    "architectures": [["evil.Model"], ["BertModel"], [], 3],
    "model_type": ["evil", "bert", 3],
}
ADAPTER = {
    "peft_type": "LORA",
    "target_modules": ["q_proj"],
    "base_model_name_or_path": "evil/model",
    "auto_mapping": {},
}
INDICES = [{"weight_map": {"lm_head.weight": name}} for name in ("../x.safetensors", "other.safetensors", 3)]
FILES = {  # those that are there already are replaced, weights apart
    "adapter_config.json": [ADAPTER, {}, "no JSON"],
    "model.safetensors.index.json": [*INDICES, {}, "no JSON"],
    "tokenizer_config.json": [{"auto_map": AUTO, "tokenizer_class": "Evil"}, "no JSON"],
    "generation_config.json": [{"auto_map": AUTO, "max_length": -1}, {"eos_token_id": "x"}],
    "custom_generate/generate.py": ["raise SystemExit('ran')"],
    "evil.py": ["raise SystemExit('ran')"],
    "other.safetensors": ["no tensors"],
    "pytorch_model.bin": ["no pickle"],
}


def add(folder, draw):
    """Add up to three settings and files to ``folder``, and return their names."""
    names = draw(st.lists(st.sampled_from([*KEYS, *FILES]), min_size=1, max_size=3, unique=True))
    for name in names:
        value = draw(st.sampled_from(KEYS.get(name) or FILES[name]))
        if name in KEYS:
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {name: value}))
        else:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
    return names


@pytest.mark.parametrize("kind", KINDS)
def test_added_settings_and_files_are_refused_or_change_nothing(checkpoints, kind, tmp_path, monkeypatch):
    whole, expected = next((path, value) for path, value in checkpoints.items() if path.name == kind)
    outcomes = {"refused": 0, "read": 0}
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked the user"))
    fetched = lambda *_, **__: pytest.fail("it fetches a kernel")  # noqa: E731
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", fetched)

    @FUZZING
    @given(st.data())
    def one(data):
        folder = tmp_path / kind
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        names = add(folder, data.draw)
        outcomes["refused" if check(folder, expected, f"{kind}/{names}") is None else "read"] += 1

    one()
    print(kind, outcomes)
    assert min(outcomes.values()) > EXAMPLES // 20
