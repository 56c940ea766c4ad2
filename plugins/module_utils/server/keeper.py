# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The keeper: keeps the models of the release served, whatever happens to the server.

It asks the server one small question every few seconds. When the answer is another than before it looks closely and
compares with the release and the record (`keeper_drift`, `keeper_book`). What may be done is done by a process of its
own (`keeper_job`, `keeper_work`), through `apply` like everybody who changes models. The keeper never ends because of
what it meets: what is in its way is told in `state/keeper.json` and tried again.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Set, Tuple

from . import keeper_backoff as backoff
from . import keeper_state as states
from .client import AccessRefused, Client, ServerError, Unreachable
from .keeper_backoff import Trouble
from .keeper_book import Book
from .keeper_drift import BY_HAND, FAILED, RUNNING, STOPPED, findings, serves
from .keeper_job import Job, command
from .keeper_patience import LONG, Patience
from .keeper_probe import Prober
from .keeper_release import Release, Unreadable, current, load, program
from .keeper_server import HalfDead, asked, died
from .keeper_state import HEARTBEAT, short
from .keeper_work import Order, client_of, register, specs_of
from .launch import SLOW
from .record import Record, awaited, held
from .running import Running, combine
from .spec import ModelSpec

QUESTION_TIMEOUT = 10.0
# A server that does not answer is asked more often: a refused connection costs nothing.
DOWN_PAUSE, DOWN_LONG = 1.0, 600.0
WORK_PAUSE = 0.5
# Every so many questions it is about the other list, which shows what the first does not.
TURN = 4
GIVE_WAY = 3.0
# Seconds that a launch which is given up still gets: it may succeed just now.
GIVE_UP = 1.0
# A job is not ended for another model before it could begin.
SETTLED = 5.0
# A server bans an address for an hour after ten refusals; this keeps far below.
REFUSED_PAUSE = 3900.0
# Without credentials there is nothing that could be refused; whoever asks too often is banned all the same.
CLOSED_PAUSE = 600.0
IDLE_PAUSE = 5.0
# By so much the clock of a host may be set on while nothing was started.
SAME_BOOT = 3.0
# Entries that cannot be launched are read again now and then: what they need may have been shipped since.
READ_AGAIN = 300.0
NOTHING = (None, None)
Span = Tuple[float, float]
# Of what happens during a launch, besides its end.
WORTH_A_LINE = ("ready", "terminate", "failed, again", "no room", "verified")


class Clock:
    """The clock of the host for people, and a steady one for intervals."""

    now = staticmethod(time.time)
    steady = staticmethod(time.monotonic)


