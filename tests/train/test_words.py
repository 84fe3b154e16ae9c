"""What a checkpoint says of a run's settings: other settings are told apart, and the same in any process are not."""

from __future__ import annotations

import json
import operator
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from subprocess import PIPE, Popen
from threading import Lock
from types import SimpleNamespace
from typing import Any

import killed
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import prunelab as pl
from prunelab.train.recipe import cosine
from prunelab.train.words import Words


def plain(parameters: Any) -> Any:
    return SGD(parameters, 0.1)


@wraps(plain)
def decorated(parameters: Any) -> Any:
    return plain(parameters)


decorated.__qualname__ = "decorated"


def closure(lr: Any) -> Any:
    def make(parameters: Any) -> Any:
        return SGD(parameters, lr)

    return make


def defaults(lr: float) -> Any:
    def make(parameters: Any, lr: float = lr, *, momentum: float = lr) -> Any:
        return SGD(parameters, lr, momentum)

    return make


@dataclass(frozen=True)
class Steps:
    """A schedule that is a data class."""

    rates: tuple[float, ...]
    inner: Any = None

    def __call__(self, done: float) -> float:
        return self.rates[int(done * len(self.rates))]


class Rate:
    """A schedule with attributes of its own."""

    def __init__(self, rate: Any) -> None:
        self._rate = rate
        self.lock = Lock()

    def __call__(self, done: float) -> Any:
        return self._rate

    def method(self, done: float) -> Any:
        return self._rate


class Slotted:
    """One without a ``__dict__``."""

    __slots__ = ("rate",)

    def __init__(self, rate: float) -> None:
        self.rate = rate


PAIRS: dict[str, tuple[Callable[[Any], Any], Any, Any]] = {
    "partial": (lambda lr: partial(SGD, lr=lr), 0.1, 0.2),
    "arguments of a partial": (lambda lr: partial(plain, lr), 0.1, 0.2),
    "function of a partial": (lambda kind: partial(kind, lr=0.1), SGD, torch.optim.Adam),
    "closure": (closure, 0.1, 0.2),
    "closure within a closure": (lambda lr: closure(closure(lr)), 0.1, 0.2),
    "defaults": (defaults, 0.1, 0.2),
    "cosine": (cosine, 0.05, 0.3),
    "data class": (lambda rate: Steps((1.0, rate)), 0.1, 0.2),
    "function in a data class": (lambda lr: Steps((1.0,), closure(lr)), 0.1, 0.2),
    "object": (Rate, 0.1, 0.2),
    "method": (lambda rate: Rate(rate).method, 0.1, 0.2),
    "slots": (lambda rate: closure(Slotted(rate)), 0.1, 0.2),
    "namespace": (lambda rate: closure(SimpleNamespace(lr=rate)), 0.1, 0.2),
    "mapping": (lambda rate: closure({"lr": rate, 1: None}), 0.1, 0.2),
    "words": (lambda last: closure({"a", "b", "c", last}), "d", "e"),
    "tensor": (lambda rate: closure(torch.tensor([1.0, rate])), 0.1, 0.2),
    "array": (lambda rate: closure(np.array([1.0, rate])), 0.1, 0.2),
    "array of objects": (lambda rate: closure(np.array([None, rate], object)), 0.1, 0.2),
    "long list": (lambda last: closure([*range(1000), last]), 1, 2),
    "loss": (lambda share: nn.CrossEntropyLoss(label_smoothing=share), 0.1, 0.2),
    "attribute's name": (operator.attrgetter, "logits", "logit"),
}


def said(value: Any) -> str:
    return Words(killed.network()).of(value)


def all_said() -> str:
    return json.dumps({kind: said(make(one)) for kind, (make, one, _) in PAIRS.items()})


@pytest.mark.parametrize("kind", list(PAIRS))
def test_other_settings_are_told_apart_and_equal_ones_are_not(kind: str) -> None:
    make, one, other = PAIRS[kind]
    assert said(make(one)) != said(make(other))
    assert said(make(one)) == said(make(one))


def test_lambdas_of_other_code_are_told_apart() -> None:
    makers: list[Callable[..., Any]] = [
        lambda p: SGD(p, 0.5),
        lambda p: SGD(p, 0.25),
        lambda p: torch.optim.Adam(p, 0.5),
        lambda p: SGD(p, momentum=0.5),
        lambda p: SGD(p, 0.5) if p in {"a", "b"} else None,
        lambda p: SGD(p, 0.5) if p in {"a", "c"} else None,
        lambda p: [lambda: SGD(p, 0.5)],
        lambda p: [lambda: SGD(p, 0.25)],
    ]
    assert len({said(make) for make in makers}) == len(makers)


def test_functions_and_classes_of_a_module_go_by_their_names() -> None:
    assert said(plain) == f"{__name__}.plain"
    # What holds another function is what its name says too, where its module has it.
    assert said(decorated) == f"{__name__}.decorated"
    assert said(SGD) == "torch.optim.sgd.SGD"
    assert said(torch.nn.functional.cross_entropy) == "torch.nn.functional.cross_entropy"


def test_words_are_the_same_in_another_process() -> None:
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    command = [sys.executable, "-c", "import test_words; print(test_words.all_said())"]
    processes = [
        Popen(command, env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": paths}, stdout=PIPE, text=True)
        for seed in ("1", "77")
    ]
    one, other = (process.communicate()[0] for process in processes)
    assert json.loads(one).keys() == PAIRS.keys()
    assert one == other
    assert "0x" not in one


def test_the_network_that_is_trained_goes_by_its_name_wherever_it_is_held() -> None:
    model = killed.network()

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, labels) + 1e-4 * sum(p.abs().sum() for p in model.parameters())

    holders = [loss, SimpleNamespace(of=[model.fc.weight, model.norm]), dict(model.named_parameters()), nn.ReLU()]
    before = [Words(model).of(each) for each in holders]
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(1)
    assert [Words(model).of(each) for each in holders] == before
    assert "model=the network" in before[0]


def test_what_holds_itself_or_much_has_an_end() -> None:
    def again(n: int) -> Any:
        return again(n - 1) if n else None

    deep: Any = None
    for _ in range(5000):
        deep = [deep, deep]
    assert len(said([again, deep])) < 1000
    assert len(said(lambda: list(range(10000)) + deep)) < 1000


@pytest.mark.parametrize(
    ("name", "first", "then"),
    [
        ("optimizer", PAIRS["partial"][0](1e-3), PAIRS["partial"][0](0.5)),
        ("schedule", cosine(0.05), cosine(0.3)),
    ],
)
def test_a_run_with_another_function_is_refused(tmp_path: Path, name: str, first: Any, then: Any) -> None:
    data = killed.images(64, 0), killed.images(32, 1)
    settings: dict[str, Any] = {"epochs": 1, "batch_size": 16, "progress": False, "folder": tmp_path}
    pl.finetune(killed.network(), *data, **{name: first}, **settings)
    with pytest.raises(pl.PruneLabError, match=f"of another run: {name} was .*, and is "):
        pl.finetune(killed.network(), *data, **{name: then}, **settings)
    assert len(pl.finetune(killed.network(), *data, **{name: first}, **settings)) == 2
