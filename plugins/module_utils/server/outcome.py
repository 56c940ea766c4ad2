# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What became of a step: the report on one model, for whoever asked for it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Dict, List, Mapping, Optional, Tuple

from .diagnose import Diagnosis

SHORT = 500


@dataclass(frozen=True)
class Attempt:
    """One choice that was launched: its number, what it is in words, and what went wrong, if anything did.

    `beside` is whether it was launched under another uid, to see whether it can. `duration` is in seconds. `log` has
    the lines of the server's log that show more than the error does.
    """

    choice: int
    runs: str
    error: str = ""
    diagnosis: Optional[Diagnosis] = None
    duration: float = 0.0
    beside: bool = False
    log: Tuple[str, ...] = ()

    def row(self) -> Dict[str, Any]:
        """As a module returns it."""
        return {**asdict(self), "duration": round(self.duration, 2), "log": list(self.log)}


@dataclass(frozen=True)
class Outcome:
    """What became of one step.

    `changed` is whether anything was done, on the server or in the record. `model` is the model as the server shows it
    now, None when it does not run. `duration` is in seconds. `error` is the server's own words, empty when all went
    well. `choice` is the number of what serves now (see plan.Choice), `runs` what that is in words, `why` what was
    wrong with the first choice where another one serves. `attempts` are the launches, in their order.
    """

    uid: str
    action: str
    reason: str
    ok: bool = True
    changed: bool = False
    model: Optional[Mapping[str, Any]] = None
    duration: float = 0.0
    error: str = ""
    diagnosis: Optional[Diagnosis] = None
    choice: int = 0
    runs: str = ""
    why: str = ""
    attempts: Tuple[Attempt, ...] = ()

    def sentence(self) -> str:
        """One line about a failure: which model, what happened, why, and what to do."""
        parts = [f"{self.uid}: {self.action} failed after {human(self.duration)}: {self.error.rstrip('.')}."]
        if self.diagnosis:
            parts.append(f"Cause: {self.diagnosis.cause}")
            parts.append(f"Cure: {self.diagnosis.cure}")
        return " ".join(parts)

    def shown_by(self) -> List[str]:
        """The lines of the server's log about a failure, those of the first launch that has some."""
        return list(next((one.log for one in self.attempts if one.error and one.log), ()))

    def notice(self) -> str:
        """One line about a model that serves and is not the first choice; empty where it is."""
        if not self.ok or not self.choice:
            return ""
        which = f"alternative {self.choice}" if self.choice > 0 else "what ran before"
        cure = next((one.diagnosis.cure for one in self.attempts if one.error and one.diagnosis), "")
        because = f" because the first choice failed: {self.why.rstrip('.')}." if self.why else "."
        return f"{self.uid}: {which} serves ({self.runs}){because}{' Cure: ' + cure if cure else ''}"

    def row(self) -> Dict[str, Any]:
        """As a module returns it."""
        return {
            "model_uid": self.uid,
            "action": self.action,
            "reason": self.reason,
            "model": dict(self.model) if self.model else None,
            "duration": round(self.duration, 2),
            "error": self.error,
            "diagnosis": asdict(self.diagnosis) if self.diagnosis else None,
            "choice": self.choice,
            "runs": self.runs,
            "why": self.why,
            "attempts": [one.row() for one in self.attempts],
        }


def human(seconds: float) -> str:
    """A duration for a message: `0.4 s`, `12 s`, `3 min 05 s`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def short(text: str, limit: int = SHORT) -> str:
    """A text on one line of at most `limit` characters."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
