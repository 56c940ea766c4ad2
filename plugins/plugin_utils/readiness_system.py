# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether a host's memory, swap and clock are fit, and whether it is cut off: facts in, findings out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ansible_collections.airgap.xinference.plugins.module_utils.alternatives import choices
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import Artifact
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.sizes import size_text
from ansible_collections.airgap.xinference.plugins.module_utils.server.spec import source_name

from .bundles import wanted_models
from .findings import PROBLEM, WARNING, Facts, Finding, Needs

SERVER = 1024**3
"""Bytes of memory that a server without models takes (measured: Xinference 4.1.0)."""
SWAPPED = 0.1
"""Swap in use, as a part of the memory, from which on a host is told to swap."""


def judge_system(needs: Needs, facts: Facts, artifacts: Sequence[Artifact]) -> list[Finding]:
    """Everything about memory, clock and the way out."""
    return [
        *judge_memory(needs, facts, artifacts),
        *judge_swap(facts),
        *judge_clock(needs, facts),
        *judge_airgap(needs, facts),
    ]


def judge_memory(needs: Needs, facts: Facts, artifacts: Sequence[Artifact]) -> list[Finding]:
    """Whether there is memory for the server, and for the weights where no GPU takes them."""
    weights = 0 if needs.gpus else _weights(needs, artifacts)
    needed, total = max(SERVER + weights, needs.min_memory), facts["memory"]["total"]
    if needed <= total:
        return []
    why = "as xinference_preflight_min_memory says" if needed == needs.min_memory else "for the server"
    if needed != needs.min_memory and weights:
        why += f" and {size_text(weights)} of weights that no GPU takes"
    cure = "switch models off (enabled: false) or take smaller ones, or take another host"
    return [Finding("memory", f"{size_text(needed)} {why}", size_text(total), cure)]


def _weights(needs: Needs, artifacts: Sequence[Artifact]) -> int:
    """Bytes of the models that will be launched; where a model has alternatives, of its largest."""
    sizes = {entry.name: sum(blob.size for blob in entry.blobs) for entry in artifacts if entry.kind == "models"}
    total = 0
    for entry in needs.models:
        if isinstance(entry, Mapping) and wanted_models([entry]):
            total += max(sizes.get(source_name(choice) or "", 0) for choice in choices(entry))
    return total


def judge_swap(facts: Facts) -> list[Finding]:
    """Whether the host swaps: a model that is paged out answers in minutes."""
    memory = facts["memory"]
    used = memory["swap_total"] - memory["swap_free"]
    if used <= SWAPPED * memory["total"]:
        return []
    return [
        Finding(
            "swap",
            "hardly any swap in use",
            f"{size_text(used)} in use, {size_text(memory['available'])} of {size_text(memory['total'])} memory free",
            "end programs that are not needed, or give the host more memory; models that are paged out answer slowly",
            WARNING,
        )
    ]


def judge_clock(needs: Needs, facts: Facts) -> list[Finding]:
    """Whether the clocks of host and controller agree; `clock_skew` was put into the facts by who measured it."""
    skew = float(facts["clock_skew"])
    if abs(skew) <= needs.max_clock_skew:
        return []
    return [
        Finding(
            "clock",
            f"a clock within {needs.max_clock_skew:g} s of the controller's",
            f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} it",
            "set the clock right (chrony with a time server of the site), because log-ins and certificates depend on "
            "it, or raise xinference_preflight_max_clock_skew",
        )
    ]


def judge_airgap(needs: Needs, facts: Facts) -> list[Finding]:
    """Whether the host reaches addresses outside of the site."""
    if not facts["reached"]:
        return []
    refused = needs.require_airgap
    return [
        Finding(
            "air gap",
            "no way out of the site",
            f"{', '.join(facts['reached'])} can be reached",
            "close the way at the firewall" + ("" if refused else ", or empty xinference_preflight_airgap_addresses"),
            PROBLEM if refused else WARNING,
        )
    ]


def skew(told: float, before: float, after: float) -> float:
    """Seconds a clock is ahead of ours (negative: behind) that said `told` some time between `before` and `after`."""
    if told > after:
        return told - after
    return min(0.0, told - before)
