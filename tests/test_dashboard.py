"""The index of all reports: the front, what to take, claims and history, against hand-made entries; bad input."""

import base64
import csv
import hashlib
import json
import random
import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from bs4 import BeautifulSoup

from distill_utils.report import dashboard, index

ATTACKS = ("<script>alert(1)</script>", "\"'><img src=x onerror=alert(1)>", "{{ 7 * 7 }}{% raw %}", "</title></style>")


def row(method, student="6-3", **values) -> dict:
    return {"method": method, "student": student, "rouge2": 9.0, "speedup": 1.5, "parameters_m": 6.0, **values}


def entry(*rows, **values) -> dict:
    teacher = row("teacher", "", rouge2=10.0, speedup=1.0, rouge2_low=9.0, rouge2_high=11.0, parameters_m=8.0)
    parameters = {"dataset": "news", "teacher": "big", "max_steps": 2000, "num_test": 100}
    parameters |= values.pop("parameters", {})
    return {"report": "03_x", "rows": [teacher, *rows], "parameters": parameters, "fingerprint": "f", **values}


def write(reports: Path, name: str, made: dict | str) -> None:
    path = reports / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(made if isinstance(made, str) else json.dumps(made), encoding="utf-8")
    path.with_suffix(".html").write_text("<p>")


def built(reports: Path) -> BeautifulSoup:
    index.write_index(reports)
    return BeautifulSoup((reports / "index.html").read_text(encoding="utf-8"), "html.parser")


def test_the_front_is_what_no_other_student_beats_in_both():
    generator = random.Random(0)
    for size in (1, 2, 5, 60):
        rows = [row("kd", f"{i}-1", speedup=generator.choice((1.1, 1.5, 2.0, generator.uniform(1, 3))),
                    rouge2=generator.choice((8.0, generator.uniform(1, 11)))) for i in range(size)]  # fmt: skip
        (facet,) = dashboard.facets([entry(*rows)])
        found = {(each["speed"], each["share"]) for each in facet["front"]}
        ours = {(row["speedup"], row["rouge2"] / 10) for row in rows}
        expected = {(speed, share) for speed, share in ours
                    if not any(a >= speed and b >= share and (a, b) != (speed, share) for a, b in ours)}  # fmt: skip
        assert found == expected
        assert [each["speed"] for each in facet["front"]] == sorted(speed for speed, _ in expected)
        drawn = dashboard.drawing(facet)
        for number, (_, x, y) in enumerate(drawn["labels"]):  # right of the fastest is room for its label
            assert x < 85 and all(abs(x - a) >= 25 or abs(y - b) >= 5 for _, a, b in drawn["labels"][:number])
        assert all(any(y < drawn["down"](each["share"]) for _, _, y in drawn["labels"]) for each in facet["front"])


def test_a_ratio_is_to_the_teacher_of_the_same_run_and_seeds_are_averaged():
    slow = entry(row("kd", speedup=None, ms_per_token=2.0), parameters={"dataset": "mail"}, report="mail")
    slow["rows"][0] |= {"rouge2": 20.0, "ms_per_token": 5.0}
    facets = {facet["students"][0]["data"]: facet["students"] for facet in dashboard.facets([entry(row("kd")), slow])}
    assert [(each["share"], each["speed"]) for each in facets["news"]] == [(0.9, 1.5)]
    assert [(each["share"], each["speed"]) for each in facets["mail"]] == [(0.45, 2.5)]
    seeds = [row("kd", seed=seed, rouge2=score, rouge2_low=score - 1) for seed, score in enumerate((7.0, 9.0))]
    (mean,) = dashboard.averaged({"rows": seeds})  # without intervals, which are of one seed
    assert (mean["rouge2"], mean["rouge2_low"], mean["seeds"]) == (8.0, None, 2)
    assert dashboard.averaged({"rows": seeds, "means": [row("kd")]}) == [row("kd")]
    assert index._seeds({"rows": seeds}) == 2  # of the README


@pytest.mark.parametrize(("documents", "good"), [(49, False), (50, True)])
def test_few_documents_recommend_nothing_however_narrow_their_interval(documents, good):
    same = row("kd", share=1.0, share_low=1.0, share_high=1.0)  # as three documents with equal summaries give
    (facet,) = dashboard.facets([entry(same, parameters={"num_test": documents})])
    assert facet["good"] == good


def test_pages_of_earlier_text_stand_beside_those_of_todays():
    facets = dashboard.facets([entry(row("kd")), entry(row("sft", speedup=3.0), fingerprint=None)])
    assert sorted(len(facet["front"]) for facet in facets) == [1, 1]
    assert {facet["students"][0]["data"] for facet in facets} == {"news", "news, earlier text"}


