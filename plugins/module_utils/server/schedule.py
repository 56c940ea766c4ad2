# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which steps may run at the same time. Pure."""

from __future__ import annotations

from typing import Collection, List, Sequence

from .plan import Step
from .spec import ModelSpec

REMOVALS = ("terminate", "cleanup")


def startable(waiting: Sequence[Step], active: Collection[Step], limit: int) -> List[Step]:
    """The waiting steps that may start now, beside the active ones, at most `limit` in all.

    Launches wait until every removal is done, so that they find its memory free. Models that share a GPU with an
    engine that measures free memory start one after another, in their order; a later one never overtakes.
    """
    chosen: List[Step] = []
    passed: List[Step] = []
    for step in waiting:
        ahead = [*active, *chosen, *passed]
        if len(active) + len(chosen) < limit and not any(_must_wait(step, other) for other in ahead):
            chosen.append(step)
        else:
            passed.append(step)
    return chosen


def _must_wait(step: Step, other: Step) -> bool:
    """Whether `step` may not run while `other`, which comes before it, has not finished."""
    if step.action in REMOVALS:
        return False
    if other.action in REMOVALS:
        return True
    if step.spec is None or other.spec is None:
        return False
    measured = step.spec.measures_memory or other.spec.measures_memory
    return measured and share_gpu(step.spec, other.spec)


def share_gpu(one: ModelSpec, other: ModelSpec) -> bool:
    """Whether two models may land on one GPU. Where a model does not say which it takes, it may take any."""
    if any("n_gpu" in spec.fields and spec.fields["n_gpu"] is None for spec in (one, other)):
        return False
    if not one.gpu_idx or not other.gpu_idx:
        return True
    return bool(set(one.gpu_idx) & set(other.gpu_idx))
