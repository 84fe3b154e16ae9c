"""Questions: judged by choice, readable without a kernel, and live with one."""

from __future__ import annotations

import ipywidgets as w
import pytest

import prunelab as pl
from prunelab import lessons

QUESTION = lessons.Question(
    "Which layer of `LeNet` holds most parameters?",
    {"conv1": "No: 20 filters of 5×5.", "fc1": "Yes: 500·800 weights, <93 %> of all.", "fc2": "No: ten classes."},
    right="fc1",
)


def parts(widget: w.VBox) -> tuple[w.RadioButtons, w.Button, w.HTML]:
    _, radio, see, said = widget.children
    return radio, see, said


def test_every_choice_gets_its_own_sentence() -> None:
    assert QUESTION.answer("fc1") == lessons.Verdict(True, "Yes: 500·800 weights, <93 %> of all.")
    assert QUESTION.answer("conv1") == lessons.Verdict(False, "No: 20 filters of 5×5.")
    with pytest.raises(pl.PruneLabError, match=r"no choice 'fc3'; the nearest names are 'fc2', 'fc1'"):
        QUESTION.answer("fc3")


def test_the_buttons_judge_what_is_chosen_and_nothing_before() -> None:
    radio, see, said = parts(QUESTION.widget())
    assert (radio.value, radio.options, said.value) == (None, ("conv1", "fc1", "fc2"), "")
    see.click()
    assert said.value == "Choose one first."
    radio.value = "conv1"
    see.click()
    assert "✗" in said.value
    assert "20 filters" in said.value
    radio.value = "fc1"
    see.click()
    assert "✓" in said.value
    assert "✗" not in said.value


def test_without_a_kernel_the_answer_is_folded_below_all_choices() -> None:
    bundle = QUESTION._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert bundle["text/plain"].splitlines()[1:] == ["  - conv1", "  - fc1", "  - fc2"]
    asked, answer = bundle["text/html"].split("<details>")
    assert "<code>LeNet</code>" in asked
    assert all(f"<li>{choice}</li>" in asked for choice in QUESTION.choices)
    assert "93" not in asked
    assert "<b>fc1</b>: Yes: 500·800 weights, &lt;93 %&gt; of all." in answer
    assert "<i>fc2</i>: No: ten classes." in answer


def test_a_question_without_a_right_choice_is_refused() -> None:
    with pytest.raises(pl.PruneLabError, match="no choice 'neither'"):
        lessons.Question("Which?", {"this": "", "that": ""}, right="neither")
    with pytest.raises(pl.PruneLabError, match="two choices or more, not 1"):
        lessons.Question("Which?", {"this": ""}, right="this")
