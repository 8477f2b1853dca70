"""Make `executed/sample/`, the run that comes with the source to look at: `make sample` runs this.

The chain runs on drawn scenes, in a workspace of its own that is gone afterwards. What belongs to this machine alone is
then taken out of what it wrote: folders become relative, ports the first one, the run's id the folder's name, and the
notes that papermill makes of each cell go. What is left of the machine is how long things took. The tour, which shows
pictures of the sample, is executed anew, and the output that the README shows says the sample's accuracy.
"""
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from intel_nb.chain.runs import SAMPLE  # noqa: E402
from intel_nb.registry import describe_accuracy  # noqa: E402
from intel_nb.storage import read_json, remove, write_checked, write_text  # noqa: E402

RUN_ID = "drawn-scenes"  # while it runs, because no run may have the name of the folder
MOST_BYTES, MOST_REPORT = 4_000_000, 2**20
OF_A_MACHINE = re.compile(r"""(?<![\w.:<-])/(?:home|root|Users|tmp|var|private|opt|usr|work|mnt|srv)/[^\s"'<\\]*""")


def run_chain(folder: Path) -> Path:
    "Run the chain on drawn scenes in `folder`, up to an endpoint that is stopped again. Return the run's folder."
    environ = {name: value for name, value in os.environ.items() if not name.startswith("INTEL_NB_")}
    environ |= {"INTEL_NB_HOME": str(folder / "workspace"), "INTEL_NB_EXECUTED": str(folder / "executed"),
                "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "intel_nb"]
    try:
        ran = subprocess.run([*command, "run", "--approve", "--run-id", RUN_ID], env=environ, cwd=ROOT)
    finally:
        subprocess.run([*command, "stop"], env=environ, cwd=ROOT, stdout=subprocess.DEVNULL)
    if ran.returncode:
        sys.exit(f"no sample: the chain ended with {ran.returncode}")
    return folder / "executed" / RUN_ID


def without_machine(text: str, folder: Path) -> str:
    "Return `text` with paths below `folder` and the project made relative, the first port, and the sample's id."
    for above in (folder, ROOT):
        text = text.replace(f"{above}/", "").replace(str(above), ".")
    text = re.sub(r"\b127\.0\.0\.1:\d+", "127.0.0.1:8080", text)
    return text.replace(f"intel-nb report {RUN_ID}", "make sample").replace(RUN_ID, SAMPLE)


def joined(outputs: list[dict]) -> list[dict]:
    "Return a cell's outputs with texts that follow each other as one: how a kernel divides them depends on time."
    found: list[dict] = []
    for one in outputs:
        if found and one["output_type"] == "stream" and one.get("name") == found[-1].get("name"):
            found[-1] = found[-1] | {"text": "".join([*found[-1]["text"], *one["text"]]).splitlines(keepends=True)}
        else:
            found.append(one)
    return found


def without_times(notebook: dict) -> dict:
    "Return an executed notebook without what papermill and Jupyter note of it; its values have a cell of one name."
    cells = [cell | {"metadata": {name: value for name, value in cell["metadata"].items()
                                  if name not in ("papermill", "execution")}} for cell in notebook["cells"]]
    cells = [cell | {"id": "injected-parameters"} if "injected-parameters" in cell["metadata"].get("tags", []) else cell
             for cell in cells]
    cells = [cell | {"outputs": joined(cell["outputs"])} if cell["cell_type"] == "code" else cell for cell in cells]
    metadata = {name: value for name, value in notebook["metadata"].items() if name != "papermill"}
    return notebook | {"cells": cells, "metadata": metadata}


def tidy(folder: Path, run: Path, to: Path) -> None:
    "Write those files of `run`, which ran in `folder`, that the sample has to the folder `to`."
    for path in sorted([*run.glob("*.ipynb"), run / "report.html"]):
        text = without_machine(path.read_text(), folder)
        if path.suffix == ".ipynb":
            text = json.dumps(without_times(json.loads(text)), indent=1, ensure_ascii=False) + "\n"
        write_text(to / path.name, text)
    record = json.loads(without_machine(json.dumps(read_json(run / "run.json")), folder))
    write_checked(to / "run.json", {name: value for name, value in record.items() if name != "check"})


def faults(folder: Path) -> list[str]:
    "Return in sentences why the files in `folder` may not be committed: too large, or with traces of a machine."
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    found = [f"all files have {sum(sizes.values()):,} bytes"] if sum(sizes.values()) > MOST_BYTES else []
    found += [f"the report has {sizes['report.html']:,} bytes"] if sizes["report.html"] > MOST_REPORT else []
    host = re.compile(rf"(?<![\w-]){re.escape(socket.gethostname())}(?![\w-])")
    for path in sorted(folder.iterdir()):
        text = re.sub(r"[A-Za-z0-9+/=]{200,}", "", path.read_text().replace("\\n", "\n"))  # without pictures
        found += [f"{path.name} names {what}" for what in sorted({*OF_A_MACHINE.findall(text), *host.findall(text)})]
    return found


def make_sample(to: Path) -> None:
    "Make the sample as the folder `to`, in the place of what was there. End with the reason if it may not be kept."
    with TemporaryDirectory(prefix="intel-nb-sample-") as temporary:
        folder = Path(temporary).resolve()
        tidy(folder, run_chain(folder), folder / "sample")
        if found := faults(folder / "sample"):
            sys.exit("\n".join(["the sample may not be kept:", *found]))
        remove(to)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder / "sample", to)


def run_tour() -> None:
    "Execute `nbs/index.ipynb` in place, and clean it."
    import nbformat
    from nbclient import NotebookClient
    tour = ROOT / "nbs" / "index.ipynb"
    notebook = nbformat.read(tour, 4)
    os.environ["PYTHONPATH"] = str(ROOT)
    NotebookClient(notebook, resources={"metadata": {"path": str(tour.parent)}}).execute()
    nbformat.write(notebook, tour)
    subprocess.run([Path(sys.executable).with_name("nbdev_clean"), "--fname", tour], cwd=ROOT, check=True)


def update_readme(sample: Path) -> None:
    "Let the output of a run that the README shows say the accuracy of the `sample`."
    steps = {step["name"]: step["result"] for step in read_json(sample / "run.json")["steps"]}
    accuracy = describe_accuracy(steps["evaluate"]["accuracy"], steps["evaluate"]["images"])
    readme = ROOT / "README.md"
    write_text(readme, re.sub(r"(?m)^(version +1, accuracy ).*", rf"\g<1>{accuracy}, Approved", readme.read_text()))


if __name__ == "__main__":
    target = ROOT / "executed" / SAMPLE
    make_sample(target)
    update_readme(target)
    run_tour()
    print(f"{target}: {sum(path.stat().st_size for path in target.iterdir()):,} bytes")
