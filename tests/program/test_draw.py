"""The picture: every operator with weights is there, what is coupled looks alike, what is pinned says why."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import torch
import torchvision.models as tv
from support import half_of_everything
from torch import Tensor, nn

import prunelab as pl
from prunelab import zoo
from prunelab.program.boxes import Element, elements
from prunelab.program.draw import Drawing
from prunelab.program.run import slice_states

SVG = "{http://www.w3.org/2000/svg}"
WEIGHTED = (nn.Conv2d, nn.Linear, nn.Embedding)


def boxes(drawing: Drawing) -> dict[str, ET.Element]:
    """The boxes of a picture, by module path; parsing it shows that it is well-formed."""
    root = ET.fromstring(drawing.svg)
    groups = [g for g in root.iter(f"{SVG}g") if g.get("class", "").split()[0] == "box"]
    # An attention without weights of its own follows the projection of the same module.
    return {g.attrib["data-module"]: g for g in reversed(groups)}


def colour(box: ET.Element) -> str:
    """How a box's frame is filled, and its outline."""
    return next(r.get("style", "") for r in box.iter(f"{SVG}rect") if r.get("class") == "frame")


def words(group: ET.Element) -> str:
    """Everything that is written in a group."""
    return " ".join(t.text or "" for t in group.iter(f"{SVG}text"))


def tooltip(box: ET.Element) -> str:
    """What pointing at a box shows."""
    return box.findtext(f"{SVG}title") or ""


def traced(model: nn.Module, *shape: int, prove: bool = True) -> pl.Program:
    return pl.trace(model.eval(), torch.randn(2, *shape), prove=prove)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "lenet": (zoo.lenet, (1, 28, 28)),
    "resnet20": (zoo.resnet20, (3, 32, 32)),
    "resnet18": (tv.resnet18, (3, 64, 64)),
    "mobilenet_v3_small": (tv.mobilenet_v3_small, (3, 64, 64)),
    "densenet121": (tv.densenet121, (3, 64, 64)),
    "shufflenet": (tv.shufflenet_v2_x0_5, (3, 64, 64)),
    "googlenet": (lambda: tv.googlenet(aux_logits=False, init_weights=False), (3, 64, 64)),
    "swin_t": (tv.swin_t, (3, 64, 64)),
    "vit": (lambda: tv.VisionTransformer(32, 8, 2, 4, 32, 64), (3, 32, 32)),
}


@pytest.fixture(scope="module", params=NETWORKS)
def program(request: pytest.FixtureRequest) -> pl.Program:
    make, shape = NETWORKS[request.param]
    return traced(make(), *shape, prove=False)


def test_every_module_with_weights_is_a_box(program: pl.Program) -> None:
    drawn = boxes(program.draw())
    weighted = {name for name, part in program.model.named_modules() if isinstance(part, WEIGHTED)}
    assert weighted <= drawn.keys()


def test_boxes_do_not_overlap_and_lie_within_the_picture(program: pl.Program) -> None:
    root = ET.fromstring(program.draw().svg)
    picture = next(g for g in root.iter(f"{SVG}g") if g.get("class") == "picture")
    frames = [next(r for r in g.iter(f"{SVG}rect") if r.get("class") == "frame") for g in picture.iter(f"{SVG}g")][1:]
    places = [tuple(float(f.attrib[k]) for k in ("x", "y", "width", "height")) for f in frames]
    for (x, y, w, h), (a, b, c, d) in combinations(places, 2):
        assert x + w <= a or a + c <= x or y + h <= b or b + d <= y
    assert min(x for x, *_ in places) >= 0
    assert max(x + w for x, _, w, _ in places) <= float(root.attrib["width"])


def test_every_box_tells_its_layer_and_cost(program: pl.Program) -> None:
    drawn = boxes(program.draw())
    for layer in program.layers:
        for module in layer.members:
            assert f"layer {layer.name}: {layer.kind}, {layer.channels} channel" in tooltip(drawn[module])
    count = sum(p.numel() for p in program.model.get_submodule(program.layers[0].members[0]).parameters())
    assert f"parameters: {count:,} (" in tooltip(drawn[program.layers[0].members[0]])


def test_coupled_layers_share_a_colour_and_others_have_another() -> None:
    program = traced(tv.resnet18(), 3, 64, 64, prove=False)
    drawn = boxes(program.draw())
    streams = [layer for layer in program.layers if layer.kind == "stream" and not layer.pinned]
    assert len(streams) == 4
    colours = [{colour(drawn[module]) for module in layer.members} for layer in streams]
    assert all(len(found) == 1 for found in colours)
    assert len(set.union(*colours)) == 4
    assert colour(drawn["layer1.0.conv1"]) == "" == colour(drawn["layer2.0.conv1"])


def test_a_box_in_several_couplings_has_the_number_of_each() -> None:
    """Where a shortcut pads with zeros, the first channels of a stage are those of the stage before."""
    program = traced(zoo.resnet20(), 3, 32, 32, prove=False)
    drawn = boxes(program.draw())
    marks = {name: [t.text for t in b.iter(f"{SVG}text") if t.get("class") == "badge"] for name, b in drawn.items()}
    assert sorted(marks["layer1.0.conv2"]) == ["1"]
    assert sorted(marks["layer2.0.conv2"]) == ["1", "2", "3"]
    assert sorted(marks["layer3.0.conv2"]) == ["1", "2", "3", "4", "5"]
    assert marks["layer1.0.conv1"] == []


