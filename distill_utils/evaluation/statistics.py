"""Intervals, paired tests, correlations and similarities: what a difference between two systems is worth.

Out of scope: what is scored (metrics.py, tasks.py). Most functions take plain arrays, one value per document.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from distill_utils.artifacts import InputError
from distill_utils.report.names import with_interval

MARGIN = 0.05  # a system that keeps more than all but this share of another's score is not worse than it
# Rough figures for ROUGE-2, where nothing is measured: standard deviation of a paired difference per document, and of
# its mean per seed (students of 150 updates, 600 documents).
DOCUMENT_SD, SEED_SD = 12.7, 0.15


def bootstrap_interval(
    values: np.ndarray, num_samples: int = 1000, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Return (mean, low, high) of a system's scores, (documents,) or (seeds, documents).

    One seed: the percentile bootstrap over documents, which says nothing of another seed. Several: the interval is for
    new documents and new seeds. Its half-width is the root of the sum of squares of two (MOVER, Zou and Donner 2008):
    the bootstrap's, of the means over seeds, and Student's t times the standard error that seeds add. A bootstrap of
    three seeds covers three quarters where seeds dominate, this form 93 to 97 % (tests/test_statistics.py).
    """
    values, level = np.atleast_2d(values), 1 - confidence
    drawn, mean = _bootstrap_means(values.mean(0), num_samples), float(values.mean())
    return (mean, *_ends(mean, drawn, _seed_reach(level, values), level))


