"""The page at `/`, in a real browser that is driven over its DevTools protocol."""
import base64
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from contextlib import contextmanager
from functools import partial
from urllib.parse import quote, urlsplit
from urllib.request import urlopen

import httpx
import numpy as np
import pytest
from websockets.sync.client import connect

from intel_nb.images import encode_jpeg
from intel_nb.scenes import sample_scene
from intel_nb.serving.app import CSP
from intel_nb.serving.endpoints import throwaway
from intel_nb.serving.worker import die_with_parent

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, chromium-browser or google-chrome")

FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
         "--remote-debugging-port=0"]
SCENES = [encode_jpeg(sample_scene(i % 6, np.random.default_rng(i))) for i in range(12)]
SECONDS = 30  # to wait for anything at most
HTTP = httpx.Client(timeout=SECONDS)

# Resolves when %s is true, which is looked at whenever the document changes.
WHEN = """new Promise(done => {
  const look = () => (%s) && done(true);
  new MutationObserver(look).observe(document, {subtree: true, childList: true, attributes: true, characterData: true});
  look();
})"""


# Each element with text of its own, and how its colour stands out from the nearest background.
CONTRAST = """[...document.querySelectorAll("body *")].filter(e => e.checkVisibility() && [...e.childNodes].some(
    n => n.nodeType === 3 && n.data.trim()) && !["SCRIPT", "STYLE"].includes(e.tagName)).map(e => {
  const parts = text => text.match(/[\\d.]+/g).map(Number);
  const linear = c => c <= .04045 * 255 ? c / 255 / 12.92 : ((c / 255 + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => [r, g, b].map(linear).reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  let behind = e;
  while (behind && (parts(getComputedStyle(behind).backgroundColor)[3] ?? 1) === 0) behind = behind.parentElement;
  const [a, b] = [light(parts(getComputedStyle(e).color)), light(parts(getComputedStyle(behind).backgroundColor))];
  return [e.textContent.trim(), (Math.max(a, b) + .05) / (Math.min(a, b) + .05)];
})"""


