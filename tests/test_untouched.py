"""Promise 2: nothing is touched before commit. The user's model and random numbers stay as they are, bit for bit."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from support import Network, half_of_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import prunelab as pl
from prunelab import zoo

NETWORK = Network(zoo.resnet20, (3, 32, 32))
HOOKS = [name for name in vars(nn.Module()) if "hook" in name]


@dataclass(frozen=True)
class State:
    """All that a user could notice, by value."""

    flags: list[bool]
    hooks: list[dict[str, Any]]
    identities: dict[str, int]
    versions: dict[str, int]
    values: dict[str, Tensor]
    gradients: dict[str, Tensor]
    without: list[str]
    frozen: list[str]
    attributes: list[list[str]]


def copied(hooks: Any) -> Any:
    return dict(hooks) if isinstance(hooks, dict) else hooks


def state_of(model: nn.Module) -> State:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return State(
        flags=[m.training for m in model.modules()],
        hooks=[{name: copied(getattr(m, name)) for name in HOOKS} for m in model.modules()],
        identities={name: id(t) for name, t in tensors.items()},
        versions={name: t._version for name, t in tensors.items()},
        values={name: t.detach().clone() for name, t in tensors.items()},
        gradients={name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
        without=[name for name, p in model.named_parameters() if p.grad is None],
        frozen=[name for name, p in model.named_parameters() if not p.requires_grad],
        attributes=[sorted(vars(m)) for m in model.modules()],
    )


def random_states() -> tuple[Any, ...]:
    # The legacy state is what data sets draw from.
    return random.getstate(), str(np.random.get_state()), torch.random.get_rng_state().tolist()  # noqa: NPY002


def settings() -> tuple[Any, ...]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_float32_matmul_precision(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_anomaly_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.get_default_device(),
        [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")],
        [torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda")],
        torch.is_autocast_cache_enabled(),
        *(getattr(torch.backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic", "allow_tf32")),
        torch.backends.mkldnn.enabled,
        torch.backends.cuda.matmul.allow_tf32,
        torch.overrides._len_torch_function_stack(),
        torch.utils._python_dispatch._get_current_dispatch_mode_stack(),
        [logging.getLogger(name).disabled for name in ("torch._subclasses.fake_tensor", "torch.fx")],
        (sys.stdout, sys.stderr),
    )


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Fails if anything is different afterwards."""
    before, chance, set_ = state_of(model), random_states(), settings()
    yield
    after = state_of(model)
    for name in ("flags", "hooks", "identities", "versions", "attributes", "without", "frozen"):
        assert getattr(after, name) == getattr(before, name), name
    for name in ("values", "gradients"):
        was, now = getattr(before, name), getattr(after, name)
        assert was.keys() == now.keys()
        assert all(torch.equal(was[key], now[key]) for key in was), name
    assert random_states() == chance
    assert settings() == set_


@pytest.fixture
def model() -> nn.Module:
    """A network in the middle of somebody's work: mixed flags, hooks, gradients, some of it frozen."""
    found = NETWORK.build(torch.float32)
    found.train()
    found.layer1.eval()
    found.layer2[0].bn1.eval()
    found.layer3.requires_grad_(False)
    found.register_forward_hook(lambda *_: None)
    found.layer1[0].register_forward_pre_hook(lambda *_: None)
    found.layer2.register_full_backward_hook(lambda *_: None)
    found(NETWORK.images(4, torch.float32)).sum().backward()
    return found


