"""The lesson on a quarter of the size: what to predict, and the layers' shares of zeros to choose yourself."""

from __future__ import annotations

from typing import Any

from prunelab.lessons.answers import plan_in
from prunelab.lessons.embedded import embedded
from prunelab.lessons.exercises import Verdict, exercise
from prunelab.lessons.question import Question

SIZE, LEAST = 0.25, 0.8

QUESTION = Question(
    "Each of the six convolutions loses the smallest 75 % of its weights, and nothing is trained. What is left of 94 % "
    "accuracy?",
    {
        "Some 90 %: small weights matter little": "No: so it is in one layer, but six change their outputs at once, "
        "and each works on what those before it have spoiled.",
        "Some 60 %": "No, it is worse: the first layers have few weights and need most of them.",
        "Hardly more than chance": "Yes, 12 %. The scan shows why: at 70 % the first layer alone costs 20 points, and "
        "the last could give 80 % for nothing.",
    },
    right="Hardly more than chance",
)
"""What one share for all layers costs the small VGG; the notebook measures it."""


@exercise(
    "a-quarter-of-the-size",
    f"Give a plan, or a lab with one, that leaves the small VGG at most {SIZE:.0%} of its parameters by zeroing single "
    f"weights (grain weight), and at least {LEAST:.0%} accuracy before any training.",
)
def a_quarter_of_the_size(answer: Any) -> Verdict:
    """Counts the weights that are left, and measures on 5,000 test images."""
    plan = plan_in(answer)
    channels = [name for name, each in plan.settings.items() if each.rule != "none" and each.grain != "weight"]
    if channels or plan.bypassed:
        return Verdict(False, f"{', '.join([*channels, *plan.bypassed])}: here single weights go; set that grain.")
    if plan.repair != "none":
        return Verdict(
            False, "This plan repairs the weights that stay: here the choice itself is judged; set no repair."
        )
    vgg = embedded("vgg_small")
    left, accuracy = vgg.cost(plan).nonzero / vgg.dense.params, vgg.accuracy(plan).accuracy
    found = f"{left:.1%} of the parameters, {accuracy:.1%} accuracy on 5,000 test images."
    if left > SIZE:
        return Verdict(
            False,
            f"{found} Still too large: look at each layer's share of the parameters. The largest alone holds half.",
        )
    if accuracy < LEAST:
        return Verdict(
            False,
            f"{found} Small enough, but too much is lost: the scan shows which layers are cheap. Give the others "
            "some weights back; the smallest layers hardly weigh anything.",
        )
    return Verdict(True, f"{found} One pass over the training images brings most of the rest back.")
