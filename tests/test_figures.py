"""Figures and tables: what is shown carries its texts, is escaped, and keeps one colour a method."""

import itertools
import math

import IPython.display
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from matplotlib.colors import to_rgb

from distill_utils.experiments.miniend import PATHS
from distill_utils.report import figures, names, style, tables


def with_interval(key: str, value: float, half: float = 1.0) -> dict:
    return {key: value, f"{key}_low": value - half, f"{key}_high": value + half}


STUDENTS = itertools.product(
    [("6-3", 1.6, 0.0), ("6-1", 0.93, 1.1)], [("sft", 8.9), ("kd", 9.0), ("pl", 9.1), ("pl_kl", 9.2)]
)
ROWS = [
    {"method": "teacher", "student": "6-6", "ms_per_token": 2.6, **with_interval("rouge2", 10.5)},
    {"method": "lead words", "student": "", "rouge2": 4.1},
    {"method": "object name", "student": "", "rouge2": 4.3, "ms_per_token": None},
    *(
        {"method": method, "student": student, "ms_per_token": speed, **with_interval("rouge2", best - loss)}
        for (student, speed, loss), (method, best) in STUDENTS
    ),
]


def marks(ax) -> list:
    return [line for line in ax.lines if line.get_marker() in ("*", *style.MARKERS)]


def texts(ax) -> list[str]:
    return [text.get_text() for text in ax.texts]


def overlapping(ax) -> list:
    ax.get_figure().draw_without_rendering()
    boxes = [text.get_window_extent().padded(-1) for text in ax.texts]
    return [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]


@pytest.fixture(autouse=True)
def clean_figures():
    figures.use_style()
    yield
    plt.close("all")


@pytest.fixture
def shown(monkeypatch):
    """Collect what is displayed."""
    outputs = []

    def collect(value, metadata=None, raw=False):
        outputs.append((value, metadata) if raw else value.data)

    monkeypatch.setattr(IPython.display, "display", collect)
    return outputs


def test_show_gives_alt_and_escaped_caption_and_closes_and_a_large_svg_becomes_png(shown, monkeypatch):
    for _ in range(2):  # the same figure gives the same bytes
        ax = figures.plot_history({"kd": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]})
        figures.show(ax, "Falls & <stops>.", "One <b>run</b> & no more.")
    data, metadata = shown[0]
    assert data["image/svg+xml"].lstrip().startswith("<?xml") and data["text/plain"] == "Falls & <stops>."
    assert metadata["image/svg+xml"]["alt"] == "Falls & <stops>."
    assert shown[1] == '<div class="figcaption">One &lt;b&gt;run&lt;/b&gt; &amp; no more.</div>'
    assert shown[:2] == shown[2:] and not plt.get_fignums()
    monkeypatch.setattr(style, "MAX_SVG_BYTES", 1000)
    figures.show(figures.plot_coverage_density([0.1], [2.0]), "a", "c")
    data, metadata = shown[4]
    assert data["image/png"][:4] == b"\x89PNG" and metadata["image/png"] == {"alt": "a", "width": 624}
    for alt, caption in (("", "c"), ("a", "  ")):
        with pytest.raises(ValueError, match="alt"):
            figures.show(style.new_axes(), alt, caption)


def test_colours_are_one_a_method_and_distinct():
    assert len(set(names.METHOD_COLORS.values())) == len(names.METHOD_COLORS)
    assert set(PATHS) <= {*names.PATH_COLORS, "miniend"}
    assert len({names.method_color(path) for path in PATHS}) == len(PATHS)
    assert names.method_color("lead words") == names.BASELINE_COLOR


