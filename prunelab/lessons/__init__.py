"""What the lesson notebooks need: questions to predict before dragging, and exercises with a checker.

>>> from prunelab import lessons
>>> lessons.Question("Which goes first?", {"conv1": "No: …", "fc1": "Yes: …"}, right="fc1")
>>> lessons.check("mean-activation", my_function)

A file of this folder that is named after a method holds what its lesson asks: ``lessons.mean_activation.QUESTION`` to
predict, and exercises that it registers with :func:`exercise`. It is found by lying here.
"""

from importlib import import_module
from pkgutil import iter_modules

from prunelab.lessons.embedded import fashion_mnist as fashion_mnist
from prunelab.lessons.exercises import (
    Verdict as Verdict,
    check as check,
    exercise as exercise,
    exercises as exercises,
)
from prunelab.lessons.question import Question as Question

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")