def test_what_to_take_rests_on_the_interval_and_on_the_best_evidence():
    def taken(*entries) -> tuple:
        (facet,) = dashboard.facets(entries)
        each = facet["take"]
        return each and each["label"], facet["good"], each and each["demo"]

    good = row("kd", seeds=3, rouge2=9.9, share_low=0.96, share_high=1.02)
    faster = row("pl", "6-1", seeds=3, rouge2=9.8, speedup=2.0, share_low=0.94, share_high=1.02)
    assert taken(entry(good, faster)) == ("KD 6-3", True, False)
    assert taken(entry(faster, row("sft", seeds=3, rouge2=9.7))) == ("PL 6-1", False, False)
    better = row("kd", seeds=3, rouge2=9.95, share_low=0.93, share_high=1.05)  # and less sure, at the same speed
    sure = row("sft", seeds=3, rouge2=9.9, share_low=0.96, share_high=1.02)
    assert taken(entry(better, sure)) == ("SFT 6-3", True, False)
    (facet,) = dashboard.facets([entry(better, sure)])
    assert [each["label"] for each in facet["front"]] == ["SFT 6-3", "KD 6-3"]
    lucky = entry(row("kd", "6-2", rouge2=12.0, speedup=3.0, share_low=1.1, share_high=1.3), report="lucky")
    assert taken(lucky) == ("KD 6-2", True, True)  # one seed
    assert taken(lucky, entry(good)) == ("KD 6-3", True, False)
    few = entry(good, parameters={"max_steps": 100})
    assert taken(few)[2] and taken(entry(good, headline="**A demonstration**: x"))[2]
    assert taken(entry(row("kd", speedup=0.8))) == (None, False, None)
    assert dashboard.facets([entry(), {**entry(row("kd")), "rows": [row("kd")]}]) == []  # nobody, and no teacher


def test_more_time_buys_the_better_student_of_a_shape_and_evidence_goes_first():
    def taken(*rows, others=()) -> list:
        (facet,) = dashboard.facets([entry(*rows), *others])
        return [(each["shape"], [best and best["label"] for best in each["students"]]) for each in facet["when"]]

    quick = row("sft", "6-1", rouge2=7.0, train_seconds=300, states_seconds=300)  # ten minutes, both together
    slow = row("kd", "6-1", rouge2=8.0, train_seconds=3000, states_seconds=400, label_seconds=201)  # over an hour
    other = row("kd", train_seconds=10)  # one student of its shape says nothing about when
    mapped = row("pl", "6-1 (decoder 5)", rouge2=9.9, train_seconds=1)
    assert taken(quick, slow, other, mapped) == [("6-1", ["SFT 6-1", "SFT 6-1", "KD 6-1"])]
    sure = entry(row("pl", "6-1", rouge2=6.0, train_seconds=60, seeds=3), report="sure")
    assert taken(quick, slow, others=[sure]) == []  # more time buys nothing
    three = row("sft", train_seconds=1), row("kd", train_seconds=2000, rouge2=9.5)
    assert taken(quick, slow, *three, others=[sure]) == [
        ("6-1", ["PL 6-1"] * 3), ("6-3", ["SFT 6-3", "KD 6-3", "KD 6-3"])
    ]  # fmt: skip
    assert taken(quick | {"train_seconds": 1e6}, slow) == [("6-1", [None, None, "KD 6-1"])]
    assert taken(row("sft"), row("kd")) == []  # pages that do not say what training took


def test_a_few_documents_and_a_held_up_seed_change_nothing():
    smoke = entry(row("pl", rouge2=13.0, seeds=3), report="smoke", parameters={"num_test": 12})
    (facet,) = dashboard.facets([smoke, entry(row("kd", rouge2=9.8), parameters={"num_test": 350})])
    assert [each["label"] for each in facet["front"]] == ["KD 6-3"] and facet["take"]["label"] == "KD 6-3"
    seeds = [row("kd", seed=seed, train_seconds=seconds) for seed, seconds in enumerate((100.0, 9000.0, 120.0))]
    means = [row("kd", seeds=3, train_seconds=3073.3)]
    (student,) = dashboard.students(entry(*seeds, means=[row("teacher", "", rouge2=10.0), *means]))
    assert student["seconds"] == 120.0


