"""Pin every direct and indirect dependency: constraints.txt for development, constraints-serve.txt for what serves.

Pip resolves for each supported Python without installing anything. A pin that differs between them gets a marker. Local
versions (`+cpu`) are left out, so that the file installs anywhere. `make lock` runs this.
"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

PYTHONS = ("3.11", "3.12", "3.13")
LOCKS = {"constraints.txt": ".[steps,aws,alibi,ray,dev]", "constraints-serve.txt": "."}


def resolve(python: str, requirement: str, folder: str) -> dict[str, str]:
    "Return package -> version as pip would install them for `requirement` on `python` (as `3.11`)."
    pip = [f"{folder}/{python}/bin/python", "-m", "pip", "install", "--quiet"]
    if not Path(pip[0]).exists():
        subprocess.run([f"python{python}", "-m", "venv", f"{folder}/{python}"], check=True)
        subprocess.run([*pip, "--upgrade", "pip"], check=True)
    report = f"{folder}/report.json"
    subprocess.run([*pip, "--dry-run", "--ignore-installed", "--report", report, requirement], check=True)
    found = (item["metadata"] for item in json.loads(Path(report).read_text())["install"])
    return {m["name"].lower().replace("_", "-"): m["version"].split("+")[0] for m in found if m["name"] != "intel-nb"}


def lines(pins: dict[str, dict[str, str]]) -> list[str]:
    "Return constraint lines from Python -> package -> version."
    out = []
    for name in sorted({n for versions in pins.values() for n in versions}):
        by_version: dict[str, list[str]] = {}
        for python, versions in pins.items():
            if name in versions:
                by_version.setdefault(versions[name], []).append(python)
        for version, pythons in by_version.items():
            marker = " or ".join(f'python_version == "{p}"' for p in pythons)
            out.append(f"{name}=={version}" + (f" ; {marker}" if len(by_version) > 1 else ""))
    return out


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, requirement in LOCKS.items():
            pins = {python: resolve(python, requirement, folder) for python in PYTHONS}
            text = "\n".join(["# Made by `make lock`; do not edit.", *lines(pins), ""])
            Path(name).write_text(text)
            print(f"{name}: {len(lines(pins))} pins", file=sys.stderr)


if __name__ == "__main__":
    main()