def test_table(shown):
    frame = pd.DataFrame(
        {
            "system": ["teacher", "<b>SFT</b>", "KD"],
            "rouge2": [10.0, 9.004, 9.001],
            "rougeL_low": [61.24, 20.0, float("nan")],
            "note <i>": ["a", "<script>", "c"],
        }
    )
    tables.show_table(
        frame, "Best & <last>.", best_high=["rouge2"], best_low=["rougeL_low"], best_among=["<b>SFT</b>", "KD"]
    )
    (html,) = shown
    table = BeautifulSoup(html, "html.parser")
    headings = [cell.get_text() for cell in table.select("thead th")]
    assert headings == ["system", "ROUGE-2", "ROUGE-L low", "note <i>"]
    assert len(table.select("thead tr")) == 1
    cells = [[cell.get_text() for cell in line.find_all(["th", "td"])] for line in table.select("tbody tr")]
    assert cells[0] == ["teacher", "10.00", "61.24", "a"]
    assert cells[1] == ["<b>SFT</b>", "9.00", "20.00", "<script>"]
    assert cells[2] == ["KD", "9.00", "–", "c"]
    assert table.caption.get_text() == "Best & <last>." and not table.select("b, i, script")
    bold = html[: html.index("font-weight: bold")].rsplit("}", 1)[-1]
    # equal as printed are both best; the teacher does not compete
    assert all(name in bold for name in ("row1_col0", "row2_col0", "row1_col1")) and "row0" not in bold
    for wrong, named in ((frame, "rouge1"), (frame.assign(system="a"), "system")):
        with pytest.raises(ValueError, match=named):
            tables.show_table(wrong, "c", best_high=["rouge1"] if named == "rouge1" else [])


def test_table_prints_runs_counts_and_the_best_of_means_with_intervals(shown):
    frame = pd.DataFrame({"student": ["sft-6-3-s0", "kd-6-1-T_4", "t5-3-3"], "pairs": [25791, 999, 7]})
    frame["ROUGE-2"] = [names.with_interval(mean, mean - 1, mean + 1) for mean in (9.5, 10.25, 8.0)]
    tables.show_table(frame, "Runs.", best_high=["ROUGE-2"])
    lines = BeautifulSoup(shown[0], "html.parser").select("tbody tr")
    cells = [[cell.get_text() for cell in line.find_all(["th", "td"])] for line in lines]
    assert [line[0] for line in cells] == ["SFT 6-3, seed 0", "KD 6-1 T_4", "t5-3-3"]  # the last is no run's name
    assert [line[1] for line in cells] == ["25,791", "999", "7"] and cells[1][2] == "10.25 (9.25 to 11.25)"
    bold = shown[0][: shown[0].index("font-weight: bold")].rsplit("}", 1)[-1]
    assert "row1_col1" in bold and "row0" not in bold


def test_samples_are_escaped_clipped_and_fold_what_repeats_without_end(shown):
    tables.show_samples([{"source": "<b>" + "x" * 500, "pl_kl": "$5"}], ["source", "pl_kl", "missing"], "Some & all")
    table = BeautifulSoup(shown[0], "html.parser")
    assert [cell.get_text() for cell in table.find_all("th")] == ["source", "PL+KL", "missing"]
    found = [cell.get_text() for cell in table.find_all("td")]
    assert found[0].startswith("<b>xxx") and len(found[0]) == 402 and found[1:] == ["$5", ""]
    looped = ["Return the" + " given" * 37 + ".", "a b a b a b a b c", "no no no", "1 2 3 4 5 " * 4]
    tables.show_samples([{str(i): text for i, text in enumerate(looped)}], [*map(str, range(4))])
    found = [cell.get_text() for cell in BeautifulSoup(shown[1], "html.parser").find_all("td")]
    assert found == ["Return the given … (×36) given.", "a b … (×4) c", *looped[2:]]