def test_a_claim_is_judged_by_the_run_that_is_no_demonstration_and_has_enough_documents():
    test = {"name": "KD", "versus": "SFT", "student": "6-1", "seeds": 3, "difference": 1.0, "low": 0.5, "high": 1.5}
    abstractive = {"signals": [{"reading": "nearer to XSum, where"}]}

    def run(name, low=0.5, **parameters) -> dict:
        versus = [test | {"low": low}]
        return entry(row("kd", "6-1", seeds=3), versus=versus, report=name, parameters=parameters, **abstractive)

    def judged(*entries) -> tuple:
        (claim,) = [each for each in dashboard.judged_claims(entries) if each["comparison"] == "kd versus sft"]
        return claim["verdict"], [line["report"] for line in claim["evidence"]]

    long, demo, few = run("long", -0.5), run("demo", num_test=200, max_steps=9), run("few", num_test=12)
    assert judged(long, demo, few) == ("not separable", ["long"])
    assert judged(demo, few) == ("confirmed", ["demo"])
    assert judged(few) == ("not testable here", [])


def test_claims_are_judged_from_the_entries():
    def test(difference, low, high, **more) -> dict:
        return {"difference": difference, "low": low, "high": high, **more}

    def claim(name, *entries) -> list:
        (found,) = [claim for claim in dashboard.judged_claims(entries) if claim["comparison"] == name]
        return [found["verdict"], *((line["verdict"], line["difference"], line["low"]) for line in found["evidence"])]

    versus = [test(1.0, 0.5, 1.5, name="KD 6-3", versus="SFT 6-3", student="6-3", seeds=3),
              test(-1.0, -1.5, -0.5, name="SFT 6-1", versus="KD 6-1", student="6-1", seeds=3),
              test(0.1, -0.5, 0.7, name="PL 6-3", versus="SFT 6-3", student="6-3", seeds=3)]  # fmt: skip
    written = {"comparison": "sft versus kd hidden_weight=0", "ROUGE-2": "-1.20 (-2.00 to -0.40)", "seeds": "1"}
    xsum, cnn = ([{"reading": f"nearer to {name}, where"}] for name in ("XSum", "CNN/DailyMail"))
    again = {"comparison": "kd versus sft", "ROUGE-2": "+9.00 (+8.00 to +9.90)"}
    run = entry(signals=xsum, versus=versus, claims=[written, again])
    assert claim("kd versus sft", run) == ["confirmed", ("confirmed", 1.0, 0.5), ("confirmed", 1.0, 0.5)]
    assert claim("pl versus sft", run) == ["not separable", ("not separable", 0.1, -0.5)]
    assert claim("sft versus kd hidden_weight=0", run) == ["contradicted", ("contradicted", -1.2, -2.0)]
    assert claim("kd divergence=tvd versus kd", run) == ["not testable here"]
    assert claim("sft versus kd", run, entry(versus=versus)) == ["not testable here"]  # of other data, and unknown
    mail = entry(signals=cnn, versus=versus[:1], parameters={"dataset": "mail"}, report="mail")
    assert claim("sft versus kd", run, mail) == ["contradicted", ("contradicted", -1.0, -1.5)]
    more = entry(signals=xsum, versus=[versus[0] | test(0.2, -0.1, 0.5)], parameters={"num_test": 900}, report="more")
    assert claim("kd versus sft", run, more) == ["not separable", ("not separable", 0.2, -0.1)]
    cuts = [test(-3.0, -4.0, -2.0, name="6-1", rival="1-6"), test(0.0, -1.0, 1.0, name="6-3", rival="3-6")]
    assert claim("decoder cut versus encoder cut", entry(cuts=cuts))[0] == "mixed"
    halves = [row("kd", shape, share=share, share_low=share - 0.03, share_high=share + 0.02)
              for shape, share in (("6-3", 0.99), ("6-1", 0.2))]  # fmt: skip
    assert claim("half the decoder versus 95 % of the teacher", entry(*halves))[0] == "confirmed"
    losses = [test(0.3, 0.2, 0.4, name="by assistant 4-4", versus="direct, cost of 4-4")]
    assert claim("assistant versus direct", entry(routes=losses)) == ["contradicted", ("contradicted", -0.3, -0.4)]
    gap = [test(0.3, 0.2, 0.4, name="by big", versus="by small", seeds_agree=False)]
    assert claim("smaller teacher versus larger teacher", entry(gap=gap))[0] == "not separable"