class Tab:
    "A connection to a tab, or to the browser: it sends commands and collects the events."
    def __init__(self, socket):
        self.socket, self.count, self.events, self.prefix = socket, 0, [], None

    def call(self, method: str, **params) -> dict:
        "Send a command and return its result; note the events that arrive before it."
        number, end = self.send(method, **params), time.monotonic() + SECONDS
        while (message := json.loads(self.socket.recv(end - time.monotonic()))).get("id") != number:
            self.note(message)
        assert "error" not in message, (method, message["error"])
        return message["result"]

    def send(self, method: str, **params) -> int:
        self.count += 1
        self.socket.send(json.dumps({"id": self.count, "method": method, "params": params}))
        return self.count

    def note(self, message: dict) -> None:
        self.events.append(message)
        if message.get("method") == "Fetch.requestPaused":  # play the proxy that takes the prefix off
            asked = message["params"]
            bare = asked["request"]["url"].replace(self.prefix, "")
            self.send("Fetch.continueRequest", requestId=asked["requestId"], url=bare)

    def of(self, method: str) -> list[dict]:
        return [e["params"] for e in self.events if e.get("method") == method]

    def js(self, expression: str):
        "Return the value of a JavaScript expression, or of its promise."
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def when(self, condition: str) -> None:
        "Wait until the JavaScript `condition` is true in the page."
        assert self.js(WHEN % condition)

    def text(self, name: str) -> str:
        "Return the visible text of the element with the id `name`."
        return self.js(f"(e => e.checkVisibility() ? e.innerText : '')(document.getElementById({name!r}))")

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.when("document.getElementById('model')?.textContent.includes('Model')")

    def choose(self, *paths) -> None:
        "Choose files, as a person does in the dialog."
        field = self.call("Runtime.evaluate", expression="document.getElementById('file')")["result"]["objectId"]
        self.call("DOM.setFileInputFiles", files=list(map(str, paths)), objectId=field)

    def key(self, name: str, code: int) -> None:
        "Press a key and let it go."
        key = {"key": name, "code": name, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=chr(code), **key)
        self.call("Input.dispatchKeyEvent", type="keyUp", **key)

    def bars(self) -> list[list[str]]:
        "Return name, width of the bar, and percentage of each row."
        return self.js("[...document.querySelectorAll('#classes tr')].map(row => "
                       "[row.cells[0].textContent, row.querySelector('div').style.width, row.cells[2].textContent])")

    def points(self, line: str) -> int:
        "Return the number of points of a line of the chart."
        return len(re.findall("[ML]", self.js(f"document.getElementById('{line}-line').getAttribute('d')") or ""))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    "Start a browser and yield the address at which it listens."
    profile = tmp_path_factory.mktemp("browser")
    process = subprocess.Popen([CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
                               stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               start_new_session=True, preexec_fn=partial(die_with_parent, os.getpid()),
                               env=os.environ | {"HOME": str(profile)})
    try:
        found = next((m for line in process.stderr if (m := re.search(r"listening on ws://([^/]+)/", line))), None)
        assert found, f"{CHROMIUM} ended with {process.wait()}"
        threading.Thread(target=process.stderr.read, daemon=True).start()  # a full pipe would stop the browser
        yield found[1]
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the group that we have started: the browser and its children
        process.wait()


@contextmanager
def new_tab(browser: str):
    "Open a tab with its own storage and cache."
    version = json.load(urlopen(f"http://{browser}/json/version", timeout=SECONDS))
    with connect(version["webSocketDebuggerUrl"], max_size=None, proxy=None) as socket:
        whole = Tab(socket)
        context = whole.call("Target.createBrowserContext")["browserContextId"]
        target = whole.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        with connect(f"ws://{browser}/devtools/page/{target}", max_size=None, proxy=None) as inside:
            tab = Tab(inside)
            for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
                tab.call(f"{domain}.enable")
            yield tab
        whole.call("Target.disposeBrowserContext", browserContextId=context)


@pytest.fixture
def tab(browser):
    """Yield a tab, and assert afterwards that it talked only to the endpoint and that nothing in it went wrong.

    `tab.expected` lists errors that the test causes: the browser logs an answer of 415 as an error, for example."""
    with new_tab(browser) as tab:
        tab.expected = []
        yield tab
        tab.js("1")  # whatever was reported up to now has come
        asked = {urlsplit(e["request"]["url"])[:2] for e in tab.of("Network.requestWillBeSent")}
        assert len({origin for origin in asked if origin[0] not in ("data", "blob")}) == 1, asked
        assert tab.of("Runtime.exceptionThrown") == []
        assert [e for e in tab.of("Runtime.consoleAPICalled") if e["type"] in ("error", "warning", "assert")] == []
        logged = [e["entry"]["text"] for e in tab.of("Log.entryAdded") if e["entry"]["level"] in ("error", "warning")]
        assert [text for text in logged if not any(e in text for e in tab.expected)] == []


@pytest.fixture(scope="module")
def url(sample_model):
    with throwaway(sample_model) as url:
        yield url


def invoke(url: str, body: bytes, kind: str = "image/jpeg") -> httpx.Response:
    return HTTP.post(f"{url}/invocations", content=body, headers={"content-type": kind})


def shows(tab: Tab, prediction: dict) -> None:
    "Assert that the page shows this prediction, best class first."
    tab.when("document.getElementById('result').ariaBusy === 'false' && document.querySelector('#classes tr')")
    expected = sorted(prediction["probabilities"].items(), key=lambda pair: -pair[1])
    assert [name for name, _, _ in tab.bars()] == [name for name, _ in expected]
    for (_, width, shown), (_, p) in zip(tab.bars(), expected):
        assert float(width.removesuffix("%")) == float(shown.removesuffix(" %")) == pytest.approx(100 * p, abs=0.051)
    assert tab.text("label") == prediction["label"] == expected[0][0]
    assert float(tab.text("confidence").removesuffix(" %")) == pytest.approx(100 * prediction["confidence"], abs=0.051)
    assert tab.text("error") == ""


# In the page: a file of these base64 bytes in a DataTransfer, as what is dropped or pasted.
CARRIED = """const bytes = Uint8Array.from(atob(%r), c => c.charCodeAt(0)), carried = new DataTransfer();
carried.items.add(new File([bytes], %r, {type: %r}));"""
DROP = 'dispatchEvent(new DragEvent("drop", {dataTransfer: carried, bubbles: true, cancelable: true}))'
WAYS = {  # what is done, and what the browser takes the file for: its bytes say that it is an image
    "drop": (f'document.getElementById("drop").{DROP}', "scene.jpg", "image/jpeg"),
    "drop beside the frame": (f"document.body.{DROP}", "scene", ""),
    "paste": ('document.body.dispatchEvent(new ClipboardEvent("paste", {clipboardData: carried, bubbles: true}))',
              "scene.txt", "text/plain"),
}


def test_before_the_first_image(tab, url):
    "Runs first, on an endpoint that has seen nothing."
    tab.open(url)
    tab.when("document.getElementById('state').textContent.startsWith('No image has been seen')")
    shown = [tab.text(name) for name in ("seen", "statistic", "alarms")]
    assert shown == ["0", "none until the next image", "none so far"]
    assert (tab.points("statistic"), tab.text("nothing")) == (0, "No readings yet")
    assert tab.text("model") == "Model pooled_pixels, version throwaway"


def test_the_endpoint_sends_the_policy(url):
    assert HTTP.get(url).headers["content-security-policy"] == CSP


def test_an_image_is_chosen(tab, url, tmp_path):
    (tmp_path / "scene.jpg").write_bytes(SCENES[3])
    tab.open(url)
    tab.choose(tmp_path / "scene.jpg")
    shows(tab, invoke(url, SCENES[3]).json()["predictions"][0])
    tab.when("!document.getElementById('preview').hidden")
    image = "document.getElementById('preview')"
    assert (tab.js(f"{image}.naturalWidth"), tab.js(f"{image}.alt")) == (150, "scene.jpg")
    assert re.match(r"Drift statistic -?\d+\.\d\d, threshold \d+\.\d\d$|This image raised", tab.text("unlike"))


@pytest.mark.parametrize("way", WAYS)
def test_an_image_comes_otherwise(tab, url, way):
    done, name, kind = WAYS[way]
    tab.open(url)
    tab.js("{" + CARRIED % (base64.b64encode(SCENES[5]).decode(), name, kind) + done + "}")
    shows(tab, invoke(url, SCENES[5]).json()["predictions"][0])


def test_the_chart_shows_the_history(tab, url):
    for scene in SCENES:
        invoke(url, scene)
    drift, readings = (HTTP.get(f"{url}/{name}").json() for name in ("drift", "history"))
    tab.open(url)
    tab.when("document.getElementById('seen').textContent !== '–'")
    assert int(tab.text("seen").split(",")[0]) == drift["observations"]
    assert tab.points("statistic") == tab.points("threshold") == len(readings["readings"]) >= len(SCENES)
    assert tab.points("alarms") == sum(is_drift for _, _, is_drift in readings["readings"])
    assert tab.text("state").startswith("Drift: " if tab.points("alarms") else "No sign of drift in ")
    assert tab.text("statistic") == (f"{drift['statistic']:.2f}, alarm above {drift['threshold']:.2f}"
                                     if drift["time"] else "none until the next image")
    assert tab.text("nothing") == ""
    path = tab.js("document.getElementById('statistic-line').getAttribute('d')")
    height = [float(y) for y in re.findall(r"[ML]\S+ ([-\d.]+)", path)]  # 0 is the top
    statistics = [statistic for statistic, _, _ in readings["readings"]]
    assert min(height) >= 0 and max(height) <= 100
    assert np.argmin(height) == np.argmax(statistics) and np.argmax(height) == np.argmin(statistics)


WRONG = {  # a file that gets no answer, and what a person is told
    "notes.txt": (b"hello", "is not an image that can be read here. Save it as JPEG, PNG, WebP or BMP."),
    "cut.png": (SCENES[0][:500], "is damaged or incomplete, so it cannot be read as an image."),
    "empty.jpg": (b"", "is empty."),
}


def test_a_wrong_file_is_told_in_words(tab, url, tmp_path):
    "Below stands what the endpoint said."
    tab.expected = ["status of 400"]
    tab.open(url)
    for name, (content, words) in WRONG.items():
        (tmp_path / name).write_bytes(content)
        tab.choose(tmp_path / name)
        tab.when(f"document.getElementById('error').textContent === {json.dumps(f'{name} {words}')}")
        message = invoke(url, content, "").json()["error"]["message"] if content else "The file is empty."
        assert message[1:] in tab.text("detail")
        assert (tab.text("label"), tab.bars(), tab.js("document.getElementById('preview').hidden")) == ("", [], True)
    (tmp_path / "scene.jpg").write_bytes(SCENES[3])
    tab.choose(tmp_path / "scene.jpg")
    tab.when("document.getElementById('label').textContent")
    assert tab.text("error") == tab.text("detail") == ""


def rows(tab: Tab) -> list[str]:
    "Return the text of each line in the list of the last answers."
    return tab.js("[...document.querySelectorAll('#answers li')].map(line => line.innerText)")


def test_several_images_are_a_list_that_is_kept(tab, url, tmp_path):
    tab.expected = ["status of 400"]
    for k in range(3):
        (tmp_path / f"{k}.jpg").write_bytes(SCENES[k])
    (tmp_path / "notes.txt").write_bytes(b"hello")
    tab.open(url)
    assert rows(tab) == [] and not tab.js("document.getElementById('kept').checkVisibility()")
    tab.choose(tmp_path / "0.jpg")
    shows(tab, invoke(url, SCENES[0]).json()["predictions"][0])
    tab.choose(*(tmp_path / name for name in ("1.jpg", "notes.txt", "2.jpg")))
    tab.when("document.querySelectorAll('#answers li').length === 4 && !document.getElementById('left').textContent")
    labels = [invoke(url, scene).json()["predictions"][0]["label"] for scene in SCENES[:3]]
    expected = [(labels[1], "1.jpg"), ("no answer", "notes.txt"), (labels[2], "2.jpg"), (labels[0], "0.jpg")]
    assert all(line.startswith(label) and name in line for line, (label, name) in zip(rows(tab), expected)), rows(tab)
    assert tab.text("label") == labels[1], "the first of those that were chosen last"
    before = [line.split("\n")[0] for line in rows(tab)]
    tab.open(url)  # again
    tab.when("document.querySelectorAll('#answers li').length === 4")
    assert [line.split("\n")[0] for line in rows(tab)] == before
    tab.js("document.querySelectorAll('#answers button')[2].click()")
    assert tab.text("label") == labels[2] and not tab.js("document.getElementById('preview').hidden")
    assert tab.js("document.querySelectorAll('#answers [aria-current]').length") == 1
    tab.js("document.getElementById('clear').click()")
    assert rows(tab) == [] and tab.text("label") == ""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_it_fits_every_screen_and_can_be_read(tab, url, tmp_path, scheme, width):
    "Nothing is wider than the screen, and text stands out from what is behind it (WCAG 2.2: 4.5 to 1)."
    tab.expected = ["status of 400"]
    tab.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500)
    tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    name = f"{'a-very-long-name-' * 6}.jpg"
    for name_of, content in ((name, SCENES[3]), ("notes.txt", b"hello")):
        (tmp_path / name_of).write_bytes(content)
    tab.open(url)
    tab.choose(tmp_path / name, tmp_path / "notes.txt")
    tab.when("document.querySelectorAll('#answers .bad').length === 1")
    assert tab.js("document.documentElement.scrollWidth") <= width
    assert [one for one in tab.js(CONTRAST) if one[1] < 4.5] == []


