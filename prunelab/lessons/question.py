"""A question to predict before dragging: buttons where a kernel runs, a plain form with a folded answer elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from prunelab.errors import PruneLabError, unknown
from prunelab.lessons.exercises import Verdict
from prunelab.lessons.prose import prose

_WIDE = "max-width: 90ch"


@dataclass(frozen=True)
class Question:
    """Several choices, one of them right. Shown in a notebook, it asks, and says why the chosen one is right or wrong.

    Attributes:
        text: what is asked; what stands between backticks is shown as code.
        choices: what can be answered, in order; each with the sentence that it gets.
        right: the choice that is.

    Raises:
        PruneLabError: fewer than two choices, or none of them is called right.
    """

    text: str
    choices: Mapping[str, str]
    right: str

    def __post_init__(self) -> None:
        if len(self.choices) < 2:
            raise PruneLabError(f"A question needs two choices or more, not {len(self.choices)}.")
        if self.right not in self.choices:
            raise unknown("choice", self.right, self.choices)
        object.__setattr__(self, "choices", MappingProxyType(dict(self.choices)))

    def answer(self, choice: str) -> Verdict:
        """Whether a choice is right, and why.

        Raises:
            PruneLabError: there is no such choice.
        """
        if choice not in self.choices:
            raise unknown("choice", choice, self.choices)
        return Verdict(choice == self.right, self.choices[choice])

    def __str__(self) -> str:
        """The question and its choices in plain text, without the answer."""
        return "\n".join([self.text, *(f"  - {choice}" for choice in self.choices)])

    def form(self) -> str:
        """The question in plain HTML: the choices as a list, the answer folded."""
        listed = "".join(f"<li>{prose(choice)}</li>" for choice in self.choices)
        others = "".join(
            f"<li><i>{prose(choice)}</i>: {prose(why)}</li>"
            for choice, why in self.choices.items()
            if choice != self.right
        )
        return (
            f'<div style="{_WIDE}"><p><b>{prose(self.text)}</b></p><ol type="a">{listed}</ol>'
            f"<details><summary>The answer</summary><p><b>{prose(self.right)}</b>: "
            f"{prose(self.choices[self.right])}</p><ul>{others}</ul></details></div>"
        )

    def widget(self) -> Any:
        """The question with a radio button for every choice, and a button that judges the chosen one."""
        import ipywidgets as w

        radio = w.RadioButtons(options=list(self.choices), value=None, layout=w.Layout(width="auto"))
        see, said = w.Button(description="see", tooltip="Right or wrong, and why"), w.HTML()

        def judge(_: Any) -> None:
            chosen = radio.value
            said.value = "Choose one first." if chosen is None else self.answer(chosen)._repr_html_()

        see.on_click(judge)
        return w.VBox(
            [w.HTML(f'<div style="{_WIDE}; line-height: 1.4"><b>{prose(self.text)}</b></div>'), radio, see, said]
        )

    def _repr_mimebundle_(self, **_: Any) -> Any:
        shown = self.widget()._repr_mimebundle_()
        return {**shown, "text/plain": str(self), "text/html": self.form()}
