"""The explorer's files: the plan written and read, the network exported, the plan as Python code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import ipywidgets as w

from prunelab.errors import PruneLabError
from prunelab.files import replacing
from prunelab.plan import Plan
from prunelab.saving import FORMATS

if TYPE_CHECKING:
    from prunelab.explorer.app import Explorer


class Filing:
    """Widgets and what they do. The explorer places them, and says when the plan has changed.

    Attributes:
        name: the field with the file's name.
        save, load, export, copy: the buttons.
        python: the plan as Python code, once ``copy`` was pressed.
    """

    def __init__(self, explorer: Explorer) -> None:
        self._explorer = explorer
        self._lab = explorer.lab
        self.name = w.Text("plan.json", description="file", layout=w.Layout(width="230px"))
        self.save = explorer._button("save plan", self._on_save, "Write the plan as JSON")
        self.load = explorer._button("load plan", self._on_load, "Read a plan from JSON")
        self.export = explorer._button(
            "export network", self._on_export, "Write the current network: .pt2 or .safetensors"
        )
        self.copy = explorer._button("copy as Python", self._on_python, "The plan as Python code")
        self.python = w.Textarea(layout=w.Layout(width="98%", height="120px", display="none"))

    @property
    def controls(self) -> tuple[w.Widget, ...]:
        """The line of controls."""
        return self.name, self.save, self.load, self.export, self.copy

    def show(self) -> None:
        """The plan's code, if it is asked for."""
        if self.python.layout.display != "none":
            self.python.value = self._lab.plan.to_python()

    def _file(self) -> Path:
        named = Path(self.name.value.strip())
        if not named.name:
            raise PruneLabError("Name a file in the field 'file' first.")
        return named

    def _plan_file(self) -> Path:
        named = self._file()
        if named.suffix.lower() in FORMATS:
            raise PruneLabError(f"{named} is the name of a network's file: name one for the plan, such as plan.json.")
        return named

    def _on_save(self) -> None:
        target = self._plan_file()
        try:
            with replacing(target) as beside:
                beside.write_text(self._lab.plan.to_json())
        except OSError as error:
            raise PruneLabError(f"The plan cannot be written to {target}: {error}.") from error
        self._explorer._say(f"The plan is in {target}.")

    def _on_load(self) -> None:
        source = self._plan_file()
        if not source.is_file():
            raise PruneLabError(f"There is no file {source}: name the plan to load in the field 'file'.")
        plan = Plan.from_json(source.read_text())
        choosing = self._explorer._choosing
        choosing.once_known(plan.criterion, lambda: self._lab.use(plan), f"The plan comes from {source}.")

    def _on_export(self) -> None:
        # torch.export changes how modules are called, for all threads.
        self._explorer._training.refuse("an export")
        named = self._file()
        target = named if named.suffix.lower() in FORMATS else named.with_name("pruned.pt2")
        self._explorer._say(f"The current network is in {self._lab.export(target)}.")

    def _on_python(self) -> None:
        hidden = self.python.layout.display == "none"
        self.python.layout.display = "" if hidden else "none"
        self.show()
