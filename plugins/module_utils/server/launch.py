# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""One launch from its request to a model that serves, or to nothing left of it."""

from __future__ import annotations

import re
import time
from typing import Any, Callable, Mapping, Optional

from .client import AccessRefused, Client, ServerError, Unreachable
from .diagnose import Diagnosis
from .running import Running, combine, look, settle
from .transport import ACTOR

TAKEN = "already in the model list"
GONE = "not found in the model list"
# "uid-rep0 is running": a replica whose launch was cancelled and has not ended. Nothing was done for the new one.
UNWINDING = re.compile(r"-(rep)?\d+ is running$")
HELD = Diagnosis(
    cause="A launch of this uid was cancelled, and the server does not let go of it. A process that waits for a disk "
    "or a driver cannot be ended, and neither can what hangs in the server itself.",
    cure="Look for the process `Model: <uid>-rep0` (`<uid>-0` in 1.x) and what it waits for (state D in `ps`); when it "
    "has ended, the uid is free. Otherwise restart the server, which offers no other way. Until then the model can run "
    "under another uid.",
    name="held",
)
DEAD = Diagnosis(
    cause="The model's process died more often than the server starts it anew, and this version keeps its uid.",
    cure="Restart the server; it offers no other way. The keeper, or playbooks/models.yml, launches all models again.",
    name="dead",
)
NO_REASON = Diagnosis(
    cause="The server gives no reason. Xinference does so when it could not start a process for the model within 60 s, "
    "most often because another model hangs while it loads.",
    cure="Look at the end of the server's log. Terminate the model that hangs, or restart the server, and run again.",
    name="no-reason",
    heals=True,
)
FORGOTTEN = Diagnosis(
    cause="The server was restarted while the model was launched, or somebody stopped the model at that moment.",
    cure="Run again. If the server restarts by itself, the end of its log says why.",
    name="forgotten",
    heals=True,
)
SLOW = Diagnosis(
    cause="The model did not become ready within wait_timeout; it is large, its disk slow, or it hangs.",
    cure="Look at the end of the server's log. Raise wait_timeout if it was still loading.",
    name="slow",
)
# A model whose process died is launched again by the server itself; that is given this long before we step in.
SELF_RECOVERY = 20.0
# A terminated engine may need this long to give its GPU memory back before the server answers.
TERMINATE_LIMIT = 180.0
# How long a cancelled launch may take to unwind.
CANCEL_LIMIT = 90.0
# How long a launch of the same uid that was cancelled before may still be in the way.
UNWIND_LIMIT, UNWIND_PAUSE = 30.0, 2.0
# How long a server that launches big models may fail to answer before the launch counts as lost.
SILENCE = 60.0
# Between two questions a twentieth of the time already waited passes, within these limits: nobody waits much too long.
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 2.0
PROGRESS_EVERY = 5.0


class LaunchFailed(Exception):
    """A launch that came to nothing. `said` is what the server said; `diagnosis` is set where the cause is ours.

    `final` is whether nothing else can be launched under this uid either.
    """

    def __init__(
        self, message: str, said: str = "", diagnosis: Optional[Diagnosis] = None, final: bool = False
    ) -> None:
        super().__init__(message)
        self.said = said or message
        self.diagnosis = diagnosis
        self.final = final


