"""Progress and stopping, and the one sentence for a name that does not exist."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from prunelab import progress
from prunelab.errors import PruneLabError, unknown
from prunelab.progress import Stopped, say_once, track


def test_nothing_is_shown_unless_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track("abc", "letters", 3, False)) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")


def test_a_bar_is_shown_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(range(3), "numbers", 3, True)) == [0, 1, 2]
    assert "numbers" in capsys.readouterr().err


def test_a_function_is_called_after_every_item() -> None:
    order: list[object] = []
    for item in track("ab", "letters", None, lambda *given: order.append(given)):
        order.append(item)
    assert order == ["a", (1, None, "letters"), "b", (2, None, "letters")]


@pytest.mark.parametrize("answer", [None, True, 0, ""])
def test_only_false_stops(answer: object) -> None:
    assert list(track("abc", "letters", 3, lambda *_: answer)) == ["a", "b", "c"]  # type: ignore[arg-type, return-value]


def test_false_stops_after_the_item() -> None:
    items = track("abc", "letters", 3, lambda done, *_: done < 2)
    assert [next(items), next(items)] == ["a", "b"]
    with pytest.raises(Stopped, match="letters"):
        next(items)


def test_what_is_said_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_said", set())
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    for _ in range(3):
        say_once("It rains.")
    say_once("It pours.")
    assert capsys.readouterr() == ("", "It rains.\nIt pours.\n")
    # In a notebook, where stderr looks like a mistake.
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))  # type: ignore[arg-type]
    say_once("It snows.")
    assert capsys.readouterr() == ("It snows.\n", "")


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("conv1", ["conv2", "fc", "conv2"], "'conv2'"),
        ("layer1", ["fc", "layer1.0.conv1", "layer1.1.conv1"], "'layer1.0.conv1', 'layer1.1.conv1'"),
        ("zzz", ["a", "b"], "'a', 'b'"),
        ("", ["a", "b"], "'a', 'b'"),
    ],
)
def test_the_nearest_names(name: str, known: list[str], expected: str) -> None:
    error = unknown("layer", name, known)
    assert isinstance(error, PruneLabError)
    assert isinstance(error, ValueError)
    assert str(error) == f"There is no layer {name!r}; the nearest names are {expected}."