def test_samples_mark_places_and_stay_text(shown, capsys):
    text = "read <b>3</b> files from Paris again"
    marks = {"unsupported": [(8, 9), (25, 30)], "differs": [(5, 20), (31, 36)]}
    row = {"document": text, "kd": text, "pl": "no no no no no 3", "marks": {"kd": marks, "pl": {"differs": [(0, 2)]}}}
    tables.show_samples([row], ["document", "kd", "pl"])
    plain, marked, looped = BeautifulSoup(shown[0], "html.parser").find_all("td")
    assert plain.get_text() == marked.get_text() == text and not plain.find_all(["b", "mark"])
    assert [mark.get_text() for mark in marked.find_all("mark")] == ["3", "Paris"]
    assert "".join(part.get_text() for part in marked.find_all("b")) == "<b>3</b> files again"
    assert looped.get_text() == "no … (×5) 3" and not looped.find_all("b")

    tables.show_samples([row], ["document", "kd"], clip=27)
    marked = BeautifulSoup(shown[-1], "html.parser").find_all("td")[1]
    assert marked.get_text() == text[:27] + " …" and marked.find_all("mark")[-1].get_text() == "Pa"
    before = len(shown)
    tables.show_samples([row], ["document", "kd"], shown=False)
    printed = capsys.readouterr().out
    assert len(shown) == before and "samples=false" in printed and "Paris" not in printed


def test_quality_speed_draws_every_row_and_no_labels_overlap():
    odd = {"method": "kd", "rouge2": math.nan, "ms_per_token": 1.0}
    ax = figures.plot_quality_speed([*ROWS, odd])
    assert {"teacher", "lead words", "object name", "PL+KL 6-3", "SFT 6-1"} <= set(texts(ax))
    assert len(ax.texts) == len(ROWS) and not overlapping(ax)
    points = [line for line in marks(ax) if len(line.get_xdata()) == 1]
    colors = {names.METHOD_COLORS[name] for name in ("teacher", "sft", "kd", "pl", "pl_kl")}
    assert len(points) == 9 and {line.get_color() for line in points} == colors
    assert len(ax.containers) == 8 and len(ax.patches) == 1  # error bars of students; the teacher's is the band
    assert not figures.plot_quality_speed([]).texts


def test_a_label_is_nearest_to_its_own_point_and_dark_enough_to_read():
    scores = {"teacher": 10.2, "sft": 9.7, "kd": 10.0, "pl": 9.4, "pl_kl": 9.0}
    ax = figures.plot_quality_speed([
        {"method": name, "ms_per_token": 11.4 if name == "teacher" else 8.2, **with_interval("rouge2", score, 1.5)}
        for name, score in scores.items()
    ])  # fmt: skip
    labels = [text for text in ax.texts if hasattr(text, "xyann")]
    dots = ax.transData.transform([text.xy for text in labels])
    for number, text in enumerate(labels):
        box = text.get_window_extent()
        away = np.hypot(*(dots - dots.clip(box.min, box.max)).T)
        assert away.argmin() == number, text.get_text()
        assert 1.05 / (np.dot(np.array(to_rgb(text.get_color())) ** 2.2, (0.2126, 0.7152, 0.0722)) + 0.05) > 4.5
    assert len(labels) == 4


def test_neighbours_are_moved_apart_around_their_middle():
    moved = figures._moved_apart([1.0, math.nan, 1.0, 3.0])
    assert math.isnan(moved[1]) and moved[3] == 3.0
    assert moved[0] < 1.0 < moved[2] and moved[0] + moved[2] == pytest.approx(2.0)
    assert list(figures._moved_apart([2.0, 2.0])) == [2.0, 2.0] and figures._moved_apart([]).empty


def test_history_names_lines_and_skips_missing_values():
    history = [{"step": 1, "loss": 3.0}, {"step": 2}, {"step": 3, "loss": 1.0}]
    ax = figures.plot_history({"sft": history, "pl_kl 6-3": history, "empty": [{"step": 1}]})
    assert [list(line.get_xdata()) for line in ax.lines] == [[1, 3], [1, 3]]
    assert set(texts(ax)) == {"SFT", "PL+KL 6-3"}
    many = figures.plot_history({f"kd {n}": history for n in range(5)})
    assert len(many.texts) == 5 and not overlapping(many)
    assert not figures.plot_history({"kd": []}).lines


