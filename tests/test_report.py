"""The report of a run and the comparison of two, as files and in a real browser."""
import json
import re
import shutil

import pytest
from test_page import CHROMIUM, browser, new_tab  # noqa: F401

QUESTIONS = ("Is it better?", "How sure is that?", "Where is it worse?", "Which data?", "What next?")


@pytest.fixture
def compared(waiting):
    "A workspace with a second run, of another threshold."
    assert waiting.run("--param", "evaluate.min_accuracy=0.1", "--run-id", "second").status == 3
    return waiting


def test_runs_and_versions_are_compared(compared, tmp_path):
    "Only the threshold differs, so the same answers come from both, and no image changed sides."
    found = compared("compare", "first", "second", "--json").json
    assert found["parameters"] == {"evaluate.min_accuracy": [0.8, 0.1]}
    accuracy = found["figures"][0]
    assert (accuracy["name"], accuracy["difference"], accuracy["p_value"]) == ("accuracy", 0, 1)
    assert accuracy["images"] == found["images"] > 0 and accuracy["interval"][0] < 0 < accuracy["interval"][1]
    assert (found["became_right"], found["became_wrong"]) == ([], [])
    assert found["second"] == {"run": "second", "version": "2"}
    by_version = compared("compare", "1", "2", "--html", str(tmp_path / "page.html"))
    assert max(map(len, by_version.out.splitlines())) <= 80 or str(tmp_path) in by_version.out.splitlines()[-1]
    assert "evaluate.min_accuracy" in by_version.out and "became right: 0" in by_version.out
    assert "evaluate.min_accuracy" in (tmp_path / "page.html").read_text()
    unknown = compared("compare", "first", "seventh")
    assert (unknown.status, unknown.out) == (2, "") and "no run and no version seventh" in unknown.err


def test_a_run_without_a_version_is_compared_as_far_as_it_got(waiting):
    assert waiting.run("--to", "data", "--run-id", "early").status == 0
    answer = waiting("compare", "early", "first")
    assert answer.status == 0 and "they answered no test image in common" in answer.out
    assert "the second alone has train, evaluate" in answer.out


def test_the_report_outlives_the_outputs(waiting):
    "When the store has lost everything, the registry still knows the evaluation; what is gone is left out."
    from intel_nb.storage import write_checked
    shutil.rmtree(waiting.home / "store")
    record = waiting.record("first")
    for step in record["steps"]:
        step["out_dir"] = step["out_dir"] and str(waiting.home / "store" / step["name"] / str(step["key"]))
    write_checked(waiting.executed / "first" / "run.json", {k: v for k, v in record.items() if k != "check"})
    assert waiting("report", "first").status == 0
    page = (waiting.executed / "first" / "report.html").read_text()
    assert "Recall by class" in page and "intel-nb approve 1" in page
    assert "What could not be shown" not in page and "Suspected labels" not in page


def test_a_damaged_file_is_named_and_the_rest_is_shown(waiting):
    path, = (waiting.home / "store").glob("evaluate/*/evaluation.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"expected_calibration_error": "none"}))
    assert waiting("report", "first").status == 0
    page = (waiting.executed / "first" / "report.html").read_text()
    assert "What could not be shown" in page and "calibration: " in page and "Recall by class" in page


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, chromium-browser or google-chrome")
@pytest.mark.parametrize("width, height, colours", [(390, 844, "light"), (1280, 800, "dark")])
def test_the_pages_in_a_browser(browser, waiting, tmp_path, width, height, colours):  # noqa: F811
    "Nothing is loaded or wider than the screen, and the five answers stand on the first one."
    assert waiting("report", "first").status == 0
    assert waiting("compare", "first", "1", "--html", str(tmp_path / "page.html")).status == 0
    report = waiting.executed / "first" / "report.html"
    assert '<a href="02_evaluate.html">' in report.read_text()
    for path in (report, report.with_name("02_evaluate.html"), tmp_path / "page.html"):
        with new_tab(browser) as tab:
            tab.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=True)
            tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": colours}])
            tab.call("Page.navigate", url=path.as_uri())
            tab.when("document.querySelector('main')")
            assert tab.js("document.documentElement.scrollWidth") <= width, path
            dark = tab.js("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
            assert dark == (colours == "dark")
            if path == report:
                seen = tab.js(f"[...document.querySelectorAll('.answers dd')].map(e => [e.previousElementSibling"
                              f".textContent, e.getBoundingClientRect().bottom <= {height}])")
                assert seen == [[question, True] for question in QUESTIONS]
            asked = {e["request"]["url"].partition(":")[0] for e in tab.of("Network.requestWillBeSent")}
            assert asked <= {"file", "data"}
            assert [e["entry"]["text"] for e in tab.of("Log.entryAdded") if e["entry"]["level"] == "error"] == []


def test_the_report_links_to_nothing_elsewhere(waiting_once):
    page = (waiting_once.executed / "first" / "report.html").read_text()
    assert re.findall(r'(?:src|href)="(?!data:|0\d_\w+\.(?:ipynb|html)")([^"]*)', page) == []
