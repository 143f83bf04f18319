"""Intervals, paired tests, correlations and similarities: what a difference between two systems is worth.

Out of scope: what is scored (metrics.py, tasks.py). Most functions take plain arrays, one value per document.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from distill_utils.artifacts import InputError


def bootstrap_interval(
    values: Sequence[float], num_samples: int = 1000, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Return (mean, low, high): the percentile bootstrap interval over documents (not over training seeds)."""
    means = _bootstrap_means(values, num_samples, seed)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(np.mean(values)), float(low), float(high)


def paired_test(values: Sequence[float], baseline: Sequence[float], num_samples: int = 1000, seed: int = 0) -> dict:
    """Compare two systems on the same documents by the paired bootstrap.

    `difference` is the mean of values - baseline, `low` and `high` its 95 % percentile interval. `p_value` is two-sided
    for "no difference": twice the smaller share of draws in which the mean difference is at most 0, or at least 0, with
    one draw added so that it is never 0.
    """
    if len(values) != len(baseline):
        raise ValueError(f"{len(values)} values for {len(baseline)} of the baseline: score the same documents")
    differences = np.asarray(values, dtype=float) - np.asarray(baseline, dtype=float)
    means = _bootstrap_means(differences, num_samples, seed)
    low, high = np.quantile(means, [0.025, 0.975])
    tail = min((means <= 0).sum(), (means >= 0).sum())
    p_value = min(1.0, 2 * (tail + 1) / (num_samples + 1))
    return {"difference": float(differences.mean()), "low": float(low), "high": float(high), "p_value": float(p_value)}


def compare(values: np.ndarray, baseline: np.ndarray) -> dict:
    """Compare two systems with several seeds each: `paired_test` of their means over seeds, document by document.

    Both are (seeds, documents). Documents are many and seeds few, so an interval over documents can exclude 0 where
    another seed would turn the difference round: `seeds_agree` says whether it has one sign in every seed, and is None
    where the two have different numbers of seeds.
    """
    ours, theirs = np.atleast_2d(values), np.atleast_2d(baseline)
    agree = None
    if len(ours) == len(theirs):
        signs = np.sign((ours - theirs).mean(1))
        agree = bool((signs == signs[0]).all())
    return {**paired_test(ours.mean(0), theirs.mean(0)), "seeds": len(ours), "seeds_agree": agree}


def share_of_gap(
    ours: Mapping[str, np.ndarray], low: Mapping[str, np.ndarray], high: Mapping[str, np.ndarray],
    num_samples: int = 1000,
) -> dict:  # fmt: skip
    """Return which share of the way from `low` to `high` a system goes, mean over tasks, with its interval.

    Each is {task: one score per document}. Every draw takes new documents of every task. A task where `high` is not
    above `low` says nothing and is left out; `tasks` names those that count.
    """
    generator, shares, used = np.random.default_rng(0), [], []
    for task, scores in ours.items():
        if paired_test(high[task], low[task])["low"] <= 0:
            continue
        gain, gap = scores - low[task], high[task] - low[task]
        drawn = generator.integers(len(gain), size=(num_samples, len(gain)))
        drawn_shares = gain[drawn].mean(1) / np.maximum(gap[drawn].mean(1), 1e-9)
        shares.append(np.append(drawn_shares, gain.mean() / gap.mean()))
        used.append(task)
    if not used:
        return {"share": None, "low": None, "high": None, "tasks": []}
    means = np.mean(shares, axis=0)
    interval = np.quantile(means[:-1], [0.025, 0.975])
    return {"share": float(means[-1]), "low": float(interval[0]), "high": float(interval[1]), "tasks": used}


def effect_sign(test: Mapping) -> int:
    """Return 1 or -1 for a difference whose interval excludes 0 and whose seeds agree on the sign, else 0."""
    if test.get("seeds_agree") is False:
        return 0
    return int(test["low"] > 0) - int(test["high"] < 0)


def format_interval(test: Mapping, decimals: int = 2) -> str:
    """Return a paired difference with its interval, as in "+0.61, 0.14 to 1.12"."""
    difference, low, high = (f"{test[name]:.{decimals}f}" for name in ("difference", "low", "high"))
    return f"{'' if difference.startswith('-') else '+'}{difference}, {low} to {high}"


