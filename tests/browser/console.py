"""The console and the documentation page in a real Chromium, against the real server.

Arguments: the server's binary, a model store, an expert set to upload, an image, a folder for screenshots. The store
holds `photos`, `spare`, a set whose name is as long as names may be and whose labels are markup, and a file that cannot
be registered and is named in markup.
"""

import base64
import contextlib
import http.server
import io
import json
import os
import pathlib
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import zlib

import PIL.Image
import axe_core_python
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

BINARY, STORE, ARTIFACT, IMAGE, SHOTS = sys.argv[1:]
ADMIN_KEY = "browser-admin-key"
# How long anything may take before the test fails instead of hanging; no statement about speed.
PATIENCE = 60
AXE = (pathlib.Path(axe_core_python.__file__).parent / "axe.min.js").read_text()
DESKTOP, PHONE = (1280, 900), (390, 844)


class Server:
    """The real server on one port, so that it can go away and come back."""

    def __init__(self, *flags):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.flags = flags
        self.origin = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self):
        command = [BINARY, "--listen", f"127.0.0.1:{self.port}", "--model-store", STORE, "--default-set", "photos"]
        environment = dict(os.environ, BVIT_ADMIN_KEYS=ADMIN_KEY)
        self.process = subprocess.Popen([*command, *self.flags], env=environment, stdout=subprocess.DEVNULL)
        wait_for(self.is_ready, "the server is ready")

    def is_ready(self):
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"{self.origin}/v2/health/ready", timeout=5).status == 200
        return False

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def classify(self, query):
        with open(IMAGE, "rb") as image:
            request = urllib.request.Request(f"{self.origin}/classify{query}", data=image.read(), method="POST")
        request.add_header("Content-Type", "image/png")
        return json.load(urllib.request.urlopen(request, timeout=PATIENCE))


def wait_for(condition, what):
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if result := condition():
            return result
        time.sleep(0.05)
    raise AssertionError(f"waited in vain until {what}")


def start_browser():
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    # Without a sandbox, because the gate runs as root in a container; the pages are our own.
    for flag in ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
    browser.set_script_timeout(PATIENCE)
    return browser