class Augmented(Dataset[tuple[Tensor, int]]):
    """Images that draw from every generator there is."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index >= len(self):
            raise IndexError
        noise = random.random() + float(np.random.rand()) + torch.rand(())  # noqa: NPY002
        return torch.full((3, 32, 32), index / 24.0) + noise, index % 10


DATA: dict[str, Callable[[], Any]] = {
    "data set": Augmented,
    "shuffling loader": lambda: DataLoader(Augmented(), batch_size=7, shuffle=True),
    "tensor": lambda: NETWORK.images(24, torch.float32),
}


def test_trace(model: nn.Module) -> None:
    with untouched(model):
        pl.trace(model, NETWORK.images(dtype=torch.float32))


def test_a_trace_that_fails(model: nn.Module) -> None:
    with untouched(model), pytest.raises(pl.PruneLabError):
        pl.trace(model, torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("make", DATA.values(), ids=DATA)
def test_profile(model: nn.Module, make: Callable[[], Any]) -> None:
    program, data = pl.trace(model, NETWORK.images(dtype=torch.float32)), make()
    with untouched(model):
        pl.profile(program, data, batch_size=8, progress=False)


def test_a_profile_that_is_stopped_or_fails(model: nn.Module) -> None:
    program = pl.trace(model, NETWORK.images(dtype=torch.float32))
    with untouched(model):
        with pytest.raises(pl.Stopped):
            pl.profile(program, Augmented(), batch_size=8, cache=False, progress=lambda *_: False)
        with pytest.raises(pl.PruneLabError):
            pl.profile(program, torch.full((4, 3, 32, 32), torch.nan), cache=False, progress=False)


@pytest.mark.parametrize("around", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_gradients_for_criteria(model: nn.Module, around: Callable[[], Any]) -> None:
    program = pl.trace(model, NETWORK.images(dtype=torch.float32))
    profile = pl.profile(program, Augmented(), cache=False, progress=False)
    with around(), untouched(model):
        found = pl.with_gradients(profile, Augmented(), cache=False, progress=False)
        with pytest.raises(pl.Stopped):
            pl.with_gradients(profile, Augmented(), cache=False, progress=lambda *_: False)
    assert found.gradients


@pytest.mark.parametrize("criterion", pl.criteria_names())
def test_resolve_cost_and_preview(model: nn.Module, criterion: str) -> None:
    images, labels = NETWORK.images(64, torch.float32), torch.arange(64) % 10
    program = pl.trace(model, images)
    profile = pl.profile(program, images, cache=False, progress=False)
    profile = pl.with_gradients(profile, list(zip(images, labels, strict=True)), cache=False, progress=False)
    with untouched(model):
        plan = pl.Plan(criterion).set("layer1.0.conv1", ratio=0.5).set("layer2.0.conv1", std=0.5)
        selection = plan.set("layer3.0.conv1", ratio=0.5, grain="weight").resolve(program, profile)
        preview = pl.Preview(program, images, labels)
        for chosen in (pl.DENSE, selection, half_of_everything(program)):
            pl.cost(program, chosen)
            preview.accuracy(chosen)
            preview.logits(chosen)


def test_collecting_labelled_images(model: nn.Module) -> None:
    from prunelab.preview import labelled

    data = DataLoader(Augmented(), batch_size=7, shuffle=True)
    with untouched(model):
        images, labels = labelled(data)
    assert len(images) == len(labels) == 24


def test_commit(model: nn.Module) -> None:
    program = pl.trace(model, NETWORK.images(dtype=torch.float32))
    with untouched(model):
        small = pl.commit(program, half_of_everything(program))
    # Nor does what is done to the new module reach the old one.
    with untouched(model):
        with torch.no_grad():
            for tensor in [*small.parameters(), *small.buffers()]:
                tensor.zero_()
        small.eval()


def test_a_selection_that_is_refused(model: nn.Module) -> None:
    program = pl.trace(model, NETWORK.images(dtype=torch.float32))
    with untouched(model), pytest.raises(pl.PruneLabError):
        pl.commit(program, pl.Selection({"linear": (0,)}))


def test_an_interrupted_forward_leaves_the_flags(model: nn.Module) -> None:
    from prunelab.program.guard import eval_mode

    def interrupted() -> None:
        with eval_mode(model):
            assert not any(m.training for m in model.modules())
            torch.rand(3)
            raise KeyboardInterrupt

    with untouched(model), pytest.raises(KeyboardInterrupt):
        interrupted()


@contextmanager
def unusual_settings() -> Iterator[None]:
    """The global settings of somebody who has changed them all."""
    was = (torch.get_float32_matmul_precision(), torch.get_default_dtype(), torch.backends.mkldnn.enabled)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_float32_matmul_precision("high")
    torch.set_default_dtype(torch.float64)
    torch.backends.cudnn.benchmark = True
    torch.backends.mkldnn.enabled = False
    try:
        with torch.autograd.set_detect_anomaly(True):
            yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision(was[0])
        torch.set_default_dtype(was[1])
        torch.backends.cudnn.benchmark = False
        torch.backends.mkldnn.enabled = was[2]


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_settings_of_somebody_who_has_changed_them_all(model: nn.Module) -> None:
    images, labels = NETWORK.images(16, torch.float32), torch.arange(16) % 10
    with unusual_settings(), untouched(model):
        program = pl.trace(model, images)
        pl.profile(program, images, cache=False, progress=False)
        pl.Preview(program, images, labels).accuracy(half_of_everything(program))
        pl.commit(program, half_of_everything(program))
        with pytest.raises(pl.PruneLabError):
            pl.trace(model, images[:, :2])


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_inside_other_modes(model: nn.Module, around: Callable[[], Any]) -> None:
    images = NETWORK.images(dtype=torch.float32)
    with around(), untouched(model):
        program = pl.trace(model, images)
        pl.commit(program, half_of_everything(program))
    assert [layer.name for layer in program.layers if not layer.pinned]


class Odd(nn.Module):
    """A forward that counts, in buffers and outside of them, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.head = nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=None), nn.Linear(6, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("largest", torch.zeros(6), persistent=False)
        self.noise = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.a(x))
        self.calls += 1  # type: ignore[operator]  # torch types buffers as Tensor | Module
        self.largest.copy_(torch.maximum(self.largest, y.detach().amax(0)))  # type: ignore[operator,arg-type]
        logits: Tensor = self.head(self.noise(y)) + random.random() * 0.0 + float(np.random.rand()) * 0.0  # noqa: NPY002
        return logits


