import pytest
import torch

from trisparse.sparsity.metric import METRICS, Metric
from trisparse.sparsity.metric.fingerprint import _masks, _sample, fingerprint
from trisparse.sparsity.metric.parser import parse


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("abs(W) * X", "X * abs(W)"),
        ("sqr(W) * sqr(X)", "abs(W) * X"),
        ("abs(W) * G * X", "abs(W) * (G * X)"),  # rounds otherwise
        ("W / G", "W * (1 / G)"),
        ("sqr(W + G)", "sqr(W) + 2 * W * G + sqr(G)"),
        ("abs(W) * (G + X)", "abs(W) * G + abs(W) * X"),
        ("log(exp(sqrt(W))) * 1", "sqrt(W)"),
    ],
)
def test_the_same_metric_written_otherwise(one, other):
    assert fingerprint(parse(one)) == fingerprint(parse(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("W", "abs(W)"),
        ("W", "-W"),
        ("abs(W) * X", "abs(W) * sqr(X)"),
        ("abs(W) * X", "abs(W) * sqrt(X)"),
        ("abs(W) + G", "abs(W)"),
        ("abs(W) * mms(G)", "abs(W) * G"),
        ("sqr(sqr(W * X))", "sqr(sqr(W * G))"),  # spread over many decades
        ("W / (0 * W)", "W"),
    ],
)
def test_other_metrics(one, other):
    assert fingerprint(parse(one)) != fingerprint(parse(other))


def test_library_is_told_apart():
    digests = [metric.fingerprint() for metric in METRICS.values()]
    assert len(set(digests)) == len(digests)
    assert all(len(digest) == 64 and int(digest, 16) for digest in digests)


def test_nan_equals_nothing_else():
    broken = [parse("exp(100) * W * 0"), parse("exp(100) * (W - W)")]
    assert all(node.evaluate(*_sample()[0]).isnan().any() for node in broken)
    assert fingerprint(broken[0]) != fingerprint(broken[1])
    assert fingerprint(broken[0]) == fingerprint(broken[0])


def test_a_metric_is_fingerprinted_in_its_simplified_form():
    assert Metric.parse("zsn(sqr(sqr(sqr(W))))").fingerprint() == METRICS["magnitude"].fingerprint()


def test_scores_within_rounding_of_the_threshold_go_by_index():
    score = torch.arange(48.0, 0, -1)[None].clone()
    score[0, 23], score[0, 24] = 25, 25 * (1 + 1e-7)
    other = score.clone()
    other[0, 23], other[0, 24] = 25 * (1 + 1e-7), 25
    assert _masks(score) == _masks(other)
    keep = torch.frombuffer(bytearray(_masks(score)), dtype=torch.bool).view(3, 48)
    assert keep.sum(1).tolist() == [24, 36, 12]
    assert keep[0, :24].all()


def test_the_sample_has_equal_magnitudes_and_is_never_changed():
    for w, g, x in _sample():
        assert torch.equal(w[:, 8:16], w[:, :8])
        assert torch.equal(w[:, 16:24], -w[:, :8])
        assert (g > 0).all()
        assert (x > 0).all()
    before = [[value.clone() for value in matrix] for matrix in _sample()]
    fingerprint(parse("zsn(abs(W) * X) + mms(G)"))
    assert all(
        torch.equal(a, b) for one, two in zip(before, _sample(), strict=True) for a, b in zip(one, two, strict=True)
    )
