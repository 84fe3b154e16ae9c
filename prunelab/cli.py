"""The ``prunelab`` command: one small table of sub-commands, each an argument list and a function.

A sub-command imports what it needs when it runs, so that ``prunelab --help`` loads no Jupyter.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import webbrowser
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import quote

from prunelab import resources
from prunelab.errors import PruneLabError

HOST = "127.0.0.1"
FIRST_NOTEBOOK = "quickstart.ipynb"
_STARTUP_SECONDS = 180.0


@dataclass(frozen=True)
class Command:
    """One sub-command of ``prunelab``.

    Attributes:
        name: what the user types.
        summary: one line for ``prunelab --help``.
        arguments: adds the sub-command's arguments to its parser.
        run: does the work and returns the exit status; bad input is a ``PruneLabError``.
    """

    name: str
    summary: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ``prunelab`` command and return its exit status: 0 done, 2 bad input, 130 stopped by Ctrl-C.

    Args:
        argv: the arguments after the command's name; those of the process if left out.
    """
    arguments = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except PruneLabError as error:
        print(f"prunelab: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prunelab: stopped.", file=sys.stderr)
        return 130


def version() -> str:
    """Return the installed version of prunelab, or a word for a checkout that was never installed."""
    try:
        return importlib.metadata.version("prunelab")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="prunelab", description="Explore and prune PyTorch networks.")
    parser.add_argument("--version", action="version", version=f"prunelab {version()}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = subparsers.add_parser(command.name, help=command.summary, description=f"{command.summary}.")
        command.arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser


# -- prunelab finetune, prunelab profile ---------------------------------------------


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        type=Path,
        metavar="RUN",
        help="a folder that lab.save(…, make_model=…, train=…, val=…) wrote; the code that it names is run",
    )


def _finetune(arguments: argparse.Namespace) -> int:
    from prunelab.train.run_folder import finetune_run

    _import_from_here()
    finetune_run(arguments.folder, partial(print, flush=True))
    return 0


def _profile(arguments: argparse.Namespace) -> int:
    from prunelab.train.run_folder import profile_run

    _import_from_here()
    profile_run(arguments.folder, partial(print, flush=True))
    return 0


