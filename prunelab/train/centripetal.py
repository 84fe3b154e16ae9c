"""The gradients of Centripetal SGD: a cluster's filters share one gradient and are drawn to their centre.

Ding, Ding, Guo and Han 2019, Centripetal SGD for pruning very deep convolutional networks with complicated structure,
arXiv 1904.03837. With *G* the gradient and *W* the weights of all filters, one a row,

    *G* ← *ΓG* + *ε*(*W* − *ΓW*),        *Γ_jk* = 1/|H| where *j* and *k* are in the same cluster *H*, else 0.

The weight decay *ηW* of the paper's formula is the optimizer's own: it is the same for all members once they are equal.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from prunelab.program.program import Program
from prunelab.repair.merge import made
from prunelab.train.clusters import Clusters


@dataclass
class _Alike:
    """Parameters of one shape whose channels lie along the same dimension: they are worked on in one go.

    Attributes:
        means: *Γ* of each, shape ``(parameters, size, size)``.
        pull: *ε* of each, shape ``(parameters, 1, 1)``.
    """

    parameters: list[nn.Parameter]
    dim: int
    means: Tensor
    pull: Tensor

    def rows(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors of this shape as matrices with a channel in each row, shape ``(parameters, size, values)``."""
        return torch.stack([t.movedim(self.dim, 0).flatten(1) if t.dim() > 1 else t[:, None] for t in tensors])

    def tensors(self, rows: Tensor) -> list[Tensor]:
        """The reverse of :meth:`rows`."""
        shape = self.parameters[0].movedim(self.dim, 0).shape
        return [row.view(shape).movedim(0, self.dim) for row in rows]


class Centripetal:
    """Changes gradients just before an optimizer's step, whichever optimizer it is."""

    def __init__(self, program: Program, clusters: Clusters, *, pull: float, vector_pull: float = 1.0) -> None:
        """Args:
        program: of the network that is trained, whose own parameters the gradients are of.
        pull: *ε*: how strongly filters are drawn to the centre of their cluster.
        vector_pull: factor of that for biases and the weights of norms; the paper's code has 0.1, which takes hundreds
            of epochs to bring them together.
        """
        means = _means(program, clusters)
        parameters = dict(program.model.named_parameters(remove_duplicate=False))
        groups: dict[tuple[Any, ...], list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
        for (name, dim), mean in means.items():
            parameter = parameters[name]
            if parameter.requires_grad:
                groups[tuple(parameter.shape), dim, parameter.dtype].append((parameter, mean))
        self._groups = [
            _Alike(
                [parameter for parameter, _ in group],
                dim,
                torch.stack([mean for _, mean in group]).to(dtype),
                torch.full((len(group), 1, 1), pull * (1.0 if len(shape) > 1 else vector_pull), dtype=dtype),
            )
            for (shape, dim, dtype), group in groups.items()
        ]
        self._hooks: list[RemovableHandle] = []

    def attach(self, optimizer: Optimizer) -> RemovableHandle:
        """Have every step of an optimizer begin with this: it sees gradients as they are then, unscaled."""
        hook = optimizer.register_step_pre_hook(lambda *_: self.apply())
        self._hooks.append(hook)
        return hook

    def detach(self) -> None:
        """Leave all optimizers' steps as they were before :meth:`attach`."""
        while self._hooks:
            self._hooks.pop().remove()

    @torch.no_grad()
    def apply(self) -> None:
        """Change the gradients that there are."""
        for group in self._groups:
            at = [k for k, parameter in enumerate(group.parameters) if parameter.grad is not None]
            if not at:
                continue
            self._move(group)
            weights = group.rows([group.parameters[k] for k in at])
            gradients = [g for k in at if (g := group.parameters[k].grad) is not None]
            means, pull = (t if len(at) == len(t) else t[at] for t in (group.means, group.pull))
            # ΓG + ε(W − ΓW) = εW + Γ(G − εW): one product of matrices.
            weights *= pull
            changed = torch.baddbmm(weights, means, group.rows(gradients) - weights)
            torch._foreach_copy_(gradients, group.tensors(changed))

    @torch.no_grad()
    def spread(self) -> float:
        """How far members still are from their clusters' centres, relative to the norm; of the worst tensor."""
        worst = 0.0
        for group in self._groups:
            self._move(group)
            rows = group.rows(group.parameters)
            far = (rows - group.means @ rows).flatten(1).norm(dim=1)
            worst = max(worst, float((far / rows.flatten(1).norm(dim=1).clamp_min(1e-30)).max()))
        return worst

    @staticmethod
    def _move(group: _Alike) -> None:
        """Training may have moved the parameters to another device since."""
        device = group.parameters[0].device
        group.means, group.pull = group.means.to(device), group.pull.to(device)


def _means(program: Program, clusters: Clusters) -> Mapping[tuple[str, int], Tensor]:
    """*Γ* of every parameter that makes clustered channels, by its name and dimension, shape ``(size, size)``."""
    found: dict[tuple[str, int], Tensor] = {}
    for name, numbers in clusters.of.items():
        layer = program.layer(name)
        members: dict[int, list[int]] = defaultdict(list)
        for channel, number in enumerate(numbers):
            members[number].append(channel)
        for slot in made(program, layer):
            key = (slot.state, slot.dim)
            matrix = found.setdefault(key, torch.eye(program.state(slot.state).shape[slot.dim], dtype=torch.float64))
            for cluster in members.values():
                for places in slot.index[cluster].T:
                    at = torch.from_numpy(places.copy())
                    matrix[at[:, None], at] = 1 / len(at)
    return found