def compare(values: np.ndarray, baseline: np.ndarray, num_samples: int = 1000) -> dict:
    """Compare two systems on the same documents and, where both have several, on the same seeds.

    Each is (documents,) or (seeds, documents); one with a single row stands against every seed of the other.
    `difference` is the mean of values - baseline, `low` and `high` its 95 % interval as of `bootstrap_interval`,
    `p_value` two-sided and of the same interval: about the level at which its end is 0, never 0 itself. `seeds_agree`
    says whether the difference has one sign in every seed. Raises ValueError for other documents or seeds.
    """
    differences = np.subtract(*_paired(values, baseline))
    drawn, mean = _bootstrap_means(differences.mean(0), num_samples), float(differences.mean())
    low, high = _ends(mean, drawn, _seed_reach(0.05, differences))
    tails = np.sort(drawn if mean > 0 else -drawn)[: num_samples // 2]
    ranks = np.arange(len(tails)) + 1  # 0 lies inside the interval that leaves out so many draws at each end
    reach = _seed_reach(2 * ranks / (num_samples + 1), differences)
    inside = abs(mean) <= np.hypot(np.maximum(abs(mean) - tails, 0), reach)
    p_value = min(1.0, float(2 * (inside.sum() + 1) / (num_samples + 1)))
    signs = np.sign(differences.mean(1))
    agree = {"seeds": len(signs), "seeds_agree": bool((signs == signs[0]).all())}
    return {"difference": mean, "low": low, "high": high, "p_value": p_value, **agree}


def share_of(values: np.ndarray, baseline: np.ndarray) -> dict:
    """Return which `share` of a baseline's score a system has, its 95 % interval, and `not_worse_5_percent`.

    Shapes are as in `compare`. The interval is of the ratio and not of a difference set against a margin, because the
    margin is a share of a score that is itself an estimate: by the delta method, from values - share * baseline per
    document. Not worse (non-inferior, at 2.5 % one-sided) is a system whose interval lies above 1 - MARGIN. All None
    where the baseline has no positive score.
    """
    ours, theirs = _paired(values, baseline)
    if theirs.mean() <= 0:
        return dict.fromkeys(("share", "share_low", "share_high", "not_worse_5_percent"))
    share = ours.mean() / theirs.mean()
    _, low, high = bootstrap_interval(share + (ours - share * theirs) / theirs.mean())
    return {"share": float(share), "share_low": low, "share_high": high, "not_worse_5_percent": low > 1 - MARGIN}


def ratio_of_means(values: np.ndarray, baseline: np.ndarray) -> tuple[float, float, float]:
    """Return the ratio of two means over different documents, each (documents,), and its 95 % bootstrap interval."""
    generator = np.random.default_rng(0)
    ours, theirs = (_bootstrap_means(np.asarray(scores), 1000, generator) for scores in (values, baseline))
    low, high = np.quantile(ours / np.maximum(theirs, 1e-9), [0.025, 0.975])
    return float(np.mean(values) / max(np.mean(baseline), 1e-9)), float(low), float(high)


def detectable_difference(
    num_documents: int, num_seeds: int, document_sd: float = DOCUMENT_SD, seed_sd: float = SEED_SD
) -> float:
    """Return the true difference that `compare` shows in four of five repetitions (80 % power, 5 % two-sided).

    `document_sd` is the standard deviation of the paired difference per document, `seed_sd` of its mean per seed.
    """
    documents = document_sd / num_documents**0.5
    seeds = seed_sd / num_seeds**0.5 if num_seeds > 1 else 0.0
    reach = stats.t.ppf(0.975, max(num_seeds - 1, 1)) * seeds
    shown_from = np.hypot(stats.norm.ppf(0.975) * documents, reach)
    return float(shown_from + stats.norm.ppf(0.8) * np.hypot(documents, seeds))


def before_training(num_documents: int, num_seeds: int, differences: Sequence[float] = ()) -> str:
    """Return in words which difference in ROUGE-2 between two students so many test documents and seeds can show.

    `differences` are those of two similar systems, one per document, here of the teacher with fewer and more beams.
    Without any, or with fewer than 50, the rough DOCUMENT_SD stands in.
    """
    measured = float(np.std(differences, ddof=1)) if len(differences) >= 50 else 0.0
    origin = "measured on the teacher with fewer beams" if measured else "rough"
    spread = f"{measured or DOCUMENT_SD:.1f} ROUGE-2 per document, {origin}"
    spread += f"; {SEED_SD} per seed, rough" if num_seeds > 1 else ""
    size = detectable_difference(num_documents, num_seeds, measured or DOCUMENT_SD)
    return (
        f"Four of five runs like this one ({num_documents:,} test documents, {interval_scope(num_seeds)}) would show a "
        f"true difference of {size:.2f} ROUGE-2 between two students (standard deviation {spread})."
    )


def _paired(values: np.ndarray, baseline: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ours, theirs = (np.atleast_2d(np.asarray(scores, dtype=float)) for scores in (values, baseline))
    if ours.shape[1] != theirs.shape[1]:
        raise ValueError(f"{ours.shape[1]} values for {theirs.shape[1]} of the baseline: score the same documents")
    if len(ours) != len(theirs) and 1 not in (len(ours), len(theirs)):
        raise ValueError(f"{len(ours)} seeds against {len(theirs)} of the baseline: compare the same seeds")
    return tuple(np.broadcast_arrays(ours, theirs))


def _bootstrap_means(values: np.ndarray, num_samples: int, generator: np.random.Generator | None = None) -> np.ndarray:
    """Return means over documents drawn with replacement, (samples,); without a generator the same draws every time."""
    if not len(values) or not np.isfinite(values).all():  # of NaN every p-value would be the smallest
        raise ValueError("no values to draw from, or some are not finite: give at least one document a score each")
    generator = generator or np.random.default_rng(0)
    rows = max(1, 4_000_000 // len(values))  # draws at a time, for memory
    sizes = [min(rows, num_samples - start) for start in range(0, num_samples, rows)]
    draws = (generator.integers(len(values), size=(size, len(values))) for size in sizes)
    return np.concatenate([values[drawn].mean(axis=1) for drawn in draws])


def _seed_reach(level, *parts: np.ndarray):
    """Return how far seeds widen an interval of a two-sided level, of the mean over parts, each (seeds, documents).

    It is Student's t times the between-seed component of a two-way analysis of variance without replication, at least
    0: what documents add to the variance between seeds is taken off, as the interval over documents has it. 0 for one.
    """
    num_seeds = len(parts[0])
    if num_seeds == 1:
        return 0.0
    between = np.mean([part.mean(1) for part in parts], axis=0).var(ddof=1)
    noise = [(part.var(0, ddof=1).mean() - part.mean(1).var(ddof=1)) / max(part.shape[1] - 1, 1) for part in parts]
    error = float(np.sqrt(max(between - sum(noise) / len(parts) ** 2, 0.0) / num_seeds))
    return stats.t.ppf(1 - np.asarray(level) / 2, num_seeds - 1) * error


def _ends(mean: float, drawn: np.ndarray, reach: float, level: float = 0.05) -> tuple[float, float]:
    low, high = np.quantile(drawn, [level / 2, 1 - level / 2])
    if not reach:
        return float(low), float(high)
    return float(mean - np.hypot(max(mean - low, 0), reach)), float(mean + np.hypot(max(high - mean, 0), reach))


def share_of_gap(ours: Mapping[str, np.ndarray], low: Mapping[str, np.ndarray], high: Mapping[str, np.ndarray]) -> dict:
    """Return which share of the way from `low` to `high` a system goes, mean over tasks, with its interval.

    Each is {task: scores (seeds, documents)}, of the same seeds everywhere. The interval is over new documents of every
    task, by the delta method as in `share_of`, since a drawn gap may be next to nothing; seeds widen it as in
    `bootstrap_interval`. A task where `high` is not above `low` says nothing and is left out; `tasks` names the others.
    """
    generator, shares, parts, drawn = np.random.default_rng(0), [], [], []
    used = [task for task in ours if compare(high[task], low[task])["low"] > 0]
    for task in used:
        gain, gap = np.atleast_2d(ours[task] - low[task]), np.atleast_2d(high[task] - low[task])
        shares.append(gain.mean() / gap.mean())
        parts.append((gain - shares[-1] * gap) / gap.mean())
        drawn.append(_bootstrap_means(parts[-1].mean(0), 1000, generator))
    if not used:
        return {"share": None, "low": None, "high": None, "tasks": []}
    mean = float(np.mean(shares))
    low_end, high_end = _ends(mean, mean + np.mean(drawn, axis=0), _seed_reach(0.05, *parts))
    return {"share": mean, "low": low_end, "high": high_end, "tasks": used}


def effect_sign(test: Mapping) -> int:
    """Return 1 or -1 for a difference whose interval excludes 0, else 0."""
    return int(test["low"] > 0) - int(test["high"] < 0)


def interval_scope(num_seeds: int, what: str = "documents") -> str:
    """Return what an interval is over: with one seed it says nothing of another."""
    return f"{seeds_in_words(num_seeds)}: intervals over {what} {'only' if num_seeds == 1 else 'and seeds'}"


def seeds_in_words(num_seeds: int) -> str:
    """Return "one seed" or "3 seeds"."""
    return "one seed" if num_seeds == 1 else f"{num_seeds} seeds"


def how_sure(test: Mapping, than: str = "") -> str:
    """Return what a paired difference says: "it is worse by 1.0 (0.1 to 2.1)"."""
    sign, ends = effect_sign(test), [test["low"], test["high"]]
    if not sign:
        return f"it is not shown to be better or worse{than}: {with_interval(test['difference'], *ends, '+.1f')}"
    near, far = sorted(map(abs, ends))
    size = with_interval(abs(test["difference"]), near, far, f".{_decimals(test, 1)}f")
    return f"it is {'better' if sign > 0 else 'worse'}{than} by {size}"


def _decimals(test: Mapping, least: int) -> int:
    """Return with how many decimals the end next to 0 is not printed as 0: as if the interval held it."""
    near = min(abs(test["low"]), abs(test["high"]))
    return next((number for number in range(least, 6) if float(f"{near:.{number}f}")), 6)


def budget_in_words(max_steps: int, num_seeds: int, what: str) -> str:
    """Return how many updates and seeds a result rests on, and whether that makes it a demonstration."""
    reach = "A demonstration with" if num_seeds < 3 else "Based on"
    return f"{reach} {max_steps:,} updates, {what} and {seeds_in_words(num_seeds)}"


def format_comparison(name: str, test: Mapping, other: str, decimals: int = 2, lower_is_better: bool = False) -> str:
    """Return a comparison in words with its interval, "kd beats sft: +0.61 (+0.14 to +1.12)", without for no name."""
    sign = -effect_sign(test) if lower_is_better else effect_sign(test)
    verb = {1: "beats", -1: "loses to", 0: "cannot be separated from"}[sign]
    decimals = _decimals(test, decimals) if sign else decimals
    size = with_interval(test["difference"], test["low"], test["high"], f"+.{decimals}f")
    return f"{name} {verb} {other}: {size}" if name else f"{verb} {other}"


def format_share(test: Mapping) -> tuple[str, str]:
    """Return a share with its interval, "97 % (94 to 101)", and whether it is shown to be above 1 - MARGIN."""
    if test["share"] is None:
        return "–", "not shown"
    share = with_interval(*(100 * test[name] for name in ("share", "share_low", "share_high")), ".0f", " %")
    says = "refuted" if test["share_high"] < 1 - MARGIN else "not shown"
    return share, "shown" if test["not_worse_5_percent"] else says


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's (1979) adjusted p-values: how surprising each is, given how many were looked at."""
    ordered = pd.Series(p_values, dtype=float).sort_values()
    return (ordered * np.arange(len(ordered), 0, -1)).cummax().clip(upper=1.0).sort_index().tolist()


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


def rank_correlation(scores: Sequence[float], outcomes: Sequence[float]) -> dict[str, float | None]:
    """Return Spearman's `rho` of two values per map, its 95 % bootstrap interval over maps, and a `p_value`.

    All None with fewer than four maps or where one side does not vary: then nothing can be said.
    """
    x, y = np.asarray(scores, dtype=float), np.asarray(outcomes, dtype=float)
    if len(x) < 4 or not np.ptp(x) or not np.ptp(y):
        return {"maps": len(x)} | dict.fromkeys(("rho", "low", "high", "p_value"))
    drawn = np.random.default_rng(0).integers(len(x), size=(2000, len(x)))
    low, high = np.nanquantile(_spearman(x[drawn], y[drawn]), [0.025, 0.975])
    test = stats.permutation_test(
        (x,), lambda x, axis: _spearman(x, y), vectorized=True, permutation_type="pairings", n_resamples=2000, rng=0
    )
    values = {"rho": _spearman(x, y), "low": low, "high": high, "p_value": test.pvalue}
    return {"maps": len(x), **{name: float(value) for name, value in values.items()}}


def _spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = stats.rankdata(x, axis=-1), stats.rankdata(y, axis=-1)
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    with np.errstate(invalid="ignore"):  # a draw of one map only has no ranks
        return (x * y).sum(-1) / np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
