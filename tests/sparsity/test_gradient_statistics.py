"""Files of gradient norms: round trips, what does not fit, and the cache."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from trisparse.sparsity import gradient_cache
from trisparse.sparsity.batches import calibration_batches
from trisparse.sparsity.gradient_cache import cached_gradient_norms, gradient_key
from trisparse.sparsity.gradient_statistics import GradientFileError, GradientStatistics
from trisparse.sparsity.gradients import gradient_norms
from trisparse.sparsity.targets import find_targets


def measure(model, tokens, **options):
    targets = find_targets(model)
    batches = calibration_batches(model, [{"input_ids": tokens}])
    return targets.found, gradient_norms(model, targets, batches, progress=False, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_written_files_hold_the_same(model_named, tokens, tmp_path, dtype):
    model = model_named("gpt2")
    targets, measured = measure(model, tokens, dtype=dtype)
    _, written = measure(model, tokens, dtype=dtype, path=tmp_path / "new" / "written.safetensors")
    loaded = GradientStatistics.load(measured.save(tmp_path / "saved.safetensors"), targets)
    again = GradientStatistics.load(loaded.save(tmp_path / "again.safetensors"))
    assert measured.info == written.info == loaded.info == again.info
    for target in targets:
        norm = measured.norm(target)
        assert norm.dtype == dtype
        assert norm.shape == target.matrix().shape
        for other in (written, loaded, again):
            assert torch.equal(other.norm(target), norm)
    assert load_file(tmp_path / "saved.safetensors").keys() == {target.name for target in targets}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.safetensors", "new", "saved.safetensors"]


def test_unreached_targets_stay_unreached_in_a_file(model_named, tokens, tmp_path):
    model = model_named("llama")
    layer = model.model.layers[1].mlp
    layer.forward = lambda x: layer.down_proj(x[..., :1].expand(*x.shape[:-1], 48))
    for mode in ("whole", "block"):
        targets, statistics = measure(model, tokens, mode=mode, path=tmp_path / f"{mode}.safetensors")
        loaded = GradientStatistics.load(tmp_path / f"{mode}.safetensors", targets)
        assert loaded.info == statistics.info
        assert len(loaded.info.unreached) == 2
        for target in targets:
            assert (loaded.norm(target) is None) == (target.name in loaded.info.unreached)


def test_a_file_of_another_model_names_the_first_difference(model_named, tokens, tmp_path):
    _, statistics = measure(model_named("llama"), tokens)
    path = statistics.save(tmp_path / "norms.safetensors")
    other = find_targets(model_named("gpt2")).found
    with pytest.raises(ValueError, match=r"they have no transformer\.h\.0\.attn\.c_attn\.weight"):
        GradientStatistics.load(path, other)
    with pytest.raises(ValueError, match=r"they have no transformer\.h\.1\.attn\.c_proj\.weight"):
        statistics.norm(next(t for t in other if t.name.endswith("1.attn.c_proj.weight")))
    experts = model_named("qwen3")
    experts.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(torch.rand(44, 32))
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is \[44, 32\], theirs \[48, 32\]"):
        GradientStatistics.load(path, find_targets(experts).found)


def test_files_that_are_none_of_ours(model_named, tokens, tmp_path):
    path = tmp_path / "norms.safetensors"
    with pytest.raises(FileNotFoundError, match="no file of gradient norms"):
        GradientStatistics.load(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(GradientFileError, match="holds no gradient norms, but a"):
        GradientStatistics.load(path)
    targets, statistics = measure(model_named("llama"), tokens)
    statistics.save(path)
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"version": "1"', b'"version": "9"'))
    with pytest.raises(GradientFileError, match="has version 9, this trisparse reads 1"):
        GradientStatistics.load(path)
    path.write_bytes(content[:-1])
    with pytest.raises(GradientFileError, match="is damaged, or no safetensors file"):
        GradientStatistics.load(path)
    path.write_bytes(content)
    loaded = GradientStatistics.load(path)
    path.unlink()
    with pytest.raises(GradientFileError, match="cannot be read any more"):
        loaded.norm(targets[0])


def test_a_failed_measurement_leaves_no_file(model_named, tokens, tmp_path):
    model = model_named("llama")
    model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="the loss of sequence 0 is nan"):
        measure(model, tokens, path=tmp_path / "norms.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_cache_measures_once(model_named, tokens, tmp_path, monkeypatch):
    monkeypatch.setenv("TRISPARSE_CACHE", str(tmp_path))
    model = model_named("llama")
    targets = find_targets(model)
    batches = calibration_batches(model, [{"input_ids": tokens}])
    first = cached_gradient_norms(model, targets, batches, progress=False)
    monkeypatch.setattr(gradient_cache, "gradient_norms", lambda *a, **k: pytest.fail("measured again"))
    second = cached_gradient_norms(model_named("llama"), targets, batches, mode="whole")
    plain = gradient_norms(model, targets, batches, progress=False)
    for target in targets.found:
        assert torch.equal(first.norm(target), plain.norm(target))
        assert torch.equal(second.norm(target), plain.norm(target))
    assert [path.suffix for path in (tmp_path / "gradients").iterdir()] == [".safetensors"]


def test_the_key_tells_apart_all_that_matters(model_named, tokens):
    def key(change=None, data=tokens, name="llama", include=None, **dtypes):
        model = model_named(name)
        if change is not None:
            change(model)
        batches = calibration_batches(model, [{"input_ids": part} for part in data.split(split)])
        return gradient_key(model, find_targets(model, include=include), batches, **dtypes)

    def nudge(model):
        weight = model.model.layers[2].mlp.down_proj.weight.data
        weight[-1, -1] = torch.nextafter(weight[-1, -1], torch.tensor(1.0))

    def rename(model):
        model.config._name_or_path = "elsewhere"

    split = 8
    same = key()
    assert same == key()
    assert same == key(rename)
    split = 3
    assert same == key()
    others = [
        key(nudge),
        key(lambda model: setattr(model.config, "rms_norm_eps", 1e-3)),
        key(data=tokens.flip(0)),
        key(data=tokens[:-1]),
        key(name="mistral"),
        key(include="model.layers.0"),
        key(dtype=torch.bfloat16),
        key(compute_dtype=torch.float32),
    ]
    assert len({same, *others}) == 9
