"""Which method, when: measured signals, what the papers would conclude from them, and what this run itself says.

Not here: measuring anything; all numbers come from the rows of comparison.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

# Share of the references' word pairs that the source lacks: Narayan et al. (2018), table 1.
NOVEL_PAIRS = {"CNN/DailyMail": 0.54, "XSum": 0.83}
MEMORIZED = 1.15  # labels this many times closer to their references than test outputs were learned by heart


def signal_rows(
    novel_2gram: float | None, births: Sequence[Mapping], label_row: Mapping | None, teacher_rouge2: float
) -> list[dict]:
    """Return rows signal, measured, reading: what can be known before a student is trained.

    `novel_2gram` is that of the references, `births` the step-0 gates, `label_row` describes the pseudo-labels of the
    training documents, `teacher_rouge2` is the teacher's on test documents.
    """
    rows = []
    if novel_2gram is not None:
        near = min(NOVEL_PAIRS, key=lambda name: abs(NOVEL_PAIRS[name] - novel_2gram))
        advice = "SFT is enough" if near == "CNN/DailyMail" else "PL or KD beats SFT"
        measured, reading = (
            f"{100 * novel_2gram:.0f} % new word pairs",
            f"nearer to {near}, where the paper says: {advice}",
        )
        rows.append({"signal": "abstractiveness of the references", "measured": measured, "reading": reading})
    for birth in births:
        empty = birth["empty"]
        reading = (
            f"{100 * empty:.0f} % of its first outputs are empty: it starts from little"
            if empty > 0.5
            else "starts as a weak copy: short training can do"
        )
        measured = f"KL {birth['kl_loss']:.2f} nats per token"
        rows.append({"signal": f"gap at birth, {birth['student']}", "measured": measured, "reading": reading})
    if label_row:
        ratio = label_row["rouge2"] / max(teacher_rouge2, 1e-9)
        reading = (
            "the teacher has learned training references by heart: labels may teach them again"
            if ratio > MEMORIZED
            else "labels are no closer to references than test outputs are"
        )
        measured = f"{label_row['rouge2']:.1f} ROUGE-2 on training, {teacher_rouge2:.1f} on test documents"
        rows.append({"signal": "quality of the pseudo-labels", "measured": measured, "reading": reading})
    return rows


def documents_needed(row: Mapping, num_documents: int) -> int | None:
    """Return about how many test documents would separate a paired difference of this size from zero."""
    if row["difference"] == 0:
        return None
    return math.ceil(num_documents * ((row["high"] - row["low"]) / 2 / abs(row["difference"])) ** 2)


def recommend(
    versus: Sequence[Mapping], seconds: Mapping[str, float], num_documents: int, baseline: str = "SFT"
) -> str:
    """Return which method to take for each student shape, or that this run cannot tell, as Markdown.

    `versus` are paired differences from the baseline (name, shape, difference, low, high); `seconds` the cost of a
    student by name, the baseline's included. Among methods that lie above the baseline the cheapest whose interval
    reaches the best one's difference is taken.
    """
    lines = []
    for shape in dict.fromkeys(row["student"] for row in versus):
        rows = [row for row in versus if row["student"] == shape]
        better = [row for row in rows if row["low"] > 0]
        cheap = seconds[f"{baseline} {shape}"]
        if better:
            best = max(better, key=lambda row: row["difference"])
            near = [row for row in better if row["high"] >= best["difference"]]
            take = min(near, key=lambda row: seconds[row["name"]])
            lines.append(
                f"- **{shape}: {take['name']}**, {take['difference']:+.2f} ROUGE-2 over {baseline} "
                f"({take['low']:+.2f} to {take['high']:+.2f}) for {seconds[take['name']] / max(cheap, 1e-9):.1f} times "
                "its training cost; the cheapest of those that this run cannot tell from the best."
            )
            continue
        best = max(rows, key=lambda row: row["difference"])
        needed = documents_needed(best, num_documents)
        if best["difference"] <= 0 or needed is None:
            lines.append(f"- **{shape}: {baseline}**. No other method scores higher here, and none is cheaper.")
        else:
            lines.append(
                f"- **{shape}: this run cannot tell.** The largest gain over {baseline}, {best['name']} with "
                f"{best['difference']:+.2f} ({best['low']:+.2f} to {best['high']:+.2f}), could be chance; about "
                f"{needed:,} test documents would settle a difference of that size. Until then {baseline} is cheapest."
            )
    return "\n".join(lines)
