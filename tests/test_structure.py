"""The house rules that no single notebook can hold: who imports whom, what a step looks like, what serving needs."""
import ast
import json
import re
import subprocess
import symtable
import sys
from pathlib import Path

import pytest

from intel_nb.parameters import choices_of, exported_cells, find_declarations, is_allowed

ROOT = Path(__file__).parent.parent
NOTEBOOKS = {str(path.relative_to(ROOT / "nbs").with_suffix("")): json.loads(path.read_text())["cells"]
             for path in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in path.parts}
STEPS = [name for name in NOTEBOOKS if re.match(r"0\d_", name)]

# A room may import those before its own group. Within a folder, a module imports lower numbers only.
LAYERS = (("library",), ("detection",), ("labels", "training", "serving"), ("steps", "chain"), ("aws",), ("cli",))
HEIGHT = {room: height for height, rooms in enumerate(LAYERS) for room in rooms}


def source(cell: dict) -> str:
    return "".join(cell["source"])


def module(cells: list[dict]) -> str:
    "The module that a notebook exports to; empty for one that exports nothing."
    return next((m[1] for c in cells if (m := re.match(r"#\|\s*default_exp (\S+)", source(c)))), "")


def room(name: str) -> str:
    "The room of a notebook: its folder, or what its number says."
    folder, _, notebook = name.rpartition("/")
    return folder or ("steps" if notebook < "10" else "library" if notebook < "20" else "cli")


def path_of(name: str) -> Path:
    return ROOT / "intel_nb" / f"{name.replace('.', '/')}.py"


