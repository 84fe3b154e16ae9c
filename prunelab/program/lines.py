"""Errors of the user's own code in a sentence: what went wrong, and in which line."""

from __future__ import annotations

import re
import sys
import sysconfig

_STANDARD = sysconfig.get_path("stdlib")
_OTHERS = ("/torch/", "/sympy/", "/prunelab/program/", "<frozen ", "<string>", "<eval_with_key>")


def is_users(file: str) -> bool:
    """Whether a file of a traceback is neither torch's nor Python's nor ours."""
    return not any(part in file for part in _OTHERS) and (not file.startswith(_STANDARD) or "-packages" in file)


# What torch says where code cannot be followed, and what that means to whoever wrote it.
_SAYINGS = (
    (
        r"data-dependent|_local_scalar_dense|cannot be called on meta",
        "what it does depends on the values in a tensor, so it may differ from image to image; only what is the same "
        "for every image can be followed (torch.where instead of if, no .item())",
    ),
    (r"\.numpy\(\) is not supported", "it leaves torch for NumPy, where it cannot be followed; use torch's functions"),
    (r"fake tensor in the exported program", "it uses .data or another tensor behind torch's back; use .detach()"),
    (
        r"Found <class '(?:.*\.)?(?P<name>\w+)'> in output",
        "it gives back a {name}, which torch cannot take apart; give back a tuple or dict, or register it with "
        "torch.export.register_dataclass",
    ),
)


def sentence(error: BaseException) -> str:
    """What an error says, for whoever wrote the code, and the line of that code where it happened."""
    text = str(error).strip()
    for pattern, saying in _SAYINGS:
        found = re.search(pattern, text)
        if found is not None:
            return f"{saying.format(**found.groupdict())}{line_of(error)}"
    return f"{text.splitlines()[0] if text else type(error).__name__}{line_of(error)}"


def line_of(error: BaseException) -> str:
    """The innermost line of the user's code in an error's traceback, as `` (in net.py, line 7)``; "" without one."""
    found = ""
    trace = error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if is_users(file):
            found = f" (in {file}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return found


def running_line() -> str:
    """The innermost line of the user's code below an operator that runs; "" where all of it is torch's and ours."""
    frame = sys._getframe(1).f_back
    while frame is not None and "/prunelab/program/" not in frame.f_code.co_filename:
        if is_users(frame.f_code.co_filename):
            return f" (in {frame.f_code.co_filename}, line {frame.f_lineno})"
        frame = frame.f_back
    return ""
