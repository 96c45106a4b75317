#!/usr/bin/env python3
"""Open pages in headless Chromium and fail on anything that a quiet, offline page does not do.

    python tools/check_report.py runs/<id>/report.html [more.html ...] [--screenshots DIR]

Each page is opened wide and narrow, light and dark; every tab is clicked, then it is printed. A console error or
warning, an uncaught exception, a message of the browser about the page (a refused script, a failed load), or a request
for anything but the page itself is listed and makes the exit status 1. No browser is exit status 2, with what to
install.

It speaks the Chrome DevTools protocol over a pipe, so that it needs nothing but Python and a browser, and it gives the
browser no name server: what a page asks for is seen and never sent.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SIZES = {"wide": (1280, 900), "narrow": (390, 844)}
LOOKS = [(size, scheme) for scheme in ("light", "dark") for size in SIZES]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "chromium-headless-shell")
INSTALL = "no Chromium found: install it (Debian: apt-get install chromium) or set CHROMIUM to the path of one"
PATIENCE_S = 60.0
"""For one answer of the browser; a slow machine takes seconds to draw a large page."""
QUIET_S = 0.4
"""A page is at rest when it has had nothing to say for so long."""

CLICK_EVERY_TAB = """
(async () => {
  let clicked = 0;
  for (const tab of document.querySelectorAll("[role=tab]")) {
    tab.click();
    clicked += 1;
    await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  }
  for (const list of document.querySelectorAll("[role=tablist]")) list.querySelector("[role=tab]").click();
  return clicked;
})()
"""
MEASURE = """({
  width: document.documentElement.scrollWidth,
  screen: innerWidth,
  plots: document.querySelectorAll(".js-plotly-plot").length,
})"""


@dataclass
class Findings:
    """What was seen of one page; `problems` is empty for a good one."""

    problems: list[str] = field(default_factory=list)
    screenshots: list[Path] = field(default_factory=list)
    tabs: int = 0
    plots: int = 0

    def add(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)


def find_browser() -> str | None:
    """CHROMIUM from the environment if set, else the first of the usual names on the path."""
    named = os.environ.get("CHROMIUM")
    if named:
        return shutil.which(named)
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """A headless Chromium with an empty profile, spoken to over file descriptors 3 and 4 (--remote-debugging-pipe)."""

    def __init__(self, path: str):
        self.profile = tempfile.mkdtemp(prefix="check-report-")
        self.events: list[dict[str, Any]] = []
        self._buffer = b""
        self._last_id = 0
        arguments = [
            path, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-sync", "--disable-background-networking", "--disable-component-update", "--disable-extensions",
            "--hide-scrollbars", "--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={self.profile}", "--remote-debugging-pipe", "about:blank",
        ]  # fmt: skip
        their_in, self._out = _high_pipe()
        self._in, their_out = _high_pipe()
        log = str(Path(self.profile) / "browser.log")
        self._pid = os.posix_spawn(
            path,
            arguments,
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
                (os.POSIX_SPAWN_DUP2, their_in, 3),
                (os.POSIX_SPAWN_DUP2, their_out, 4),
            ],
            setpgroup=0,
        )
        os.close(their_in)
        os.close(their_out)

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; events that arrive meanwhile are kept in `events`.

        Raises:
            RuntimeError: the browser refuses the command, or has gone.
            TimeoutError: no answer.
        """
        self._last_id += 1
        message: dict[str, Any] = {"id": self._last_id, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        deadline = time.monotonic() + PATIENCE_S
        while True:
            reply = self._read(deadline - time.monotonic())
            if reply is None:
                raise TimeoutError(f"{method}: no answer from the browser in {PATIENCE_S:.0f} s")
            if reply.get("id") == message["id"]:
                if "error" in reply:
                    raise RuntimeError(f"{method}: {reply['error'].get('message')}")
                return reply["result"]
            self.events.append(reply)

    def listen(self, quiet_s: float = QUIET_S, until: str | None = None) -> None:
        """Collect events until the one named has come and then nothing more for `quiet_s`."""
        deadline = time.monotonic() + PATIENCE_S
        waiting = until is not None and all(event.get("method") != until for event in self.events)
        while time.monotonic() < deadline:
            event = self._read(deadline - time.monotonic() if waiting else quiet_s)
            if event is None and not waiting:
                return
            if event is not None:
                self.events.append(event)
                waiting = waiting and event.get("method") != until
        if waiting:
            raise TimeoutError(f"{until}: did not happen in {PATIENCE_S:.0f} s")

    def close(self) -> None:
        """End the browser and all its processes, and remove its profile."""
        with contextlib.suppress(OSError, RuntimeError, TimeoutError):
            self.call("Browser.close")
        for end in (self._in, self._out):
            os.close(end)
        for firmer in (None, signal.SIGTERM, signal.SIGKILL):
            if firmer is not None:
                os.killpg(self._pid, firmer)
            if self._gone(within_s=5.0):
                break
        shutil.rmtree(self.profile, ignore_errors=True)

    def _gone(self, within_s: float) -> bool:
        deadline = time.monotonic() + within_s
        while not (gone := os.waitpid(self._pid, os.WNOHANG)[0]) and time.monotonic() < deadline:
            time.sleep(0.05)
        return bool(gone)

    def _read(self, timeout_s: float) -> dict[str, Any] | None:
        """The next message, or None when there is none in time."""
        deadline = time.monotonic() + max(0.0, timeout_s)
        while b"\0" not in self._buffer:
            if not select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return None
            data = os.read(self._in, 1 << 20)
            if not data:
                raise RuntimeError("the browser ended" + _last_words(Path(self.profile) / "browser.log"))
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


@contextlib.contextmanager
def browser(path: str) -> Iterator[Browser]:
    one = Browser(path)
    try:
        yield one
    finally:
        one.close()


def check_page(
    one: Browser, page: Path, screenshots: Path | None = None, *, looks: Sequence[tuple[str, str]] = LOOKS
) -> Findings:
    """Look at a page in sizes and schemes, all of them by default; the screenshots are of its whole length."""
    findings = Findings()
    url = page.resolve().as_uri()
    for size, scheme in looks:
        width, height = SIZES[size]
        target = one.call("Target.createTarget", url="about:blank")["targetId"]
        session = one.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        one.events.clear()
        for domain in ("Page", "Runtime", "Log", "Network"):
            one.call(f"{domain}.enable", session)
        narrow = size == "narrow"
        metrics = {"width": width, "height": height, "deviceScaleFactor": 2 if narrow else 1, "mobile": narrow}
        one.call("Emulation.setDeviceMetricsOverride", session, **metrics)
        if narrow:
            one.call("Emulation.setTouchEmulationEnabled", session, enabled=True)
        one.call("Emulation.setEmulatedMedia", session, features=[{"name": "prefers-color-scheme", "value": scheme}])
        answer = one.call("Page.navigate", session, url=url)
        if answer.get("errorText"):
            findings.add(f"cannot be opened: {answer['errorText']}")
            return findings
        one.listen(until="Page.loadEventFired")
        clicked = one.call(
            "Runtime.evaluate", session, expression=CLICK_EVERY_TAB, awaitPromise=True, returnByValue=True
        )
        findings.tabs = clicked["result"].get("value", 0)
        one.listen()
        seen = one.call("Runtime.evaluate", session, expression=MEASURE, returnByValue=True)["result"]["value"]
        findings.plots = seen["plots"]
        if seen["width"] > seen["screen"]:
            findings.add(f"wider than its {size} screen: {seen['width']} of {seen['screen']} pixels")
        if screenshots is not None:
            shot = screenshots / f"{page.stem}-{size}-{scheme}.png"
            shot.write_bytes(base64.b64decode(_screenshot(one, session, width)))
            findings.screenshots.append(shot)
        printed = one.call("Page.printToPDF", session, printBackground=True)["data"]
        if screenshots is not None and not narrow:
            (screenshots / f"{page.stem}-{scheme}.pdf").write_bytes(base64.b64decode(printed))
        one.listen()
        for problem in problems(one.events, url):
            findings.add(problem)
        one.call("Target.closeTarget", targetId=target)
    return findings


def problems(events: Sequence[dict[str, Any]], url: str) -> Iterator[str]:
    """What the browser's events say against the page at `url`."""
    for event in events:
        params = event.get("params", {})
        match event.get("method"):
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                said = " ".join(str(arg.get("value", arg.get("description", ""))) for arg in params["args"])
                yield f"console {params['type']}: {said[:500]}"
            case "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                yield f"exception: {details.get('exception', {}).get('description', details.get('text'))}"[:500]
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                entry = params["entry"]
                yield f"{entry['source']} {entry['level']}: {entry['text'][:500]} {entry.get('url', '')[:200]}".rstrip()
            case "Network.requestWillBeSent":
                asked = params["request"]["url"]
                if asked.split("#")[0] != url and not asked.startswith(("data:", "about:")):
                    yield f"request: {params['request']['method']} {asked[:300]}"
            case "Network.webSocketCreated":
                yield f"request: websocket {params['url'][:300]}"


def _screenshot(one: Browser, session: str, width: int) -> str:
    height = one.call("Page.getLayoutMetrics", session)["cssContentSize"]["height"]
    clip = {"x": 0, "y": 0, "width": width, "height": min(height, 16_000 if width > 800 else 8_000), "scale": 1}
    return one.call("Page.captureScreenshot", session, format="png", captureBeyondViewport=True, clip=clip)["data"]


def _high_pipe() -> tuple[int, int]:
    """A pipe on descriptors from 10 up, clear of the 3 and 4 that the browser's ends become."""
    ends = os.pipe()
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return high[0], high[1]


def _last_words(log: Path) -> str:
    with contextlib.suppress(OSError):
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return ": " + " | ".join(lines[-3:]) if lines else ""
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("pages", nargs="+", type=Path, metavar="PAGE", help="HTML files to open")
    parser.add_argument("--screenshots", type=Path, metavar="DIR", help="where to keep screenshots and prints")
    options = parser.parse_args(arguments)
    absent = [str(page) for page in options.pages if not page.is_file()]
    if absent:
        print(f"no such file: {', '.join(absent)}", file=sys.stderr)
        return 2
    path = find_browser()
    if path is None:
        print(INSTALL, file=sys.stderr)
        return 2
    if options.screenshots:
        options.screenshots.mkdir(parents=True, exist_ok=True)
    failed = False
    with browser(path) as one:
        for page in options.pages:
            findings = check_page(one, page, options.screenshots)
            failed = failed or bool(findings.problems)
            verdict = f"{len(findings.problems)} problems" if findings.problems else "quiet and offline"
            print(f"{page}: {verdict} ({findings.plots} plots, {findings.tabs} tabs, 2 sizes, light and dark, print)")
            for problem in findings.problems:
                print(f"  {problem}")
            for shot in findings.screenshots:
                print(f"  saved {shot}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