class Page:
    """What a person sees and does."""

    def __init__(self, browser, origin):
        self.browser, self.origin, self.requests = browser, origin, []

    def open(self, path="/"):
        self.browser.get(self.origin + path)

    def find(self, selector):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector):
        return self.find(selector).text

    def texts(self, selector):
        script = "return [...document.querySelectorAll(arguments[0])].map((node) => node.textContent)"
        return self.browser.execute_script(script, selector)

    def wait_text(self, selector, pattern):
        wait_for(lambda: re.search(pattern, self.text(selector)), f"{selector} says {pattern!r}: {self.text(selector)!r}")

    def answered(self):
        """Classifications this page has had an answer to."""
        script = "return performance.getEntriesByType('resource').filter((entry) => entry.name.includes('/classify')).length"
        return self.browser.execute_script(script)

    def row(self, name, version=1):
        selector = f'#sets tr[data-key="{name}/{version}"]'
        return wait_for(lambda: self.browser.find_elements(By.CSS_SELECTOR, selector), f"{name} is listed")[0]

    def row_says(self, name, pattern):
        wait_for(lambda: re.search(pattern, self.row(name).text), f"the row of {name} says {pattern!r}: {self.row(name).text!r}")

    def act(self, name, action):
        button = self.row(name).find_element(By.CSS_SELECTOR, f"[data-action={action}]")
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
        button.click()

    def set_key(self, key):
        self.find("#key").clear()
        self.find("#key").send_keys(key)

    def choose_image(self):
        self.find("#file").send_keys(str(pathlib.Path(IMAGE).resolve()))

    def press(self, *keys):
        ActionChains(self.browser).send_keys(*keys).perform()

    def focused(self):
        script = "const node = document.activeElement; return node.id || node.className || node.textContent.trim()"
        return self.browser.execute_script(script)

    def look(self, size, scheme):
        """Sets the window's size and the colour scheme."""
        self.size = (width, height) = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == PHONE}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def shoot(self, name):
        self.browser.execute_script("document.activeElement.blur(); scrollTo(0, 0)")
        # Two frames: styles and canvases have followed by then.
        frames = "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => done()))"
        self.browser.execute_async_script(frames)
        shot = self.browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        (pathlib.Path(SHOTS) / f"{name}.png").write_bytes(base64.b64decode(shot["data"]))

    def check_fit_and_access(self, what):
        """Nothing is wider than the window, and axe finds no fault with contrast, names or roles."""
        # Not against `innerWidth`: on a phone it grows with what does not fit.
        width = self.browser.execute_script("return document.documentElement.scrollWidth")
        assert width <= self.size[0], f"{what}: {width} pixels wide on a screen of {self.size[0]}"
        self.browser.execute_script(AXE)
        run = "const done = arguments[0]; axe.run(document).then(done, (error) => done({ error: String(error) }))"
        found = self.browser.execute_async_script(run)
        assert "error" not in found, found
        faults = [f"{fault['id']}: {node['target']} {node['failureSummary']}" for fault in found["violations"] for node in fault["nodes"]]
        assert not faults, f"{what}:\n" + "\n".join(faults)
        assert len(found["passes"]) > 10, "axe looked at nothing"

    def check_console(self, what, expected=None):
        """No error and no warning since the last look, but the browser's own notes of the failed requests that `expected` allows."""
        for entry in self.browser.get_log("browser"):
            is_expected = expected and entry["source"] == "network" and re.search(expected, entry["message"])
            assert is_expected or entry["level"] not in ("SEVERE", "WARNING"), f"{what}: {entry}"

    def check_requests(self):
        """Every request since the last look went to the server."""
        for entry in self.browser.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                url = message["params"]["request"]["url"]
                # What the page itself makes never leaves it.
                if not url.startswith(("data:", "blob:")):
                    self.requests.append(url)
        foreign = [url for url in self.requests if not url.startswith(self.origin + "/")]
        assert not foreign, foreign


def classify(page, server):
    page.open()
    page.wait_text("#status-word", "^ready$")
    page.choose_image()
    page.wait_text("#labels", r"\d%")
    expected = server.classify("/photos?top_k=5")["predictions"]
    assert page.texts("#labels .label") == [prediction["label"] for prediction in expected]
    scores = [f"{prediction['score'] * 100:.1f}%" for prediction in expected]
    assert page.texts("#labels .score") == scores, (page.texts("#labels .score"), scores)
    stages = page.texts("#timings li")
    assert len(stages) == 5 and all(re.search(r"\d (ms|s)$", stage) for stage in stages), stages
    page.check_console("classify")


def drop_and_paste(page, server):
    """The same image comes in by the two other ways; the browser's own events carry it."""
    label = page.texts("#labels .label")[0]
    with open(IMAGE, "rb") as image:
        encoded = base64.b64encode(image.read()).decode()
    script = """
        const [kind, encoded] = arguments;
        const file = new File([Uint8Array.from(atob(encoded), (c) => c.charCodeAt(0))], `${kind}.png`, { type: "image/png" });
        const data = new DataTransfer();
        data.items.add(file);
        const options = { bubbles: true, cancelable: true, dataTransfer: data, clipboardData: data };
        if (kind === "drop") document.getElementById("drop").dispatchEvent(new DragEvent("drop", options));
        else document.dispatchEvent(new ClipboardEvent("paste", options));
    """
    for kind in ("drop", "paste"):
        answered = page.answered()
        page.browser.execute_script(script, kind, encoded)
        page.wait_text("#image-name", f"^{kind}.png$")
        wait_for(lambda: page.answered() > answered, f"the {kind} is answered")
        assert page.texts("#labels .label")[0] == label
    page.check_console("drop and paste")


