"""Tracing: what it takes, what it refuses and in which words, and that a program computes what the module computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import Network, flops, half_of_everything, parameters, relative
from torch import Tensor, nn
from torch.nn import functional

import prunelab as pl
from prunelab import zoo
from prunelab.program.run import bind

Body = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """Two convolutions and a linear layer, and between them whatever a test wants."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head, self.unused = nn.Linear(8, 5), nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("table", torch.ones(8))
        self.scale = torch.full((8, 1, 1), 2.0)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(self, x).mean((2, 3)))
        return logits


def network(body: Body) -> Network:
    return Network(lambda: Net(body), (3, 6, 6))


def check_promise(net: Network) -> pl.Program:
    """Promise 1, in short; gives the program."""
    model, images = net.build(torch.float32), net.images(dtype=torch.float32)
    program = pl.trace(model, images)
    selection = half_of_everything(program)
    small = pl.commit(program, selection)
    with torch.no_grad():
        assert relative(bind(program)(images), model(images)) < 1e-6
        assert relative(bind(program, selection)(images), small(images)) < 1e-6
    assert pl.cost(program, selection).params == parameters(small)
    return program


def in_place(net: Net, x: Tensor) -> Tensor:
    y = net.a(x)
    y = functional.relu_(y)
    y += 1.0
    z = y.mul_(2.0)
    y.clamp_(max=3.0)
    out: Tensor = net.b(z) + y
    return out


def without_gradients(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = net.a(x)
    out: Tensor = net.b(y)
    return out


def converted(net: Net, x: Tensor) -> Tensor:
    out: Tensor = net.b(net.a(x).to(torch.float32).contiguous())
    return out


def counting(net: Net, x: Tensor) -> Tensor:
    net.calls += 1  # type: ignore[operator]  # torch types buffers as Tensor | Module
    out: Tensor = net.b(net.a(x))
    return out


def dropping(net: Net, x: Tensor) -> Tensor:
    y = functional.dropout(net.a(x), 0.5, net.training)
    y = functional.dropout(functional.dropout2d(y, 0.5, net.training), 0.5, net.training, inplace=True)
    out: Tensor = net.b(functional.silu(y.relu(), inplace=True))
    return out


def twice(net: Net, x: Tensor) -> Tensor:
    out: Tensor = net.b(net.b(net.a(x)).relu())
    return out


@pytest.mark.parametrize("body", [in_place, without_gradients, converted, counting, dropping, twice])
def test_program_computes_what_the_module_computes(body: Body) -> None:
    program = check_promise(network(body))
    assert not program.layer("a").pinned


def test_a_forward_that_counts_calls_in_a_buffer_is_still_proven() -> None:
    model = network(counting).build(torch.float32)
    program = pl.trace(model, torch.randn(2, 3, 6, 6))
    assert [layer.name for layer in program.layers if not layer.pinned] == ["a", "b"]
    assert model.get_buffer("calls") == 0


def test_a_plain_tensor_of_the_module_pins_what_it_meets() -> None:
    program = check_promise(network(lambda net, x: net.b(net.a(x) * net.scale)))
    assert program.layer("a").pinned == "mul joins it with a value whose size is fixed"
    assert not program.layer("b").pinned


def test_a_number_made_in_forward_pins_nothing() -> None:
    program = check_promise(network(lambda net, x: net.b(net.a(x) * torch.tensor(3.0))))
    assert not program.layer("a").pinned


def overwritten_under_a_view(net: Net, x: Tensor) -> Tensor:
    y = net.a(x)
    deep = y.view(y.shape[0], -1).view(y.shape)
    y.relu_()
    out: Tensor = net.b(deep)
    return out


def overwritten_in_part(net: Net, x: Tensor) -> Tensor:
    y: Tensor = net.a(x)
    left, right = y.chunk(2, 1)
    left.relu_()
    right += 1.0
    right[:, :, :2] = 0.0
    y.mul_(2.0)
    out: Tensor = net.b(y * torch.cat([left, right], 1))
    return out


def filled_in(net: Net, x: Tensor) -> Tensor:
    mask = x.new_zeros(6, 6)
    mask[:3, 2:] = 1.0
    mask[4] += 0.5
    y = net.a(x)
    frame = torch.zeros_like(y)
    frame[:, :, 1:] = y[:, :, 1:]
    out: Tensor = net.b(frame * mask)
    return out


@pytest.mark.parametrize(
    ("body", "channels"), [(overwritten_under_a_view, 8), (overwritten_in_part, 4), (filled_in, 8)]
)
def test_what_is_overwritten_is_seen_through_every_view(body: Body, channels: int) -> None:
    program = check_promise(network(body))
    layer = program.layer("a")
    assert (layer.channels, layer.pinned) == (channels, "")


def overwritten_buffer(net: Net, x: Tensor) -> Tensor:
    first = net.table[:4]
    net.table.mul_(2.0)
    out: Tensor = net.b(net.a(x)) + first.mean()
    return out


def test_overwriting_the_users_own_memory_under_a_view_is_refused() -> None:
    model = network(overwritten_buffer).build(torch.float32)
    before = model.get_buffer("table").clone()
    with pytest.raises(
        pl.PruneLabError, match=r"part of b_table in place \(.*test_trace.py:\d+\).*without the in-place"
    ):
        pl.trace(model, torch.randn(2, 3, 6, 6))
    assert torch.equal(model.get_buffer("table"), before)


def lowered(net: Net, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = net.a(x)
    return y.float()


def on_data(net: Net, x: Tensor) -> Tensor:
    y: Tensor = net.a(x)
    return y if y.sum() > 0 else -y


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lowered, "autocast, whose inside cannot be followed"),
        (on_data, r"Net cannot be traced: .*test_trace.py"),
    ],
)
def test_what_cannot_be_traced_is_said(body: Body, message: str) -> None:
    model = network(body).build(torch.float32)
    with pytest.raises(pl.PruneLabError, match=message):
        pl.trace(model, torch.randn(2, 3, 6, 6))
    assert not model.training


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (torch.randn(2, 4, 6, 6), r"cannot run on an example input of shape \[\(2, 4, 6, 6\)\]"),
        (torch.randn(0, 3, 6, 6), "no images"),
        (torch.tensor(1.0), "needs an example input"),
        ("images", "needs an example input"),
        ((), "needs an example input"),
    ],
)
def test_unfit_examples_are_refused_in_a_sentence(example: object, message: str) -> None:
    with pytest.raises(pl.PruneLabError, match=message):
        pl.trace(network(twice).build(torch.float32), example)