def test_a_form_of_another_site_is_refused(tab, url, tmp_path):
    "Any page could post to an endpoint on this machine, without a script; the endpoint's own page may."
    tab.expected = ["403", "404"]  # a browser asks for the icon of whatever it shows, here of a JSON document
    (tmp_path / "a.jpg").write_bytes(SCENES[3])
    html = (f"<form action='{url}/invocations' method=post enctype=multipart/form-data>"
            "<input type=file name=photos id=file></form>")
    tab.call("Page.navigate", url="data:text/html," + quote(html))
    tab.when("document.getElementById('file')")
    tab.choose(tmp_path / "a.jpg")
    tab.js("document.forms[0].submit()")
    shown, end = "", time.monotonic() + SECONDS
    while "error" not in shown and time.monotonic() < end:  # the old document goes at any moment
        shown = tab.call("Runtime.evaluate", expression="document.body?.innerText")["result"].get("value") or ""
    assert json.loads(shown)["error"]["code"] == "cross_origin"


def test_it_works_under_any_path(tab, url):
    tab.prefix = "/some/prefix"
    tab.call("Fetch.enable", patterns=[{"urlPattern": "*/some/prefix*"}])
    for path in ("/some/prefix/", "/some/prefix"):
        before = len(tab.of("Network.requestWillBeSent"))
        tab.open(url + path)
        tab.when("document.getElementById('seen').textContent !== '–'")
        asked = {urlsplit(e["request"]["url"]).path for e in tab.of("Network.requestWillBeSent")[before:]} - {","}
        assert asked == {path, *(f"/some/prefix/{name}" for name in ("ping", "drift", "history"))}


