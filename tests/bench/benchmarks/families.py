"""The small sizes of the families under pytest-benchmark: `make bench`. Its name keeps `make test` from collecting it.

Each contestant of a case is checked before it is timed, as by `trisparse bench run`.
"""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from trisparse.bench.families import prune
from trisparse.bench.families.prune_process import prune_model
from trisparse.bench.registry import Case, Options, benchmarks
from trisparse.bench.runner import right_contestants
from trisparse.sparsity.pattern import parse_pattern

ROUNDS = 5
# Which of the quick cases of each family are small; a family is taken where it is registered.
SMALL = {"linear": "", "select": "1024x1024"}
_SAMPLES, _SEQ_LEN = 4, 64


def pytest_generate_tests(metafunc):
    if "case" not in metafunc.fixturenames:
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = []
    for name, only in SMALL.items():
        if name not in benchmarks():
            continue
        for case in benchmarks()[name].run(Options(quick=True, device=device, only=only)):
            if isinstance(case, Case) and only in case.name:
                contestants = case.contestants
                found += [pytest.param(case, one, id=f"{name}: {case.name}: {one}") for one in contestants]
    metafunc.parametrize(("case", "contestant"), found)


def test_family(benchmark, case, contestant):
    torch.compiler.reset()  # torch gives up on a function that it compiled for too many shapes
    wrong = []
    only = {contestant: case.contestants[contestant]}
    right = right_contestants(Case(case.name, {}, only, case.reference, case.baseline, case.check), wrong.append)
    assert not wrong

    def call():
        right[contestant]()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    benchmark.group = case.name
    benchmark.pedantic(call, rounds=ROUNDS, warmup_rounds=1)


@pytest.fixture(scope="module")
def small_llama():
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**shape, vocab_size=512, max_position_embeddings=_SEQ_LEN)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("method", "pattern", "how"),
    [(method, pattern, how) for method, pattern, ways in prune.QUICK_CASES for how in ways],
)
def test_prune(benchmark, small_llama, method, pattern, how, tmp_path_factory, monkeypatch):
    tokens = torch.randint(0, 512, (_SAMPLES, _SEQ_LEN), generator=torch.Generator().manual_seed(0))
    job = prune.Job(method, pattern, how, "small", "cpu", "float32", _SAMPLES, _SEQ_LEN, 0)
    pruned = []

    def setup():
        monkeypatch.setenv("TRISPARSE_CACHE", str(tmp_path_factory.mktemp("cache")))  # no gradients of the round before
        pruned.append(copy.deepcopy(small_llama))
        return (pruned[-1], tokens, job), {}

    benchmark.group = f"prune: {method} {pattern}, 2 blocks of 256"
    benchmark.pedantic(prune_model, setup=setup, rounds=ROUNDS, warmup_rounds=1)
    weights = [module.weight for module in pruned[-1].model.layers.modules() if isinstance(module, torch.nn.Linear)]
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    assert abs(zeros - parse_pattern(pattern).sparsity) < prune.PRUNED_WITHIN