def test_buffers_that_forward_writes_to() -> None:
    torch.manual_seed(0)
    odd, x = Odd(), torch.randn(8, 4)
    odd(x).sum().backward()
    with untouched(odd):
        program = pl.trace(odd, x)
        selection = half_of_everything(program)
        pl.Preview(program, x, torch.arange(8) % 3).accuracy(selection)
        small = pl.commit(program, selection)
    assert odd.get_buffer("calls") == 1
    assert small.get_buffer("calls") == 1
    assert small.get_buffer("norm.num_batches_tracked") == 1
    assert small.training


class Recorder:
    """A user's hook that keeps what it sees."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(self, module: nn.Module, args: Any, result: Any = None) -> None:
        self.seen.append(result)


def test_hooks_of_every_kind_stay_and_run_only_while_forward_is_followed() -> None:
    torch.manual_seed(0)
    model, x, recorder = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(2, 4), Recorder()
    model[0].register_forward_hook(recorder)
    model[0].register_forward_pre_hook(lambda *_: None)
    model[1].register_full_backward_hook(lambda *_: None)
    model[1].register_full_backward_pre_hook(lambda *_: None)
    model[2].register_state_dict_post_hook(lambda *_: None)
    model[2].register_state_dict_pre_hook(lambda *_: None)
    model[2].register_load_state_dict_pre_hook(lambda *_: None)
    model[2].register_load_state_dict_post_hook(lambda *_: None)
    with untouched(model):
        program = pl.trace(model, x)
        # What hooks change is part of the network, so they run, on tensors without data, as the docstring says.
        assert recorder.seen
        assert all(type(t) is not Tensor or t.is_meta for t in recorder.seen)
        recorder.seen.clear()
        pl.profile(program, x, cache=False, progress=False)
        pl.Preview(program, x, torch.zeros(2, dtype=torch.int64)).accuracy(half_of_everything(program))
        assert not recorder.seen
        small = pl.commit(program, half_of_everything(program))
    recorder.seen.clear()
    small(x)
    assert not recorder.seen  # a copy of the module has a copy of the hook's object
    (hook,) = small.get_submodule("0")._forward_hooks.values()
    assert [type(t) for t in hook.seen][-1:] == [Tensor]
