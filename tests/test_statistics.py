"""Intervals, paired tests, correlations and similarities: against scipy, naive forms and counts by hand."""

import numpy as np
import pytest
import scipy.stats
import torch

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
    narrow = statistics.bootstrap_interval(values, confidence=0.5)
    assert low < narrow[1] < mean < narrow[2] < high and narrow == statistics.bootstrap_interval(values, confidence=0.5)
    many = np.random.default_rng(1).normal(size=50_000)  # 80 draws at a time
    mean, low, high = statistics.bootstrap_interval(many, num_samples=300)
    assert high - low == pytest.approx(2 * 1.96 / 50_000**0.5, rel=0.2) and low < mean < high


def test_one_seed_against_the_paired_t_test():
    generator = np.random.default_rng(0)
    baseline = generator.normal(30, 15, size=200)
    for shift in (0.15, 0.0, -0.15):
        values = baseline + generator.normal(shift, 1.0, size=200)
        found = statistics.compare(values, baseline, num_samples=20_000)
        expected = scipy.stats.ttest_rel(values, baseline)
        assert found["difference"] == pytest.approx((values - baseline).mean())
        assert found["p_value"] == pytest.approx(expected.pvalue, abs=0.02)
        assert (found["low"], found["high"]) == pytest.approx(tuple(expected.confidence_interval(0.95)), abs=0.01)
    better = statistics.compare(baseline + 1, baseline)
    assert better["low"] == pytest.approx(1) and better["p_value"] == pytest.approx(2 / 1001)


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
    rotation = np.linalg.qr(generator.normal(size=(6, 6)))[0]
    found = statistics.cka([torch.tensor(states) for states in (x, y, x @ rotation * 7.0 - 5.0)])
    assert found[0, 1] == found[1, 0] == pytest.approx(naive_cka(x, y), rel=1e-9)
    assert np.allclose(np.diag(found), 1.0) and found[2, 1] == pytest.approx(found[0, 1], rel=1e-9)
    wide = statistics.cka([torch.tensor(generator.normal(size=(64, 256))) for _ in range(2)])
    assert abs(wide[0, 1]) < 0.1  # unrelated; the plain estimator says about 0.8 here


def test_rank_correlation():
    perfect = statistics.rank_correlation([1.0, 2.0, 4.0, 8.0, 9.0, 11.0], [5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    assert perfect["rho"] == perfect["low"] == perfect["high"] == pytest.approx(-1.0)
    assert perfect["p_value"] == pytest.approx(2 / 720, rel=1e-6)  # both extremes of all orders

    x, y = [3.0, 1.0, 2.0, 5.0, 4.0, 4.0], [1.0, 1.5, 0.0, 2.0, 3.0, 2.5]
    found = statistics.rank_correlation(x, y)
    assert found["rho"] == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    assert found["low"] <= found["rho"] <= found["high"] and 0 < found["p_value"] <= 1
    for few in (([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]), ([1.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0])):
        assert statistics.rank_correlation(*few)["rho"] is None


# --------------------------------------------------------------------------------------------- documents and seeds


def planted(num_seeds: int, seed_sd: float = 1.0, num_documents: int = 60, seed: int = 0) -> np.ndarray:
    """Return scores (seeds, documents) around 0 with effects of seeds, of documents, and of both together."""
    generator = np.random.default_rng(seed)
    seeds, documents = generator.normal(0, seed_sd, (num_seeds, 1)), generator.normal(size=(1, num_documents))
    return seeds + documents + generator.normal(size=(num_seeds, num_documents))


@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        (statistics.compare, (np.ones(9), np.ones(8)), "8 of the baseline"),
        (statistics.compare, (planted(2), planted(3)), "2 seeds against 3"),
        (statistics.bootstrap_interval, (np.ones((1, 0)),), "no values"),
        (statistics.compare, ([1.0, np.nan, 3.0], np.zeros(3)), "not finite"),
        (statistics.cka, ([torch.randn(3, 4)],), "3 tokens"),
    ],
)
def test_what_cannot_be_compared_is_rejected(function, arguments, named):
    with pytest.raises((ValueError, InputError), match=named):
        function(*arguments)


def naive_interval(values: np.ndarray, num_samples: int) -> tuple[float, float, float]:
    """The same interval by loops over documents and seeds, and the table of a two-way analysis of variance."""
    (num_seeds, num_documents), mean = values.shape, values.mean()
    of_seeds, of_documents = values.mean(1), values.mean(0)
    between = num_documents * sum((of_seeds - mean) ** 2) / (num_seeds - 1)
    squares = 0.0
    for s in range(num_seeds):
        for d in range(num_documents):
            squares += (values[s, d] - of_seeds[s] - of_documents[d] + mean) ** 2
    residual = squares / ((num_seeds - 1) * (num_documents - 1))
    error = (max(between - residual, 0) / (num_seeds * num_documents)) ** 0.5
    reach = {2: 12.706205, 3: 4.302653, 5: 2.776445}[num_seeds] * error  # a table of Student's t
    low, high = statistics.bootstrap_interval(of_documents, num_samples)[1:]
    return mean, mean - ((mean - low) ** 2 + reach**2) ** 0.5, mean + ((high - mean) ** 2 + reach**2) ** 0.5


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
@pytest.mark.parametrize("seed_sd", [0.0, 0.2, 2.0])
def test_interval_over_seeds_against_loops(num_seeds, seed_sd):
    values, baseline = planted(num_seeds, seed_sd), planted(num_seeds, seed=1)
    assert statistics.bootstrap_interval(values, 300) == pytest.approx(naive_interval(values, 300), rel=1e-6)
    test, expected = statistics.compare(values, baseline, 300), naive_interval(values - baseline, 300)
    assert (test["difference"], test["low"], test["high"]) == pytest.approx(expected, rel=1e-6)
    assert (test["p_value"] < 0.05) == (statistics.effect_sign(test) != 0)


