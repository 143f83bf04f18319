"""Intervals, paired tests, correlations and similarities: against scipy, naive forms and counts by hand."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from scipy.stats import spearmanr

from distill_utils.artifacts import InputError
from distill_utils.evaluation import statistics


def test_bootstrap_interval_against_scipy_and_normal_theory():
    values = np.random.default_rng(1).gamma(2.0, 10.0, size=400)
    mean, low, high = statistics.bootstrap_interval(values, num_samples=20_000)
    settings = {"n_resamples": 20_000, "method": "percentile", "rng": np.random.default_rng(2)}
    expected = scipy.stats.bootstrap((values,), np.mean, **settings).confidence_interval
    error = values.std() / len(values) ** 0.5
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.06 * error)
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.15 * error)
    assert statistics.bootstrap_interval(values, seed=3) == statistics.bootstrap_interval(values, seed=3)
    narrow = statistics.bootstrap_interval(values, confidence=0.5)
    assert low < narrow[1] < mean < narrow[2] < high


def test_bootstrap_in_several_parts_is_still_a_bootstrap():
    values = np.random.default_rng(1).normal(size=50_000)  # 80 draws at a time
    mean, low, high = statistics.bootstrap_interval(values, num_samples=300)
    assert high - low == pytest.approx(2 * 1.96 / 50_000**0.5, rel=0.2) and low < mean < high


def test_paired_test_sign_and_p_value():
    generator = np.random.default_rng(0)
    baseline = generator.normal(30, 15, size=200)
    for shift in (0.15, 0.0, -0.15):
        values = baseline + generator.normal(shift, 1.0, size=200)
        found = statistics.paired_test(values, baseline, num_samples=20_000)
        expected = scipy.stats.ttest_rel(values, baseline)
        assert found["difference"] == pytest.approx((values - baseline).mean())
        assert found["low"] < found["difference"] < found["high"]
        assert found["p_value"] == pytest.approx(expected.pvalue, abs=0.02)
        assert (found["low"], found["high"]) == pytest.approx(tuple(expected.confidence_interval(0.95)), abs=0.01)
    better = statistics.paired_test(baseline + 1, baseline)
    assert better["low"] == pytest.approx(1) and better["p_value"] == pytest.approx(2 / 1001)
    assert statistics.paired_test(baseline, baseline)["p_value"] == 1
    with pytest.raises(ValueError, match="same documents"):
        statistics.paired_test(baseline, baseline[:10])


def test_holm_by_hand():
    assert statistics.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0] and statistics.holm([]) == []


def naive_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Debiased CKA from whole kernels in float64, as Song et al. write the unbiased HSIC."""

    def hsic(k, m):
        k, m, n = k - np.diag(np.diag(k)), m - np.diag(np.diag(m)), len(k)
        ones = np.ones(n)
        total = np.trace(k @ m) + (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
        return (total - 2 / (n - 2) * (ones @ k @ m @ ones)) / (n * (n - 3))

    k, m = x @ x.T, y @ y.T
    return hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))


def test_cka_equals_its_definition_and_keeps_its_invariances():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(40, 6)) + 3.0
    y = x @ generator.normal(size=(6, 9)) + generator.normal(size=(40, 9))
    found = statistics.cka([torch.tensor(x), torch.tensor(y)])
    assert found[0, 1] == found[1, 0] == pytest.approx(naive_cka(x, y), rel=1e-9)
    assert np.allclose(np.diag(found), 1.0)
    rotation = np.linalg.qr(generator.normal(size=(6, 6)))[0]
    turned = statistics.cka([torch.tensor(x @ rotation * 7.0 - 5.0), torch.tensor(y)])
    assert turned[0, 1] == pytest.approx(found[0, 1], rel=1e-9)


def test_cka_of_unrelated_states_is_small_even_when_they_are_wide():
    generator = torch.Generator().manual_seed(0)
    found = statistics.cka([torch.randn(64, 256, generator=generator) for _ in range(2)])
    assert abs(found[0, 1]) < 0.1  # the plain estimator says about 0.8 here
    with pytest.raises(InputError, match="3 tokens are too few"):
        statistics.cka([torch.randn(3, 4)])


def test_rank_correlation():
    perfect = statistics.rank_correlation([1.0, 2.0, 4.0, 8.0, 9.0, 11.0], [5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    assert perfect["rho"] == perfect["low"] == perfect["high"] == pytest.approx(-1.0)
    assert perfect["p_value"] == pytest.approx(2 / 720, rel=1e-6)  # both extremes of all orders

    x, y = [3.0, 1.0, 2.0, 5.0, 4.0, 4.0], [1.0, 1.5, 0.0, 2.0, 3.0, 2.5]
    found = statistics.rank_correlation(x, y)
    assert found["rho"] == pytest.approx(spearmanr(x, y).statistic)
    assert found["low"] <= found["rho"] <= found["high"] and 0 < found["p_value"] <= 1
    for few in (([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]), ([1.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0])):
        assert statistics.rank_correlation(*few)["rho"] is None


def test_a_comparison_needs_an_interval_without_zero_and_seeds_that_agree():
    noise = np.random.default_rng(0).normal(size=80)
    better, worse = 1.0 + noise, noise
    test = statistics.compare(np.stack([better, better]), np.stack([worse, worse]))
    assert test["difference"] == pytest.approx(1.0) and test["seeds"] == 2 and test["seeds_agree"]
    assert statistics.effect_sign(test) == 1 and statistics.effect_sign(test | {"seeds_agree": False}) == 0
    assert (
        statistics.effect_sign({"low": -1.0, "high": 0.5}) == 0
        and statistics.effect_sign({"low": -2, "high": -1}) == -1
    )
    assert statistics.compare(better, np.stack([worse, worse]))["seeds_agree"] is None
    fixed = {"difference": -0.5, "low": -0.9, "high": -0.1, "seeds_agree": True}
    assert statistics.format_comparison("kd", fixed, "sft") == "kd loses to sft (-0.50, -0.90 to -0.10)"
    assert statistics.format_comparison("kd", fixed, "sft", lower_is_better=True).startswith("kd beats sft")