def test_the_keyboard_is_enough(tab, url):
    tab.open(url)
    tab.key("Tab", 9)
    assert tab.js("document.activeElement.id") == "file"
    assert tab.js("getComputedStyle(document.getElementById('drop')).outlineStyle") == "solid"


def test_a_token_is_asked_for_and_kept_in_the_tab(tab, sample_model, tmp_path):
    (tmp_path / "scene.jpg").write_bytes(SCENES[3])
    tab.expected = ["status of 401"]
    with throwaway(sample_model, INTEL_NB_TOKEN="open-sesame") as url:
        tab.open(url)  # the page and the model's name are for everybody
        tab.when("!document.getElementById('key').hidden")
        tab.choose(tmp_path / "scene.jpg")
        tab.when("document.getElementById('error').textContent")
        for token, outcome in (("wrong", "document.getElementById('wanted').textContent.includes('does not accept')"),
                               ("open-sesame", "document.getElementById('label').textContent")):
            tab.js("document.getElementById('token').focus()")
            tab.call("Input.insertText", text=token)
            tab.key("Enter", 13)
            tab.when(outcome)
        assert tab.js("document.getElementById('key').hidden") and tab.text("error") == ""
        tab.when("document.getElementById('seen').textContent === '1'")
        tab.open(url)
        tab.when("document.getElementById('seen').textContent === '1'")
        assert tab.js("document.getElementById('key').hidden")


def test_an_endpoint_that_is_gone_is_said_until_it_is_back(tab, url):
    tab.expected = ["ERR_INTERNET_DISCONNECTED"]
    tab.open(url)
    network = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    tab.call("Network.emulateNetworkConditions", offline=True, **network)
    tab.when("document.getElementById('trouble').textContent === 'The endpoint does not answer. Is it running?'")
    tab.call("Network.emulateNetworkConditions", offline=False, **network)
    tab.js("document.dispatchEvent(new Event('visibilitychange'))")
    tab.when("document.getElementById('trouble').textContent === ''")


def test_a_hidden_tab_asks_nothing(tab, url):
    tab.open(url)
    tab.when("document.getElementById('seen').textContent !== '–'")
    assert tab.js("""[true, false].map(hidden => {
        let asked = 0;
        const real = window.fetch;
        window.fetch = (...request) => { asked += 1; return real(...request); };
        Object.defineProperty(document, "hidden", {get: () => hidden, configurable: true});
        document.dispatchEvent(new Event("visibilitychange"));
        window.fetch = real;
        return asked;
    })""") == [0, 1]
