"""``trisparse export`` and the commands that take other tools' folders."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass
from transformers import LlamaConfig, LlamaForCausalLM

import trisparse
from trisparse.sparsity.checkpoint import CheckpointError, load, read_info, save
from trisparse.sparsity.foreign.export import export_dense, load_any
from trisparse.sparsity.foreign.semi_structured import load_semi_structured, save_semi_structured, sparse_tensor
from trisparse.sparsity.mask import masks, masks_sha256
from trisparse.sparsity.sparsify import sparsify

VECTORS = Path(__file__).parent / "vectors"
DOCS = Path(__file__).parents[3] / "docs" / "checkpoints-others.md"


@pytest.fixture
def wide():
    """A bf16 Llama whose weights have the multiples of torch's 2:4 kernels, pruned to 2:4."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**shape, vocab_size=16, bos_token_id=1, eos_token_id=2)
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)  # .to() would round the rotary frequencies
    sparsify(model, "2:4", "magnitude", progress=False)
    return model.eval()


@pytest.fixture
def zeros(tiny_llama, tmp_path, trisparse_command):
    """A dense folder with the zeros of a 2:4 model, as others publish them."""
    trisparse_command("export", tiny_llama / "pruned", "--out", tmp_path / "zeros", "--to", "dense")
    return tmp_path / "zeros"


