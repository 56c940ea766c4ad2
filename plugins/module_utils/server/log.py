# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The lines of the server's log that show why a launch failed.

The API passes on the last words of an engine only, which often are that its reason stands above. What is read here is
what the server printed since the launch began: errors that name the model, then errors that name none, which an engine
prints by itself. Lines that hold the arguments of calls are left out, because those hold environment variables.
"""

from __future__ import annotations

import calendar
import os
import re
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple, Union

from .transport import ACTOR

# From a time, in seconds since 1970, what the server printed after it.
Reader = Callable[[float], str]
TAIL = 512 * 1024
MOST_LINES = 6
LONGEST = 240
# 4.1.0: 2026-11-20T10:08:11.757Z ERROR xinference.core.worker pid:7262 ... node:vm text
# 1.8.1: 2026-11-20 10:08:48,054 xinference.core.worker 12985 ERROR    text
# vLLM:  (EngineCore_0 pid=12) ERROR 11-20 10:08:48 [core.py:708] text
HEAD = re.compile(
    r"^(?:\([^)]*\) )?(?:(?P<day>\d{4}-\d\d-\d\d)[T ](?P<clock>\d\d:\d\d:\d\d)\S*|"
    r"(?:ERROR|CRITICAL|WARNING|INFO|DEBUG) \d\d-\d\d \d\d:\d\d:\d\d) ",
)
LEVEL = re.compile(r"\b(?:ERROR|CRITICAL|FATAL)\b")
PREFIX = re.compile(r"^.*?\b(?:ERROR|CRITICAL|FATAL)\b(?: \d\d-\d\d \S+ \[[^\]]*\]| \S+ pid:.*? node:\S+)?\s+")
RAISED = re.compile(r"^(?:\([^)]*\) )?(?:ERROR \S+ \S+ \[[^\]]*\] )?[A-Za-z_][\w.]*(?:Error|Exception|Closed|Exit)\b.*")
ARGUMENTS = re.compile(r"\b(?:kw)?args:")
OF_A_CALL = re.compile(r"\[request [0-9a-f-]+\] Leave \w+, error: |\s+request_id=\".*$|, elapsed time: \d+ s\b.*$")
# Who prints errors of several launches at once without naming one, and passes their reasons on by the API anyway.
SERVERS_OWN = re.compile(r"\b(?:xinference\.|uvicorn|asyncio\b)")
# What uvicorn prints when the API is up; from then on errors may be those of requests.
UP = re.compile(r"Application startup complete|Uvicorn running on")
# What is said without a time: by the command line, by uvicorn before it can log, by Python.
FATAL = re.compile(
    r"^(?:usage: |Error: |error: |(?:ERROR|CRITICAL): |\[Errno \d+\] |Traceback \(most recent call last\))"
)
# What the program that runs a native server prints last.
ENDED = re.compile(r"^The server ended with code .*$", re.MULTILINE)
MOST_ERRORS = 16 * 1024
REPLICA = re.compile(r"\S-rep\d+(?![\w-])")


def files(root: Union[str, Path]) -> Reader:
    """Reads what a server printed into files below a root directory: its own, or what its manager kept of it."""
    root = Path(root)

    def read(since: float) -> str:
        places = [root / "logs" / "server.log", *(root / "home" / "logs").glob("*.log")]
        places += (root / "home" / "logs").glob("*/*.log")
        found = [tail(path) for path in places if _changed(path) >= since]
        return max(found, key=len, default="")

    return read


def tail(path: Path, limit: int = TAIL) -> str:
    """The end of a file, from the beginning of a line; nothing where it cannot be read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - limit))
            if size > limit:
                file.readline()
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def reasons(text: str, uid: str, since: float = 0.0) -> List[str]:
    """The lines of a log after `since` that show what went wrong with a model, each once, the cause first.

    Those that name the model come first, then those that name none; none of what names another.
    """
    ours: List[str] = []
    nobodys: List[str] = []
    own = re.compile(rf"(?<![\w.-]){re.escape(uid)}(?:-(?:rep)?\d+)?(?![\w-])")
    for head, body in _records(text, since):
        if not LEVEL.search(head[:120]):
            continue
        whole = "\n".join([head, *body])
        lines = [line for line in body if RAISED.match(line)] + [head]
        if own.search(whole):
            ours += lines
        elif not SERVERS_OWN.search(head[:120]) and not REPLICA.search(whole):
            nobodys += lines
    found = (_bare(line) for line in (*ours, *nobodys) if not ARGUMENTS.search(line))
    return list(dict.fromkeys(line for line in found if line))[:MOST_LINES]


def startup(text: str, since: float = 0.0) -> Dict[str, Any]:
    """What went wrong at the last start that a log tells of: `errors` as text, `up` whether the API came up at all.

    Errors from before the API was up; where it never was, all of them. Arguments of calls are left out.
    """
    found: List[str] = []
    up = False
    runs = [part for part in ENDED.split(text) if part.strip()]
    text = runs[-1].strip("\n") if runs else ""
    for head, body in _records(text, since):
        whole = "\n".join([head, *body])
        if LEVEL.search(head[:120]) or any(RAISED.match(line) or FATAL.match(line) for line in body):
            found += [line for line in (head, *body) if not ARGUMENTS.search(line)]
        if UP.search(whole):
            up = True
            break
    if not found and not up:
        # A program that ends before it can log prints what Python says of it, and nothing has a head.
        lines = text.splitlines()
        if any(RAISED.match(line) or FATAL.match(line) for line in lines):
            found = [line for line in lines if not ARGUMENTS.search(line)]
    return {"errors": "\n".join(found)[-MOST_ERRORS:], "up": up}


def _records(text: str, since: float) -> Iterator[Tuple[str, List[str]]]:
    """Records of a log, each its first line and those that belong to it; without those from before `since`."""
    head: Optional[str] = None
    body: List[str] = []
    late = True
    for line in text.splitlines():
        match = HEAD.match(line)
        if not match:
            body.append(line)
            continue
        if head is not None and late:
            yield head, body
        head, body = line, []
        if match.group("day"):
            late = not since or _latest(match.group("day"), match.group("clock"), "Z " in line[:32]) >= since - 1
    if head is not None and late:
        yield head, body


def _latest(day: str, clock: str, universal: bool) -> float:
    """A time of a log in seconds since 1970; where it has no zone, the later of ours and UTC, which containers have."""
    moment = time.strptime(f"{day} {clock}", "%Y-%m-%d %H:%M:%S")
    here = time.mktime(moment)
    return float(calendar.timegm(moment)) if universal else max(here, float(calendar.timegm(moment)))


def _bare(line: str) -> str:
    """A line without time, place and process."""
    text = PREFIX.sub("", line) if LEVEL.search(line[:120]) else re.sub(r"^\([^)]*\) ", "", line)
    text = " ".join(ACTOR.sub("", OF_A_CALL.sub("", text)).split())
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return -1.0