def test_a_task_judges_only_where_the_teacher_beats_scratch():
    def scores(task, teacher_low) -> list:
        gain = {"task": task, "difference": 2.0, "low": 1.0, "high": 3.0}
        return [{"method": "teacher", **gain, "low": teacher_low}, {"method": "miniend", "student": "3-3", **gain}]

    rows = [*scores("summaries", 1.0), *scores("family", -1.0)]
    made = {"report": "04", "rows": rows, "ways": [{"path": "miniend", "share": 0.5}], "parameters": {"seeds": [0]}}
    (claim,) = [claim for claim in dashboard.judged_claims([made]) if claim["comparison"] == "miniend versus scratch"]
    assert [line["on"] for line in claim["evidence"]] == ["summaries"]


DAMAGES = {
    "half": '{"rows": [{"method"', "empty": "", "list": "[]", "foreign": '{"a": 1}', "deep": "[" * 100_000,
    "text": json.dumps(entry(row("kd")) | {"headline": 3}), "rows": json.dumps({"rows": ["x"]}),
    "word": json.dumps(entry(row("kd", speedup="fast"))), "nan": '{"rows": [{"rouge2": NaN}]}',
    "huge": '{"rows": [{"rouge2": 1' + "0" * 400 + "}]}", "method": json.dumps(entry(row(["kd"]))),
    "means": json.dumps(entry() | {"means": {"a": 1}}), "claims": json.dumps(entry() | {"claims": [{"claim": 1}]}),
    "wall": json.dumps(entry() | {"wall_seconds": "long"}),
}  # fmt: skip


def test_damaged_and_foreign_files_are_named_and_left_out(tmp_path):
    write(tmp_path, "03_good", entry(row("kd")))
    for name, text in DAMAGES.items():
        write(tmp_path, f"bad_{name}", text)
    (tmp_path / "latin.json").write_bytes(b'{"rows": [], "title": "\xff"}')
    (tmp_path / "latin.html").write_text("<p>")
    (tmp_path / "history.csv").write_bytes(b"date\n\xff\n")
    page = built(tmp_path)
    assert [tr.a["href"] for tr in page.select(".runs tbody tr")] == ["03_good.html"]
    named = " ".join(item.get_text() for item in page.select("li"))
    assert all(f"{name}.json: " in named for name in [*(f"bad_{name}" for name in DAMAGES), "latin"])
    assert "history.csv: " in named
    assert {line["report"] for line in csv.DictReader((tmp_path / "results.csv").open())} == {"03_good"}


@pytest.mark.parametrize("odd", [
    {"rows": []}, {"rows": [], "parameters": {"seeds": 3, "num_test": "all", "teachers": 7, "student_shapes": "6-3"}},
    entry(row("kd", speedup=1e-320), row("pl", speedup=1e200), row("sft", parameters_m=-4.0, rouge2=-1e200)),
    entry(row("kd", untrained="x", task="a"), ways=[{}], controls=[{}], gap=[{}], routes=[{}], cuts=[{}], versus=[{}],
          claims=[{"comparison": "a"}], interpolated=[{}], parameters={"num_test": float("inf"), "max_steps": -1}),
    entry(row("kd", seeds=None)), entry(row("kd", rouge2_low=1.0)), entry(row(None)),
    entry(row(None), means=[row(None)]),
    entry(means=[row("kd", share=0.9, share_low=0.8, share_high=1.0)]),
    entry(row("kd", own=float("nan")), row("kd", own=float("nan"))),
])  # fmt: skip
def test_what_no_notebook_would_write_still_gives_an_index_and_a_readme(tmp_path, odd):
    write(tmp_path, "03_odd", odd)
    assert [tr.a["href"] for tr in built(tmp_path).select(".runs tbody tr")] == ["03_odd.html"]
    assert index.readme_table(tmp_path)


def poisoned(value, attack: str):
    """Append an attack to every text of nested lists and dictionaries."""
    if isinstance(value, dict):
        return {key: poisoned(item, attack) for key, item in value.items()}
    if isinstance(value, list):
        return [poisoned(item, attack) for item in value]
    return value + attack if isinstance(value, str) else value


