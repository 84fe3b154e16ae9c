"""Which line of the user's own code something happened in, for messages."""

from __future__ import annotations

import sys
import sysconfig

_STANDARD = sysconfig.get_path("stdlib")
_OTHERS = ("/torch/", "/sympy/", "/prunelab/program/", "<frozen ", "<string>", "<eval_with_key>")


def is_users(file: str) -> bool:
    """Whether a file of a traceback is neither torch's nor Python's nor ours."""
    return not any(part in file for part in _OTHERS) and (not file.startswith(_STANDARD) or "-packages" in file)


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
