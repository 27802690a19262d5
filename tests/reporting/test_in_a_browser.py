"""Reports in headless Chromium: everything is drawn, the console is silent, nothing is asked of any network."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from pages import Page
from recorded_runs import HOSTILE, Make, compress_run

from hf_elastic.reporting import write_report

pytestmark = pytest.mark.slow
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# The last one keeps the browser's own calls home on this machine.
SWITCHES = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
    "--virtual-time-budget=8000", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip


@dataclass(frozen=True)
class Visit:
    """What became of a page: its elements afterwards, what the console says, what it asked for."""

    elements: str
    console: list[str]
    requests: list[str]


def visit(page: Path, aside: Path, *switches: str) -> Visit:
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser here: none of {', '.join(BROWSERS)} is on the PATH")
    log = aside / "network.json"
    command = [browser, *SWITCHES, *switches, f"--user-data-dir={aside / 'user'}", f"--log-net-log={log}"]
    done = subprocess.run(
        [*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    found = json.loads(log.read_text())
    parameters = [event.get("params", {}) for event in found["events"]]
    # The browser's own requests are of no page.
    mine = [p for p in parameters if "url" in p and str(p.get("network_isolation_key")).startswith("file://")]
    asked = [p["url"] for p in mine if not p["url"].startswith("file://")]
    return Visit(done.stdout, re.findall(r":CONSOLE:\d+\] (.*)", done.stderr), asked)


def drawn(found: Visit) -> int:
    return len(re.findall(r'class="chart js-plotly-plot"', found.elements))


@pytest.mark.parametrize("switches", [(), ("--force-dark-mode", "--window-size=390,800")])
@pytest.mark.parametrize("kind", ["recorded", "compress", "adapters", "elm"])
def test_a_report_draws_everything_in_silence(made: Make, tmp_path: Path, kind: str, switches: tuple[str, ...]) -> None:
    run = compress_run(tmp_path / "out.run", name=HOSTILE) if kind == "recorded" else Path(f"{made(kind)}.run")
    page = write_report(run, tmp_path / "page.html")
    found = visit(page, tmp_path, *switches)
    assert (found.console, found.requests) == ([], [])
    figures = Page(page).figures
    assert drawn(found) == len(figures) > 1
    assert f'data-drawn="{len(figures)}"' in found.elements


def test_errors_and_requests_of_a_page_would_be_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text('<html><body><img src="http://127.0.0.1:9/x.png"><script>missing();</script></body></html>')
    found = visit(page, tmp_path)
    assert "missing is not defined" in found.console[0]
    assert set(found.requests) == {"http://127.0.0.1:9/x.png"}


def test_the_page_itself_forbids_what_it_does_not_hold(tmp_path: Path) -> None:
    page = write_report(compress_run(tmp_path / "out.run"), tmp_path / "page.html")
    page.write_text(page.read_text().replace("<main>", '<main><img src="http://127.0.0.1:9/x.png">'))
    found = visit(page, tmp_path)
    assert found.requests == [] and "Content Security Policy" in found.console[0]
