"""The command line: what it copies, what it refuses, and what it hands to JupyterLab."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from prunelab import cli, resources
from prunelab.errors import PruneLabError


@pytest.fixture
def bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put stand-ins in the place of the bundled notebooks, and an empty folder in that of the user."""
    source = tmp_path / "bundled"
    (source / "figures").mkdir(parents=True)
    (source / ".ipynb_checkpoints").mkdir()
    (source / "results").mkdir()
    names = ("quickstart.ipynb", "lesson.ipynb", "figures/a.txt", ".ipynb_checkpoints/old.ipynb", "results/a.md")
    for name in names:
        (source / name).write_text(json.dumps({"name": name}))
    monkeypatch.setattr(resources, "folder", lambda name: {"notebooks": source}[name])
    user = tmp_path / "user"
    user.mkdir()
    monkeypatch.chdir(user)
    return source


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_first_start_copies_every_notebook_and_says_where(bundled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, notebook = cli.prepare_folder(None, None)
    assert folder == Path.cwd()
    assert notebook == folder / "quickstart.ipynb"
    assert files_in(folder) == ["figures/a.txt", "lesson.ipynb", "quickstart.ipynb"]
    said = capsys.readouterr().out
    assert "quickstart.ipynb" in said
    assert str(folder) in said


def test_a_second_start_keeps_what_the_user_changed(bundled: Path) -> None:
    cli.copy_notebooks(Path.cwd())
    Path("quickstart.ipynb").write_text("mine")
    Path("lesson.ipynb").unlink()
    copied, kept = cli.copy_notebooks(Path.cwd())
    assert Path("quickstart.ipynb").read_text() == "mine"
    assert "lesson.ipynb" in copied
    assert "quickstart.ipynb" not in copied
    assert "Kept your own quickstart.ipynb" in kept


def test_a_start_with_nothing_new_says_nothing(bundled: Path) -> None:
    cli.copy_notebooks(Path.cwd())
    assert cli.copy_notebooks(Path.cwd()) == []


def test_a_missing_folder_is_made(bundled: Path) -> None:
    folder, notebook = cli.prepare_folder(Path("new/deep"), Path("lesson.ipynb"))
    assert folder == Path.cwd() / "new" / "deep"
    assert notebook == folder / "lesson.ipynb"
    assert notebook.is_file()


def test_a_folder_that_is_a_file_is_refused(bundled: Path) -> None:
    Path("file").write_text("")
    with pytest.raises(PruneLabError, match="file cannot be made"):
        cli.prepare_folder(Path("file"), None)


def test_the_users_own_notebook_opens_where_it_lies_and_nothing_is_copied(bundled: Path, tmp_path: Path) -> None:
    own = tmp_path / "elsewhere" / "own.ipynb"
    own.parent.mkdir()
    own.write_text("{}")
    assert cli.prepare_folder(None, own) == (own.parent, own)
    assert cli.prepare_folder(tmp_path, own) == (tmp_path, own)
    assert files_in(own.parent) == ["own.ipynb"]
    assert files_in(Path.cwd()) == []


def test_a_notebook_below_the_current_folder_shows_the_current_folder(bundled: Path) -> None:
    own = Path.cwd() / "sub" / "own.ipynb"
    own.parent.mkdir()
    own.write_text("{}")
    assert cli.prepare_folder(None, Path("sub/own.ipynb")) == (Path.cwd(), own)
    assert cli.prepare_folder(Path("sub"), Path("own.ipynb")) == (own.parent, own)


def test_a_notebook_outside_the_folder_is_refused(bundled: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.ipynb"
    own.write_text("{}")
    with pytest.raises(PruneLabError, match="lies outside"):
        cli.prepare_folder(Path.cwd(), own)


def test_an_unknown_notebook_is_refused_with_those_that_exist(bundled: Path) -> None:
    with pytest.raises(PruneLabError, match=r"no notebook absent\.ipynb .* lesson\.ipynb, quickstart\.ipynb"):
        cli.prepare_folder(None, Path("absent.ipynb"))


def test_the_server_is_private_and_asks_nobody_for_news() -> None:
    given = cli.server_arguments(Path("/some where"), 1234, "secret", "/lab/tree/quickstart.ipynb")
    for setting in (
        "--ServerApp.ip=127.0.0.1",
        "--ServerApp.port=1234",
        "--ServerApp.root_dir=/some where",
        "--IdentityProvider.token=secret",
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--LabApp.default_url=/lab/tree/quickstart.ipynb",
    ):
        assert setting in given


def test_the_environment_keeps_the_users_own_settings(tmp_path: Path) -> None:
    given = {"JUPYTER_CONFIG_PATH": "/own", "JUPYTER_PREFER_ENV_PATH": "0"}
    added = cli.server_environment(given, tmp_path)
    assert added == {"JUPYTER_CONFIG_PATH": f"{tmp_path}{os.pathsep}/own", "JUPYTER_PREFER_ENV_PATH": "0"}
    assert cli.server_environment({}, tmp_path)["JUPYTER_CONFIG_PATH"] == str(tmp_path)


@pytest.mark.parametrize(
    ("environment", "platform", "expected"),
    [
        ({}, "linux", False),
        ({"DISPLAY": ""}, "linux", False),
        ({"DISPLAY": ":0"}, "linux", True),
        ({"WAYLAND_DISPLAY": "wayland-0"}, "linux", True),
        ({}, "darwin", True),
        ({}, "win32", True),
    ],
)
def test_screen(environment: dict[str, str], platform: str, expected: bool) -> None:
    assert cli.has_screen(environment, platform) is expected


def test_a_taken_port_is_refused(bundled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind((cli.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["lab", "--no-browser", "--port", str(port)]) == 2
    assert f"Port {port} is taken" in capsys.readouterr().err


@pytest.mark.parametrize("port", ["0", "65536", "-1", "http", "8.5"])
def test_a_port_that_is_none_is_refused(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["lab", f"--port={port}"])
    assert stopped.value.code == 2
    assert "whole number from 1 to 65535" in capsys.readouterr().err


def test_a_free_port_can_be_bound() -> None:
    with socket.socket() as server:
        server.bind((cli.HOST, cli.free_port()))


def test_no_command_shows_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([])
    assert stopped.value.code == 2
    assert "usage: prunelab" in capsys.readouterr().err


def test_version_from_the_module() -> None:
    command = [sys.executable, "-m", "prunelab", "--version"]
    assert subprocess.check_output(command, text=True, timeout=300).split() == [
        "prunelab",
        *cli.version().split(),
    ]