@pytest.mark.parametrize("attack", ATTACKS)
def test_texts_stay_texts_everywhere(tmp_path, attack):
    test = {"difference": 1.0, "low": 0.5, "high": 1.5, "seeds": 3}
    claims = [{"comparison": "kd versus sft", "ROUGE-2": "+1.00 (+0.50 to +1.50)", "claim": "x"}]
    made = entry(row("kd", variant="v", name="n"), versus=[test | {"name": "KD", "versus": "SFT", "student": ""}],
                 cuts=[test | {"name": "6-3", "rival": "3-6"}], changed={"a": "b"}, date="2026", fingerprint="f",
                 provenance={"commit": "c"}, wall_seconds=3, **dict.fromkeys(("title", "question", "profile"), "t"),
                 headline="**Take** this. Then", routes=[test | {"name": "mixed target"}])  # fmt: skip
    made = poisoned(made, attack) | {"claims": claims}
    made["rows"][0] |= {"method": "teacher", "student": ""}
    made["changed"] = {f"a{attack}": f"b{attack}"}
    folder = re.sub(r"[/\\]", "", f"p#?&{attack}")
    write(tmp_path, f"{folder}/03_x", made)
    write(tmp_path, "03_x", made)
    for name in ("03_x", f"{folder}/03_x"):
        index.append_history(tmp_path, name)
    write(tmp_path, f"{folder}/bad", f'{{"rows": "{attack}"}}')
    page = built(tmp_path)
    (script,) = page.select("script")
    digest = base64.b64encode(hashlib.sha256(script.string.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page.select_one("meta[http-equiv]")["content"]
    assert not page.select("img, iframe, link, object, form, [src], [style]") and len(page.select("title")) > 1
    assert not [name for tag in page.find_all(True) for name in tag.attrs if name.startswith("on")]
    assert page.main and page.h1 and "49" not in page.select_one(".take").get_text()
    assert attack in page.select_one(".facet h3").get_text() and attack in page.select_one(".take").get_text()
    linked = {unquote(link["href"]) for link in page.select(".runs tbody a")}
    assert linked == {"03_x.html", f"{folder}/03_x.html"} and all((tmp_path / link).exists() for link in linked)


def test_history_has_a_line_a_report_with_what_it_replaced(tmp_path):
    for score, method, commit in ((9.0, "kd", "aaa"), (9.5, "pl", "bbb")):
        made = entry(row(method, rouge2=score, rouge2_low=8.0, rouge2_high=9.9), row("sft", rouge2=1.0))
        write(tmp_path, "full/03_x", made | {"provenance": {"commit": commit}, "date": f"of {commit}"})
        index.append_history(tmp_path, "full/03_x")
    write(tmp_path, "05_x", {"rows": [{"method": "logits", "student": "4-4", "loss": loss} for loss in (4.2, 4.1)]})
    index.append_history(tmp_path, "05_x")
    first, second, other = csv.DictReader((tmp_path / "history.csv").open())
    assert (first["best"], first["value"], first["moved"]) == ("KD 6-3", "9", "")
    assert (second["best"], second["value"], second["low"]) == ("PL 6-3", "9.5", "8")
    assert (second["replaced"], second["before"], second["moved"]) == ("of aaa aaa", "9", "0.5")
    assert (other["figure"], other["value"], other["replaced"]) == ("loss", "4.15", "")
    with open(tmp_path / "history.csv", "a", encoding="utf-8") as file:
        file.write("2026,//elsewhere.example/x\nhalf a li")
    page = built(tmp_path)
    (table,) = [table for table in page.select("table") if table.select("a[href='history.csv']")]
    assert "+0.50" in table.get_text() and len(table.select("tbody tr")) == 5
    links = [link["href"] for link in table.select("tbody a")]
    assert links == ["05_x.html", "full/03_x.html", "full/03_x.html"]  # what is not there is named without a link
    index.append_history(tmp_path, "full/03_x")
    assert str(built(tmp_path)).count("full/03_x.html") == str(page).count("full/03_x.html")  # nothing moved: no line
    last = list(csv.DictReader((tmp_path / "history.csv").open()))[-1]  # not joined to what a killed writer left
    assert (last["report"], last["before"], last["moved"]) == ("full/03_x", "9.5", "0")


def test_a_thousand_runs_make_one_index_that_can_be_read(tmp_path):
    generator = random.Random(0)
    for i in range(1000):
        rows = [row(name, rouge2=generator.uniform(5, 10), speedup=generator.uniform(1, 4)) for name in ("kd", "pl")]
        write(tmp_path, f"p{i}/03_x", entry(*rows, parameters={"dataset": f"data{i % 10}"}, headline="Take it."))
    page = built(tmp_path)
    assert len(page.select(".long tbody tr")) == 1000
    assert len(page.select(".facet")) == dashboard.MAX_FACETS
    (tmp_path / "many").mkdir()
    write(tmp_path / "many", "03_x", entry(*(row("kd", f"{i}-1", rouge2=generator.uniform(1, 9)) for i in range(2000))))
    page = built(tmp_path / "many")
    assert len(page.select(".plot circle")) < 2 * dashboard.MAX_POINTS
    titles = [title.get_text() for title in page.select(".plot circle title")]
    counts = [re.match(r"(\d+) students", title) for title in titles]
    assert sum(int(count[1]) if count else 1 for count in counts) == 2000
