"""A headless Chromium, spoken to over a pipe in its own protocol; no port, no library."""

import base64
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--remote-debugging-pipe",
)


def find_browser():
    """The path of an installed Chromium, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One open page: evaluates, presses keys, takes pictures, and keeps what the console said."""

    def __init__(self, commands, replies):
        self.commands, self.replies = commands, replies
        self.number, self.said, self.session, self.asked = 0, [], None, []

    def call(self, method, **parameters):
        """A command's result; events that come before it are noted."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            reply = self._read()
            if reply.get("id") == self.number:
                assert "error" not in reply, reply["error"]
                return reply["result"]

    def _read(self):
        data = bytearray()
        while not data.endswith(b"\0"):
            piece = self.replies.read(1)
            assert piece, "the browser has ended"
            data += piece
        reply = json.loads(data[:-1])
        self._note(reply)
        return reply

    def _note(self, reply):
        method, given = reply.get("method"), reply.get("params", {})
        if method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
            self.said.append(json.dumps(given))
        elif method == "Log.entryAdded":
            self.said.append(given["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.asked.append(given["request"]["url"])

    def open(self, address, width=1280, **window):
        """Open an address in a page of its own, in a window of this size, and wait until it is loaded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.resize(width, **window)
        self.call("Page.navigate", url=address)
        while self.evaluate("document.readyState") != "complete" or self.evaluate("location.href") == "about:blank":
            pass

    def evaluate(self, expression):
        """What an expression gives, as plain data."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def resize(self, width, height=900, *, scheme="light"):
        """The window's size in pixels, and whether the person likes it dark."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def press(self, key):
        """One key, down and up."""
        for kind in ("rawKeyDown", "keyUp"):
            code = {"ArrowLeft": 37, "ArrowRight": 39, "ArrowUp": 38, "ArrowDown": 40, "Tab": 9, " ": 32}[key]
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def photograph(self, path=None, *, clip=None, whole=False):
        """The page as PNG bytes: what the window shows, all of it, or a box of it."""
        given = {"captureBeyondViewport": whole or clip is not None}
        if clip is not None:
            given["clip"] = {**clip, "scale": 1}
        elif whole:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            given["clip"] = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        data = base64.b64decode(self.call("Page.captureScreenshot", format="png", **given)["data"])
        if path is not None:
            path.write_bytes(data)
        return data


@contextmanager
def browsing(browser, profile):
    """A browser with an empty profile in a folder, ended afterwards."""
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
    command = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
    process = subprocess.Popen(
        ["/bin/bash", "-c", command, browser, *_FLAGS, f"--user-data-dir={profile}"],
        pass_fds=(theirs_in, theirs_out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        with os.fdopen(ours_in, "rb") as replies:
            yield Page(ours_out, replies)
    finally:
        os.close(ours_out)
        process.terminate()
        process.wait(20)


def photograph(page_path, picture_path, *, width=1280, height=1200, scheme="light"):
    """What a window shows of a page's file, as a PNG of few colours."""
    with tempfile.TemporaryDirectory() as profile, browsing(find_browser(), profile) as page:
        page.open(Path(page_path).resolve().as_uri(), width, height=height, scheme=scheme)
        image = Image.open(io.BytesIO(page.photograph()))
    image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(picture_path, optimize=True)


if __name__ == "__main__":  # python -m tests.support.browser report.html docs/report.png
    photograph(*sys.argv[1:3])