class Keeper:
    """Looks after the models below `root`. Call `tick` again after as many seconds as it returns.

    `connect` makes a client, `start` a job; `renew` replaces this process by the program of another release.
    """

    def __init__(
        self,
        root: Path,
        say: Callable[[str], None],
        clock: Any = Clock,
        connect: Callable[[Release, float], Client] = client_of,
        start: Callable[[Path, Path, Order], Any] = lambda own, root, order: Job(command(own, root), order),
        renew: Callable[[Path], None] = lambda own: None,
    ) -> None:
        self.root, self.say, self.clock = root, say, clock
        self.connect, self.start_job, self.renew = connect, start, renew
        self.directory = root / "state"
        self.lock = self.directory / "lock"
        self.state = states.load(self.directory)
        self.book = Book(self.state, say, clock)
        self.prober = Prober(self.book, clock)
        self.patience = Patience()
        self.release: Optional[Release] = None
        self.client: Optional[Client] = None
        self.specs: Optional[List[ModelSpec]] = None
        self.wrong: Dict[str, str] = {}
        self.job: Any = None
        self.job_began = 0.0
        self.open: Set[str] = set()
        """What of the job's models is not yet known to serve or to have failed."""
        self.trouble = Trouble()
        self.up = False
        self.down_since: Optional[float] = None
        self.seen: Tuple[Any, Any] = NOTHING
        self.half_dead = HalfDead()
        self.turn = 0
        self.next_question = self.hold_until = self.grace_until = self.read_again = 0.0
        self.problems: Dict[str, str] = {}
        self.saved: Tuple[str, float] = ("", -HEARTBEAT)
        now, steady = clock.now(), clock.steady()
        left = min(max(0.0, float((self.state.refused or {}).get("until") or 0) - now), REFUSED_PAUSE)
        self.refused_until = steady + left
        self.state.started = round(now, 1)
        self.state.server.setdefault("restarts", 0)

    @property
    def kept(self) -> Release:
        """The release to go by; nothing asks for it while there is none."""
        if self.release is None:
            raise Unreadable("no release is in force")
        return self.release

    # -- one turn

    def tick(self) -> float:
        """Do what is to be done now; returns for how many seconds there is nothing."""
        try:
            pause = self._turn()
            self._problem("keeper", "")
        except Exception as bug:  # Whatever it is, the models want to be looked after.
            self._problem("keeper", f"the keeper has a mistake and goes on: {type(bug).__name__}: {bug}")
            pause = IDLE_PAUSE
            self.next_question = self.clock.steady() + pause
        self._save()
        return pause

    def end(self) -> None:
        """Stop working. What is being launched goes on, and whoever comes next finds it."""
        self._end_job("")
        self.state.doing = "ended"
        self._save(anyway=True)

    def _turn(self) -> float:
        if not self._follow():
            self._end_job("there is no release to go by")
            return IDLE_PAUSE
        if self._is_refused():
            return IDLE_PAUSE
        self._watch()
        if self.clock.steady() >= self.next_question and self.state.refused is None:
            self._question()
            self.book.forgive()
        if self.up and self.client is not None:
            self._act()
            running = [uid for uid, one in self.book.found.items() if one.kind == RUNNING]
            now = self.clock.steady()
            # A launch that hangs may keep the server itself from seeing that another model died.
            long = self.job is not None and now - self.job_began >= LONG
            free = (self.job is None or long) and now >= self.hold_until
            others = [uid for uid in running if uid not in self.open]
            self.prober.turn(self.client, self.kept, others, free, LONG if long else None)
        pause = max(0.05, self.next_question - self.clock.steady())
        return min(pause, WORK_PAUSE) if self.job or self.prober.busy else pause

    # -- the release

    def _follow(self) -> bool:
        """Read the release in force when it is another; returns whether there is one to act upon."""
        if self.release is not None and current(self.root) == self.release.id:
            return True
        try:
            found = load(self.root)
        except Unreadable as problem:
            self._problem("release", f"{problem}; nothing is done until there is a release")
            self.release = self.book.release = None
            return False
        self._problem("release", "")
        self._end_job("another release is in force")
        own = program(found.directory)
        if own is not None:
            self._save(anyway=True)
            self.renew(own)
        if self.state.release != found.id:
            # What is new in it is left to Ansible at first, beginning when the server answers.
            self.grace_until, self.state.grace_until = float("inf"), 0.0
            if (self.state.refused or {}).get("release") != found.id:
                self.state.refused = None
        elif self.release is None and self.state.grace_until:
            left = min(self.state.grace_until - self.clock.now(), found.settings.grace)
            self.grace_until = self.clock.steady() + max(0.0, left)
        count = f"{len(found.entries)} {'model' if len(found.entries) == 1 else 'models'}"
        self.say(
            f"looks after release {found.id}: {count} at {found.settings.endpoint}, policy {found.settings.policy}"
        )
        self.release = self.book.release = found
        self.state.release, self.state.policy = found.id, found.settings.policy
        self.specs = self.client = None
        self.up, self.seen, self.next_question = False, NOTHING, 0.0
        return True

    # -- the server

    def _question(self) -> None:
        """Ask the server what is due, and look closely when the answer is another than before."""
        self.next_question = self.clock.steady() + self.kept.settings.interval
        if self.client is None:
            self.client = self.connect(self.kept, QUESTION_TIMEOUT)
        try:
            if not self.up or self.seen == NOTHING or self._differs(self.client):
                self._look(self.client)
        except Unreachable as error:
            self.half_dead.alive()
            self._is_down("down", error.message)
            self.client = None
        except AccessRefused as error:
            self._refuse(error.message)
        except ServerError as error:
            self._is_down("in trouble", error.message)
            done = self.half_dead.seen(error, self.clock.steady(), self.kept.settings)
            if done:
                self.say(done)

    def _differs(self, client: Client) -> bool:
        """One request, and whether it was answered otherwise than when last looked at closely."""
        self.turn += 1
        if self.turn % TURN == 0:
            return bool(_print_of_models(client.models()) != self.seen[1])
        return bool(_print_of_instances(client.instances()) != self.seen[0])

    def _is_down(self, word: str, said: str) -> None:
        """Note that the server does not answer, or not sensibly."""
        now = self.clock.steady()
        if self.up or self.down_since is None:
            self.down_since = now
        if self.up or self.state.server.get("state") != word:
            self.state.server.update(state=word, since=round(self.clock.now(), 1), problem=short(said))
            self.say(f"the server is {word}: {short(said)}")
        self.up, self.seen = False, NOTHING
        self.book.unknown()
        if word != "in trouble" and now - self.down_since < DOWN_LONG:
            self.next_question = now + min(DOWN_PAUSE, self.kept.settings.interval)

    def _look(self, client: Client) -> None:
        """Both lists, the release and the record: what is as it should be, and what is not?"""
        sent = self.clock.now()
        status = client.status()
        boot = _boot(status, sent, self.clock.now())
        self.half_dead.alive()
        if not status.get("workers"):
            self._is_down("starting", "it answers, and no worker has joined yet")
            return
        instances, models = client.instances(), client.models()
        self._notice_restart(boot)
        self._is_up()
        if self.specs is None or (self.wrong and self.clock.steady() >= self.read_again):
            self.specs = self._read_entries(client)
        running = combine(models, instances)
        others = self.job is None and held(self.lock)
        record = Record(self.directory / "launched.json", writable=False)
        stopped = [uid for uid, model in self.state.models.items() if model.stopped]
        found = findings(self.specs, running, record.entries, self.book.ready_at, stopped)
        stopped = [one.uid for one in found if one.kind == STOPPED]
        # A server that gave up one of several replicas shows fewer than were launched, as if somebody had wished so.
        suspects = {one.uid for one in found if one.kind in BY_HAND}
        if suspects:
            dead = died(client) & suspects
            text = "a process of it died, and the server gave it up"
            found = [replace(one, kind=FAILED, text=text) if one.uid in dead else one for one in found]
        self.book.keep_only({spec.uid for spec in self.specs} | set(self.wrong))
        self.open -= {one.uid for one in found if one.kind == RUNNING and one.uid not in self.book.relaunch}
        self.book.take(found, record.entries, self.open, others)
        for uid, problem in self.wrong.items():
            self.book.wrong(uid, problem, running.get(uid, Running(uid)).state if uid in running else "missing")
        # While models are being changed every look is a close one; and a server tells late that it gave a model up.
        young = any(self.book.young(uid) for uid in stopped)
        self.seen = (
            NOTHING if others or self.job or young else (_print_of_instances(instances), _print_of_models(models))
        )

    def _notice_restart(self, boot: Optional[Span]) -> None:
        """Notice a server that was started anew: everything that ran on it is gone, and so is what was launched."""
        if boot is None:
            return
        earliest, latest = boot
        server = self.state.server
        known = float(server.get("boot") or 0)
        anew = not known or earliest > known + SAME_BOOT
        server["boot"] = latest if anew else min(known, latest)
        if not anew:
            return
        if known:
            server["restarts"] = int(server.get("restarts") or 0) + 1
            wished = known < asked(self.directory) <= latest
            self.say(f"the server was started anew{', as it was asked to' if wished else ''}")
            self.book.new_life(self.open, wished)
            self._end_job("")
            self.specs = None

    def _is_up(self) -> None:
        if not self.up:
            self.state.server.update(state="up", since=round(self.clock.now(), 1), problem="")
            self.say("the server answers")
        self.up, self.down_since = True, None
        if self.grace_until == float("inf"):
            self.grace_until = self.clock.steady() + self.kept.settings.grace
            self.state.grace_until = round(self.clock.now() + self.kept.settings.grace, 1)

    def _read_entries(self, client: Client) -> List[ModelSpec]:
        """The entries of the release as the server has to run them. Custom models that it lost are registered first."""
        now = self.clock.steady()
        if self.kept.registrations and now >= self.grace_until and not held(self.lock):
            for text in register(client, self.kept):
                self.say(text)
        specs, self.wrong = specs_of(client, self.kept.entries, self.root)
        self.read_again = max(now + READ_AGAIN, self.grace_until)
        return specs

    # -- acting

    def _act(self) -> None:
        """Have done what is due, unless somebody else is at it."""
        now = self.clock.steady()
        if self.job is not None and awaited(self.lock):
            self._end_job("somebody else wants to change models")
            self.hold_until = now + GIVE_WAY
        if now < self.hold_until or not self.trouble.due(self.kept.id, now):
            return
        self.patience.see(self._missed(), self.open, now)
        if self._gives_up(now):
            return
        due = [uid for uid in self.book.due(self.grace_until) if not self.patience.waits(uid, now)]
        if self.job is not None:
            # One more that is due does not wait for those under way: they go on on the server, and are followed again.
            more = [uid for uid in due if uid not in self.open]
            settled = now - self.job_began >= SETTLED and self.job.order.patience is None
            if not more or self.book.deadly(more) or not settled:
                return
            due = [*more, *sorted(self.open)]
            self._end_job("")
        deadly = self.book.deadly(due)
        if deadly and len(due) > 1:
            due = [uid for uid in due if uid not in deadly] or deadly[:1]
        if due and not held(self.lock):
            self._start(due)

    def _missed(self) -> List[str]:
        """The models that served before, do not now, and shall."""
        policy, models = self.kept.settings.policy, self.state.models
        return [
            uid
            for uid, one in self.book.found.items()
            if uid in models and models[uid].served_since and not serves(one.kind, policy, uid in self.book.dead)
        ]

    def _gives_up(self, now: float) -> bool:
        """Have launches ended that keep others from coming back; returns whether there are any."""
        if self.job is None or self.job.order.patience is not None:
            return False
        served = [uid for uid, model in self.state.models.items() if model.served_since]
        found = self.patience.hangs(served, now)
        if not found:
            return False
        for uid, other in found:
            took = now - self.patience.launched[uid]
            self.say(
                f"{uid}: its launch has taken {took:.0f} s and keeps {other} from coming back; it is given up for now"
            )
            self.patience.give_up(uid, now)
        self._end_job("")
        self._order([uid for uid, _other in found], GIVE_UP)
        return True

    def _start(self, due: List[str]) -> None:
        for uid in due:
            one = self.book.found.get(uid)
            self.say(f"{uid}: launching{f' ({short(one.text)})' if one and one.text else ''}")
        self._order(due)

    def _order(self, due: List[str], patience: Optional[float] = None) -> None:
        """Have a process launch models, or wait for them as long as `patience` says and then give them up."""
        own = program(self.kept.directory)
        if own is None:
            self._problem("release", f"release {self.kept.id} has lost its program; run playbooks/serve.yml")
            return
        again = tuple(uid for uid in due if uid in self.book.relaunch)
        try:
            self.job = self.start_job(own, self.root, Order(self.kept.id, tuple(due), again, patience))
        except OSError as error:
            self._came_to_nothing(f"no process can be started: {error}")
            return
        self.job_began, self.open, self.seen = self.clock.steady(), set(due), NOTHING
        self.state.doing = f"{'launching' if patience is None else 'giving up'} {', '.join(due)}"

    def _watch(self) -> None:
        """Hear what the job says, and take down what it came to."""
        if self.job is None:
            return
        code, outcome, uids = self.job.code, None, self.job.order.uids
        for told in self.job.news():
            if "outcome" in told:
                outcome = told
            elif "error" in told:
                if not self._lives_on():
                    return
                self.open.discard(str(told["uid"]))
                self._failed(str(told["uid"]), str(told["error"]), told.get("diagnosis"))
            elif told.get("log"):
                self.say(str(told["log"]))
            elif str(told.get("event") or "").startswith(WORTH_A_LINE):
                self.say(f"{told['uid']}: {told['event']}")
        if outcome is not None:
            self._end_job("")
            self._take(outcome)
        elif code is not None:
            self._end_job("")
            self._came_to_nothing(f"the process that launches {', '.join(uids)} ended with code {code}")

    def _failed(self, uid: str, error: str, diagnosis: Optional[Mapping[str, Any]]) -> None:
        if self.job.order.patience is not None and (diagnosis or {}).get("name") == SLOW.name:
            error, diagnosis = "given up because it kept others from coming back", None
        self.book.failed(uid, error, diagnosis)

    def _lives_on(self) -> bool:
        """Whether the server is the one that it was. What fails because it ended is no model's fault."""
        try:
            if self.client is not None:
                sent = self.clock.now()
                self._notice_restart(_boot(self.client.status(), sent, self.clock.now()))
                self.seen = NOTHING
        except ServerError as error:
            self._end_job("")
            self._is_down("down", error.message)
        return self.job is not None

    def _take(self, outcome: Mapping[str, Any]) -> None:
        word, said = str(outcome["outcome"]), str(outcome.get("said") or "")
        if word == "done":
            self.trouble = Trouble()
            self._problem("work", "")
            for notice in outcome.get("notices") or []:
                self.say(str(notice))
            for row in outcome.get("models") or []:
                self.book.relaunch.discard(str(row["model_uid"]))
                self.book.done(row)
        elif word == "refused":
            self._refuse(said)
        elif word in ("busy", "stale"):
            self.hold_until = self.clock.steady() + GIVE_WAY
        else:
            self._came_to_nothing(said)

    def _came_to_nothing(self, said: str) -> None:
        """The work as a whole failed, through no model's fault."""
        now = self.clock.steady()
        self.trouble = backoff.failed(self.trouble, self.kept.id, now, "keeper", said)
        self._problem("work", f"cannot launch models: {short(said)}")
        self.say(f"tried again in {self.trouble.until - now:.0f} s")

    def _end_job(self, why: str) -> None:
        if self.job is None:
            return
        if why:
            self.say(f"no longer launching {', '.join(sorted(self.open))}: {why}")
        self.job.end()
        self.job, self.open, self.state.doing = None, set(), ""
        self.seen, self.next_question = NOTHING, 0.0

    # -- credentials

    def _refuse(self, said: str) -> None:
        """A login or a key is refused: nothing is sent for long, or until another release has other credentials."""
        pause = REFUSED_PAUSE if self.kept.login else CLOSED_PAUSE
        until = round(self.clock.now() + pause, 1)
        self.refused_until = self.clock.steady() + pause
        self.state.refused = {"release": self.kept.id, "until": until, "said": short(said)}
        self._end_job("")
        self.up, self.client, self.seen = False, None, NOTHING
        self.book.unknown()
        self.state.server.update(state="refuses", since=round(self.clock.now(), 1), problem=short(said))
        self._problem(
            "login", f"{short(said)} It is tried again in {pause / 60:.0f} min, or at once with another release."
        )

    def _is_refused(self) -> bool:
        """Whether the credentials are of no use now; then nothing at all is sent."""
        if self.state.refused is not None and self.clock.steady() < self.refused_until:
            self._problem("login", self.problems.get("login") or str(self.state.refused.get("said")))
            return True
        self.state.refused = None
        self._problem("login", "")
        return False

    # -- telling

    def _problem(self, about: str, text: str) -> None:
        """Tell what keeps the keeper from its work, once, or that it does not any more."""
        before = self.problems.pop(about, "")
        if text:
            self.problems[about] = text
        if text != before:
            self.say(text or f"solved: {before}")
        self.state.problem = "; ".join(text for _about, text in sorted(self.problems.items()))

    def _save(self, anyway: bool = False) -> None:
        """Write what is known when it is news, and now and then to show that the keeper lives."""
        steady, content = self.clock.steady(), repr(self.state)
        if anyway or content != self.saved[0] or steady - self.saved[1] >= HEARTBEAT:
            self.saved = (content, steady)
            self._problem("disk", states.save(self.directory, self.state, self.clock.now()))


def _boot(status: Mapping[str, Any], sent: float, heard: float) -> Optional[Span]:
    """Between which times the server started, by its answer to a request; None where it does not tell.

    It tells whole seconds, and may have looked at its clock at any time between the request and the answer.
    """
    uptime = status.get("uptime")
    if not isinstance(uptime, (int, float)) or not math.isfinite(uptime):
        return None
    return round(sent - uptime - 1, 1), round(heard - uptime, 1)


def _print_of_models(models: Mapping[str, Mapping[str, Any]]) -> Any:
    """What of the list of models must not change unnoticed."""
    return {uid: Running(uid, model).shown for uid, model in models.items()}


def _print_of_instances(instances: List[Dict[str, Any]]) -> Any:
    """What of the list of instances must not change unnoticed."""
    return {uid: (one.status, one.since, one.replicas, one.error) for uid, one in combine({}, instances).items()}
