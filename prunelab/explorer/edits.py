"""The user's hand on the rows: what it has changed there, and what of the lab the rows show meanwhile."""

from __future__ import annotations

import time
from typing import Any

from prunelab.errors import PruneLabError
from prunelab.explorer.desk import Desk, layers_of, onto, plan_of
from prunelab.explorer.lab import Lab
from prunelab.plan import Plan, Setting

# Two changes closer than this are one movement of the hand: one step of undo.
_ONE_MOVEMENT = 1.0
_SET = ("rule", "value", "grain", "locked")


class Edits:
    """Takes edits of the rows to the lab, which cells change too, and which jobs change.

    The browser sends all rows with every edit, and may send some more before it hears of a change made elsewhere. So
    entries carry a number, ``shown``: it grows with every such change, and the browser hands it back as it was.
    """

    def __init__(self, lab: Lab, desk: Desk) -> None:
        self._lab, self._desk = lab, desk
        self._shown = (lab.stage.program, lab.plan)
        self._number = 0
        self._before: dict[str, dict[str, Any]] = {}
        self._last = (0.0, "")

    def show(self) -> None:
        """The rows as the lab has them now."""
        program, plan = self._lab.stage.program, self._lab.plan
        if program is not self._shown[0] or plan != self._shown[1]:
            self.rest()
            # Of another network's rows nothing is meant for this one.
            self._outdate(self._desk.layers if program is self._shown[0] else {})
        self._shown = (program, plan)
        self._desk.layers = {name: {**entry, "shown": self._number} for name, entry in layers_of(self._lab).items()}

    def rest(self) -> None:
        """The hand has moved elsewhere: its next edit is a step of its own."""
        self._last = (0.0, "")

    def take(self) -> bool:
        """Make the user's changes the lab's; gives whether the lab has more that the rows do not show.

        Raises:
            PruneLabError: the lab is at another network than the rows, or refuses the plan; it stays as it was.
        """
        program, shown = self._shown
        if program is not self._lab.stage.program:
            raise PruneLabError("The network was changed in a cell. The rows show it now; the last move was not made.")
        elsewhere, rows = self._lab.plan != shown, self._desk.layers
        if elsewhere:
            self.rest()
        meant = {name: entry for name, entry in rows.items() if self._is_meant(name, entry)}
        plan = onto(self._lab.plan, shown, plan_of(meant, shown))
        self._lab.use(plan, merge=self._goes_on(plan))
        if elsewhere:
            self._outdate(rows)
        else:
            self._before |= {name: rows[name] for name in self._before.keys() & rows.keys() if self._is_old(rows[name])}
        self._shown = (program, self._lab.plan)
        return elsewhere or any(map(self._is_old, rows.values()))

    def _outdate(self, before: dict[str, dict[str, Any]]) -> None:
        """What the browser has sent until now, and has on its way, is of rows that are no more."""
        self._number += 1
        self._before = dict(before)

    def _is_old(self, entry: dict[str, Any]) -> bool:
        return bool(entry.get("shown", self._number) != self._number)

    def _is_meant(self, name: str, entry: dict[str, Any]) -> bool:
        """Whether an entry says what the user wants: an old one only where the hand has moved it since."""
        if not self._is_old(entry):
            return True
        before = self._before.get(name, {}) if entry["shown"] == self._number - 1 else {}
        return bool(before) and any(entry.get(key) != before.get(key) for key in _SET)

    def _goes_on(self, plan: Plan) -> bool:
        """Whether a change goes on with the last one."""
        old = self._lab.plan.settings
        names = sorted(plan.settings.keys() | old.keys())
        new = [(n, plan.settings.get(n, Setting())) for n in names if plan.settings.get(n) != old.get(n)]
        changed = str([(n, s.rule, s.grain, s.locked) for n, s in new])
        then, now = self._last, time.monotonic()
        self._last = (now, changed)
        return changed == then[1] and now - then[0] < _ONE_MOVEMENT