def _import_from_here() -> None:
    """Modules in the current folder can be imported, as with ``python -m``; those in RUN cannot."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)


# -- prunelab reproduce ---------------------------------------------


def _paper_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="the reproduction; without it, all are listed")
    parser.add_argument("--data", type=Path, metavar="DIR", help="the folder that holds the data sets")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="how many seeds, from 0 (default: 3)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("notebooks/results"),
        metavar="DIR",
        help="where results go (default: %(default)s)",
    )
    parser.add_argument("--short", action="store_true", help="seconds on embedded images, to see that the code runs")


def _reproduce(arguments: argparse.Namespace) -> int:
    from prunelab.papers.reproduce import find, listing, reproduce

    if arguments.name is None:
        print(listing())
        return 0
    find(arguments.name)
    if arguments.data is None and not arguments.short:
        raise PruneLabError("Give the folder that holds the data sets: --data DIR.")
    reproduce(
        arguments.name,
        arguments.data or Path(),
        seeds=arguments.seeds,
        out=arguments.out,
        short=arguments.short,
        say=partial(print, flush=True),
    )
    return 0


# -- prunelab lab ---------------------------------------------


def _lab_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=_port, help="the port to serve on (default: a free one)")
    parser.add_argument(
        "--no-browser", action="store_true", help="print the address and serve, without opening a browser"
    )
    parser.add_argument(
        "--notebook",
        type=Path,
        metavar="PATH",
        help=f"the notebook to open, a bundled one or your own (default: {FIRST_NOTEBOOK})",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        metavar="DIR",
        help="the folder to work in, made if missing (default: the current one)",
    )


def _lab(arguments: argparse.Namespace) -> int:
    folder, notebook = prepare_folder(arguments.folder, arguments.notebook)
    port: int = arguments.port or free_port()
    _require_free(port)
    token = secrets.token_hex(24)
    start_page = "/lab/tree/" + quote(notebook.relative_to(folder).as_posix())
    address = f"http://{HOST}:{port}{start_page}?token={quote(token)}"
    opens_browser = not arguments.no_browser and has_screen(os.environ, sys.platform)
    threading.Thread(target=_announce, args=(port, address, opens_browser), daemon=True).start()
    with tempfile.TemporaryDirectory(prefix="prunelab-lab-") as defaults:
        os.environ.update(server_environment(os.environ, Path(defaults)))
        from jupyterlab.labapp import LabApp
        from tornado.ioloop import PeriodicCallback

        # A Ctrl-C that comes just before the loop falls asleep is noticed at its next event: there is one every second.
        PeriodicCallback(lambda: None, 1000).start()
        LabApp.launch_instance(server_arguments(folder, port, token, start_page))
        # A second, impatient Ctrl-C must not break off the tidying up.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    print("JupyterLab has stopped.")
    return 0


def server_arguments(folder: Path, port: int, token: str, start_page: str) -> list[str]:
    """Return JupyterLab's settings: reachable from this machine alone, asking nobody for news or updates.

    They are handed over inside this process: on a command line every user of the machine could read it.

    Args:
        folder: absolute; all that JupyterLab shows.
        port: a free TCP port.
        token: what a browser must present; set here so that no configuration file switches it off.
        start_page: the path of the page shown first, with its leading slash.
    """
    return [
        f"--ServerApp.ip={HOST}",
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",
        "--ServerApp.base_url=/",
        f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={folder}",
        # The address is announced, and the browser opened, by this command.
        "--ServerApp.open_browser=False",
        # In a container everybody is root; the server is bound to this machine and asks for its token anyway.
        "--ServerApp.allow_root=True",
        # One Ctrl-C ends it, without a question that a second Ctrl-C would have to answer.
        "--ServerApp.answer_yes=True",
        "--Application.log_level=ERROR",
        f"--LabApp.default_url={start_page}",
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]


def server_environment(environment: Mapping[str, str], defaults: Path) -> dict[str, str]:
    """Return what to add to the environment so that JupyterLab opens quietly on the right Python.

    Args:
        environment: the process environment, ``os.environ``.
        defaults: a folder that lasts as long as the server; JupyterLab's changed defaults are written there.
    """
    # Otherwise a newcomer is first asked about news. This is a default: the user's own choice wins.
    overrides = {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false"}}
    path = defaults / "labconfig" / "default_setting_overrides.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(overrides), encoding="utf-8")
    places = [str(defaults), *filter(None, [environment.get("JUPYTER_CONFIG_PATH")])]
    return {
        "JUPYTER_CONFIG_PATH": os.pathsep.join(places),
        # The notebooks must run in the Python that has prunelab, even if the user registered another kernel.
        "JUPYTER_PREFER_ENV_PATH": environment.get("JUPYTER_PREFER_ENV_PATH") or "1",
    }


def has_screen(environment: Mapping[str, str], platform: str) -> bool:
    """Say whether a browser window could be shown; only on Linux is there a way to tell.

    Args:
        environment: the process environment, ``os.environ``.
        platform: ``sys.platform``.
    """
    if not platform.startswith("linux"):
        return True
    return bool(environment.get("DISPLAY") or environment.get("WAYLAND_DISPLAY"))


def prepare_folder(folder: Path | None, notebook: Path | None) -> tuple[Path, Path]:
    """Choose the working folder and the notebook to open, copying the bundled notebooks in if wanted.

    Args:
        folder: the folder to work in; if None the current one, or that of ``notebook`` when it exists.
        notebook: the notebook to open, relative to ``folder`` or the current one; if None the quickstart.

    Returns:
        The folder and the notebook, both absolute, the notebook inside the folder.

    Raises:
        PruneLabError: if the folder cannot be made, or the notebook does not exist or lies outside it.
    """
    own = _existing(notebook, folder)
    if own is not None:
        root = _made(folder) if folder is not None else _surrounding(own)
        if not own.is_relative_to(root):
            raise PruneLabError(f"{own} lies outside {root}; give a --folder that contains it, or none.")
        return root, own
    root = _made(folder or Path.cwd())
    for line in copy_notebooks(root):
        print(line)
    chosen = root / (notebook or FIRST_NOTEBOOK)
    if not chosen.is_file() or not chosen.resolve().is_relative_to(root):
        bundled = ", ".join(sorted(path.name for path in resources.folder("notebooks").glob("*.ipynb")))
        raise PruneLabError(
            f"There is no notebook {notebook or FIRST_NOTEBOOK} here or in {root}; prunelab brings {bundled}."
        )
    return root, chosen


def copy_notebooks(folder: Path) -> list[str]:
    """Copy the bundled notebooks into ``folder``, leaving every file alone that is already there.

    Returns:
        A sentence naming the files copied, if any, and one naming those kept although they differ, if any.
    """
    source = resources.folder("notebooks")
    copied: list[str] = []
    kept: list[str] = []
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        # What `prunelab reproduce` measured is read in the repository; it is no notebook to work in.
        if not path.is_file() or any(part.startswith((".", "__")) or part == "results" for part in name.parts):
            continue
        target = folder / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            copied.append(name.as_posix())
        elif target.read_bytes() != path.read_bytes():
            kept.append(name.as_posix())
    said = [f"Copied {', '.join(copied)} into {folder}."] if copied else []
    if kept:
        said.append(
            f"Kept your own {', '.join(kept)} in {folder}; to get prunelab's version, rename yours and start again."
        )
    return said


def free_port() -> int:
    """Return a TCP port on this machine that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    return port


