"""The run that comes with the source, `executed/sample/`: what the notebooks do now; no command touches it.

`make sample` takes out what belongs to one machine. What is left of it, times and plots of times, is masked here.
"""
import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest

from intel_nb.chain.execution import copy_for_run
from intel_nb.chain.parameters import read_parameters
from intel_nb.chain.plan import PLAN
from intel_nb.storage import read_checked

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "executed" / "sample"
STEPS = {step.name: step for step in PLAN}
AGAIN = "the notebooks have changed since the sample was made; make sample makes it anew"


@pytest.fixture(scope="module")
def maker():
    "The script behind `make sample`."
    spec = importlib.util.spec_from_file_location("sample", ROOT / ".ci" / "sample.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cells_of(path: Path) -> list[dict]:
    return json.loads(path.read_text())["cells"]


def is_filled_in(cell: dict) -> bool:
    return "injected-parameters" in cell["metadata"].get("tags", [])


def code_of(cells: list[dict]) -> list[str]:
    "The sources of the cells of code, without the one that papermill adds."
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "code" and not is_filled_in(c)]


def shape_of(value):
    "The names in a document, in order, with what kind of value each has."
    if isinstance(value, dict):
        return {name: shape_of(one) for name, one in value.items()}
    return [shape_of(one) for one in value] if isinstance(value, list) else type(value).__name__


def kinds_of(path: Path) -> list[list[list[str]]]:
    "What kinds of data (text, picture, …) each output of each cell has."
    return [[sorted(out.get("data", ())) for out in cell.get("outputs", ())] for cell in cells_of(path)]


def test_the_sample_is_whole():
    assert {path.name for path in SAMPLE.iterdir()} == {"run.json", "report.html", *(s.notebook for s in PLAN)}
    record = read_checked(SAMPLE / "run.json")
    assert (record["run_id"], record["status"]) == ("sample", "succeeded")
    assert {step["name"]: step["status"] for step in record["steps"]} == dict.fromkeys(STEPS, "succeeded")
    assert all(step["out_dir"] == f"workspace/store/{step['name']}/{step['key']}" for step in record["steps"])


@pytest.mark.parametrize("name", STEPS)
def test_the_sample_has_the_code_of_the_notebooks(name, tmp_path):
    "The cells of code, which name the pictures too, and the parameters that the chain fills in."
    notebook = STEPS[name].notebook
    now, then = cells_of(copy_for_run(ROOT / "nbs" / notebook, tmp_path / notebook)), cells_of(SAMPLE / notebook)
    assert code_of(then) == code_of(now), AGAIN
    filled = next("".join(cell["source"]) for cell in then if is_filled_in(cell))
    assert set(re.findall(r"^(\w+) = ", filled, re.M)) <= set(read_parameters(ROOT / "nbs" / notebook)), AGAIN
    assert all(cell["execution_count"] for cell in then if cell["cell_type"] == "code")
    assert not [out for cell in then for out in cell.get("outputs", ()) if out["output_type"] == "error"]


def test_the_sample_is_small_and_names_no_machine(maker):
    assert maker.faults(SAMPLE) == []


@pytest.mark.parametrize("text, found", [
    ('"out_dir = \\"/home/me/out\\"\\n"', "/home/me/out"), ("sqlite:////tmp/x/mlflow.db", "/tmp/x/mlflow.db"),
    ("<td>/Users/me/a.csv</td>", "/Users/me/a.csv"), ("workspace/store/.work/data-0/out", None), ("</tmp/>", None),
    ("http://127.0.0.1:8080/work/x", None), ("iVBORw0KGgo" * 30 + "/tmp/x", None)])
def test_a_trace_of_a_machine_is_found(maker, tmp_path, text, found):
    (tmp_path / "report.html").write_text(text)
    assert maker.faults(tmp_path) == ([f"report.html names {found}"] if found else [])


def test_too_large_a_sample_is_refused(maker, tmp_path):
    (tmp_path / "report.html").write_text("a" * 2_000_000)
    (tmp_path / "00_data.ipynb").write_text("a" * 3_000_000)
    assert maker.faults(tmp_path) == ["all files have 5,000,000 bytes", "the report has 2,000,000 bytes"]


def test_commands_pass_over_the_sample(waiting):
    there = waiting.executed / "sample"
    shutil.copytree(SAMPLE, there)
    before = {path.name: path.read_bytes() for path in there.iterdir()}
    record = json.loads(before["run.json"])
    (there / "run.json").write_text(json.dumps(record | {"status": "queued"}))  # as damaged as a record can be
    assert [run["run_id"] for run in waiting("runs", "--json").json] == ["first"]
    assert "first" in waiting("report", "latest").out
    for arguments in (["status"], ["models"], ["check"], ["check", "--repair"], ["prune", "--yes"], ["audit"]):
        answer = waiting(*arguments)
        assert answer.status == 0, (arguments, answer)
        assert "sample" not in answer.out + answer.err
    (there / "run.json").write_bytes(before["run.json"])
    for arguments in (["run", "--run-id", "sample"], ["report", "sample"], ["logs", "sample"], ["suspects", "sample"],
                      ["cancel", "sample"], ["compare", "sample", "first"]):
        answer = waiting(*arguments)
        assert answer.status == 2, (arguments, answer)
        assert "run id 'sample' is taken by the example that comes with the source" in answer.err
    assert {path.name: path.read_bytes() for path in there.iterdir()} == before


TIMES = re.compile(r"""
    \d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?Z? | [\d.,]+(?=\ (ms|s|min)\b)
    | (?<="seconds":\ )[\d.]+ | (?<=_ms":\ )[\d.]+ | (?<="check":\ ")\w+
""", re.X)


def masked(path: Path) -> str:
    "The text of a file without times, and without the plots of a notebook that draws times."
    text = path.read_text()
    if path.name == STEPS["staging"].notebook:
        text = re.sub(r'("image/\w+": )"[^"]*"', r"\1", text)
    return TIMES.sub("…", text)


@pytest.mark.slow
def test_the_sample_is_the_same_each_time_on_one_machine(maker, tmp_path):
    "Two of today have the same bytes but for times, and what they name is what the committed one names."
    for name in ("one", "two"):
        maker.make_sample(tmp_path / name)
    names = sorted(path.name for path in SAMPLE.iterdir())
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == names
    for name in names:
        assert masked(tmp_path / "one" / name) == masked(tmp_path / "two" / name), name
    new, old = (read_checked(folder / "run.json") for folder in (tmp_path / "one", SAMPLE))
    assert shape_of(new) == shape_of(old), AGAIN
    for step in PLAN:
        new, old = (kinds_of(folder / step.notebook) for folder in (tmp_path / "one", SAMPLE))
        assert new == old, AGAIN
