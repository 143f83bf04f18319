"""A headless Chromium driven by its DevTools protocol, for tests of pages. Out of scope: what a page should be."""

import contextlib
import json
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
QUIET += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


class Page:
    """One tab: its size and colours are set at will, and what it asked of the network or complained about is kept."""

    def __init__(self, address: str):
        import websocket

        self.socket = websocket.create_connection(address, timeout=180, suppress_origin=True)
        self.number, self.events = 0, []
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters) -> dict:
        """Send a command and return its result."""
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == self.number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            self.events.append(message)

    def open(self, path: Path, width: int = 1280, height: int = 844, dark: bool = False) -> None:
        """Open a file at a width in CSS pixels and wait until it is loaded."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        until = time.time() + 60
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            if time.time() > until:
                raise TimeoutError(f"{path.name} did not load")
            self.run("1")

    def run(self, script: str):
        """Return the value of an expression; a promise is waited for."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(str(found["exceptionDetails"])[:400])
        return found["result"].get("value")

    def requests(self) -> list[str]:
        """Return the addresses that were asked for since `open`, but for the page itself and what it holds."""
        sent = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith(("file:", "data:"))]

    def complaints(self) -> list[str]:
        """Return errors and warnings on the console since `open`."""
        found = [e["params"]["entry"]["text"] for e in self.events if e["method"] == "Log.entryAdded"]
        methods = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Page.javascriptDialogOpening")
        return found + [str(e["params"]) for e in self.events if e["method"] in methods]


@contextlib.contextmanager
def chromium(profile: Path):
    """Start a browser with a new profile and yield one page of it."""
    profile.mkdir(parents=True, exist_ok=True)
    command = [CHROMIUM, *QUIET, f"--user-data-dir={profile}", "--remote-debugging-port=0", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        place, until = profile / "DevToolsActivePort", time.time() + 60
        while not (place.exists() and place.read_text().count("\n")):
            if process.poll() is not None or time.time() > until:
                raise RuntimeError("the browser did not start")
            time.sleep(0.1)
        port = place.read_text().split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
            tabs = [tab for tab in json.load(answer) if tab["type"] == "page"]
        yield Page(tabs[0]["webSocketDebuggerUrl"])
    finally:
        process.terminate()
        process.wait(timeout=20)