def _require_free(port: int) -> None:
    with socket.socket() as probe:
        probe.settimeout(1)
        if probe.connect_ex((HOST, port)) == 0:
            raise PruneLabError(f"Port {port} is taken; give another --port, or none to have a free one chosen.")


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port; give a whole number from 1 to 65535")
    return int(text)


def _existing(notebook: Path | None, folder: Path | None) -> Path | None:
    if notebook is None:
        return None
    places = [notebook] if folder is None else [folder / notebook, notebook]
    return next((place.resolve() for place in places if place.is_file()), None)


def _surrounding(notebook: Path) -> Path:
    current = Path.cwd().resolve()
    return current if notebook.is_relative_to(current) else notebook.parent


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PruneLabError(f"The folder {folder} cannot be made ({error.strerror}); give another --folder.") from error
    return folder.resolve()


def _announce(port: int, address: str, opens_browser: bool) -> None:
    """Wait until the server listens, then say where; runs beside the server, which holds the main thread."""
    give_up = time.monotonic() + _STARTUP_SECONDS
    while time.monotonic() < give_up:
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex((HOST, port)) == 0:
                break
        time.sleep(0.1)
    else:
        return
    opened = opens_browser and webbrowser.open(address)
    print(f"JupyterLab {'is open' if opened else 'runs'} at {address}", flush=True)
    if not opened:
        print("Open this address in a browser on this machine.", flush=True)
    print("Ctrl-C here stops it.", flush=True)


COMMANDS: tuple[Command, ...] = (
    Command("lab", "Open the explorer's notebooks in JupyterLab", _lab_arguments, _lab),
    Command("finetune", "Commit and fine-tune from a folder; again, go on where it was", _run_arguments, _finetune),
    Command("profile", "Profile the network of a folder on its training set", _run_arguments, _profile),
    Command("reproduce", "Run a paper's experiment for several seeds and tabulate it", _paper_arguments, _reproduce),
)

if __name__ == "__main__":
    raise SystemExit(main())