def imports(path: Path) -> set[str]:
    "Modules of this package that the file imports, wherever in it, and other packages by their first name."
    found, inside = set(), ("intel_nb", *path.relative_to(ROOT / "intel_nb").parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            above = inside[:len(inside) + 1 - node.level] if node.level else ()
            start = ".".join([*above, *([node.module] if node.module else [])])
            is_package = start.startswith("intel_nb") and (ROOT / start.replace(".", "/")).is_dir()
            found |= {f"{start}.{a.name}" for a in node.names} if is_package else {start}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
    return {name.removeprefix("intel_nb.") if name.startswith("intel_nb.") else name.split(".")[0] for name in found}


MODULES = {module(cells): name for name, cells in NOTEBOOKS.items() if module(cells)}


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_one_way(name):
    "A room imports those below it, a module lower numbers of its own room; a step imports no step."
    notebook = MODULES[name]
    for other in imports(path_of(name)) & set(MODULES):
        below = MODULES[other]
        if room(below) != room(notebook):
            assert HEIGHT[room(below)] < HEIGHT[room(notebook)], f"{notebook} imports {below}"
        else:
            assert below < notebook and room(below) != "steps", f"{notebook} imports {below}"


def rooms() -> dict[str, set[str]]:
    "Each room of the package's top level, and those that it imports."
    found: dict[str, set[str]] = {name.split(".")[0]: set() for name in MODULES}
    for name in MODULES:
        first = name.split(".")[0]
        found[first] |= {other.split(".")[0] for other in imports(path_of(name))} & set(found) - {first}
    return found


def test_the_house_stays_small():
    "At most 22 rooms on the top level, and 8 levels of imports among them."
    def level(name: str) -> int:
        return 1 + max(map(level, arrows[name]), default=0)

    arrows = rooms()
    assert len(arrows) <= 22
    assert max(map(level, arrows)) <= 8


@pytest.mark.parametrize("name", MODULES)
def test_only_one_door_to_the_cloud(name):
    assert name == "aws.client" or not imports(path_of(name)) & {"boto3", "botocore", "sagemaker"}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_has_its_cells(name):
    "One cell of parameters, a section `## Run`, and a last cell that writes the result."
    cells = NOTEBOOKS[name]
    assert sum("parameters" in c["metadata"].get("tags", []) for c in cells) == 1
    assert sum(source(c).split("\n")[0] == "## Run" for c in cells if c["cell_type"] == "markdown") == 1
    assert "result.json" in source(cells[-1])


def is_answer(cell: dict) -> bool:
    return "answer" in cell["metadata"].get("tags", [])


CHAPTERS = [name for name in STEPS if any(map(is_answer, NOTEBOOKS[name]))]


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_chapter_answers_its_question(name):
    "Title and question, then the place for the answer, which the run fills; no cell is longer than a screen."
    cells = NOTEBOOKS[name]
    run = next(i for i, c in enumerate(cells) if source(c).startswith("## Run"))
    assert re.match(r"# \w+\n\n> .*\?\n", source(cells[0]))
    assert [i for i, c in enumerate(cells) if is_answer(c)] == [1]
    assert sum("answer.show(" in source(c) for c in cells[run:]) == 1
    assert [i for i, c in enumerate(cells) if c["cell_type"] == "code" and len(c["source"]) > 25] == []
    assert not any("text/plain" in output.get("data", {}) for output in cells[-1]["outputs"]), "a raw dictionary"


@pytest.mark.parametrize("name", STEPS)
def test_a_step_checks_its_parameters_first(name):
    "Every parameter is declared, and the cells after the parameters and after `## Run` check them all."
    from intel_nb.chain.parameters import read_parameters
    declared = read_parameters(ROOT / "nbs" / f"{name}.ipynb")
    assert all(is_allowed(parameter.default, parameter) for parameter in declared.values())
    cells, step = NOTEBOOKS[name], name.split("_", 1)[1].replace("test_staging", "staging")
    is_tagged = ["parameters" in c["metadata"].get("tags", []) for c in cells]
    run = next(i for i, c in enumerate(cells) if source(c).startswith("## Run"))
    for checking in (cells[is_tagged.index(True) + 2], cells[run + 1]):
        assert f'check_parameters("{step}", globals())' in source(checking)
    assert find_declarations(exported_cells(step), step) == declared


@pytest.mark.parametrize("name", STEPS)
def test_a_step_exports_its_parameters_and_uses_none_of_them(name):
    "Its module holds their declarations. A function that read one there would miss what the notebook was given."
    step = name.split("_", 1)[1].replace("test_staging", "staging")
    tables = [symtable.symtable((ROOT / "intel_nb" / f"{step}.py").read_text(), step, "exec")]
    for table in tables:
        tables += table.get_children()
    read = {symbol.get_name() for table in tables[1:] for symbol in table.get_symbols() if symbol.is_global()}
    assert read and not read & set(find_declarations(exported_cells(step), step))


def test_the_table_of_profiles_agrees_with_the_declarations():
    from intel_nb.chain.parameters import read_parameters
    from intel_nb.train import PROFILES
    declared = read_parameters(ROOT / "nbs" / "01_train.ipynb")
    assert {name for name, one in declared.items() if one.default is None} == set(PROFILES)
    for name, row in PROFILES.items():
        assert row["type"] == declared[name].type
        assert all(is_allowed(value, declared[name]) for profile, value in row.items() if profile != "type")


def test_slow_changes_are_corruptions():
    from intel_nb.chain.parameters import read_parameters
    from intel_nb.detection.corruptions import CORRUPTIONS
    assert choices_of(read_parameters(ROOT / "nbs" / "04_drift.ipynb")["slow"].limits) == list(CORRUPTIONS)


@pytest.mark.parametrize("name", STEPS)
def test_papermill_sees_every_parameter(name):
    "A comment with an equals sign, for one, hides a parameter from papermill's inspector."
    from papermill.inspection import _infer_parameters
    from papermill.iorw import load_notebook_node
    cell = next(c for c in NOTEBOOKS[name] if "parameters" in c["metadata"].get("tags", []))
    written = [t.id for node in ast.parse(source(cell)).body for t in node.targets]
    assert [p.name for p in _infer_parameters(load_notebook_node(str(ROOT / "nbs" / f"{name}.ipynb")))] == written


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_committed_clean(name):
    "No counts, no path of the machine that ran them, no image of more than a poster's size."
    text = (ROOT / "nbs" / f"{name}.ipynb").read_text()
    assert len(text) < 400_000
    for cell in NOTEBOOKS[name]:
        if cell["cell_type"] == "code":
            assert cell["execution_count"] is None
            shown = json.dumps(cell["outputs"])
            assert not re.search(r"/(root|home|work|tmp|Users)/", shown), shown[:300]


def test_every_module_imports_in_a_fresh_process():
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(f'intel_nb.{name}')"
    subprocess.run([sys.executable, "-c", code, *MODULES], check=True, cwd="/")


@pytest.mark.slow
def test_serving_needs_the_core_alone(tmp_path):
    "In an environment with nothing but what is pinned for serving, a package answers."
    import numpy as np

    from intel_nb.images import encode_jpeg
    from intel_nb.model import sample_package
    from intel_nb.scenes import sample_scene
    sample_package(tmp_path / "model")
    (tmp_path / "sea.jpg").write_bytes(encode_jpeg(sample_scene(4, np.random.default_rng(0))))
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    locked = (["--require-hashes", "-r", ROOT / "locks" / f"{name}.txt"] for name in ("build", "serve"))
    for what in (*locked, ["--no-deps", ROOT]):
        subprocess.run([python, "-m", "pip", "install", "-q", *what], check=True)
    code = """
import sys, threading, time, urllib.request, uvicorn, pathlib
from intel_nb.serving import create_app
server = uvicorn.Server(uvicorn.Config(create_app("model", "state"), port=0, log_level="error"))
threading.Thread(target=server.run, daemon=True).start()
while not server.started: time.sleep(.05)
port = server.servers[0].sockets[0].getsockname()[1]
image, headers = pathlib.Path("sea.jpg").read_bytes(), {"Content-Type": "image/jpeg"}
request = urllib.request.Request(f"http://127.0.0.1:{port}/invocations", image, headers)
print(urllib.request.urlopen(request, timeout=20).read().decode())
"""
    done = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert json.loads(done.stdout)["predictions"][0]["label"] == "sea", done.stderr
    installed = subprocess.run([python, "-m", "pip", "list"], capture_output=True, text=True).stdout
    assert not re.search(r"^(torch|mlflow|pyarrow|alibi)", installed, re.M)


def test_the_docs_list_all_settings():
    from dataclasses import fields

    from intel_nb.serving.app import Settings
    text = (ROOT / "docs" / "endpoint.md").read_text()
    assert [f.name for f in fields(Settings) if f"| `INTEL_NB_{f.name.upper()}` |" not in text] == []
