"""Users' code that moves values: flatten, view, transpose, split, join, shuffle, pad, pick, sort."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from users import Case, between, check_case, conv

BOTH = {"a": 8, "b": 6}
NUMBER = "picks it out by its number"


def flat(positions: int = 36, hidden: int = 5) -> dict[str, nn.Module]:
    return {"a": conv(3, 8), "fc": nn.Linear(8 * positions, hidden), "head": nn.Linear(hidden, 3)}


CASES: dict[str, Case] = {
    # Flatten and view -----------------------------------
    "flatten": Case(lambda m, x: m.head(m.fc(m.a(x).relu().flatten(1)).relu()), flat, {"a": 8, "fc": 5}),
    "nn.Flatten": Case(
        lambda m, x: m.head(m.fc(m.flatten(m.a(x)))), lambda: {**flat(), "flatten": nn.Flatten()}, {"a": 8, "fc": 5}
    ),
    "view with x.size(0) and -1": Case(lambda m, x: m.head(m.fc(m.a(x).view(x.size(0), -1))), flat, {"a": 8, "fc": 5}),
    "view with -1 and a literal": Case(
        lambda m, x: m.head(m.fc(m.a(x).view(-1, 288))),
        flat,
        {"fc": 5},
        {"a": "your forward does not follow the cut at view"},
    ),
    "reshape with len(x)": Case(lambda m, x: m.head(m.fc(m.a(x).reshape(len(x), -1))), flat, {"a": 8, "fc": 5}),
    "flatten of positions, transposed": Case(
        lambda m, x: m.head(m.fc(m.a(x).flatten(2).transpose(1, 2)).mean(1)), lambda: flat(1), {"a": 8, "fc": 5}
    ),
    "flatten of channels last": Case(
        lambda m, x: m.head(m.fc(m.a(x).permute(0, 2, 3, 1).flatten(1))), flat, {"a": 8, "fc": 5}
    ),
    "view and back, by sizes": Case(*between(lambda m, y: y.view(y.size(0), y.size(1), -1).relu().view(y.shape)), BOTH),
    "view and back, by literals": Case(
        *between(lambda m, y: y.view(-1, 8, 36).relu().view(-1, 8, 6, 6)),
        {"b": 6},
        {"a": r"your forward does not follow the cut at view \(in .*test_shapes.py, line \d+\)"},
    ),
    "unflatten of positions": Case(*between(lambda m, y: y.flatten(2).unflatten(-1, (6, 6))), BOTH),
    "nn.Unflatten of positions": Case(
        *between(lambda m, y: m.un(y.flatten(2)), un=lambda: nn.Unflatten(2, (6, 6))), BOTH
    ),
    # Order ----------------------------------------------
    "permute and back": Case(*between(lambda m, y: y.permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2)), BOTH),
    "transpose and back": Case(*between(lambda m, y: y.transpose(1, -1).relu().transpose(-1, 1)), BOTH),
    "movedim, mT and mH": Case(*between(lambda m, y: y.movedim(1, 3).movedim(-1, 1).mT.mH), BOTH),
    "flip of channels": Case(*between(lambda m, y: torch.flip(y, (1, 3))), BOTH),
    "roll of positions": Case(*between(lambda m, y: y.roll((1, 2), (2, 3))), BOTH),
    "roll of channels": Case(*between(lambda m, y: y.roll(1, 1)), {"b": 6}, {"a": "rolls its channels"}),
    # Parts ----------------------------------------------
    "chunk": Case(*between(lambda m, y: torch.cat(y.chunk(2, 1)[::-1], 1)), {"a": 4, "b": 6}),
    "chunk, multiplied": Case(*between(lambda m, y: torch.mul(*y.chunk(2, 1)), 4), {"a": 4, "b": 6}),
    "split by the half of the size": Case(
        *between(lambda m, y: torch.cat(y.split(y.shape[1] // 2, 1)[::-1], 1)), {"a": 4, "b": 6}
    ),
    "split by a literal": Case(
        *between(lambda m, y: torch.cat(y.split(4, 1)[::-1], 1)), {"b": 6}, {"a": "does not follow the cut at split"}
    ),
    "split into unequal parts": Case(
        *between(lambda m, y: torch.cat(torch.split(y, [2, 6], 1)[::-1], 1)),
        {"b": 6},
        {"a #1": "unequal, fixed sizes", "a #2": "unequal, fixed sizes"},
    ),
    "split at a place": Case(
        *between(lambda m, y: torch.cat(torch.tensor_split(y, [4], 1)[::-1], 1)),
        {"b": 6},
        {"a #1": "your code splits it", "a #2": "your code splits it"},
    ),
    "tensor_split into equal parts": Case(
        *between(lambda m, y: torch.cat(torch.tensor_split(y, 2, 1)[::-1], 1)), {"a": 4, "b": 6}
    ),
    "split of positions": Case(*between(lambda m, y: torch.cat(y.split([2, 4], 2)[::-1], 2)), BOTH),
    "slices by literals": Case(
        *between(lambda m, y: torch.cat([y[:, :3].relu(), y[:, 3:]], 1)),
        # What is cut after the third channel leaves the literals right.
        {"a #2": 5, "b": 6},
        {"a #1": "does not follow the cut"},
    ),
    "slices of positions": Case(*between(lambda m, y: torch.cat([y[:, :, :3].relu(), y[..., 3:, :]], 2)), BOTH),
    "every other position": Case(*between(lambda m, y: y[:, :, ::2, 1::2]), BOTH),
    "narrow": Case(
        *between(lambda m, y: torch.cat([y.narrow(1, 0, 3).relu(), y.narrow(1, 3, 5)], 1)),
        {"b": 6},
        {"a #1": "forward", "a #2": "forward"},
    ),
    "narrow of positions": Case(*between(lambda m, y: y.narrow(2, 1, 4).narrow(-1, -3, 2)), BOTH),
    "index_select of channels": Case(
        *between(lambda m, y: y.index_select(1, torch.tensor([1, 0, 5])), 3), {"b": 6}, {"a": NUMBER}
    ),
    "index_select of positions": Case(*between(lambda m, y: y.index_select(2, torch.tensor([1, 0, 5]))), BOTH),
    "select": Case(*between(lambda m, y: y[:, 2].unsqueeze(1) * y), {"b": 6}, {"a": f"{NUMBER}|spreads"}),
    "select of a position": Case(*between(lambda m, y: y[:, :, 2].unsqueeze(2) * y.select(3, 0)[..., None]), BOTH),
    "unbind": Case(*between(lambda m, y: torch.stack(y.unbind(1)[::-1], 1)), {"b": 6}, {"a": NUMBER}),
    "unbind of positions": Case(*between(lambda m, y: torch.stack(y.unbind(2)[::-1], 2)), BOTH),
    # Joins ----------------------------------------------
    "cat": Case(*between(lambda m, y: torch.cat([y, m.c(y), y.relu()], 1), 20, c=lambda: conv(8, 4)), {**BOTH, "c": 4}),
    "cat with the input": Case(
        lambda m, x: m.head(torch.cat([x, m.a(x)], 1).mean((2, 3))),
        lambda: {"a": conv(3, 8), "head": nn.Linear(11, 3)},
        {"a": 8},
    ),
    "stack and sum": Case(
        *between(lambda m, y: torch.stack([y, y.relu(), m.c(y)]).sum(0), c=lambda: conv(8, 8)), {"stream": 8, "b": 6}
    ),
    "stack into channels": Case(
        *between(lambda m, y: torch.stack([y, y.relu()], 2).flatten(1, 2), 16), {"a": 8, "b": 6}
    ),
    "hstack and vstack of positions": Case(
        *between(lambda m, y: torch.vstack([y, y]).chunk(2)[0] + torch.dstack([y, y])[:, :, :6]), BOTH
    ),
    # Repeats --------------------------------------------
    "repeat": Case(*between(lambda m, y: y.repeat(1, 2, 1, 1), 16), BOTH),
    "tile": Case(*between(lambda m, y: torch.tile(y, (2, 1, 1)), 16), BOTH),
    "repeat_interleave": Case(*between(lambda m, y: y.repeat_interleave(2, 1), 16), BOTH),
    "expand": Case(*between(lambda m, y: y * y.mean((2, 3), keepdim=True).expand(-1, -1, 6, 6)), BOTH),
    # Shuffles -------------------------------------------
    "pixel_shuffle": Case(*between(lambda m, y: F.pixel_shuffle(y, 2), 2), {"a": 2, "b": 6}),
    "nn.PixelShuffle": Case(*between(lambda m, y: m.up(y), 2, up=lambda: nn.PixelShuffle(2)), {"a": 2, "b": 6}),
    "pixel_unshuffle": Case(*between(lambda m, y: F.pixel_unshuffle(y, 2), 32), BOTH),
    "pixel_unshuffle of the image": Case(
        lambda m, x: m.head(m.a(m.down(x)).mean((2, 3))),
        lambda: {"down": nn.PixelUnshuffle(2), "a": conv(12, 8), "head": nn.Linear(8, 3)},
        {"a": 8},
    ),
    "unfold": Case(
        lambda m, x: m.head(m.fc(F.unfold(m.a(x), (3, 2)).transpose(1, 2)).mean(1)),
        lambda: {"a": conv(3, 8), "fc": nn.Linear(48, 5), "head": nn.Linear(5, 3)},
        {"a": 8, "fc": 5},
    ),
    "channel shuffle by view": Case(
        *between(lambda m, y: y.view(len(y), 2, y.shape[1] // 2, 6, 6).transpose(1, 2).reshape(y.shape)),
        {"a": 4, "b": 6},
    ),
    "nn.ChannelShuffle": Case(*between(lambda m, y: m.mix(y), mix=lambda: nn.ChannelShuffle(4)), {"a": 2, "b": 6}),
    "rearranged by hand into patches": Case(
        lambda m, x: m.head(
            m.fc(m.a(x).unflatten(2, (3, 2)).unflatten(4, (3, 2)).permute(0, 2, 4, 3, 5, 1).flatten(3)).mean((1, 2))
        ),
        lambda: {"a": conv(3, 8), "fc": nn.Linear(32, 5), "head": nn.Linear(5, 3)},
        {"a": 8, "fc": 5},
    ),
    # Borders --------------------------------------------
    "F.pad of positions, every mode": Case(
        *between(
            lambda m, y: F.pad(
                F.pad(F.pad(F.pad(y, (1, 2)), (1, 1, 1, 1), "reflect"), (1, 1, 1, 1), "replicate"),
                (1, 1, 1, 1),
                "circular",
            )
        ),
        BOTH,
    ),
    "F.pad of channels": Case(*between(lambda m, y: F.pad(y, (0, 0, 0, 0, 1, 2)), 11), BOTH),
    "F.pad of channels, circular": Case(
        *between(lambda m, y: F.pad(y.flatten(2).transpose(1, 2), (1, 1), "circular").transpose(1, 2)[..., None], 10),
        {"b": 6},
        {"a": "pad mixes it with its neighbours"},
    ),
    "reflecting and replicating modules": Case(
        *between(lambda m, y: m.p(m.q(y)), p=lambda: nn.ReflectionPad2d(1), q=lambda: nn.ReplicationPad2d(1)), BOTH
    ),
    # Order along channels -------------------------------
    "cumsum": Case(*between(lambda m, y: y.cumsum(1) / 8.0), BOTH),
    "softmax": Case(*between(lambda m, y: y.softmax(1)), BOTH, mixes=True),
    "argmax": Case(*between(lambda m, y: y * y.argmax(1, keepdim=True)), {"b": 6}, {"a": "argmax orders or numbers"}),
    "argmax of positions": Case(*between(lambda m, y: y * y.argmax(2, keepdim=True)), BOTH),
    "topk": Case(*between(lambda m, y: y.topk(4, 1).values, 4), {"b": 6}, {"a": "topk orders or numbers it"}),
    "topk of positions": Case(*between(lambda m, y: y.flatten(2).topk(3, -1)[0].unsqueeze(3)), BOTH),
    "sort": Case(*between(lambda m, y: y.sort(dim=1)[0]), {"b": 6}, {"a": "sort orders or numbers it"}),
    "sort of positions": Case(*between(lambda m, y: y.sort(3, descending=True).values), BOTH),
    "gather": Case(*between(lambda m, y: y.gather(1, y.argsort(1))), {"b": 6}, {"a": "argsort orders|picks it out"}),
    "gather of positions": Case(*between(lambda m, y: y.gather(2, y.argsort(2))), BOTH),
    "mean and norm over channels": Case(
        *between(lambda m, y: y * y.mean(1, keepdim=True) - y.norm(dim=1, keepdim=True)), BOTH, mixes=True
    ),
    "max over channels": Case(
        *between(lambda m, y: torch.cat([y.max(1, keepdim=True)[0], y.mean(1, keepdim=True)], 1), 2), BOTH, mixes=True
    ),
    "max over channels, with its place": Case(
        *between(lambda m, y: torch.mul(*y.max(1, keepdim=True)), 1), {"b": 6}, {"a": "max orders or numbers it"}
    ),
    "maximum of two": Case(*between(lambda m, y: torch.max(y, -y) + torch.min(y, y * 2)), BOTH),
    "cosine similarity": Case(
        *between(lambda m, y: y * F.cosine_similarity(y, y.relu() + 1, 1).unsqueeze(1)), BOTH, mixes=True
    ),
    "F.normalize": Case(*between(lambda m, y: F.normalize(y, dim=1)), BOTH, mixes=True),
    "a size as a number": Case(
        *between(lambda m, y: y / y.shape[1] ** 0.5), {"b": 6}, {"a": r"cut at div \(in .*test_shapes.py, line \d+\)"}
    ),
    "positions as a number": Case(*between(lambda m, y: y / (y.shape[2] * y.size(-1))), BOTH),
    # Space ----------------------------------------------
    "fft of positions": Case(*between(lambda m, y: torch.fft.irfft2(torch.fft.rfft2(y) * 0.5, s=y.shape[-2:])), BOTH),
    "fft of positions, all dimensions named": Case(*between(lambda m, y: torch.fft.fftn(y, dim=(2, 3)).abs()), BOTH),
    "fft of channels": Case(
        *between(lambda m, y: torch.fft.fft(y, dim=1).real), {"b": 6}, {"a": "fft_fft mixes it with its neighbours"}
    ),
    "grid_sample": Case(
        *between(
            lambda m, y: F.grid_sample(y, m.grid.expand(len(y), -1, -1, -1), align_corners=False),
            grid=lambda: nn.Parameter(torch.rand(1, 4, 4, 2) - 0.5),
        ),
        BOTH,
    ),
    "affine_grid of the input": Case(
        lambda m, x: m.head(
            m.a(
                F.grid_sample(
                    x, F.affine_grid(m.where(x.mean((2, 3))).view(-1, 2, 3), x.size(), False), align_corners=False
                )
            ).mean((2, 3))
        ),
        lambda: {"a": conv(3, 8), "where": nn.Linear(3, 6), "head": nn.Linear(8, 3)},
        {"a": 8},
        {"where": "affine_grid_generator"},
    ),
    "interpolate by size": Case(*between(lambda m, y: F.interpolate(y, size=(9, 4), mode="bicubic")), BOTH),
    "interpolate like another": Case(*between(lambda m, y: F.interpolate(F.avg_pool2d(y, 2), y.shape[2:])), BOTH),
    "max_unpool": Case(*between(lambda m, y: F.max_unpool2d(*F.max_pool2d(y, 2, return_indices=True), 2)), BOTH),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_that_move(case: Case) -> None:
    check_case(case)
