"""The lesson on multi-grain pruning: what to predict, and a plan with all grains to make yourself."""

from __future__ import annotations

from typing import Any

from prunelab.lessons.answers import plan_in
from prunelab.lessons.embedded import embedded
from prunelab.lessons.exercises import Verdict, exercise
from prunelab.lessons.question import Question
from prunelab.plan import Plan
from prunelab.program.selection import Selection

QUESTION = Question(
    "`stage3.conv2` holds half of all parameters. It is bypassed: its input passes through to the classifier, whose "
    "weights are chosen anew by least squares. Nothing is trained. Before, the network scored 94 %. And now?",
    {
        "About 10 %, as good as guessing": "No, that is what it scores without the repair: the classifier then reads "
        "features that it was not made for. They are there all the same.",
        "Some 60 %": "No: the features that the layer is given tell the classes apart nearly as well as those that it "
        "gives.",
        "More than 93 %": "Yes: less than a point is lost. What looked like the most needed layer was nearly idle; "
        "only the layer behind it did not know.",
    },
    right="More than 93 %",
)
"""What a bypass costs once the weights behind it are repaired; the notebook measures it."""

COMPRESSION, DROP = 5.0, 0.02


@exercise(
    "multi-grain",
    f"Give a plan, or a lab with one, that prunes the small VGG by layer, channel and weight at once: at least "
    f"{COMPRESSION:.0f} times fewer parameters that are not zero, and without any training at most {DROP * 100:.0f} "
    "points of accuracy lost.",
)
def multi_grain(answer: Any) -> Verdict:
    """Counts what the plan leaves, and measures it on 5,000 test images."""
    plan, vgg = plan_in(answer), embedded("vgg_small")
    missing = _missing(plan.resolve(vgg.program, vgg.profile))
    if missing:
        return Verdict(False, f"This plan removes no {missing}: all three grains must take something away.")
    left, change = vgg.cost(plan), vgg.accuracy(plan).change
    smaller, structural = vgg.dense.params / left.nonzero, vgg.dense.params / left.params
    found = (
        f"{smaller:.2f} times smaller, {structural:.2f} of it by layers and channels; {change * 100:+.1f} points on "
        "5,000 test images."
    )
    if change < -DROP:
        return Verdict(False, f"{found} That costs too much: {_hint(plan)}")
    if smaller < COMPRESSION:
        return Verdict(
            False,
            f"{found} That is not small enough: most parameters lie in the widest layers, and single weights of those "
            "cost least.",
        )
    return Verdict(True, f"{found} Training starts from here.")


def _missing(selection: Selection) -> str:
    """The first of the three grains that takes nothing away."""
    if not selection.bypassed:
        return "layer"
    if not selection.kept:
        return "channels"
    return "" if any(not mask.all() for mask in selection.masks.values()) else "single weights"


def _hint(plan: Plan) -> str:
    if plan.repair == "none":
        return "the weights that stay do not know what went. A plan can repair them."
    if len(plan.bypassed) > 1:
        return "the layers are not equally idle; give back the one that is needed most."
    return "channels cost more than single weights; take fewer of them, or elsewhere."
