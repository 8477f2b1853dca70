"""Each block of the README and of what it leads to is run as it stands there, or marked, and then at least understood.

A block says after its fence what it is: `sh` is run in a workspace whose version 1 serves in staging, line by line, and
`sh elsewhere` in another workspace. `make` is what a person gives to make, `interactive` waits for a person, `account`
needs AWS (`test_cloud_path.py` walks it), `docker` an engine of containers, and `long` takes minutes. `text` is output.
"""
import json
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from itertools import dropwhile, groupby, takewhile
from pathlib import Path

import pytest
from conftest import House
from typer.main import get_command

from intel_nb.chain.parameters import read_parameters
from intel_nb.chain.plan import PLAN
from intel_nb.cli import app
from intel_nb.registry import describe_accuracy
from intel_nb.scenes import SAMPLE_CLASSES, sample_jpeg

ROOT = Path(__file__).parents[1]
DOCS = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
RUN, PARSED = ("sh", "sh elsewhere"), ("sh make", "sh interactive", "sh account", "sh docker", "sh long")
BLOCKS = [(name, kind, body) for name in DOCS
          for kind, body in re.findall(r"^```(.*)\n((?:.*\n)*?)^```$", (ROOT / name).read_text(), re.M)]
LINES = [(name, kind, line) for name, kind, body in BLOCKS if kind != "text"
         for line in body.replace("\\\n", "").splitlines()]
TO_RUN = sorted({name for name, kind, _ in LINES if kind in RUN})


def test_each_block_says_what_it_is():
    assert [(name, kind) for name, kind, _ in BLOCKS if kind not in (*RUN, *PARSED, "text")] == []
    assert sum((ROOT / name).read_text().count("\n```") for name in DOCS) == 2 * len(BLOCKS)


def commands(line: str) -> list[list[str]]:
    "The commands of a line of the shell as lists of words, without variables before them and files behind them."
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|>")
    lexer.whitespace_split = True
    parts = [list(words) for is_pipe, words in groupby(lexer, lambda word: word == "|") if not is_pipe]
    parts = [list(takewhile(lambda word: word != ">", words)) for words in parts]
    return [list(dropwhile(lambda word: re.match(r"[A-Z_]+=", word), words)) for words in parts]


def understand(words: list[str]) -> None:
    "Raise typer's error unless the command `intel-nb` understands these words. Nothing is carried out."
    name, command, context = "intel-nb", get_command(app), None
    while command:
        context = command.make_context(name, list(words), parent=context)
        rest = [*getattr(context, "_protected_args", ()), *context.args]
        name, command, words = command.resolve_command(context, rest) if hasattr(command, "commands") and rest else (
            name, None, [])


@pytest.mark.parametrize("words", [["run", "--dat", "x"], ["runn"], ["aws", "invoke"], ["promote", "1", "2"]])
def test_what_is_wrong_is_not_understood(words):
    with pytest.raises(Exception, match="No such|Missing|unexpected"):
        understand(words)


def check(words: list[str]) -> None:
    "Assert that a command of a block exists, with these options."
    program = words[0].removeprefix(".venv/bin/")
    if program == "make":
        done = subprocess.run(["make", "--no-print-directory", "-n", "-o", ".venv/run.stamp", *words[1:]], cwd=ROOT,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if words[1] == "run":
            understand(shlex.split(done.stdout.partition("||")[0].replace("\\\n", " "))[1:])
    elif program == "intel-nb":
        understand(words[1:])
    elif program == "papermill":
        given = {words[k + 1] for k, word in enumerate(words) if word == "-p"}
        assert given <= set(read_parameters(ROOT / words[1]))
    else:
        assert program in ("curl", "docker", "echo", "jupyter", "mkdir", "nbdev_test", "openssl", "pytest")


@pytest.mark.parametrize("line", dict.fromkeys(line for _, _, line in LINES))
def test_each_line_is_understood(line):
    for words in commands(line):
        check(words)


def test_what_a_newcomer_types_is_what_ci_runs():
    first = next(body for _, kind, body in BLOCKS if kind == "sh make").split("\n")[:2]
    assert first == ["make run", "make test"]
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert "- run: make run" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()


def test_the_output_that_the_readme_shows_is_that_of_the_sample():
    shown = next(body for name, kind, body in BLOCKS if kind == "text")
    record = json.loads((ROOT / "executed" / "sample" / "run.json").read_text())
    result = next(step["result"] for step in record["steps"] if step["name"] == "evaluate")
    assert f"version   1, accuracy {describe_accuracy(result['accuracy'], result['images'])}, Approved\n" in shown


@pytest.mark.parametrize("step", PLAN, ids=lambda step: step.name)
def test_the_readme_asks_what_the_chapters_ask(step):
    "And it leads to both forms of the chapter."
    first = "".join(json.loads((ROOT / "nbs" / step.notebook).read_text())["cells"][0]["source"])
    row = next(line for line in (ROOT / "README.md").read_text().splitlines() if f"](nbs/{step.notebook})" in line)
    assert f"| {re.search('^> (.*)', first, re.M)[1]} | [as it ran](executed/sample/{step.notebook}) |" in row


@pytest.mark.parametrize("name", DOCS)
def test_what_is_linked_is_there(name):
    text = (ROOT / name).read_text()
    for to in re.findall(r"\]\(([^)#]*)(?:#[^)]*)?\)|(?:src|href)=\"([^\"#]+)", text):
        path = "".join(to)
        assert "://" in path or ((ROOT / name).parent / path).exists(), path


def put_files(house: House) -> None:
    "Put what the blocks name into the folder of `house`."
    (house.root / ".venv").mkdir()
    (house.root / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    (house.root / "nbs").symlink_to(ROOT / "nbs")
    (house.root / "intel.zip").symlink_to(house.archive)
    data = next(step["out_dir"] for step in house.record("first")["steps"] if step["name"] == "data")
    (house.root / "path" / "to").mkdir(parents=True)
    (house.root / "path" / "to" / "dataset").symlink_to(Path(data) / "dataset")
    images = ("sea.jpg", "street.png", "photos/a.jpg", "photos/b.jpg", "exports/c.jpg", "batch1/d.jpg")
    for k, name in enumerate(images):
        (house.root / name).parent.mkdir(exist_ok=True)
        (house.root / name).write_bytes(sample_jpeg(k, [500 + k]))
    for name in ("exports/c.jpg", "batch1/d.jpg"):
        label = SAMPLE_CLASSES[("c", "d").index(Path(name).stem) + 4]
        (house.root / name).with_name("labels.csv").write_text(f"image,label\n{Path(name).name},{label}\n")
    shutil.make_archive(str(house.root / "batch1"), "zip", house.root / "batch1")
    assert house("export", "1").status == 0
    (house.root / "model-1.tar.gz").rename(house.root / "model.tar.gz")
    (house.root / "model-1.evaluation.json").unlink()


def put_truth(house: House, url: str) -> None:
    "Ask the endpoint for an answer, and write its label to `truth.csv`."
    asked = urllib.request.Request(f"{url}/invocations", sample_jpeg(4, [600]), {"Content-Type": "image/jpeg"})
    with urllib.request.urlopen(asked, timeout=30) as answer:
        (house.root / "truth.csv").write_text(f"request_id,label\n{answer.headers['x-request-id']},sea\n")


@pytest.mark.slow
@pytest.mark.parametrize("name", TO_RUN)
def test_the_blocks_run_as_they_stand(name, staged):
    url = staged("endpoints", "--json").json[0]["url"]
    put_files(staged)
    put_truth(staged, url)
    other = House(staged.root / "elsewhere", staged.archive)
    try:
        for _, kind, line in [one for one in LINES if one[0] == name and one[1] in RUN]:
            environ = (other if kind == "sh elsewhere" else staged).environ
            done = subprocess.run(["bash", "-c", line.replace("http://127.0.0.1:8080", url)], cwd=staged.root,
                                  env=environ, capture_output=True, text=True, timeout=300)
            print(f"$ {line}\n{done.stdout}{done.stderr}")
            status = int((re.search(r"exit status (\d)", line) or ["", "0"])[1])
            assert done.returncode == status, done.stderr
            if "curl" in line:
                assert json.loads(done.stdout)["predictions"]
    finally:
        if other.home.exists():
            other("stop")