def test_properties_of_a_comparison():
    one, baseline = planted(1), planted(1, seed=1)
    test = statistics.compare(one, baseline)
    assert test["seeds"] == 1 and test == statistics.compare(one[0], baseline[0])
    same = statistics.compare(planted(3), planted(3))
    assert (same["difference"], same["low"], same["high"], same["p_value"]) == (0, 0, 0, 1)
    equal = statistics.compare(np.repeat(one, 3, axis=0), baseline)  # seeds that change nothing add nothing
    assert {**equal, "seeds": 1} == pytest.approx(test) and equal["seeds"] == 3


@pytest.mark.parametrize("seed_sd", [0.0, 0.15, 3.0])  # none, as much as documents, all that counts
def test_coverage_with_three_seeds(seed_sd):
    inside = []
    for repetition in range(700):
        _, low, high = statistics.bootstrap_interval(planted(3, seed_sd, seed=repetition), 300)
        inside.append(low <= 0 <= high)
    assert 0.93 <= np.mean(inside) <= 0.97


def test_share_of_a_baseline_against_a_bootstrap_of_the_ratio():
    generator = np.random.default_rng(0)
    baseline = generator.gamma(2.0, 5.0, size=600)
    values = 0.9 * baseline + generator.normal(0, 3, size=600)
    found = statistics.share_of(values, baseline)
    drawn = generator.integers(600, size=(5000, 600))
    low, high = np.quantile(values[drawn].mean(1) / baseline[drawn].mean(1), [0.025, 0.975])
    assert found["share"] == pytest.approx(values.mean() / baseline.mean())
    assert (found["share_low"], found["share_high"]) == pytest.approx((low, high), abs=0.003)
    assert not found["not_worse_5_percent"] and statistics.format_share(found)[1] == "refuted"
    assert statistics.share_of(baseline, baseline) == {
        "share": 1.0, "share_low": 1.0, "share_high": 1.0, "not_worse_5_percent": True,
    }  # fmt: skip
    few = statistics.share_of(values[:20] + 1, baseline[:20])  # nothing is shown of a score like the baseline's
    assert few["share_low"] < 0.95 < few["share_high"] and statistics.format_share(few)[1] == "not shown"
    assert statistics.share_of(values, np.zeros(600))["share"] is None
    seeds = statistics.share_of(np.stack([values + 0.5, values, values - 0.5]), baseline)
    assert seeds["share"] == pytest.approx(found["share"]) and seeds["share_low"] < found["share_low"] - 0.05


def test_detectable_difference():
    # 1.96 + 0.84 standard errors; the rough figures of ROUGE-2 are those of the 2,200 test documents of pydocs.
    assert statistics.detectable_difference(2200, 1) == pytest.approx(2.8016 * 12.7 / 2200**0.5, rel=1e-4)
    for num_seeds, seed_sd in ((1, 0.0), (3, 0.3)):
        size = statistics.detectable_difference(60, num_seeds, 1.0, seed_sd)
        shown = []
        for seed in range(400):
            generator = np.random.default_rng(seed)
            values = size + generator.normal(0, seed_sd, (num_seeds, 1)) + generator.normal(size=60)
            shown.append(statistics.compare(values, np.zeros(60), 300)["low"] > 0)
        assert np.mean(shown) == pytest.approx(0.8, abs=0.05)
    assert f"{0.28016 * 5 * (60 / 59) ** 0.5:.2f}" in statistics.before_training(100, 1, [0.0, 10.0] * 30)
    for differences in ([0.0] * 60, [0.0, 10.0]):  # equal systems, few documents
        assert "12.7" in statistics.before_training(100, 1, differences)


def test_words_follow_the_interval():
    worse = {"difference": -0.5, "low": -0.9, "high": -0.1}
    for change, sign in (({}, -1), ({"high": 0.04}, 0), ({"low": 0.04, "high": 0.9}, 1)):
        test = worse | change
        assert statistics.effect_sign(test) == sign
        assert ("not shown" in statistics.how_sure(test)) == (sign == 0)
        assert ("loses" in statistics.format_comparison("kd", test, "sft")) == (sign < 0)
        assert ("beats" in statistics.format_comparison("kd", test, "sft", lower_is_better=True)) == (sign < 0)
    for low in ("0.04", "0.004"):  # not "0.0"
        small = worse | {"low": float(low), "high": 0.9}
        assert f"({low} to" in statistics.how_sure(small)
        assert f"(+{low} to" in statistics.format_comparison("kd", small, "sft")


def test_ratio_of_means_over_different_documents_against_the_delta_method():
    generator = np.random.default_rng(0)
    values, baseline = generator.gamma(2.0, 6.0, size=900), generator.gamma(2.0, 5.0, size=400)
    ratio, low, high = statistics.ratio_of_means(values, baseline)
    errors = [scores.std(ddof=1) / scores.mean() / len(scores) ** 0.5 for scores in (values, baseline)]
    reach = 1.96 * ratio * np.hypot(*errors)
    assert ratio == pytest.approx(values.mean() / baseline.mean())
    assert (low, high) == pytest.approx((ratio - reach, ratio + reach), abs=0.02)
