"""Controls without a browser: what each draws when its knob is turned. test_lab.py moves them in JupyterLab."""

import ipywidgets
import pandas as pd
import pytest

from distill_utils.report import figures, widgets

ROWS = [
    {"method": "teacher", "student": "", "ms_per_token": 8.0, "rouge2": 10.0, "rouge2_low": 9.0, "words": 9.0},
    {"method": "kd", "student": "6-3", "ms_per_token": 5.0, "rouge2": 9.5, "rouge2_low": 9.0, "words": 9.0},
    {"method": "sft", "student": "6-1", "ms_per_token": 4.0, "rouge2": 7.0, "rouge2_low": 6.0, "words": 8.0},
    {"method": "lead_words", "student": "", "rouge2": 3.0, "words": 9.0},
]


class Controls(list):
    """What `interact` and `interact_manual` were given: (function, controls)."""

    def __call__(self, function, **controls):
        assert function.__name__  # interact asks for it
        self.append((function, controls))

    def options(self, **_):
        return self


@pytest.fixture
def made(monkeypatch):
    controls = Controls()
    monkeypatch.setattr(ipywidgets, "interact", controls)
    monkeypatch.setattr(ipywidgets, "interact_manual", controls)
    return controls


@pytest.fixture
def drawn(monkeypatch):
    """All that is displayed, in order: HTML as text, a figure as itself."""
    found = []
    monkeypatch.setattr(
        "IPython.display.display", lambda *given, **_: found.extend(getattr(x, "data", x) for x in given)
    )
    return found


def test_samples_are_searched_and_every_control_has_a_name(made, drawn, capsys):
    widgets.sample_browser([{"id": "1", "source": "a", "kd": "Tree"}, {"id": "2", "source": "a tree", "kd": "<d>"}])
    ((draw, controls),) = made
    assert all(control.description for control in controls.values()) and controls["index"].max == 1
    draw(index=1, word="")
    assert "&lt;d&gt;" in drawn[-1] and "2 of 2." in drawn[-1]
    draw(index=1, word="TREE")
    assert "2 of 2." in drawn[-1] and controls["index"].max == 1
    draw(index=1, word="<D")
    assert "&lt;d&gt;" in drawn[-1] and "1 of 1." in drawn[-1] and controls["index"].max == 0
    draw(index=0, word="absent")
    assert "'absent'" in capsys.readouterr().out and len(drawn) == 3
    with pytest.raises(ValueError, match="no rows"):
        widgets.sample_browser([])


def test_metrics_are_chosen_among_numbers(made, drawn):
    widgets.metric_picker(ROWS)
    ((draw, controls),) = made
    assert controls["x"].value == "ms_per_token" and "rouge2_low" not in controls["x"].options
    draw(x="words", y="rouge2")
    assert drawn[-1].axes[0].get_xlabel() == "words per summary" and not figures.plt.get_fignums()


def test_the_best_within_a_budget_is_named(made, drawn, capsys):
    widgets.budget_explorer(ROWS)
    ((draw, controls),) = made
    for budget, expected in ((8.0, "teacher"), (5.0, "KD 6-3"), (4.99, "SFT 6-1"), (1.0, "fastest takes 4.00")):
        draw(budget)
        assert expected in capsys.readouterr().out
        assert budget in [line.get_xdata()[0] for line in drawn[-1].axes[0].lines]
    assert controls["budget"].min < 4.0 and controls["budget"].max > 8.0
    with pytest.raises(ValueError, match="ms_per_token"):
        widgets.budget_explorer(ROWS[3:])


def test_a_text_goes_through_every_model_with_the_settings(made, drawn, capsys):
    asked = []

    def decoder(name):
        return lambda text, **settings: asked.append((name, text, settings)) or f"{name} <wrote>"

    def mark(document, summary, teachers):
        return {"differs": [(0, 2)]} if summary != teachers else {}

    widgets.decoding_playground({name: decoder(name) for name in ("teacher", "kd 6-3")}, mark, "first")
    ((draw, controls),) = made
    assert controls["document"].value == "first" and all(control.description for control in controls.values())
    draw("own text", 4, 0.5)
    assert asked == [(name, "own text", {"num_beams": 4, "length_penalty": 0.5}) for name in ("teacher", "kd 6-3")]
    assert "teacher &lt;wrote&gt;" in drawn[-1] and "<b>kd</b> 6-3" in drawn[-1]
    draw("own text", 1, 0.5)
    assert asked[-1][2] == {"num_beams": 1}
    draw("  ", 1, 1.0)
    assert len(asked) == 4 and "no text" in capsys.readouterr().out


def test_thresholds_of_labels_move_alone(made, drawn, capsys):
    table = pd.DataFrame({"measure": ["copy_rate"] * 4 + ["score"] * 2, "value": [0.1, 0.5, 0.9, 1.0, -1.0, -3.0],
                          "removed": False, "low": [-float("inf")] * 4 + [-2.0] * 2,
                          "high": [0.95] * 4 + [float("inf")] * 2})  # fmt: skip
    before = table.copy()
    widgets.label_filter(table)
    assert [controls["threshold"].value for _, controls in made] == [0.95, -2.0]
    widgets.label_filter(table.assign(high=1.5)[:4])  # beyond all values, and still to be moved both ways
    slider = made.pop()[1]["threshold"]
    assert slider.min < 0.1 and slider.value == 1.5 < slider.max
    for (draw, _), threshold, said in zip(made, (0.5, -3.5), ("2 of 4", "2 of 2"), strict=True):
        draw(threshold)
        assert said in capsys.readouterr().out
        assert threshold in [line.get_xdata()[0] for line in drawn[-1].axes[0].lines]
    assert table.equals(before)


def test_chosen_layers_are_measured_once_and_stay_in_the_table(made, drawn, capsys):
    asked = []
    widgets.layer_picker({"encoder": 3, "decoder": 2}, lambda kept: asked.append(kept) or {"loss": 0.1234})
    ((draw, controls),) = made
    assert controls["encoder"].value == (0, 1, 2) and controls["decoder"].value == (0, 1)
    draw(encoder=(0, 2), decoder=(1,))
    draw(encoder=(2, 0), decoder=(1,))
    assert asked == [{"encoder": [0, 2], "decoder": [1]}]
    draw(encoder=(1,), decoder=(0, 1))
    assert "encoder 0, 2 | decoder 1" in drawn[-1] and "encoder 1 | decoder 0, 1" in drawn[-1]
    draw(encoder=(), decoder=(0,))
    assert len(asked) == 2 and "at least one layer" in capsys.readouterr().out
