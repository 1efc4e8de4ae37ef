import json

import pytest
import yaml
from torch import nn

from trisparse.sparsity.allocation import ALLOCATIONS, ERK, OWL, PerLayer, UniformPlus, find_allocation
from trisparse.sparsity.pattern import NM, Rows, Unstructured
from trisparse.sparsity.targets import find_targets

MIXED = {"*.mlp.*": "2:4", "*.self_attn.*": "4:8", "*.0.*": "dense"}


HALF = Unstructured(0.5)


def patterns(values, model, pattern=HALF):
    return PerLayer(values).patterns(model, find_targets(model).found, pattern)


def test_the_last_match_decides(model_named):
    found = patterns(MIXED, model_named("llama"))
    assert found["model.layers.0.mlp.up_proj.weight"] is None
    assert found["model.layers.1.mlp.up_proj.weight"] == NM(2, 4)
    assert found["model.layers.2.self_attn.q_proj.weight"] == NM(4, 8)
    assert [one for name, one in found.items() if ".0." in name] == [None] * 7


def test_weights_without_a_match_get_the_sparsity_of_the_call(linears):
    found = patterns({"part1": 0.75, "part2": "25% rows"}, linears((4, 4), (4, 4), (4, 4)), NM(2, 4))
    assert list(found.values()) == [NM(2, 4), Unstructured(0.75), Rows(0.25)]


def test_a_name_that_matches_nothing_is_named(linears):
    with pytest.raises(ValueError, match=r"matches none of the weights to prune: \*\.mlp\.\*"):
        patterns({"part0": 0.5, "*.mlp.*": 0.5}, linears((4, 4)))


def test_inputs_that_m_does_not_divide_are_named_for_their_layers_alone(linears):
    model = linears((4, 6), (4, 8))
    assert patterns({"part1": "2:4"}, model)["part1.weight"] == NM(2, 4)
    with pytest.raises(ValueError, match=r"2:4 needs inputs divisible by 4.*part0\.weight"):
        patterns({"part*": "2:4"}, model)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "values must map name patterns"),
        ("2:4", "values must map name patterns"),
        ({1: 0.5}, "keys, got 1"),
        ({"a": 1.0}, r"allocation of 'a': sparsity must be in \[0, 1\), got 1.0, or 'dense'"),
        ({"a": "sparse"}, "allocation of 'a': sparsity 'sparse' is not understood"),
        ({"a": "50% global"}, "allocation of 'a': 50% global ranks all layers together"),
        ({"a": None}, "allocation of 'a': sparsity must be a number"),
    ],
)
def test_wrong_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        PerLayer(values)


def test_a_global_sparsity_for_the_rest_is_refused():
    with pytest.raises(ValueError, match="50% global is itself an allocation"):
        PerLayer(MIXED).check(Unstructured(0.5, "global"))


def test_what_was_given_does_not_change_it():
    values = dict(MIXED)
    allocation = PerLayer(values)
    values["*.mlp.*"] = 0.1
    assert allocation == PerLayer(MIXED)
    assert hash(allocation) == hash(PerLayer(MIXED))


def test_yaml_and_json_files(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({**MIXED, "*.1.*": 0.5}))
    # unquoted, 2:4 is a number of base 60 to YAML 1.1
    (tmp_path / "a.yaml").write_text('"*.mlp.*": 2:4\n"*.self_attn.*": 4:8\n"*.0.*": dense\n"*.1.*": 0.5\n')
    assert yaml.safe_load((tmp_path / "a.yaml").read_text())["*.mlp.*"] == 124
    for file in (tmp_path / "a.json", tmp_path / "a.yaml"):
        allocation = find_allocation(file)
        assert find_allocation(str(file)) == allocation
        assert str(allocation) == str(PerLayer({**MIXED, "*.1.*": 0.5}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("*.mlp.*: 2:4", "is neither JSON nor YAML"),
        ("- 2:4", "must map name patterns to sparsities"),
        ('"*.mlp.*": [2, 4]', "must map name patterns to sparsities"),
        ('"*.mlp.*": 4:2', r"a\.yaml: allocation of '\*\.mlp\.\*': n of an n:m pattern"),
        ("", "must map name patterns"),
    ],
)
def test_wrong_files(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        find_allocation(tmp_path / "a.yaml")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        find_allocation(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("erk", ERK()),
        ("ERK", ERK()),
        ("owl", OWL(5, 0.08)),
        ("owl:M=7", OWL(M=7)),
        ("owl: M = 7, lambda = 0.15", OWL(7, 0.15)),
        ("uniform+:last=0.9", UniformPlus(0.9)),
        (OWL(M=3), OWL(3)),
    ],
)
def test_names_and_parameters(text, expected):
    assert find_allocation(text) == expected
    assert find_allocation(str(expected)) == expected


def test_every_name_is_found_and_reads_back():
    for name, kind in ALLOCATIONS.items():
        assert isinstance(find_allocation(name), kind)
        assert find_allocation(str(find_allocation(name))) == kind()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("rkl", r"allocation must be one of uniform, uniform\+, global, erk, lamp, owl, or a .*file, got 'rkl'"),
        ("owl:lambda_=0.1", "owl has no parameter 'lambda_': it has M, lambda"),
        ("erk:M=5", "erk has no parameter 'M': it has none"),
        ("owl:M=five", "M must be a number, got 'five'"),
        ("owl:M=0", "M must be a number in"),
        (5, "must be a name, a file or an Allocation, got 5"),
    ],
)
def test_wrong_names_and_parameters(wrong, message):
    with pytest.raises(ValueError, match=message):
        find_allocation(wrong)


def test_layers_of_any_module_can_be_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    found = patterns({"0": 0.25, "2.weight": "1:4"}, model)
    assert list(found.values()) == [Unstructured(0.25), NM(1, 4)]
