"""What users install: a wheel built by way of the sdist, in an environment that cannot see the checkout."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import threading
import time
import urllib.error
import urllib.request
import venv
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit, urlunsplit

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
# pytest runs from the checkout's own folders; a package that is itself installed has nothing to build.
pytestmark = pytest.mark.skipif(
    not (CHECKOUT / "pyproject.toml").is_file(), reason="Needs a source checkout to build a wheel from."
)


def run(arguments: Sequence[str | Path], folder: Path) -> str:
    """Run a command in ``folder`` and return what it printed; show all of it if it fails."""
    done = subprocess.run(
        [str(argument) for argument in arguments], cwd=folder, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{arguments} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the unpacked sdist, as a packager would."""
    folder = tmp_path_factory.mktemp("build")
    run([sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder], CHECKOUT)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    source = next(path for path in folder.iterdir() if path.is_dir())
    run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], source)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment that holds the wheel and borrows every other package."""
    home = tmp_path_factory.mktemp("installed") / "env"
    venv.create(home, with_pip=False)
    binaries = home / ("Scripts" if os.name == "nt" else "bin")
    python = binaries / "python"
    site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], home).strip())
    # Path files inside a borrowed folder are not followed, so an editable install stays unseen.
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "borrowed.pth").write_text("\n".join(borrowed))
    run([sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel], home)
    return python


def shipped(folder: str) -> set[str]:
    """Return the files of a folder of the checkout that users need, relative to the folder."""
    root = CHECKOUT / folder
    names = (path.relative_to(root) for path in root.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts)}


def test_the_wheel_holds_the_package_the_data_and_the_notebooks_but_no_results(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    expected = {f"prunelab/{name}" for name in shipped("prunelab")}
    for folder in ("data", "notebooks"):
        names = {name for name in shipped(folder) if not name.startswith("results/")}
        expected |= {f"prunelab/_share/{folder}/{name}" for name in names}
    assert "prunelab/_share/notebooks/quickstart.ipynb" in expected
    assert sorted(expected - inside) == []
    extra = {name for name in inside - expected if ".dist-info/" not in name}
    assert sorted(extra) == []


def test_the_installed_package_finds_its_own_data(python: Path, tmp_path: Path) -> None:
    code = (
        "import json, prunelab.resources as r, sys; "
        "print(json.dumps([r.__file__, *(str(r.folder(n)) for n in ('data', 'notebooks')), *sys.path]))"
    )
    home, data, notebooks, *path = json.loads(run([python, "-c", code], tmp_path))
    assert str(CHECKOUT) not in path
    share = Path(home).parent / "_share"
    assert (Path(data), Path(notebooks)) == (share / "data", share / "notebooks")
    assert any(Path(data).iterdir())


def read_into(lines: queue.Queue[str], stream: IO[str]) -> None:
    """Move a process's output to where it can be waited for, and keep its pipe from filling up."""
    for line in stream:
        lines.put(line)


@contextlib.contextmanager
def served_lab(python: Path, folder: Path, home: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run ``prunelab lab --no-browser`` in ``folder``; yield the process and the address that it prints."""
    command = shutil.which("prunelab", path=str(python.parent))
    assert command is not None
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        environment[name] = str(home / name.lower())
    # JupyterLab's own pages lie beside the borrowed packages.
    environment["JUPYTERLAB_DIR"] = str(Path(sys.prefix) / "share" / "jupyter" / "lab")
    process = subprocess.Popen(
        [command, "lab", "--no-browser"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Tests that a script runs in the background are deaf to Ctrl-C, and so would be what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    lines: queue.Queue[str] = queue.Queue()
    reader = threading.Thread(target=read_into, args=(lines, process.stdout), daemon=True)
    reader.start()
    said: list[str] = []
    try:
        give_up = time.monotonic() + 240
        while time.monotonic() < give_up and process.poll() is None:
            with contextlib.suppress(queue.Empty):
                said.append(lines.get(timeout=1))
                if found := re.search(r"http://\S+", said[-1]):
                    yield process, found.group()
                    return
        pytest.fail(f"prunelab lab printed no address within 240 s:\n{''.join(said)}")
    finally:
        process.kill()
        process.wait()
        reader.join(10)
        process.stdout.close()


def fetch(address: str, path: str, token: str | None) -> tuple[int, bytes]:
    """Ask the server for ``path``, with or without its token; return the status and the body."""
    parts = urlsplit(address)
    headers = {} if token is None else {"Authorization": f"token {token}"}
    request = urllib.request.Request(urlunsplit((parts.scheme, parts.netloc, path, "", "")), headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, b""


def test_lab_starts_in_an_empty_folder_serves_the_quickstart_and_stops(python: Path, tmp_path: Path) -> None:
    folder = tmp_path / "an empty folder"
    folder.mkdir()
    with served_lab(python, folder, tmp_path) as (process, address):
        parts = urlsplit(address)
        assert parts.hostname == "127.0.0.1"
        assert parts.path == "/lab/tree/quickstart.ipynb"
        token = parts.query.removeprefix("token=")
        assert len(token) >= 32
        assert (folder / "quickstart.ipynb").is_file()
        assert fetch(address, "/api/status", None)[0] == 403
        assert fetch(address, "/api/status", token)[0] == 200
        status, body = fetch(address, "/api/contents/quickstart.ipynb?content=0", token)
        assert (status, json.loads(body)["type"]) == (200, "notebook")
        status, page = fetch(address, "/lab/tree/quickstart.ipynb", token)
        assert status == 200
        settings = re.search(rb'id="jupyter-config-data"[^>]*>(.*?)</script>', page, re.DOTALL)
        assert settings is not None
        assert json.loads(settings.group(1))["news"] == {"disabled": True}
        path = "/lab/api/settings/@jupyterlab/apputils-extension:notification"
        schema = json.loads(fetch(address, path, token)[1])["schema"]
        assert schema["properties"]["fetchNews"]["default"] == "false"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 0
