# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Shipping one host: ask what is missing, send it, ask again, until the host has and has verified everything.

The host is the only one who knows what arrived, so there is no state here to lose: a transfer that broke off, a file
that was damaged on the way and a first run are all the same loop.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Callable, Iterable

from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import Artifact, Bundle
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.sizes import size_text
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.transfer import Step, transfer_plan, travelling

from .feeding import Tally
from .progress import Progress, duration_text
from .transport import DiskFull, Hopeless, Overtaken, Transport, TransportError, Unusable, damaged_twice

Answer = dict[str, Any]
"""What the module xinference_store returned."""

ROUNDS = 12
"""Questions asked at most, those aside that follow a transfer that broke off but came nearer. Two are needed, one more
for large manifests, and each loss on the way costs another."""
PATIENCE = 2
"""How often in a row a transport may break off without having moved anything."""


class ShippingError(Exception):
    """A host that cannot be shipped to; the message says what was wanted, what was found and what to do."""


@dataclass
class Shipment(Tally):
    """What was sent to one host, sizes in bytes; `first` and `answer` are the host's first and last answer."""

    first: Answer = field(default_factory=dict)
    answer: Answer = field(default_factory=dict)
    changed: bool = False
    transports: list[str] = field(default_factory=list)


def missing_blobs(artifacts: list[Artifact], answer: Answer) -> dict[str, int]:
    """Digests and sizes of the blobs that are known to be missing, and of all that an unknown manifest may bring."""
    missing: dict[str, int] = {}
    for artifact in artifacts:
        unknown = artifact.digest in answer["missing"]
        for blob in artifact.blobs:
            if unknown or blob.digest in answer["missing"]:
                missing[blob.digest] = blob.size
    return missing


def ship(
    artifacts: list[Artifact],
    ask: Callable[[], Answer],
    connect: Callable[[Answer], list[Transport]],
    label: str,
    say: Callable[[str], None],
) -> Shipment:
    """Send `artifacts` until the host misses nothing.

    `ask` runs the store module, `connect` offers transports, best first: one that cannot be used there, or breaks off
    again and again without moving a byte, gives way to the next and is taken out of the list. Raises ShippingError when
    nothing moves any more, when a blob arrives damaged twice, or when the disk of the host is too small.
    """
    first = ask()
    shipment = Shipment(first=first, answer=first)
    _count(shipment, first)
    transports: list[Transport] = []
    damaged: set[str] = set()
    failure: TransportError | None = None
    before: int | None = None
    stuck = 0
    rounds = 0
    while rounds < ROUNDS:
        answer = shipment.answer
        if not answer["missing"]:
            return shipment
        _refuse_twice_damaged(answer, damaged)
        _refuse_small_disk(answer, missing_blobs(artifacts, answer) if before is None else answer["missing"], failure)
        left = sum(answer["missing"].values()) - sum(answer["partial"].values())
        rounds += failure is None or before is None or left >= before
        if failure is not None and before is not None:
            stuck = stuck + 1 if left >= before else 0
            if stuck >= PATIENCE or (stuck and isinstance(failure, Unusable)):
                transports.pop(0)
                stuck = 0
                if not transports:
                    raise ShippingError(f"{failure}. Nothing more arrived; what did stays there for the next run.")
                say(f"{label}: {failure}; going on with {transports[0].name}")
            else:
                say(f"{label}: {failure}; going on where it stopped")
        transports = transports or connect(answer)
        steps = _steps(answer, transports[0])
        failure, before = None, left
        try:
            progress = Progress(label, sum(step.travels for step in steps), say)
            transports[0].send(steps, progress, shipment, answer["receive"]["turn"])
        except Hopeless as error:
            raise ShippingError(f"{error}") from error
        except Overtaken:
            before = None
        except TransportError as error:
            failure = error
        if (
            steps
            and before is not None
            and not isinstance(failure, Unusable)
            and transports[0].name not in shipment.transports
        ):
            shipment.transports.append(transports[0].name)
        try:
            shipment.answer = ask()
        except ShippingError as error:
            # The disk may be so full that the host cannot even answer.
            raise (ShippingError(str(failure)) if isinstance(failure, DiskFull) else error) from error
        _count(shipment, shipment.answer)
    raise ShippingError(f"Still missing after {ROUNDS} attempts: {_some(shipment.answer['missing'])}.")


