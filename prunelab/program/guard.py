"""What keeps the user's model and random numbers as they were while prunelab works."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def random_kept() -> Iterator[None]:
    """Afterwards every random number that the user draws is the one that it would have been without this."""
    python, cpu = random.getstate(), torch.random.get_rng_state()
    numpy = np.random.get_state()  # noqa: NPY002  # it is the state that users' data sets draw from
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.random.set_rng_state(cpu)
        for device, state in enumerate(gpus):
            torch.cuda.set_rng_state(state, device)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module's training flag and all random states are as before."""
    flags = [(m, m.training) for m in model.modules()]
    with random_kept():
        for module, _ in flags:
            # Not model.eval(): users override train(), for example to keep norms frozen.
            module.training = False
        try:
            yield
        finally:
            for module, flag in flags:
                module.training = flag


@contextmanager
def quiet() -> Iterator[None]:
    """Without the tracebacks that PyTorch logs for errors which prunelab catches and puts into a sentence."""
    names = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes")
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled
