"""A JupyterLab with settings of its own and a headless Chromium that drives it.

The one fixture most tests want is ``notebook_page``: give it the source of some cells, and it returns once
JupyterLab has shown the notebook and run them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import nbformat
import pytest
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Error,
    Locator,
    Page,
    expect,
    sync_playwright,
)

# Generous: a slow machine with two cores may be starting Chromium, the server and a kernel at the same time.
PATIENCE_SECONDS = 240.0
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM_PLACES = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)
CHROMIUM_ARGUMENTS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # Containers often give shared memory too little room for a page.
    "--disable-dev-shm-usage",
]
_FAILED = pytest.StashKey[bool]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test below this folder, so that ``-m "not browser"`` leaves them out."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.browser)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remember a failure until the fixtures are torn down, which is when screenshots are taken."""
    report = yield
    if report.when == "call":
        item.stash[_FAILED] = report.failed
    return report


# -- Chromium ---------------------------------------------


def find_chromium() -> str | None:
    """Return the path of a Chromium or Chrome: the one named in PRUNELAB_CHROMIUM, or one found."""
    named = [os.environ["PRUNELAB_CHROMIUM"]] if os.environ.get("PRUNELAB_CHROMIUM") else []
    found = (shutil.which(name) for name in (*named, *CHROMIUM_NAMES, *CHROMIUM_PLACES))
    return next((path for path in found if path), None)


@pytest.fixture(scope="session")
def chromium_path() -> str:
    """The browser's executable; without one the tests are skipped, and fail where CI=true."""
    path = find_chromium()
    if path is None:
        sentence = "Chromium was not found; install Chromium or Google Chrome, or name it in PRUNELAB_CHROMIUM."
        if os.environ.get("CI") == "true":
            pytest.fail(sentence)
        pytest.skip(sentence)
    return path


@pytest.fixture(scope="session")
def browser(chromium_path: str) -> Iterator[Browser]:
    """One headless Chromium for the whole run; each page lives in a context of its own."""
    # Five seconds, the default, are few for a round trip through a busy kernel on a slow machine.
    expect.set_options(timeout=1000 * PATIENCE_SECONDS / 4)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium_path,
            args=CHROMIUM_ARGUMENTS,
            headless=True,
            timeout=1000 * PATIENCE_SECONDS,
        )
        yield browser
        browser.close()


# -- JupyterLab ---------------------------------------------


@dataclass(frozen=True)
class LabServer:
    """A running JupyterLab.

    Attributes:
        address: without a slash at the end.
        token: what every request must carry.
        root: the folder whose notebooks it shows.
        log: what the server and its kernels wrote.
    """

    address: str
    token: str
    root: Path
    log: Path

    def request(self, path: str, method: str = "GET") -> Any:
        """Ask the server's REST interface; return the decoded JSON, or None where there is none."""
        request = urllib.request.Request(
            self.address + path, method=method, headers={"Authorization": f"token {self.token}"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            body = answer.read()
        return json.loads(body) if body else None

    def stop_kernels(self) -> None:
        """Shut every kernel down, so that a test leaves no memory and no work to the next one."""
        for session in self.request("/api/sessions"):
            with contextlib.suppress(urllib.error.HTTPError):
                self.request(f"/api/sessions/{session['id']}", method="DELETE")


def jupyter_environment(folder: Path) -> dict[str, str]:
    """Return an environment in which Jupyter reads nothing of the user's, and python3 is this interpreter."""
    kernel = folder / "path" / "kernels" / "python3" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel.write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))
    folders = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "IPYTHONDIR": "ipython",
        "JUPYTER_PATH": "path",
    }
    # A question about news would cover a corner of the page.
    defaults = folder / "config" / "labconfig" / "default_setting_overrides.json"
    defaults.parent.mkdir(parents=True)
    quiet = {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false"}}
    defaults.write_text(json.dumps(quiet))
    return {**os.environ, **{name: str(folder / place) for name, place in folders.items()}}


def lab_command(port: int, token: str, root: Path) -> list[str]:
    """Return the command line of a JupyterLab that asks nobody for news and shows itself to scripts."""
    return [
        *(sys.executable, "-m", "jupyterlab"),
        "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",
        f"--ServerApp.root_dir={root}",
        "--ServerApp.open_browser=False",
        "--ServerApp.allow_root=True",
        f"--IdentityProvider.token={token}",
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--LabApp.extension_manager=readonly",
        "--LabApp.expose_app_in_browser=True",
    ]


@pytest.fixture(scope="session")
def lab_server(chromium_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabServer]:
    """A JupyterLab for the whole run; it ends with it, kernels included."""
    folder = tmp_path_factory.mktemp("jupyter")
    root, log = folder / "notebooks", folder / "server.log"
    root.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = LabServer(f"http://127.0.0.1:{port}", secrets.token_hex(16), root, log)
    with log.open("w") as stream:
        process = subprocess.Popen(
            lab_command(port, server.token, root),
            cwd=folder,
            env=jupyter_environment(folder),
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    try:
        _wait_for(server, process)
        yield server
        with contextlib.suppress(OSError):
            server.stop_kernels()
            server.request("/api/shutdown", method="POST")
            process.wait(30)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(server: LabServer, process: subprocess.Popen[bytes]) -> None:
    give_up = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < give_up and process.poll() is None:
        with contextlib.suppress(OSError):
            server.request("/api/status")
            return
        time.sleep(0.2)
    pytest.fail(f"JupyterLab did not start; the end of its log:\n{server.log.read_text()[-4000:]}")


# -- a notebook on the screen ---------------------------------------------

_RESTORED = """async () => {
    while (!window.jupyterapp?.restored) await new Promise(done => setTimeout(done, 50));
    await window.jupyterapp.restored;
}"""
# Hands no promise back: that of the run would not settle before the last cell has. Cleared first, so that the
# counts of an earlier run do not pass for those of this one.
_RUN_ALL = """() => {
    const {commands} = window.jupyterapp;
    commands.execute('notebook:clear-all-cell-outputs').then(() => {
        commands.execute('notebook:run-all-cells');
        window.prunelabRuns = (window.prunelabRuns ?? 0) + 1;
    });
}"""
# What the notebook is about to do, from its model: cells outside the window are not in the document.
_STATE = """() => {
    const panel = window.jupyterapp?.shell.currentWidget;
    const context = panel?.sessionContext;
    if (!panel?.content?.widgets || !context) return {ready: false};
    const cells = panel.content.widgets.filter(cell => cell.model.type === 'code');
    const outputs = cells.map(cell => cell.model.outputs.toJSON());
    const failed = outputs.flat().find(output => output.output_type === 'error');
    return {
        ready: context.isReady && !!context.session?.kernel,
        runs: window.prunelabRuns ?? 0,
        idle: context.session?.kernel?.status === 'idle'
            && cells.every(cell => (cell.model.executionState ?? 'idle') === 'idle'),
        ran: cells.every(cell => !cell.model.sharedModel.getSource().trim() || cell.model.executionCount > 0),
        error: failed ? [failed.ename, failed.evalue, ...failed.traceback].join('\\n') : null,
    };
}"""
# The browser's own remarks that tell nothing about the page's scripts.
_HARMLESS = re.compile(r"favicon|net::ERR_ABORTED|ResizeObserver loop", re.IGNORECASE)
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@dataclass
class NotebookPage:
    """A notebook in JupyterLab, its cells run.

    Attributes:
        page: Playwright's page, for anything not covered here.
        name: the notebook's file name, which is also its JupyterLab workspace.
        server: the JupyterLab that shows it.
        errors: what the page's scripts threw or wrote to the console as an error, in order.
    """

    page: Page
    name: str
    server: LabServer
    errors: list[str] = field(default_factory=list)

    @property
    def outputs(self) -> Locator:
        """The output area of every code cell that is on the screen, in order."""
        return self.page.locator(".jp-Notebook .jp-Cell-outputArea")

    def command(self, name: str, **arguments: Any) -> None:
        """Start one of JupyterLab's commands, without waiting for its end."""
        script = "([name, given]) => { window.jupyterapp.commands.execute(name, given); }"
        self.page.evaluate(script, [name, arguments])

    def state(self) -> dict[str, Any]:
        """Return what the notebook reports: ready, idle, ran (every cell), and the text of an error."""
        state: dict[str, Any] = self.page.evaluate(_STATE)
        return state

    def wait_until(self, met: Callable[[dict[str, Any]], bool], what: str, seconds: float = PATIENCE_SECONDS) -> None:
        """Wait until ``met`` holds for the notebook's state; a cell's error ends the wait and the test."""
        give_up = time.monotonic() + seconds
        while not met(state := self.state()):
            if state.get("error"):
                pytest.fail(f"A cell failed while waiting for {what}:\n{_COLOURS.sub('', state['error'])}")
            if time.monotonic() > give_up:
                pytest.fail(
                    f"Still waiting for {what} after {seconds:.0f} s: {state}; page errors: {self.errors}; "
                    f"the end of the server's log:\n{self.server.log.read_text()[-2000:]}"
                )
            self.page.wait_for_timeout(100)

    def wait_idle(self, seconds: float = PATIENCE_SECONDS) -> None:
        """Wait until the kernel has nothing to do and two looks in a row agree about it."""
        for _ in range(2):
            self.wait_until(lambda state: state["ready"] and state["idle"], "an idle kernel", seconds)
            self.page.wait_for_timeout(150)

    def run_all(self, seconds: float = PATIENCE_SECONDS) -> None:
        """Run every cell from top to bottom and wait for the end; a cell that fails fails the test."""
        runs = self.state()["runs"]
        self.page.evaluate(_RUN_ALL)
        self.wait_until(lambda state: state["runs"] > runs, "the run to start", seconds)
        self.wait_until(lambda state: state["ran"] and state["idle"], "the cells to run", seconds)
        if error := self.state()["error"]:
            pytest.fail(f"A cell failed:\n{_COLOURS.sub('', error)}")

    def set_theme(self, dark: bool) -> None:
        """Switch JupyterLab's theme and wait until the page shows it."""
        self.command("apputils:change-theme", theme=f"JupyterLab {'Dark' if dark else 'Light'}")
        self.page.wait_for_function("light => document.body.dataset.jpThemeLight === light", arg=str(not dark).lower())

    def assert_no_errors(self) -> None:
        """Fail if the page's scripts threw anything or wrote an error to the console."""
        assert self.errors == []


class OpenNotebook(Protocol):
    """What ``notebook_page`` gives a test."""

    def __call__(
        self,
        cells: Sequence[str] | Path,
        width: int = 1600,
        height: int = 1000,
        dark: bool = False,
        seconds: float = PATIENCE_SECONDS,
    ) -> NotebookPage:
        """Write a notebook with these code cells, open it, run them, and return the page.

        Args:
            cells: the source of each code cell, or the path of a notebook, of which a copy is opened.
            width: of the window, in CSS pixels.
            height: of the window, in CSS pixels.
            dark: whether JupyterLab's dark theme is shown.
            seconds: how long the cells may take to run.
        """


@pytest.fixture
def notebook_page(browser: Browser, lab_server: LabServer, request: pytest.FixtureRequest) -> Iterator[OpenNotebook]:
    """Open notebooks in JupyterLab; each gets a window of its own, and their kernels end with the test."""
    contexts: list[BrowserContext] = []
    opened: list[NotebookPage] = []

    def open_notebook(
        cells: Sequence[str] | Path,
        width: int = 1600,
        height: int = 1000,
        dark: bool = False,
        seconds: float = PATIENCE_SECONDS,
    ) -> NotebookPage:
        name = _write_notebook(lab_server.root, request.node.name, cells)
        context = browser.new_context(viewport={"width": width, "height": height})
        contexts.append(context)
        context.set_default_timeout(1000 * PATIENCE_SECONDS)
        notebook = NotebookPage(context.new_page(), name, lab_server)
        opened.append(notebook)
        _listen(notebook)
        # A workspace of its own: JupyterLab would otherwise open again what an earlier test had open.
        workspace = quote(name.removesuffix(".ipynb"))
        notebook.page.goto(
            f"{lab_server.address}/lab/workspaces/{workspace}/tree/{quote(name)}?token={lab_server.token}"
        )
        notebook.page.evaluate(_RESTORED)
        notebook.wait_until(lambda state: state["ready"], "JupyterLab and its kernel")
        notebook.set_theme(dark)
        notebook.run_all(seconds)
        notebook.wait_idle(seconds)
        return notebook

    yield open_notebook

    if request.node.stash.get(_FAILED, True):
        for notebook in opened:
            _save_screenshot(notebook)
    for context in contexts:
        context.close()
    lab_server.stop_kernels()


def _write_notebook(root: Path, test: str, cells: Sequence[str] | Path) -> str:
    if isinstance(cells, Path):
        notebook = nbformat.read(cells, as_version=4)
    else:
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    name = f"{re.sub(r'[^a-z0-9]+', '-', test.lower()).strip('-')}-{secrets.token_hex(3)}.ipynb"
    nbformat.write(notebook, root / name)
    return name


def _listen(notebook: NotebookPage) -> None:
    def said(message: ConsoleMessage) -> None:
        if message.type == "error" and not _HARMLESS.search(f"{message.text} {message.location}"):
            notebook.errors.append(f"console: {message.text}")

    def threw(error: Error) -> None:
        if not _HARMLESS.search(str(error)):
            notebook.errors.append(f"page: {error}")

    notebook.page.on("console", said)
    notebook.page.on("pageerror", threw)


def _save_screenshot(notebook: NotebookPage) -> None:
    folder = Path(os.environ.get("PRUNELAB_SCREENSHOTS") or tempfile.mkdtemp(prefix="prunelab-screenshots-"))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{notebook.name}.png"
    with contextlib.suppress(Error):
        notebook.page.screenshot(path=path, timeout=30_000)
        print(f"What the page showed: {path}; its errors: {notebook.errors}")