def markup_is_refused(page):
    """The policy lets no string become markup or code, so that a slip in the page's scripts would stay without effect."""
    attempts = ["document.body.innerHTML = '<b>'", "document.createElement('script').text = '1'"]
    for attempt in attempts:
        script = f"try {{ {attempt}; return 'done' }} catch (error) {{ return String(error) }}"
        assert page.browser.execute_script(script) != "done", attempt
    inline = "const node = document.createElement('a'); node.setAttribute('onclick', 'window.pwned = 1'); node.click(); return window.pwned"
    assert not page.browser.execute_script(f"try {{ {inline} }} catch {{ return null }}")
    page.browser.get_log("browser")


def routing(page, server):
    layers = server.classify("/photos?routing=true")["routing"]["layers"]
    shown = lambda: [int(text) for text in page.texts("#map .cell")]
    slider = page.find("#layer")
    for number, layer in enumerate(layers, 1):
        if number > 1:
            slider.send_keys(Keys.ARROW_RIGHT)
        page.wait_text("#layer-name", f"^Layer {number} of {len(layers)}$")
        assert shown() == [experts[0] for experts in layer["experts"]], number
        assert page.text("#agreement") == f"{layer['neighbour_agreement'] * 100:.1f}%"
    assert len({tuple(experts[0] for experts in layer["experts"]) for layer in layers}) > 1, "the layers differ"
    cell = page.browser.find_elements(By.CSS_SELECTOR, "#map .cell")[9]
    ActionChains(page.browser).scroll_to_element(cell).move_to_element(cell).perform()
    page.wait_text("#patch", rf"Row 2, column 2: expert {layers[-1]['experts'][9][0]}\b")
    page.check_console("routing")


def manage(page):
    page.row_says("spare", "registered")
    page.act("spare", "load")
    page.wait_text("#sets-message", "The server refuses: a key is needed")
    page.set_key("not-the-right-key")
    page.act("spare", "load")
    page.wait_text("#sets-message", "The server refuses this key: the key is not known")
    assert "registered" in page.row("spare").text
    page.check_console("refused keys", expected="401")
    page.set_key(ADMIN_KEY)
    page.act("spare", "load")
    page.wait_text("#sets-message", "load spare: done")
    page.row_says("spare", "resident")
    page.act("spare", "pin")
    page.wait_text("#sets-message", "pin spare: done")
    page.row_says("spare", "unpin")
    assert page.row("spare").find_element(By.CSS_SELECTOR, "[data-column=Pinned]").text.endswith("yes")
    assert not page.row("spare").find_element(By.CSS_SELECTOR, "[data-action=unload]").is_displayed()
    page.act("spare", "unpin")
    page.wait_text("#sets-message", "unpin spare: done")
    page.act("spare", "unload")
    page.wait_text("#sets-message", "unload spare: done")
    page.row_says("spare", "registered")

    page.find("details summary").click()
    page.find("#upload-name").send_keys("uploaded")
    page.find("#upload-file").send_keys(str(pathlib.Path(ARTIFACT).resolve()))
    page.find("#upload button").click()
    page.wait_text("#sets-message", "upload uploaded: done")
    page.act("uploaded", "try")
    page.wait_text("#generation", "^uploaded:1:")
    page.act("uploaded", "delete")
    page.browser.switch_to.alert.accept()
    page.wait_text("#sets-message", "delete uploaded: done")
    wait_for(lambda: "uploaded" not in "".join(page.texts("#sets th")), "the deleted set is gone")
    assert page.text("#memory-total") and len(page.texts("#memory li")) == 5
    page.find("details summary").click()
    page.check_console("manage")


