"""The lesson on Network Trimming: what to predict, and the thresholds of a first round to choose yourself."""

from __future__ import annotations

from typing import Any

from prunelab.lessons.answers import plan_in
from prunelab.lessons.embedded import embedded
from prunelab.lessons.exercises import Verdict, exercise
from prunelab.lessons.question import Question

QUESTION = Question(
    "The 500 neurons of `fc1` are zero 72 % of the time on average. With k = 1, how many of them lie above the "
    "threshold?",
    {
        "All that are zero more often than not, some 450": "No: the threshold is no fixed share of zeros. It lies one "
        "standard deviation above what is usual in this very layer.",
        "Fewer than 100": "Yes, 65. In a normal distribution 16 % lie more than one standard deviation above the mean; "
        "here it is 13 %, since the mean is not far from 100 %, where the scale ends.",
        "About half, 250": "No: half would lie above the median. The threshold is one standard deviation further up.",
    },
    right="Fewer than 100",
)
"""How many neurons of LeNet's `fc1` the paper's rule removes; the notebook counts them."""

COMPRESSION, DROP = 1.8, 0.05


@exercise(
    "network-trimming",
    f"Give a plan, or a lab with one, that cuts LeNet by APoZ with std= alone: at least {COMPRESSION} times smaller, "
    f"and before any retraining at most {DROP * 100:.0f} points of accuracy lost.",
)
def network_trimming(answer: Any) -> Verdict:
    """Counts what the plan leaves, and measures it on 5,000 test images."""
    plan = plan_in(answer)
    if plan.criterion != "apoz":
        return Verdict(False, f"This plan scores by {plan.criterion}; Network Trimming looks at the share of zeros.")
    if plan.repair != "none":
        return Verdict(
            False, "This plan repairs the weights that stay: here the cut itself is judged, so set no repair."
        )
    if plan.bypassed or any(each.std is None or each.grain != "channel" for each in plan.settings.values()):
        return Verdict(False, "Every layer that you set must be cut by its threshold: channels, and std= alone.")
    lenet = embedded("lenet")
    smaller, change = lenet.dense.params / lenet.cost(plan).params, lenet.accuracy(plan).change
    found = f"{smaller:.2f} times smaller, {change * 100:+.1f} points on 5,000 test images."
    if smaller < COMPRESSION:
        return Verdict(
            False,
            f"{found} That is not small enough: nearly all parameters are those between `conv2` and `fc1`. A smaller k "
            "removes more.",
        )
    if change < -DROP:
        return Verdict(
            False,
            f"{found} That costs too much: give back where it hurts. The layers need not share one k, and two that "
            "lose a little each may cost less than one that loses much.",
        )
    return Verdict(True, f"{found} Retraining starts from here.")