def test_only_modules_are_traced() -> None:
    with pytest.raises(pl.PruneLabError, match=r"torch\.nn\.Module, not a function"):
        pl.trace(lambda x: x, torch.randn(2, 3))  # type: ignore[arg-type]


def test_a_batch_of_one_is_as_good_as_any() -> None:
    net = network(twice)
    model = net.build(torch.float32)
    program = pl.trace(model, torch.randn(1, 3, 6, 6))
    assert program.batch is None
    for count in (1, 2, 5):
        with torch.no_grad():
            assert relative(bind(program)(net.images(count).float()), model(net.images(count).float())) < 1e-6


def test_a_batch_size_in_the_users_code_is_kept_and_said() -> None:
    program = pl.trace(
        network(lambda net, x: net.a(x.reshape(2, 3, 6, 6))).build(torch.float32), torch.randn(2, 3, 6, 6)
    )
    assert program.batch == 2
    with pytest.raises(pl.PruneLabError, match="batches of 2 images only"):
        pl.profile(program, torch.randn(5, 3, 6, 6), cache=False, progress=False)
    with pytest.raises(pl.PruneLabError, match="batches of 2 images only"):
        pl.Preview(program, torch.randn(5, 3, 6, 6), torch.zeros(5, dtype=torch.int64))


def in_pairs(net: Net, x: Tensor) -> Tensor:
    y = net.a(x)
    frames = y.view(-1, 2, *y.shape[1:])
    out: Tensor = net.b(frames.flip(1).reshape(y.shape))
    return out


def test_a_forward_that_folds_images_together_is_traced_for_that_many() -> None:
    program = check_promise(network(in_pairs))
    assert program.batch == 2
    assert not program.layer("a").pinned
    images = torch.randn(2, 3, 6, 6)
    assert 2 * pl.cost(program).flops == flops(program.model, images)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_wrappers_are_looked_through(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = network(twice).build(torch.float32)
    program = pl.trace(wrap(model), torch.randn(2, 3, 6, 6))
    assert program.model is model
    assert isinstance(pl.commit(program, half_of_everything(program)), Net)


def test_several_inputs_and_outputs() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.head = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            z = self.left(x).relu() + self.right(y)
            return self.head(z), z.sum(1)

    torch.manual_seed(0)
    model, args = Pair().double().eval(), (torch.randn(3, 4).double(), torch.randn(3, 3).double())
    program = pl.trace(model, args)
    selection = half_of_everything(program)
    small = pl.commit(program, selection)
    with torch.no_grad():
        for ours, theirs in zip(bind(program, selection).run(args), small(*args), strict=True):
            assert relative(ours, theirs) < 1e-12
    assert [layer.name for layer in program.layers if not layer.pinned] == [program.layer("left").name]


def test_it_is_quick_to_say_what_it_found() -> None:
    program = pl.trace(zoo.lenet(), torch.randn(2, 1, 28, 28))
    assert repr(program).splitlines()[0] == "Program of LeNet: 4 layers, 1 pinned"
    assert "its outputs are the network's outputs" in repr(program.layers)
    frame = program.layers.to_frame()
    assert list(frame.index) == ["conv1", "conv2", "fc1", "fc2"]
    assert frame["params"].sum() == pytest.approx(1.0)
    assert frame["flops"].sum() == pytest.approx(1.0)


def test_unknown_layer_names_the_nearest() -> None:
    program = pl.trace(zoo.lenet(), torch.randn(2, 1, 28, 28))
    with pytest.raises(pl.PruneLabError, match="no layer 'convv1'; the nearest names are 'conv1'"):
        program.layer("convv1")


def test_errors_of_torch_are_not_logged_beside_the_sentence(caplog: pytest.LogCaptureFixture) -> None:
    literal: Body = lambda net, x: torch.cat([net.a(x)[:, :4].relu(), net.a(x)[:, 4:]], 1)  # noqa: E731
    with caplog.at_level("WARNING"):
        pl.trace(network(literal).build(torch.float32), torch.randn(2, 3, 6, 6))
        with pytest.raises(pl.PruneLabError):
            pl.trace(network(twice).build(torch.float32), torch.randn(2, 4, 6, 6))
    assert not caplog.records