def striped(upright, seed):
    """A picture of stripes, noisy, unlike every other one of its seed."""
    side, noise = 64, random.Random(f"{upright} {seed}")
    rows = b""
    for y in range(side):
        along = [x if upright else y for x in range(side)]
        base = [40 if (at % (6 + seed % 3)) < 3 else 200 for at in along]
        rows += b"\0" + bytes(value + noise.randrange(30) for value in base for _ in range(3))
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    size = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def teach(page, server, folder):
    """Two labels, a fit, a picture that nobody knew, a second fit, and back; on a phone."""
    def picture(upright, seed):
        path = pathlib.Path(folder) / f"{upright}-{seed}.png"
        path.write_bytes(striped(upright, seed))
        return str(path)

    page.look(PHONE, "light")
    # The key goes with the page.
    page.open()
    page.wait_text("#status-word", "^ready$")
    page.find("#teach-set").send_keys("stripes")
    page.find("#teach-open button").click()
    page.wait_text("#teach-message", "The server refuses: a key is needed")
    assert not page.find("#teach-work").is_displayed()
    page.check_console("teach without a key", expected="401")
    page.set_key(ADMIN_KEY)
    page.find("#teach-open button").click()
    wait_for(page.find("#teach-work").is_displayed, "the set is open")
    for label, upright in [("up", True), ("across", False)]:
        page.find("#teach-label").send_keys(label)
        page.find("#teach-new button").click()
        item = f'#teach-labels li[data-key="{label}"]'
        wait_for(lambda: page.browser.find_elements(By.CSS_SELECTOR, item), f"{label} is there")
        page.find(f"{item} input").send_keys("\n".join(picture(upright, seed) for seed in range(5)))
        page.wait_text("#teach-message", f"5 pictures are kept as {label}")
        page.wait_text(item, "5 pictures")
    page.find("#teach-fit").click()
    page.wait_text("#teach-state", "Version 1 answers now")
    page.wait_text("#teach-accuracy", r"of 10 pictures are right")
    page.wait_text("#teach-versions", r"version 1 \(answers now")
    page.check_fit_and_access("taught, on a phone")
    page.shoot("teach-phone")
    Select(page.find("#set")).select_by_value("stripes")
    page.find("#file").send_keys(picture(True, 77))
    page.wait_text("#generation", "^stripes:1:")
    page.wait_text("#labels", "^up")

    def is_kept():
        body = striped(True, 78)
        request = urllib.request.Request(f"{server.origin}/classify/stripes?min_score=1", data=body, method="POST")
        urllib.request.urlopen(request, timeout=PATIENCE)
        page.find("#teach-open button").click()
        return page.browser.find_elements(By.CSS_SELECTOR, "#teach-review li")

    item = wait_for(is_kept, "the unsure picture is listed")[0]
    assert re.search("no label was sure enough|unlike the pictures", item.text), item.text
    page.check_fit_and_access("review, on a phone")
    page.shoot("teach-review-phone")
    Select(item.find_element(By.CSS_SELECTOR, "select")).select_by_value("up")
    item.find_element(By.CSS_SELECTOR, "button").click()
    page.wait_text("#teach-message", "labelling: done")
    page.wait_text('#teach-labels li[data-key="up"]', "6 pictures")
    page.find("#teach-fit").click()
    page.wait_text("#teach-state", "Version 2 answers now")
    page.wait_text("#teach-versions", r"version 2 \(answers now")
    for row, of in [(1, 11), (2, 10)]:
        page.wait_text(f"#teach-versions tr:nth-child({row}) td:nth-child(2)", rf"% of {of} \(")
    for size, scheme, name in [(DESKTOP, "dark", "desktop-dark"), (PHONE, "dark", "phone-dark"), (DESKTOP, "light", "desktop")]:
        page.look(size, scheme)
        page.check_fit_and_access(f"taught twice, {name}")
        page.shoot(f"teach-{name}")
    back = next(button for button in page.browser.find_elements(By.CSS_SELECTOR, "#teach-versions button") if button.is_displayed())
    page.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", back)
    back.click()
    page.browser.switch_to.alert.accept()
    page.wait_text("#teach-message", "Version 2 is gone")
    page.wait_text("#teach-versions", r"^version 1 \(answers now")
    page.find("#again").click()
    page.wait_text("#generation", "^stripes:1:")
    Select(page.find("#set")).select_by_value("photos")
    page.choose_image()
    page.wait_text("#generation", "^photos:1:")
    page.check_console("teach")


