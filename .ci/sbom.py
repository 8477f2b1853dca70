"""Write what each image holds as CycloneDX: `dist/intel-nb-serve.cdx.json` and `dist/intel-nb-steps.cdx.json`.

The components are those pins of the image's lock that its Python on Linux takes, with their hashes. Debian's packages
in the base image are not among them: scan the image itself for those. `make sbom` runs this.
"""
import subprocess
import sys
from pathlib import Path

from packaging.markers import Marker

IMAGE = {"python_version": "3.11", "python_full_version": "3.11.2", "sys_platform": "linux", "os_name": "posix",
         "platform_machine": "x86_64"}


def blocks(lock: Path) -> list[str]:
    "Return the pins of a lock, each with its hashes."
    return [line for line in lock.read_text().replace("\\\n", " ").splitlines() if line and not line.startswith("#")]


def is_taken(pin: str) -> bool:
    "Return whether the image takes a pin."
    marker = pin.partition(" --hash")[0].partition(";")[2]
    return not marker or Marker(marker).evaluate(IMAGE)


def main() -> None:
    Path("dist").mkdir(exist_ok=True)
    for name in ("serve", "steps"):
        taken = [pin for pin in blocks(Path("locks", f"{name}.txt")) if is_taken(pin)]
        target = Path("dist", f"intel-nb-{name}.cdx.json")
        command = [Path(sys.executable).with_name("cyclonedx-py"), "requirements", "--pyproject", "pyproject.toml",
                   "--output-reproducible", "--of", "JSON", "-o", target, "-"]
        subprocess.run(command, input="\n".join(taken), text=True, check=True)
        print(f"{target}: {len(taken)} components")


if __name__ == "__main__":
    main()