def test_lengths_state_the_share_left_whole():
    ax = figures.plot_lengths({"source": list(range(1, 101)), "reference": [5] * 10}, {"source": 80})
    assert texts(ax) == ["80 (80 % not cut)"]
    assert max(ax.lines[0].get_xdata()) == 100
    ax = figures.plot_coverage_density([0.1, 0.9], [0.1, 30.0])
    assert "10" in [label.get_text() for label in ax.get_yticklabels()]  # a power in TeX would be shown as it is


def test_intervals_stand_in_groups_with_the_teacher_as_band():
    rows = []
    for name, mean in (("lead_words", 18.0), ("teacher", 25.0)):
        rows.append({"method": name})
        for metric, part in (("rouge1", 1), ("rouge2", 2), ("rougeL", 1), ("rougeLsum", 1)):
            rows[-1] |= with_interval(metric, mean / part)
    ax = figures.plot_intervals(rows)
    assert texts(ax) == ["lead words", "teacher"]
    assert [line.get_xdata()[0] for line in marks(ax)][:4] == [18.0, 25.0, 9.0, 12.5]
    bands = [sorted({x for x, _ in band.get_paths()[0].vertices}) for band in ax.collections]
    assert bands[:2] == [[24.0, 26.0], [11.5, 13.5]]
    assert {text.xy[0] for text in ax.texts} == {26.0}  # names stand beyond the band


def test_decoding_settings_are_joined_by_time_one_line_a_model():
    points = [("teacher", "teacher", "4 beams", 80.0, 9.5), ("teacher", "teacher", "1 beam", 30.0, 9.0)]
    points += [("SFT 6-3", "sft", "1 beam", 20.0, 8.0)]
    rows = [
        {"name": name, "method": method, "setting": setting, "latency_ms": ms, **with_interval("rouge2", score)}
        for name, method, setting, ms, score in points
    ]
    many = [row | {"name": f"SFT {i}", "method": "sft"} for i, row in enumerate(rows[1:2] * 10)]
    assert figures.plot_trade_off([*rows, *many])  # more models than markers
    ax = figures.plot_trade_off(rows)
    assert [list(line.get_xdata()) for line in marks(ax)] == [[30.0, 80.0], [20.0]]
    assert texts(ax) == ["1", "4", "1"]


def test_capacity_gap_is_a_line_by_teacher_size_and_a_mark_for_the_assistant():
    points = [("direct", 4e6, 20.0), ("direct", 1e6, 19.0), ("direct", 16e6, 18.0), ("by an assistant", 16e6, 21.0)]
    rows = [
        {"name": name, "method": "miniend", "teacher_parameters": size, **with_interval("score", score)}
        for name, size, score in points
    ]
    teachers = [
        {"name": "teacher", "method": "teacher", "teacher_parameters": n, "score": s} for n, s in ((4e6, 25), (1e6, 22))
    ]
    ax = figures.plot_capacity_gap([*rows, *teachers], "accuracy")
    assert [list(line.get_ydata()) for line in marks(ax)] == [[22, 25], [19.0, 20.0, 18.0], [21.0]]
    behind, direct, assisted = (list(line.get_xdata()) for line in marks(ax))
    assert behind == [1.0, 4.0] and direct == pytest.approx([1.0, 4.0, 16.0], rel=0.05)
    assert direct[-1] != assisted[0] == pytest.approx(16.0, rel=0.05)  # of one teacher, side by side
    assert set(texts(ax)) == {"teacher", "direct", "by an assistant"} and ax.get_xscale() == "log"
    assert len(figures.plot_capacity_gap(rows[:3]).lines) > 0  # without teachers


def test_differences_without_zero_are_filled():
    rows = [{"name": "kd hidden_weight=0 versus kd", "difference": -2.0, "low": -3.0, "high": -1.0}]
    rows.append({"name": "pl_gold versus pl", "difference": 0.5, "low": -0.5, "high": 1.5})
    ax = figures.plot_differences(rows)
    assert [point.get_markerfacecolor() == "white" for point in marks(ax)] == [False, True]
    assert [point.get_color() for point in marks(ax)] == [names.method_color("kd"), names.method_color("pl_gold")]
    assert [label.get_text() for label in ax.get_yticklabels()][1] == "PL+references\nversus PL"


