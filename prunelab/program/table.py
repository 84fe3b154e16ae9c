"""Tables of what a program holds, as plain text, HTML and DataFrames."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prunelab.program.channels import Layer

if TYPE_CHECKING:
    import pandas as pd


def aligned(lines: list[list[str]]) -> str:
    """Lines of cells, all of one length, as columns that line up."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in padded)


class Layers(tuple[Layer, ...]):
    """The layers in order of execution; prints as a table, and becomes a DataFrame."""

    costs_: Mapping[str, tuple[float, float]]

    @classmethod
    def of(cls, layers: tuple[Layer, ...], shares: Mapping[str, tuple[float, float]]) -> Layers:
        """Layers with their shares of parameters and FLOPs."""
        table = cls(layers)
        table.costs_ = shares
        return table

    def rows(self) -> list[dict[str, Any]]:
        """One dict per layer: name, kind, channels, members, shares of parameters and FLOPs, why pinned."""
        return [
            {
                "name": layer.name,
                "kind": layer.kind,
                "channels": layer.channels,
                "members": len(layer.producers),
                "params": self.costs_[layer.name][0],
                "flops": self.costs_[layer.name][1],
                "pinned because": layer.pinned,
            }
            for layer in self
        ]

    def to_frame(self) -> pd.DataFrame:
        """The table as a DataFrame; ``params`` and ``flops`` are shares of the whole network, 0 to 1."""
        import pandas as pd

        return pd.DataFrame(self.rows()).set_index("name")

    def __repr__(self) -> str:
        heads = ["layer", "kind", "channels", "members", "params", "FLOPs", "pinned because"]
        body = [
            [r["name"], r["kind"], f"{r['channels']}", f"{r['members']}", f"{r['params']:.1%}",
            f"{r['flops']:.1%}",
             r["pinned because"]]
            for r in self.rows()
        ]  # fmt: skip
        return aligned([heads, *body])

    def _repr_html_(self) -> str:
        styled = self.to_frame()
        return str(styled.to_html(formatters={"params": "{:.1%}".format, "flops": "{:.1%}".format}))