class Launcher:
    """Launches, follows and stops the model `uid`. `deadline` is in time.monotonic()."""

    def __init__(self, client: Client, uid: str, deadline: float, listener: Callable[[str, str], None]) -> None:
        self.client = client
        self.uid = uid
        self.started = time.monotonic()
        self.deadline = deadline
        self.listener = listener
        self.progress = 0.0
        # Set when a ready model was found under the uid that this launcher did not launch.
        self.contested = False

    def launch(self, payload: Mapping[str, Any]) -> Running:
        """Launch and wait until the model serves. Whatever a failure leaves behind is cleared away first."""
        try:
            try:
                return self._persistent(payload)
            except ServerError as refusal:
                if TAKEN not in refusal.detail:
                    raise
            return self._contested(payload)
        except AccessRefused:
            raise
        except (ServerError, LaunchFailed):
            self._sweep()
            raise

    def follow(self) -> Running:
        """Wait until a launch that is under way has ended well."""
        began = reported = heard = time.monotonic()
        while True:
            try:
                found = self._instance()
                heard = time.monotonic()
            except Unreachable:
                if time.monotonic() - heard > SILENCE:
                    raise
                found = Running(self.uid, status="CREATING")
            if found is None:
                raise LaunchFailed("the server forgot the launch", diagnosis=FORGOTTEN)
            if found.status == "ERROR":
                said = ACTOR.sub("", found.error)
                raise LaunchFailed(said or "the server gives no reason", said, None if said else NO_REASON)
            if found.loaded:
                return self._listed()
            if time.monotonic() >= self.deadline:
                return self._out_of_time()
            if time.monotonic() - reported >= PROGRESS_EVERY:
                reported = time.monotonic()
                self._report()
            time.sleep(min(max((time.monotonic() - began) / 20, FIRST_PAUSE), LONGEST_PAUSE))

    def stop(self, seen: Optional[Running]) -> None:
        """Terminate the model, cancelling its launch first where one is under way. One that is gone already is fine."""
        if seen and seen.state == "starting":
            self._cancel()
        if seen and seen.state == "stopping":
            self.await_gone()
            return
        try:
            self.client.terminate(self.uid, timeout=TERMINATE_LIMIT)
        except ServerError as error:
            if GONE not in error.detail:
                raise

    def await_gone(self) -> None:
        """Wait until a termination that is under way has ended."""
        while time.monotonic() < self.deadline:
            found = self._instance()
            if found is None or found.status != "TERMINATING":
                return
            time.sleep(FIRST_PAUSE)
        waited = time.monotonic() - self.started
        raise LaunchFailed(f"it has been terminating for {waited:.0f} s, and does not end", diagnosis=HELD, final=True)

    def _persistent(self, payload: Mapping[str, Any]) -> Running:
        """Launch; again while an earlier launch of the same uid is still being unwound."""
        end = min(self.deadline, time.monotonic() + UNWIND_LIMIT)
        while True:
            try:
                return self._launch(payload)
            except (ServerError, LaunchFailed) as failure:
                said = failure.said if isinstance(failure, LaunchFailed) else failure.detail
                if not UNWINDING.search(said.strip()):
                    raise
                if time.monotonic() >= end:
                    raise LaunchFailed(said, diagnosis=HELD, final=True) from failure
            time.sleep(UNWIND_PAUSE)

    def _launch(self, payload: Mapping[str, Any]) -> Running:
        if self.client.features.launch_returns_early:
            self.client.launch(payload)
            return self.follow()
        try:
            self.client.launch(payload, timeout=max(1.0, self.deadline - time.monotonic()))
        except Unreachable:
            if time.monotonic() < self.deadline:
                raise
            return self._out_of_time()
        return self._listed()

    def _listed(self) -> Running:
        """The model as the server lists it, now that it is ready."""
        found = settle(self.client, self.uid)
        if found.model is None:
            raise LaunchFailed("it became ready and was gone at once; its process may have died")
        return found

    def _contested(self, payload: Mapping[str, Any]) -> Running:
        """The uid is taken, though the server did not list it: a ghost, or somebody who was faster."""
        end = min(self.deadline, time.monotonic() + SELF_RECOVERY)
        died = False
        while time.monotonic() < end:
            found = look(self.client).get(self.uid)
            if found is None:
                died = False
                break
            if found.state == "ready":
                self.contested = True
                return found
            if found.state == "starting":
                return self.follow()
            time.sleep(1.0)
            died = found.state == "failed" and found.model is None
        if died and not self.client.features.ends_the_dead:
            raise LaunchFailed("its process died, and the server cannot forget it", diagnosis=DEAD, final=True)
        self.stop(None)
        return self._launch(payload)

    def _out_of_time(self) -> Running:
        """Cancel the launch, unless it succeeded just now."""
        found = self._instance()
        if found and found.loaded:
            return self._listed()
        self._report()
        self._cancel()
        taken = time.monotonic() - self.started
        far = f" (progress {self.progress:.0%})" if self.progress else ""
        message = f"not ready after {taken:.0f} s{far}; the launch was cancelled"
        left = self._instance()
        if left and (left.state == "starting" or left.unwinding):
            raise LaunchFailed(f"{message}, and the server does not let go of it", diagnosis=HELD, final=True)
        raise LaunchFailed(message, diagnosis=SLOW)

    def _cancel(self) -> None:
        """Cancel the launch and wait until it has unwound. One that has ended already is fine."""
        end = time.monotonic() + CANCEL_LIMIT
        try:
            self.client.cancel(self.uid)
        except AccessRefused:
            raise
        except ServerError:
            pass  # Refused because it has ended, or slow to unwind; both show below.
        while time.monotonic() < end:
            found = self._instance()
            if found is None or not (found.state == "starting" or found.unwinding):
                return
            time.sleep(0.5)

    def _sweep(self) -> None:
        """Stop what a failed launch left running. The error of the launch counts, so errors here are not raised."""
        try:
            left = look(self.client).get(self.uid)
            if left and (left.model is not None or left.state in ("starting", "lost")):
                self.stop(left)
        except ServerError:
            pass

    def _report(self) -> None:
        try:
            self.progress = self.client.progress(self.uid)
            self.listener(self.uid, f"progress {self.progress:.0%}")
        except ServerError:
            pass

    def _instance(self) -> Optional[Running]:
        return combine({}, self.client.instances(self.uid)).get(self.uid)