def test_thresholds_say_what_they_remove():
    values = [0.0, 5.0, 10.0, 20.0]
    table = pd.DataFrame({"measure": "reference_rouge2", "value": values, "low": 10.0, "high": math.inf})
    table["removed"] = table["value"] < 10
    (ax,) = figures.plot_thresholds(table).axes
    assert ax.get_title(loc="left") == "50 % removed" and ax.get_xlabel() == "reference ROUGE-2"
    assert [line.get_xdata()[0] for line in ax.lines] == [10.0]
    assert sum(patch.get_height() for patch in ax.patches) == len(values)


def test_maps_number_the_kept_cells():
    ax = figures.plot_maps({"published": [0, 2, 5], "last": [3, 4, 5], "1 · last": [5]}, 6)
    kept = [(text.get_position()[0] - 0.5, text.get_position()[1] - 0.5, text.get_text()) for text in ax.texts]
    expected = [(0, 0, "0"), (2, 0, "1"), (5, 0, "2"), (3, 1, "0"), (4, 1, "1"), (5, 1, "2"), (5, 3, "0")]
    assert [cell for cell in kept if cell[2]] == expected  # the row between is empty: another size stands apart


def test_layers_have_one_panel_a_stack_and_lines_only_with_intervals():
    rows = [
        {"stack": stack, "layer": i, "v": i, **with_interval("w", i)}
        for stack, depth in (("encoder", 3), ("decoder", 2))
        for i in range(depth)
    ]
    for key, containers in (("v", 1), ("w", 2)):
        encoder, decoder = figures.plot_layers(rows, key, "change").axes
        assert [patch.get_height() for patch in encoder.patches] == [0, 1, 2] and len(decoder.patches) == 2
        assert len(encoder.containers) == containers


def test_heatmaps_carry_numbers_until_there_are_too_many():
    panels = {"small": pd.DataFrame([[1.0, 0.25]]), "big": pd.DataFrame([[0.5] * 13] * 13)}
    one, other = figures.plot_heatmaps(panels, (0, 1)).axes
    assert texts(one) == ["1.00", "0.25"] and not other.texts


def test_agreement_names_every_point_above_all_bars():
    points = [("first", 2, 5), ("published = searched", 1, 7), ("near", 1.01, 3)]
    rows = [{"name": n, "x": x, **with_interval("y", y)} for n, x, y in points]
    ax = figures.plot_agreement(rows, "x", "y", "loss", "ROUGE-2")
    assert [text.strip() for text in texts(ax)] == [name for name, *_ in points] and not overlapping(ax)
    assert all(text.get_window_extent().y0 >= ax.bbox.y1 - 1 for text in ax.texts)


def test_stacked_bars_add_up_and_leave_out_what_is_nowhere():
    rows = [{"name": "a", "weights (GB)": 2.0, "logits": 1.0, "nothing": 0.001}, {"name": "b", "weights (GB)": 0.5}]
    ax = figures.plot_stacked(rows, ["weights (GB)", "logits", "nothing"], "GB", limit=4.0, limit_label="device")
    bars = [bar for bar in ax.patches if bar.get_width() > 0]
    assert sorted((bar.get_x(), bar.get_width()) for bar in bars) == [(0.0, 0.5), (0.0, 2.0), (2.0, 1.0)]
    assert [text.strip() for text in texts(ax)] == ["3", "0.5", "device"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["weights", "logits"]


def test_a_figure_that_fails_is_named_on_the_page_and_leaves_nothing_open(shown, monkeypatch):
    def broken(*_, **__):
        raise ValueError("no <room>")

    monkeypatch.setattr(style, "axis_label", broken)  # after the axes were made
    before = plt.get_fignums()
    figures.show(figures.plot_history({"kd": [{"step": 1, "loss": 2.0}]}), "Falls.", "One run.")
    assert "ValueError" in shown[0] and "no &lt;room&gt;" in shown[0] and plt.get_fignums() == before