def test_dense_opens_where_there_is_no_trisparse(tiny_llama, zeros):
    assert sorted(file.name for file in zeros.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert not re.search("trisparse|quantization|sparsity", (zeros / "config.json").read_text())
    expected = load(tiny_llama / "pruned")
    ids = torch.arange(12).reshape(1, -1)
    code = (
        "import sys, torch; sys.modules['trisparse'] = None; from transformers import AutoModelForCausalLM as A\n"
        f"model = A.from_pretrained({str(zeros)!r})\n"
        "assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear\n"
        "print(model(torch.arange(12).reshape(1, -1)).logits.double().sum().item().hex())"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd="/")
    assert float.fromhex(run.stdout.split()[-1]) == expected(ids).logits.double().sum().item()
    assert load_file(zeros / "model.safetensors").keys() == expected.state_dict().keys()


def test_dense_export_of_the_dense_form_has_no_file_of_masks(tiny_llama, tmp_path, trisparse_command):
    save(load(tiny_llama / "pruned"), tmp_path / "ours", form="dense")
    assert (tmp_path / "ours" / "trisparse_masks.safetensors").is_file()
    trisparse_command("export", tmp_path / "ours", "--out", tmp_path / "out", "--to", "dense")
    # vLLM would load every file of safetensors as weights
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    assert not (tmp_path / "out" / "trisparse.json").exists()


def test_dtype_of_the_export(tiny_llama, tmp_path, trisparse_command, trisparse_error):
    trisparse_command("export", tiny_llama / "pruned", "--out", tmp_path / "h", "--to", "dense", "--dtype", "fp16")
    assert {w.dtype for w in load_file(tmp_path / "h" / "model.safetensors").values()} == {torch.float16}
    common = ["export", tiny_llama / "pruned", "--out", tmp_path / "o"]
    assert "dtype must be one of" in trisparse_error(*common, "--to", "dense", "--dtype", "int4")
    assert "to must be one of dense, semi-structured, trisparse" in trisparse_error(*common, "--to", "gguf")
    assert not (tmp_path / "o").exists()


def test_what_is_not_offered_says_why(tiny_llama, zeros, tmp_path, trisparse_error):
    common = ["export", tiny_llama / "pruned", "--out", tmp_path / "o"]
    shown = trisparse_error(*common, "--to", "compressed-tensors")
    assert "since 0.15" in shown
    assert "vLLM" in shown
    assert "--to dense" in shown
    shown = trisparse_error("export", zeros, "--out", tmp_path / "o", "--to", "trisparse")
    assert "has no masks: --recover-masks" in shown
    shown = trisparse_error("export", zeros, "--out", zeros, "--to", "trisparse", "--recover-masks")
    assert "choose another folder" in shown
    assert "exists and is not" in trisparse_error("export", tiny_llama / "pruned", "--out", zeros, "--to", "dense")
    assert "has masks already" in trisparse_error(*common, "--to", "dense", "--recover-masks")
    assert "multiples of 32 rows and 64 columns" in trisparse_error(
        *common, "--to", "semi-structured", "--dtype", "bf16"
    )
    assert "float32 has no 2:4 kernels" in trisparse_error(*common, "--to", "semi-structured")


@pytest.mark.parametrize("place", [".", "inner", "inner/out"])
def test_a_result_never_replaces_what_it_is_made_from(tiny_llama, tmp_path, trisparse_error, place):
    folder = tmp_path / "inner"
    shutil.copytree(tiny_llama / "pruned", folder)
    shutil.copy(folder / "config.json", tmp_path)  # with it, the folder above counts as a checkpoint of ours
    before = sorted(tmp_path.rglob("*"))
    out = ["--out", tmp_path / place]
    train = ["--data", tiny_llama / "text.txt", *out]
    for command in (
        ["export", folder, "--to", "dense", *out],
        ["prune", folder, *out],
        ["retrain", folder, *train],
        ["retrain", tiny_llama / "pruned", "--teacher", folder, *train],
        ["retrain", tiny_llama / "pruned", "--form", "reconstruct", "--dense", folder, *train],
    ):
        assert "are one inside the other" in trisparse_error(*command), command
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dense_checkpoint_becomes_one_of_ours(tiny_llama, zeros, tmp_path, trisparse_command):
    out = trisparse_command(
        "export", zeros, "--out", tmp_path / "ours", "--to", "trisparse", "--recover-masks", "--json"
    )
    assert json.loads(out)["masks"] == 14
    assert masks_sha256(load(tmp_path / "ours")) == masks_sha256(load(tiny_llama / "pruned"))
    (step,) = read_info(tmp_path / "ours")["recipe"]
    command = "trisparse export zeros --out ours --to trisparse --recover-masks --json"
    assert step == {"step": "recover-masks", "weights": 14, "of": 15, "sparsity": 0.5, "command": command}
    assert (tmp_path / "ours" / "tokenizer.json").is_file()


def test_commands_recover_masks_when_asked(zeros, tiny_llama, tmp_path, trisparse_command, trisparse_error):
    train = ["--data", tiny_llama / "text.txt", "--steps", 2, "--seq-len", 16]
    shown = trisparse_error("retrain", zeros, *train, "--out", tmp_path / "r")
    assert "--recover-masks takes the masks from its zeros" in shown
    trisparse_command("retrain", zeros, *train, "--out", tmp_path / "r", "--recover-masks")
    assert masks_sha256(load(tmp_path / "r")) == masks_sha256(load(tiny_llama / "pruned"))
    assert [step["step"] for step in read_info(tmp_path / "r")["recipe"]] == ["recover-masks", "retrain"]
    assert "--no-merge needs a base" in trisparse_error(
        "retrain", zeros, *train, "--out", tmp_path / "a", "--recover-masks", "--no-merge"
    )
    trisparse_command("prune", zeros, "--out", tmp_path / "p", "--sparsity", "1:4", "--recover-masks")
    assert {str(mask.pattern) for mask in masks(load(tmp_path / "p")).values()} == {"1:4"}
    assert "does not go with --stream" in trisparse_error(
        "prune", zeros, "--out", tmp_path / "s", "--recover-masks", "--stream"
    )


def test_inspect_shows_what_others_pruned(zeros, trisparse_command):
    shown = trisparse_command("inspect", zeros)
    assert "14 of 16 weights are pruned, 50.00%" in shown
    assert "--recover-masks takes them" in shown
    rows = json.loads(trisparse_command("inspect", zeros, "--json"))
    assert rows["format"] == "dense"
    assert {row["pattern"] for row in rows["weights"]} == {"2:4", None}
    shown = trisparse_command("inspect", VECTORS / "bitmask-bf16-sharded")
    assert "compressed-tensors sparse-bitmask: every command takes the folder" in shown


def test_commands_take_a_checkpoint_of_compressed_tensors(tiny_llama, tmp_path, trisparse_command):
    folder = tmp_path / "foreign"
    folder.mkdir()
    for file in (VECTORS / "24-bf16").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    vocabulary = json.loads((tiny_llama / "dense" / "tokenizer.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_llama / "dense" / name).read_bytes())
    assert len(vocabulary["model"]["vocab"]) == 12  # as the model's
    data = ["--data", tiny_llama / "text.txt", "--seq-len", 16]
    assert "perplexity" in trisparse_command("eval", folder, *data, "--max-tokens", 64)
    trisparse_command("retrain", folder, *data, "--steps", 1, "--out", tmp_path / "r")
    assert masks_sha256(load(tmp_path / "r")) == masks_sha256(load(folder))
    assert read_info(tmp_path / "r")["recipe"][0] == {
        "step": "import",
        "format": "compressed-tensors sparse-24-bitmask",
    }


def test_semi_structured_tensors_are_torchs(wide, tmp_path):
    assert save_semi_structured(wide, tmp_path / "s") == {}
    info = json.loads((tmp_path / "s" / "semi_structured.json").read_text())
    assert info["packed"] == sorted(masks(wide))
    tensors = load_file(tmp_path / "s" / "semi_structured-00000.safetensors")
    for name in masks(wide):
        packed, meta = tensors[f"{name}.packed"], tensors[f"{name}.meta"]
        dense = wide.get_parameter(name)
        assert (packed.shape, meta.shape) == ((len(dense), dense.shape[1] // 2), (len(dense), dense.shape[1] // 16))
        assert torch.equal(sparse_semi_structured_to_dense_cutlass(packed, meta), dense)
        made = sparse_tensor(packed, meta)
        assert isinstance(made, SparseSemiStructuredTensorCUTLASS)
        assert made.shape == dense.shape
        assert torch.equal(made.to_dense(), dense)
        assert made.packed.data_ptr() == packed.data_ptr()
    stored = sum(file.stat().st_size for file in (tmp_path / "s").glob("*.safetensors"))
    wide.save_pretrained(tmp_path / "dense")
    assert stored < 0.65 * (tmp_path / "dense" / "model.safetensors").stat().st_size
    ids = torch.arange(12).reshape(1, -1)
    assert torch.equal(load_semi_structured(tmp_path / "s", "cpu")(ids).logits, wide(ids).logits)


@pytest.mark.gpu
def test_semi_structured_layers_run_on_torchs_kernels(wide, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    save_semi_structured(wide, tmp_path / "s")
    model = load_semi_structured(tmp_path / "s", "cuda")
    assert isinstance(model.model.layers[0].mlp.up_proj.weight, SparseSemiStructuredTensorCUTLASS)
    ids = torch.arange(16).reshape(1, -1).cuda()
    wide = wide.cuda()
    with torch.no_grad():
        close = (model(ids).logits - wide(ids).logits).abs().max()
    assert close <= 0.02 * wide(ids).logits.abs().max()


def test_transformers_does_not_open_it_with_random_weights(wide, tmp_path):
    save_semi_structured(wide, tmp_path / "s")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        LlamaForCausalLM.from_pretrained(tmp_path / "s")


def test_weights_that_cannot_be_packed_stay_dense(wide, tmp_path):
    sparsify(wide, "30%", "magnitude", include=["*layers.0*up_proj*"], progress=False)
    left = save_semi_structured(wide, tmp_path / "s")
    assert left == {"model.layers.0.mlp.up_proj.weight": "the pattern 30% keeps more than two of four neighbours"}
    ids = torch.arange(12).reshape(1, -1)
    assert torch.equal(load_semi_structured(tmp_path / "s", "cpu")(ids).logits, wide(ids).logits)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t, n: t.pop(f"{n}.meta"), "should be there as"),
        (lambda t, n: t.update({f"{n}.meta": t[f"{n}.meta"][:, :-1].clone()}), "meta is"),
        (lambda t, n: t.update({f"{n}.packed": t[f"{n}.packed"].float()}), "packed is torch.float32"),
        (lambda t, n: t[f"{n}.meta"].fill_(0), "two ascending places"),
        (lambda t, n: t.pop("model.norm.weight"), "weights, and a model"),
    ],
)
def test_damaged_packed_weights_are_refused(wide, tmp_path, damage, message):
    save_semi_structured(wide, tmp_path / "s")
    file = tmp_path / "s" / "semi_structured-00000.safetensors"
    tensors = load_file(file)
    damage(tensors, "model.layers.1.mlp.down_proj.weight")
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=message):
        load_semi_structured(tmp_path / "s", "cpu")


def test_a_compressed_checkpoint_is_exported_bit_for_bit(wide, tmp_path, trisparse_command):
    save(wide, tmp_path / "ours")
    for to in ("dense", "semi-structured"):
        trisparse_command("export", tmp_path / "ours", "--out", tmp_path / to, "--to", to)
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    assert all(torch.equal(dense[name], weight) for name, weight in wide.state_dict().items())
    semi = load_semi_structured(tmp_path / "semi-structured", "cpu")
    assert all(torch.equal(w, wide.state_dict()[name]) for name, w in semi.state_dict().items())


@pytest.mark.parametrize("form", ["dense", "semi-structured", "compressed-tensors"])
def test_the_generation_config_comes_along(wide, tmp_path, form):
    folder = tmp_path / "from"
    if form == "compressed-tensors":
        shutil.copytree(VECTORS / "24-bf16", folder)
    elif form == "dense":
        wide.save_pretrained(folder)
    else:
        save_semi_structured(wide, folder)
    (folder / "generation_config.json").write_text('{"max_new_tokens": 77, "do_sample": true, "top_k": 7}')
    model = load_semi_structured(folder, "cpu") if form == "semi-structured" else load_any(folder)[0]
    export_dense(model, tmp_path / "out", folder)
    config = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (config["max_new_tokens"], config["do_sample"], config["top_k"]) == (77, True, 7)
    (folder / "generation_config.json").write_text('{"top_k": ')
    with pytest.raises(CheckpointError, match=r"generation_config\.json is damaged"):
        load_semi_structured(folder, "cpu") if form == "semi-structured" else load_any(folder)


def test_tokenizers_and_processors_come_along_in_every_form(wide, tmp_path, trisparse_command):
    folder = tmp_path / "from"
    save(wide, folder)
    names = [
        "chat_template.json",
        "additional_chat_templates/tool.jinja",
        "chat_templates/tool.jinja",
        "preprocessor_config.json",
        "sentencepiece.bpe.model",
        "tokenizer.json",
        "tokenizer_config.json",
        "video_preprocessor_config.json",
        "vocab.txt",
    ]
    for name in (*names, "modeling_evil.py", "other.bin"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    for to in ("dense", "semi-structured", "trisparse"):
        trisparse_command("export", folder, "--out", tmp_path / to, "--to", to)
        assert all((tmp_path / to / name).read_text() == name for name in names)
        assert not (tmp_path / to / "modeling_evil.py").exists()
        assert not (tmp_path / to / "other.bin").exists()
    assert "# trisparse" in (tmp_path / "trisparse" / "README.md").read_text()


def test_the_loader_in_the_docs_needs_torch_alone(wide, tmp_path):
    save_semi_structured(wide, tmp_path / "s")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S) if "def load" in block)
    assert "trisparse" not in code
    space = {}
    exec(code, space)
    model = space["load"](str(tmp_path / "s"), "cpu")
    ids = torch.arange(12).reshape(1, -1)
    assert torch.equal(model(ids).logits, wide(ids).logits)
    assert trisparse.__version__