def together(shipments: list[Shipment]) -> Shipment:
    """Several shipments to one host as one."""
    return Shipment(
        first=shipments[0].first,
        answer=shipments[-1].answer,
        sent_bytes=sum(shipment.sent_bytes for shipment in shipments),
        hashed_bytes=sum(shipment.hashed_bytes for shipment in shipments),
        blobs=sum(shipment.blobs for shipment in shipments),
        from_peers_bytes=sum(shipment.from_peers_bytes for shipment in shipments),
        peers=list(dict.fromkeys(name for shipment in shipments for name in shipment.peers)),
        refused=_added(shipment.refused for shipment in shipments),
        changed=any(shipment.changed for shipment in shipments),
        transports=list(dict.fromkeys(name for shipment in shipments for name in shipment.transports)),
    )


def _added(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for each in counts:
        for name, count in each.items():
            total[name] = total.get(name, 0) + count
    return total


def summary(shipment: Shipment, total: int, seconds: float) -> str:
    """One line of totals."""
    if not shipment.changed:
        return f"{size_text(total)} are there already; nothing was sent or read"
    came = shipment.sent_bytes + shipment.from_peers_bytes
    rate = f" ({size_text(came / seconds)}/s)" if seconds > 0 and came else ""
    way = f" by {' and '.join(shipment.transports)}" if shipment.transports else ""
    peers = f" and {size_text(shipment.from_peers_bytes)} got from other hosts" if shipment.from_peers_bytes else ""
    return (
        f"{shipment.blobs} blobs: {size_text(shipment.sent_bytes)} sent{way}{peers} in {duration_text(seconds)}{rate}, "
        f"{size_text(max(0, total - came))} were there already"
    )


def _count(shipment: Shipment, answer: Answer) -> None:
    shipment.sent_bytes += answer["given_bytes"]
    shipment.hashed_bytes += answer["hashed_bytes"]
    shipment.blobs += answer["blobs"]
    shipment.changed = shipment.changed or answer["changed"]


def _steps(answer: Answer, transport: Transport) -> list[Step]:
    """What this transport has to do: one that cannot resume begins every unfinished blob again."""
    partial = answer["partial"] if transport.resumes else {}
    return travelling(transfer_plan(answer["missing"], (), partial))


def _refuse_twice_damaged(answer: Answer, before: set[str]) -> None:
    again = {
        digest: why for digest, why in answer["damaged"].items() if digest in before and digest in answer["missing"]
    }
    if again:
        raise ShippingError(damaged_twice(again))
    before.update(answer["damaged"])


def _refuse_small_disk(answer: Answer, missing: dict[str, int], failure: TransportError | None = None) -> None:
    """Refuse what does not fit, be it by the numbers or because the last transfer found the disk (or quota) full."""
    needed = sum(missing.values()) - sum(answer["partial"].values())
    free = answer["receive"]["free_bytes"]
    full = isinstance(failure, DiskFull) or (failure is not None and _FULL.search(str(failure)))
    if needed > free or full:
        told = f" ({failure})" if full and not isinstance(failure, DiskFull) else ""
        raise ShippingError(
            f"Not enough disk for {answer['receive']['path']}: {size_text(needed)} are needed, {size_text(free)} are "
            f"free{told}. Free some, or choose another root directory (xinference_root), and run again; "
            f"{'what arrived stays there' if answer['partial'] or failure else 'nothing was sent'}."
        )


_FULL = re.compile("no space left on device|disk quota exceeded", re.IGNORECASE)
"""What a full disk of the host is called in the message of the connection plugin."""


def _some(digests: dict[str, int]) -> str:
    shown = sorted(digests)[:3]
    return ", ".join(shown) + (f" and {len(digests) - 3} more" if len(digests) > 3 else "")


def describe(bundle: Bundle, artifacts: list[Artifact], answer: Answer, root: str) -> dict[str, str]:
    """Before and after for diff mode: one line for each artifact, and the directories that are made again."""
    before, after = [], []
    for artifact in artifacts:
        missing = missing_blobs([artifact], answer)
        have = sum(blob.size for blob in artifact.blobs if blob.digest not in missing)
        total = sum(blob.size for blob in artifact.blobs)
        before.append(f"{artifact.reference} {artifact.digest[:19]} {size_text(have)} of {size_text(total)}")
        after.append(f"{artifact.reference} {artifact.digest[:19]} {size_text(total)} of {size_text(total)}")
    after += [f"{path} made" for path in answer["made"]]
    return {
        "before_header": f"{root} (host)",
        "after_header": f"{bundle.root} (bundle)",
        "before": "\n".join(before) + "\n",
        "after": "\n".join(after) + "\n",
    }