def format_comparison(name: str, test: Mapping, other: str, decimals: int = 2, lower_is_better: bool = False) -> str:
    """Return a comparison in words with its interval: "kd beats sft (+0.61, 0.14 to 1.12)"."""
    sign = -effect_sign(test) if lower_is_better else effect_sign(test)
    verb = {1: "beats", -1: "loses to", 0: "cannot be separated from"}[sign]
    seeds = "; seeds disagree on the sign" if test.get("seeds_agree") is False else ""
    return f"{name} {verb} {other} ({format_interval(test, decimals)}{seeds})"


def _bootstrap_means(values: Sequence[float], num_samples: int, seed: int) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    if not len(values):
        raise ValueError("no values to draw from: score at least one document")
    generator = np.random.default_rng(seed)
    rows = max(1, 4_000_000 // len(values))  # draws at a time, for memory
    sizes = [min(rows, num_samples - start) for start in range(0, num_samples, rows)]
    draws = (generator.integers(len(values), size=(size, len(values))) for size in sizes)
    return np.concatenate([values[drawn].mean(axis=1) for drawn in draws])


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's (1979) adjusted p-values: how surprising each is, given how many were looked at."""
    order, worst, adjusted = np.argsort(p_values), 0.0, [0.0] * len(p_values)
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = worst
    return adjusted


def input_output_similarity(states: Sequence[Tensor]) -> list[float]:
    """Return of each layer the mean cosine between its input and its output; near 1, the layer changes little."""
    pairs = zip(states[:-1], states[1:], strict=True)
    return [torch.cosine_similarity(before, after, dim=-1).mean().item() for before, after in pairs]


def cka(states: Sequence[Tensor]) -> np.ndarray:
    """Return the linear CKA between all pairs of states, debiased; 1 on the diagonal, about 0 when unrelated.

    Kornblith et al. 2019, with the unbiased estimator of HSIC (Song et al. 2012), which does not grow with the width
    where tokens are few. It is computed from (dim, dim) products: no (tokens, tokens) matrix is built. Unchanged by
    rotations and by scaling. Raises InputError for fewer than four tokens.
    """
    num = len(states[0])
    if num < 4:
        raise InputError(f"{num} tokens are too few to compare layers: give at least 4")
    centred = [state.double() - state.double().mean(0) for state in states]  # (tokens, dim); HSIC ignores the mean
    squares = [state.square().sum(1) for state in centred]  # the kernel's diagonal, which the estimator leaves out
    hsic = np.zeros((len(states), len(states)))
    for i, (one, a) in enumerate(zip(centred, squares, strict=True)):
        for j, (two, b) in enumerate(zip(centred[: i + 1], squares[: i + 1], strict=True)):
            # Centred, every row of a kernel sums to 0, so without its diagonal to -a.
            value = (one.T @ two).square().sum() - (a * b).sum()
            value += a.sum() * b.sum() / ((num - 1) * (num - 2)) - 2 * (a * b).sum() / (num - 2)
            hsic[i, j] = hsic[j, i] = value.item()
    own = np.sqrt(np.clip(np.diag(hsic), 1e-30, None))
    return hsic / np.outer(own, own)


def rank_correlation(
    scores: Sequence[float], outcomes: Sequence[float], num_samples: int = 2000, seed: int = 0
) -> dict[str, float | None]:
    """Return Spearman's `rho` of two values per map, its 95 % bootstrap interval over maps, and a `p_value`.

    All None with fewer than four maps or where one side does not vary: then nothing can be said.
    """
    x, y = np.asarray(scores, dtype=float), np.asarray(outcomes, dtype=float)
    if len(x) < 4 or not np.ptp(x) or not np.ptp(y):
        return {"maps": len(x), "rho": None, "low": None, "high": None, "p_value": None}
    drawn = np.random.default_rng(seed).integers(len(x), size=(num_samples, len(x)))
    low, high = np.nanquantile(_spearman(x[drawn], y[drawn]), [0.025, 0.975])
    test = stats.permutation_test(
        (x,), lambda x, axis: _spearman(x, y), vectorized=True, permutation_type="pairings", n_resamples=num_samples,
        rng=np.random.default_rng(seed),
    )  # fmt: skip
    values = {"rho": _spearman(x, y), "low": low, "high": high, "p_value": test.pvalue}
    return {"maps": len(x), **{name: float(value) for name, value in values.items()}}


def _spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = stats.rankdata(x, axis=-1), stats.rankdata(y, axis=-1)
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    with np.errstate(invalid="ignore"):  # a draw of one map only has no ranks
        return (x * y).sum(-1) / np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
