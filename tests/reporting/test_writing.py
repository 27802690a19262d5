"""A report says what the record says, nothing else, and nothing that a page could be broken by."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pages import Page
from recorded_runs import HOSTILE, WIDTH, compress_run, macs, row, searched, space, structure, write

from hf_elastic.errors import CheckpointError, UnsupportedModelError
from hf_elastic.reporting import front_sections, write_figures, write_report
from hf_elastic.reporting.reading import open_run
from hf_elastic.search import Objective, search_subnets


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return compress_run(tmp_path / "out.run")


@pytest.fixture
def page(run: Path) -> Page:
    return Page(write_report(run))


def recorded(run: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((run / "result.json").read_text())
    return data


def change(run: Path, **stages: Any) -> Path:
    data = recorded(run)
    data["stages"] |= stages
    (run / "result.json").write_text(json.dumps(data))
    return run


def test_the_report_is_one_file_that_asks_for_nothing(run: Path) -> None:
    path = write_report(run)
    page = Page(path)
    assert path == run / "report.html" and path.stat().st_size < 8e6
    given = [value for _, found in page.elements for name, value in found.items() if name in ("src", "href", "srcset")]
    assert [value for value in given if not (value or "").startswith(("#", "data:"))] == []
    policy = next(m["content"] or "" for m in page.attributes("meta") if "http-equiv" in m)
    assert "default-src 'none'" in policy and "http" not in policy
    assert path.read_text(encoding="utf-8").count("plotly.js v") == 1  # its banner


def test_the_front_in_the_page_is_that_of_all_pairs(page: Page) -> None:
    points = [(macs(e.architecture), structure(e.architecture)) for e in searched().feasible]
    beaten = {(x, y) for x, y in points for a, b in points if a <= x and b >= y and (a, b) != (x, y)}
    drawn = page.trace("front", "front")
    assert set(zip(drawn["x"], drawn["y"], strict=True)) == set(points) - beaten
    every = page.trace("front", "evaluated")
    assert sorted(zip(every["x"], every["y"], strict=True)) == sorted(points)


@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_the_front_goes_by_the_direction_of_both_objectives(run: Path, signs: tuple[int, int]) -> None:
    named: list[tuple[str, Any]] = [("structure", structure), ("macs", macs)]
    ways: dict[int, Any] = {1: "minimize", -1: "maximize"}
    goals = [Objective(name, value, direction=ways[s]) for (name, value), s in zip(named, signs, strict=True)]
    result = search_subnets(space(), goals, evaluations=30, seed=1, progress=False)
    result.save(run / "search.json")
    result.save(run / "exact.json")
    page = Page(write_report(run))
    points = {(macs(e.architecture), structure(e.architecture)) for e in result.evaluations}

    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        pairs = list(zip(one, other, reversed(signs), strict=True))
        return one != other and all(sign * a <= sign * b for a, b, sign in pairs)

    wanted = {point for point in points if not any(beats(one, point) for one in points)}
    for figure, name in (("front", "front"), ("exact-front", "exact front")):
        drawn = page.trace(figure, name)
        assert set(zip(drawn["x"], drawn["y"], strict=True)) == wanted
    words = {1: "lower", -1: "higher"}
    assert f"Better is {words[signs[0]]} structure, and {words[signs[1]]} MACs at 128 tokens." in page.text


def test_the_midpoint_the_limit_and_the_models_of_the_table_are_marked(page: Page, run: Path) -> None:
    middle, rows = space().midpoint(), recorded(run)["stages"]["compare"]["rows"]
    assert page.trace("front", "midpoint")["x"] == [macs(middle)]
    assert set(page.trace("front", "limit")["x"]) == {0.75 * macs(space().largest())}
    for one in rows:
        trace = page.trace("front", f"{one['name']} (table)")
        assert (trace["x"], trace["y"]) == ([one["macs"]], [one["structure"]])
    colours = {trace["name"]: trace["marker"]["color"] for trace in page.figures["front"]["data"]}
    assert colours["parent (table)"] == "role:parent" and colours["found (table)"] == "role:found"
    assert colours["uniform width, untrained (table)"] == "role:alternative"


def test_hovering_tells_the_architecture(page: Page) -> None:
    note = page.trace("front", "midpoint")["text"][0].replace("<br>", " ")
    widths = {space().midpoint()[f"layers.{layer}.intermediate_size"] for layer in range(3)}
    assert f"FFN {widths.pop()}×3" in note and "heads 2×3" in note and "3 of 3 layers" in note


def test_a_front_of_exact_search_is_called_exact(run: Path) -> None:
    searched().save(run / "exact.json")
    found = recorded(run)["stages"]["search"]["architecture"]
    change(run, repair={"architecture": found, "tried": [{"architecture": found}], "finished": True})
    page = Page(write_report(run))
    assert page.trace("exact-front", "exact front")["mode"] == "lines+markers"
    assert page.trace("exact-front", "chosen without training")["x"] == [sum(found.values())]


def test_the_answer_of_an_exact_search_is_not_drawn_again_as_one_that_was_tried(run: Path) -> None:
    found = recorded(run)["stages"]["search"]["architecture"]
    other = dict.fromkeys(found, min(found.values()))
    tried = [{"architecture": one, "macs": 5, "structure": 0.5} for one in (found, other)]
    change(run, repair={"architecture": found, "tried": tried, "finished": True})
    (series,) = front_sections._tried_series(open_run(run), "structure", "macs")
    assert len(series.x) == 1 and series.name == "exact answers, repaired on a part of the text"


def test_an_exact_search_without_a_second_axis_or_an_answer_has_no_chart(run: Path) -> None:
    single = search_subnets(space(), [Objective("macs", macs, cost=True)], evaluations=4, seed=0, progress=False)
    nothing = replace(searched(), evaluations=())
    for result in (single, nothing):
        result.save(run / "exact.json")
        page = Page(write_report(run))
        assert "exact-front" not in page.figures and "front" in page.figures
        assert "The exact front holds" not in page.text


def test_the_table_holds_costs_and_shares_and_qualities(page: Page, run: Path) -> None:
    header, parent, found, plain = page.tables["Models of this run"]
    rows = recorded(run)["stages"]["compare"]["rows"]
    cells = dict(zip(header, found, strict=True))
    assert cells["MACs at 128"] == f"{rows[1]['macs']} ({rows[1]['macs'] / rows[0]['macs']:.0%})"
    assert cells["speed-up"] == "2.00x" and cells["latency"] == "10 ms" and cells["loads as"] == "stock"
    assert cells["structure"] == f"{rows[1]['structure']:.4f}"
    assert parent[0] == "parent" and plain[0] == "uniform width, untrained"
    assert sum(found.get("class") == "marked" for found in page.attributes("tr")) == 1


def test_layers_are_drawn_beside_their_parent(page: Page, run: Path) -> None:
    found = recorded(run)["stages"]["compare"]["rows"][1]["architecture"]
    assert page.trace("layer-widths", "found")["y"] == [found[f"layers.{n}.intermediate_size"] for n in range(3)]
    assert page.trace("layer-widths", "parent")["y"] == [WIDTH] * 3
    assert page.trace("layer-heads", "found")["y"] == [found[f"layers.{n}.num_attention_heads"] for n in range(3)]


def test_predictions_stand_against_measurements(page: Page) -> None:
    assert (page.trace("speed-ups", "models")["x"], page.trace("speed-ups", "models")["y"]) == ([2.2], [2.0])
    assert page.trace("damages", "models")["y"] == [1.5, 1.0, 4.0]
    assert "correlation of 0.50" in page.text and "(+10.0%)" in page.text


def test_times_versions_seed_and_loading_are_told(page: Page) -> None:
    assert page.tables["Together 7.5 s"][1:3] == [["space", "1.5 s", "yes"], ["tables", "2.0 s", "yes"]]
    assert ["torch", "2.0"] in page.tables["Versions and machine"]
    assert ["seed", "7"] in page.tables["Options"] and "Seed: 7." in page.text
    assert 'from_pretrained("out")' in page.text and "met macs of 0.75: it is 0.7" in page.text


def test_what_a_run_does_not_have_is_left_out_with_the_reason(page: Page) -> None:
    ids = {found.get("id") for found in page.attributes("section")}
    assert "front" not in ids and "trade-off" in ids and "growth" not in ids and "routing" not in ids
    assert "Growth of blocks belongs to ELM." in page.text
    assert "Routing needs statistics of routers" in page.text


def test_every_chart_has_words_and_numbers_for_those_who_do_not_see_it(page: Page) -> None:
    drawn = [found for found in page.attributes("div") if found.get("role") == "img"]
    assert {f"chart-{slug}" for slug in page.figures} == {found["id"] for found in drawn}
    assert all(len(found["aria-label"] or "") > 20 for found in drawn)
    assert sum(caption.startswith("Numbers of: ") for caption in page.tables) == len(drawn)
    assert page.attributes("html")[0]["lang"] == "en"
    assert any(found.get("name") == "viewport" for found in page.attributes("meta"))


def test_texts_of_a_run_cannot_become_elements_of_the_page(tmp_path: Path) -> None:
    path = write_report(compress_run(tmp_path / "out.run", name=HOSTILE, model=HOSTILE))
    page = Page(path)
    assert page.attributes("img") == [] and HOSTILE in page.tables["Models of this run"][3][0]
    assert len(page.attributes("script")) == 3  # plotly, the figures, our own
    assert not any("onerror" in name for _, found in page.elements for name in found)
    names = [trace["name"] for trace in page.figures["models-latency"]["data"]]
    assert all("<" not in name for name in names) and any("&lt;img" in name for name in names)


def test_a_run_that_is_not_finished_shows_what_there_is(tmp_path: Path) -> None:
    options = {"model": "m", "within": {"macs": 0.5}, "recipe": "best", "seed": 0}
    run = write(tmp_path / "out.run", options, {"space": {"finished": True, "seconds": 1.0}})
    page = Page(write_report(run))
    assert "not finished; done so far: space" in page.text
    assert "Trade-off needs a search or a comparison, which this run has not recorded." in page.text
    assert page.figures == {} and page.attributes("script") == []


def test_a_folder_that_is_no_run_is_refused_and_the_run_beside_it_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"out is no run: .*its run is .*out\.run"):
        write_report(tmp_path / "out")
    with pytest.raises(CheckpointError, match="holds no result.json"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "damage",
    [
        {"compare": {"rows": [{"name": "parent"}, {"macs": 3}], "finished": True}},
        {"check": {"budgets": [{"met": True}]}},
        {"compare": {"rows": 5}},
        {"tables": {"predicted": [1.0, 2.0], "measured": [1.0, float("nan")], "finished": True}},
        {"recover": {"losses": [{"step": 1, "loss": float("inf")}]}},
        {"search": {"seconds": 10**400}},
    ],
)
def test_a_record_of_something_else_is_an_error_and_no_page(run: Path, damage: dict[str, Any]) -> None:
    with pytest.raises(
        CheckpointError, match=r"holds a record that hf_elastic did not write \(result.json, or"
    ) as caught:
        write_report(change(run, **damage))
    assert "\n" not in str(caught.value)
    assert not (run / "report.html").exists()


def test_a_record_with_half_a_character_is_an_error_and_no_page(run: Path) -> None:
    budgets = [{"met": 1, "sentence": "\ud800"}]
    with pytest.raises(CheckpointError, match=r"result.json is no JSON file: .*surrogates not allowed") as caught:
        write_report(change(run, check={"predicted_speedup": 2.0, "measured_speedup": 2.0, "budgets": budgets}))
    assert str(caught.value).isprintable()
    assert not (run / "report.html").exists()


def test_a_broken_search_is_an_error(run: Path) -> None:
    (run / "search.json").write_text('{"format": "else"}')
    with pytest.raises(CheckpointError, match=r"search.json is broken: not a search result"):
        write_report(run)


def test_a_page_that_cannot_be_written_is_an_error(run: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot write"):
        write_report(run, run / "result.json" / "page.html")


def test_a_recovery_and_a_study_have_reports_too(tmp_path: Path) -> None:
    losses = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    recovery = write(
        tmp_path / "recovery", {"model": "abc", "settings": {"target": "logits", "seed": 3}},
        {"recover": {"steps": 2, "losses": losses, "finished": True, "seconds": 4.0}},
    )  # fmt: skip
    page = Page(write_report(recovery))
    assert page.trace("loss-recover", "recover")["y"] == [2.0, 1.0] and "logits distilled for 2 steps" in page.text
    shared = {"seed": 0, "train_seconds": 1.0}
    rows = [
        {"method": "LoRA", "subnet": "rank 8", "accuracy": 0.9, "adapter_parameters": 80, "macs_share": 1.0, **shared},
        {"method": "LoRA", "subnet": "rank 4", "accuracy": 0.8, "adapter_parameters": 40, "macs_share": 1.0, **shared},
    ]
    study = write(tmp_path / "study", {"model": "m", "train": "t", "steps": 5}, {"LoRA": {"rows": rows}})
    page = Page(write_report(study))
    assert page.trace("models-adapter-parameters", "LoRA")["y"] == [0.9, 0.8]
    assert page.tables["Methods and subnets"][1][:2] == ["LoRA", "rank 8"]


def test_a_family_shows_each_size_and_whether_it_is_met(run: Path) -> None:
    rows = [row("parent", space().largest(), 0.02), row("1.5x", space().midpoint(), 0.01)]
    sentence = "speed-up 1.5: measured 2.0"
    outcome = {
        "budgets": [{"budget": "speedup", "met": False, "sentence": sentence}],
        "predicted_speedup": 1.6, "measured_speedup": 2.0,
    }  # fmt: skip
    stage = {"rows": rows, "setting": "prefill of 1x8", "outcomes": {"1.5x": outcome}, "finished": True}
    page = Page(write_report(change(run, **{"family 1.5x": stage})))
    assert page.trace("family-1", "sizes")["x"] == [20.0, 10.0]
    assert f"MISSED 1.5x: {sentence}" in page.text
    assert page.trace("speed-ups", "models")["x"] == [2.2, 1.6]


def test_statistics_of_routers_in_the_folder_are_drawn(run: Path) -> None:
    routers = [
        {"layer": 0, "kind": "mlp_tokens", "capacity": 0.8, "share": 0.75, "units": [0.75], "dependence": 0.4},
        {"layer": 1, "kind": "heads", "capacity": 0.5, "share": 0.5, "units": [0.9, 0.1], "dependence": 0.1},
    ]
    found = {"routers": routers, "tokens": 50, "seq_len": 8, "nominal_macs": 0.9, "measured_macs": 0.88}
    (run / "routing.json").write_text(json.dumps(found))
    page = Page(write_report(run))
    assert page.trace("routing-mlp-tokens", "measured")["y"] == [0.75]
    assert page.figures["units-heads"]["data"][0]["z"] == [[0.9], [0.1]]


@pytest.mark.slow
def test_figures_are_whole_svg_and_png_files_and_equal_when_drawn_again(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="drawn by matplotlib: pip install matplotlib")
    drawn = write_figures(run, tmp_path / "a")
    assert [path.name for path in drawn][:2] == ["front.svg", "models-latency.svg"]
    assert all(ElementTree.parse(path).getroot().tag.endswith("svg") for path in drawn)
    again = write_figures(run, tmp_path / "b")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in drawn]
    (first, *_) = write_figures(run, tmp_path / "c", format="png")
    assert first.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UnsupportedModelError, match="'gif' is not one of svg, png"):
        write_figures(run, tmp_path / "d", format="gif")  # type: ignore[arg-type]


def test_without_matplotlib_figures_say_what_to_install(run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(UnsupportedModelError, match=r'pip install "hf-elastic\[report\]"'):
        write_figures(run, tmp_path / "a")