def hostile(page, name):
    """Labels, names and reasons are text, whatever they look like."""
    Select(page.find("#set")).select_by_value(name)
    page.wait_text("#generation", f"^{name}:1:")
    labels = page.texts("#labels .label")
    assert all(label.startswith("<img src=x onerror=") for label in labels), labels
    assert "<img src=x onerror=" in page.text("#broken-files")
    assert not page.browser.execute_script("return window.pwned || document.querySelector('img[src=x]')")
    assert name in page.texts("#sets th")
    for size in (DESKTOP, PHONE):
        page.look(size, "light")
        page.check_fit_and_access(f"hostile at {size}")
        page.shoot(f"hostile-{'desktop' if size == DESKTOP else 'phone'}")
    page.look(DESKTOP, "light")
    page.find("#filter").send_keys("spare")
    wait_for(lambda: page.texts("#sets th") == ["spare"], "the filter finds one set")
    page.find("#filter").send_keys(Keys.CONTROL + "a", Keys.DELETE)
    Select(page.find("#set")).select_by_value("photos")
    page.wait_text("#generation", "^photos:1:")
    page.check_console("hostile")


def keyboard(page):
    """Everything that matters is reached and worked without a mouse, and what has the focus can be seen."""
    page.open()
    page.wait_text("#status-word", "^ready$")
    page.press(Keys.TAB)
    assert page.focused() == "skip", page.focused()
    reached = []
    for _ in range(60):
        page.press(Keys.TAB)
        reached.append(page.focused())
        outline = "const style = getComputedStyle(document.activeElement); return style.outlineStyle + style.outlineWidth"
        label = "const label = document.activeElement.closest('.button'); return label ? getComputedStyle(label).outlineStyle : 'none'"
        visible = page.browser.execute_script(outline) not in ("none", "none0px") or page.browser.execute_script(label) != "none"
        assert visible or page.focused() in ("", "BODY"), f"{reached[-1]} shows no focus"
        if reached[-1] == "sample":
            page.press(Keys.ENTER)
            page.wait_text("#labels", r"\d%")
            break
    assert {"key", "file"} <= set(reached) and reached[-1] == "sample", reached
    page.find("#layer").send_keys(Keys.TAB)
    wait_for(lambda: "cell" in page.focused(), "the map has the focus")
    page.press(Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    page.wait_text("#patch", "^Row 2, column 2: expert")
    page.check_console("keyboard")


def away_and_back(page, server):
    server.kill()
    page.wait_text("#banner", "cannot be reached")
    page.find("#again").click()
    page.wait_text("#classify-message", "The server cannot be reached")
    page.look(PHONE, "light")
    page.check_fit_and_access("unreachable")
    page.shoot("unreachable-phone")
    page.look(DESKTOP, "light")
    server.start()
    page.wait_text("#status-word", "^ready$")
    assert not page.find("#banner").is_displayed()
    page.find("#again").click()
    page.wait_text("#labels", r"\d%")
    page.check_console("away and back", expected="ERR_CONNECTION|ERR_EMPTY_RESPONSE|ERR_SOCKET|Failed to load resource")


def overloaded(page, server):
    """One request at a time, and a client that holds that place with a body that never ends."""
    head = "POST /classify HTTP/1.1\r\nHost: test\r\nContent-Length: 1000\r\nExpect: 100-continue\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as hog:
        hog.sendall(head.encode())
        # Asked for its body, it has the place.
        assert b" 100 " in hog.recv(1000)
        page.find("#again").click()
        page.wait_text("#classify-message", r"The server is overloaded: .*Try again in \d+ s")
        page.shoot("overloaded-desktop")
    page.check_console("overloaded", expected="429")
    wait_for(lambda: "bvit_requests_in_flight 1" in metrics(server), "the place is free")
    page.find("#again").click()
    page.wait_text("#labels", r"\d%")


class Snapshots(http.server.ThreadingHTTPServer):
    """A camera whose picture can be changed."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Snapshot)
        self.picture = pathlib.Path(IMAGE).read_bytes()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def show_nothing(self):
        file = io.BytesIO()
        PIL.Image.new("RGB", (320, 240)).save(file, "PNG")
        self.picture = file.getvalue()


class Snapshot(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.picture)))
        self.end_headers()
        self.wfile.write(self.server.picture)

    def log_message(self, *_):
        pass


def teach_from_frame(page, server, card):
    """What is shown is kept, byte for byte, also when the camera shows something else by then."""
    show = f"{card} button"
    if "--examples" not in server.flags:
        page.wait_text("#frame-teaching", "Start it with --examples DIR")
        assert not page.find(show).is_displayed()
        return
    wait_for(page.find(show).is_displayed, "the button is there")
    assert not page.text("#frame-teaching")
    page.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", page.find(show))
    page.find(show).click()
    page.wait_text("#frame-message", "The server refuses: a key is needed")
    page.find("#frame-close").click()
    assert not page.find("#frame-dialog").is_displayed()
    page.set_key(ADMIN_KEY)
    page.find(show).click()
    wait_for(page.find("#frame-dialog").is_displayed, "the frame is shown")
    assert page.find("#frame-set").get_attribute("value") == "photos"
    page.find("#frame-set").clear()
    page.find("#frame-set").send_keys("stripes")
    page.press(Keys.TAB)
    wait_for(lambda: page.browser.execute_script("return document.querySelectorAll('#frame-labels option').length") == 2, "two labels are offered")
    page.find("#frame-label").send_keys("shut")
    page.look(PHONE, "dark")
    page.check_fit_and_access("a frame to teach from")
    page.shoot("frame-phone-dark")
    page.look(DESKTOP, "light")
    page.find("#frame-form button").click()
    page.wait_text("#frame-message", "kept as shut for stripes")
    page.find("#frame-form button").click()
    page.wait_text("#frame-message", "stripes had this frame as shut already")
    page.press(Keys.ESCAPE)
    assert not page.find("#frame-dialog").is_displayed()
    # The server before this one was killed in the middle of a stream.
    page.check_console("teach from a frame", expected="401|/events")
    request = urllib.request.Request(f"{server.origin}/teach/stripes", headers={"X-Api-Key": ADMIN_KEY})
    example, = (example for example in json.load(urllib.request.urlopen(request))["examples"] if example["label"] == "shut")
    request.full_url += f"/examples/{example['id']}"
    assert urllib.request.urlopen(request).read() == pathlib.Path(IMAGE).read_bytes()


def cameras(page, server):
    """What cameras show, and what has changed, without a reload."""
    snapshots = Snapshots()
    port = snapshots.server_address[1]
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "cameras.toml"
        camera = '[[camera]]\nname = "{}"\nurl = "http://127.0.0.1:{}/"\nevery = "200ms"\nagree = "1 of 1"\nfrozen = 0\n'
        longest = "n" * 64
        file.write_text("".join(camera.format(*entry) for entry in [("gate", port), ("gone", 1), (longest, port)]))
        server.kill()
        server.flags = (*server.flags, "--cameras", str(file))
        server.start()
        page.open()
        label = server.classify("")["predictions"][0]["label"]
        card = '#camera-list li[data-key="{}"]'
        wait_for(lambda: page.texts(card.format("gate") + " .state") == [label], f"the gate shows {label}")
        wait_for(lambda: "silent" in "".join(page.texts(card.format("gone") + " .state")), "the dead camera is silent")
        assert "cannot connect" in page.text(card.format("gone"))
        drawn = "return [...arguments[0].getContext('2d').getImageData(0, 0, 300, 200).data].some((value) => value > 0 && value < 255)"
        picture = page.find(card.format("gate") + " canvas")
        wait_for(lambda: page.browser.execute_script(drawn, picture), "the picture is drawn")
        teach_from_frame(page, server, card.format("gate"))
        snapshots.show_nothing()
        wait_for(lambda: "dark" in page.text(card.format("gate") + " .state"), "the gate is dark")
        wait_for(lambda: any("gate: dark" in text for text in page.texts("#camera-changes li")), "the change is listed")
        for size, size_name in [(DESKTOP, "desktop"), (PHONE, "phone")]:
            for scheme in ("light", "dark"):
                page.look(size, scheme)
                page.check_fit_and_access(f"cameras, {size_name}, {scheme}")
                page.shoot(f"cameras-{size_name}-{scheme}")
        page.look(DESKTOP, "light")
        page.check_console("cameras")


def metrics(server):
    return urllib.request.urlopen(f"{server.origin}/metrics", timeout=PATIENCE).read().decode()


def draining(page):
    """What a server behind a proxy answers while it shuts down; without one its connections are closed at once, and it
    cannot be reached. The browser answers in its place, in the server's words."""
    body = json.dumps({"error": "the server is shutting down", "error_type": "draining"})
    script = """
        window.realFetch = fetch;
        window.fetch = async () => new Response(arguments[0], { status: 503, headers: { "Retry-After": "1" } });
    """
    page.browser.execute_script(script, body)
    page.wait_text("#banner", "shutting down: it finishes what it has and takes nothing new")
    assert page.text("#status-word") == "draining"
    page.find("#again").click()
    page.wait_text("#classify-message", "Not now: the server is shutting down. Try again in 1 s")
    page.shoot("draining-desktop")
    page.browser.execute_script("window.fetch = window.realFetch")
    page.wait_text("#status-word", "^ready$")
    page.check_console("draining")


def pictures(page):
    """Each page in each size and scheme, as a screenshot and through axe."""
    for path, name in [("/", "console"), ("/docs", "docs")]:
        page.open(path)
        if path == "/":
            page.wait_text("#status-word", "^ready$")
            page.choose_image()
            page.wait_text("#labels", r"\d%")
            # The charts need two readings.
            page.wait_text("#now-images", "per second")
        for size, size_name in [(DESKTOP, "desktop"), (PHONE, "phone")]:
            for scheme in ("light", "dark"):
                page.look(size, scheme)
                page.check_fit_and_access(f"{name}, {size_name}, {scheme}")
                page.shoot(f"{name}-{size_name}-{scheme}")
        page.look(DESKTOP, "light")
        page.check_console(name)


def main():
    pathlib.Path(SHOTS).mkdir(parents=True, exist_ok=True)
    longest = next(name for name in os.listdir(f"{STORE}/expert-sets") if len(name) == 200)
    scratch = tempfile.mkdtemp()
    server = Server("--examples", f"{scratch}/examples", "--keep-unsure", "5")
    browser = start_browser()
    page = Page(browser, server.origin)
    try:
        page.look(DESKTOP, "light")
        classify(page, server)
        drop_and_paste(page, server)
        markup_is_refused(page)
        routing(page, server)
        manage(page)
        teach(page, server, scratch)
        hostile(page, longest)
        keyboard(page)
        away_and_back(page, server)
        draining(page)
        pictures(page)
        page.check_requests()
        server.kill()
        server.flags = ("--max-requests", "1", "--body-timeout", "60s")
        server.start()
        page.open()
        page.wait_text("#status-word", "^ready$")
        page.choose_image()
        page.wait_text("#labels", r"\d%")
        overloaded(page, server)
        for flags in [(), ("--examples", f"{scratch}/examples")]:
            server.flags = flags
            cameras(page, server)
        page.check_requests()
        print(f"{len(page.requests)} requests, all to {server.origin}; {len(os.listdir(SHOTS))} screenshots in {SHOTS}")
    except BaseException:
        page.shoot("failed")
        raise
    finally:
        browser.quit()
        server.kill()


main()
