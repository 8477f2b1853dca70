"""Take the README's pictures of the report, of an executed notebook and of an endpoint's page, with chromium.

The first two show `executed/sample/`. The endpoint is one that `make run` has left on drawn scenes, whose URL may be
given: `.venv/bin/python .ci/pictures.py http://127.0.0.1:8080`.
"""
import base64
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image, ImageOps

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_page import CHROMIUM, FLAGS, Tab, invoke, new_tab  # noqa: E402

from intel_nb.chain.report import render_notebooks  # noqa: E402
from intel_nb.scenes import SAMPLE_CLASSES, sample_jpeg  # noqa: E402

CHAPTER = "02_evaluate"
WIDTH, COLOURS = 960, 96


@contextmanager
def open_tab(folder: Path) -> Iterator[Tab]:
    "Start a browser with its files in `folder`, and yield a tab."
    process = subprocess.Popen([CHROMIUM, *FLAGS, "--hide-scrollbars", f"--user-data-dir={folder}", "about:blank"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        found = (re.search(r"listening on ws://([^/]+)/", line) for line in process.stderr)
        with new_tab(next(filter(None, found))[1]) as tab:
            yield tab
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def take(tab: Tab, name: str, height: int) -> None:
    "Write the top of what `tab` shows to `docs/NAME.png`, in few colours."
    tab.call("Emulation.setDeviceMetricsOverride", width=WIDTH, height=height, deviceScaleFactor=1, mobile=False)
    tab.js("new Promise(done => requestAnimationFrame(() => setTimeout(done, 500)))")  # it may lay itself out anew
    taken = tab.call("Page.captureScreenshot")["data"]
    shot = Image.open(io.BytesIO(base64.b64decode(taken))).convert("RGB").crop((1, 1, WIDTH - 1, height - 1))
    path = ROOT / "docs" / f"{name}.png"
    framed = ImageOps.expand(shot, 1, "#c8ced5")  # a page is white, and so may be what is around it
    framed.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size:,} bytes")


def go(tab: Tab, url: str) -> None:
    "Open a page, and wait until all of it is there."
    tab.call("Page.navigate", url=url)
    tab.js("new Promise(go => document.readyState === 'complete' ? go(1) : addEventListener('load', () => go(1)))")


def main(url: str) -> None:
    with TemporaryDirectory() as temporary, open_tab(Path(temporary) / "browser") as tab:
        folder = Path(temporary)
        shutil.copytree(ROOT / "executed" / "sample", folder / "sample")
        render_notebooks(folder / "sample")
        for name, file, height in (("report", "report.html", 780), ("notebook", f"{CHAPTER}.html", 680)):
            go(tab, (folder / "sample" / file).as_uri())
            take(tab, name, height)
        for k in range(60):
            invoke(url, sample_jpeg(k % len(SAMPLE_CLASSES), [k]))
        files = [folder / f"{SAMPLE_CLASSES[k]}.jpg" for k in (3, 2, 4)]
        for k, file in enumerate(files):
            file.write_bytes(sample_jpeg(SAMPLE_CLASSES.index(file.stem), [100 + k]))
        tab.open(url)
        tab.choose(*files)
        tab.when("document.getElementById('result').ariaBusy === 'false' && document.querySelector('#classes tr')")
        take(tab, "page", 790)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080")