def test_more_couplings_than_colours_in_the_palette_stay_apart() -> None:
    program = traced(tv.efficientnet_b0(), 3, 64, 64, prove=False)
    drawn = boxes(program.draw())
    streams = [layer for layer in program.layers if layer.kind == "stream" and not layer.pinned]
    assert len({colour(drawn[layer.members[0]]) for layer in streams}) == len(streams) > 12


def test_a_module_called_twice_is_coupled_with_itself() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.inner, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.inner(torch.relu(self.inner(self.stem(x)))))
            return y

    root = ET.fromstring(traced(Twice(), 4, prove=False).draw().svg)
    inner = [g for g in root.iter(f"{SVG}g") if g.get("data-module") == "inner"]
    assert len(inner) == 2
    assert all("coupled" in g.attrib["class"] for g in inner)


def test_what_is_pinned_says_why() -> None:
    program = traced(zoo.lenet(), 1, 28, 28)
    box = boxes(program.draw())["fc2"]
    assert "pinned" in box.attrib["class"]
    assert program.layer("fc2").pinned in words(box)
    assert f"pinned: {program.layer('fc2').pinned}" in tooltip(box)
    assert "pinned" not in boxes(program.draw())["fc1"].attrib["class"]


def test_a_long_reason_is_whole_in_the_tooltip_and_short_in_the_box() -> None:
    class Literal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.wide(x).view(-1, 8).relu())
            return logits

    program = traced(Literal(), 4)
    layer = program.layer("wide")
    assert len(layer.pinned) > 90
    box = boxes(program.draw())["wide"]
    assert layer.pinned in tooltip(box)
    assert words(box).endswith("…")


def test_norms_and_activations_are_folded_into_boxes() -> None:
    program = traced(
        nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 3, groups=8)), 3, 8, 8
    )
    drawn = boxes(program.draw())
    assert "conv 3×3, 3 → 8, stride 2 · norm · relu6" in words(drawn["0"])
    assert "depthwise 3×3, 8" in words(drawn["3"])


def found(program: pl.Program) -> list[Element]:
    return elements(program.nodes, program.outputs)


def test_concatenating_again_and_again_is_a_chain() -> None:
    cats = [e for e in found(traced(tv.densenet121(), 3, 64, 64, prove=False)) if e.text == "cat"]
    assert len(cats) == 6 + 12 + 24 + 16
    assert all(len(e.sources) == 2 for e in cats)


@pytest.mark.parametrize("name", ["swin_t", "vit"])
def test_attention_is_one_box_that_reads_its_projection(name: str) -> None:
    make, shape = NETWORKS[name]
    drawn = found(traced(make(), *shape, prove=False))
    attention = [e for e in drawn if e.text.startswith("attention")]
    assert len(attention) == {"swin_t": 12, "vit": 2}[name]
    assert all([drawn[s].text[:6] for s in e.sources] == ["linear"] for e in attention)


class Odd(nn.Module):
    """Names and texts that mean something in XML."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"a<b> & 'c'": nn.Linear(4, 4), 'd"e': nn.Linear(4, 2)})

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts.values():
            x = part(x)
        return x


def test_names_are_escaped() -> None:
    drawn = boxes(traced(Odd(), 4).draw())
    assert drawn.keys() == {"parts.a<b> & 'c'", 'parts.d"e'}
    assert "parts.a<b> & 'c'" in words(drawn["parts.a<b> & 'c'"])


def test_one_layer_and_none() -> None:
    assert boxes(traced(nn.Linear(4, 2), 4).draw()).keys() == {"weight"}
    assert boxes(traced(nn.ReLU(), 4).draw()) == {}
    assert "input 4" in traced(nn.ReLU(), 4).draw().svg


def test_a_selection_shows_what_stays() -> None:
    program = traced(zoo.resnet20(), 3, 32, 32)
    selection = half_of_everything(program, mask=False)
    bound = slice_states(program, selection, program.state)
    drawn = boxes(program.draw(selection))
    for layer in program.layers:
        for module in layer.members:
            stays = [r for r in drawn[module].iter(f"{SVG}rect") if r.get("class") == "stays"]
            if layer.pinned:
                assert stays == []
                continue
            state, _ = next(p for p in layer.producers if p[0].startswith(f"{module}."))
            kept, total = bound[state].shape[0], program.state(state).shape[0]
            assert f"{kept} / {total}" in words(drawn[module])
            gone = next(r for r in drawn[module].iter(f"{SVG}rect") if r.get("class") == "gone")
            share = float(stays[0].attrib["width"]) / float(gone.attrib["width"])
            assert share == pytest.approx(kept / total, abs=0.01)
    assert not [r for r in ET.fromstring(program.draw().svg).iter(f"{SVG}rect") if r.get("class") == "stays"]


def test_a_selection_that_does_not_fit_is_refused() -> None:
    with pytest.raises(pl.PruneLabError, match="cannot be pruned"):
        traced(zoo.lenet(), 1, 28, 28).draw(pl.Selection(kept={"fc2": (0,)}))


def test_it_is_saved_and_shown(tmp_path: Path) -> None:
    drawing = traced(zoo.lenet(), 1, 28, 28).draw()
    assert drawing.save(tmp_path / "net.svg").read_text(encoding="utf-8") == drawing.svg
    assert drawing.svg in drawing._repr_html_()
    with pytest.raises(pl.PruneLabError, match=r"'net\.png' a name that ends in '\.svg'"):
        drawing.save(tmp_path / "net.png")
