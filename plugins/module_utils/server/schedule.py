# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which steps may run at the same time. Pure."""

from __future__ import annotations

from typing import Collection, List, Sequence

from .fields import LAUNCH_ORDER
from .plan import Step
from .spec import ModelSpec

REMOVALS = ("terminate", "cleanup")


def startable(waiting: Sequence[Step], active: Collection[Step], limit: int, gpus: bool = True) -> List[Step]:
    """The waiting steps that may start now, in the order to start them, at most `limit` with the active ones.

    Launches wait until every removal is done, so that they find its memory free. Models that share a GPU start in their
    order, and one after another where an engine measures the free memory; a later one never overtakes. Of models that
    share none, LLMs start first, because they take longest. `gpus` is whether the server has any.
    """
    free: List[Step] = []
    for place, step in enumerate(waiting):
        if not any(_must_wait(step, other, gpus) for other in [*active, *waiting[:place]]):
            free.append(step)
    room = max(0, limit - len(active))
    if not any(one is not other and _share(one, other, gpus) for one in waiting for other in waiting):
        free.sort(key=lambda step: -step.spec.rank if step.spec else -len(LAUNCH_ORDER))
    return free[:room]


def _must_wait(step: Step, other: Step, gpus: bool) -> bool:
    """Whether `step` may not run while `other`, which comes before it, has not finished."""
    if step.action in REMOVALS:
        return False
    if other.action in REMOVALS:
        return True
    if step.spec is None or other.spec is None:
        return False
    measured = any(spec.measures_memory for spec in (*_specs(step), *_specs(other)))
    return measured and _share(step, other, gpus)


def _share(step: Step, other: Step, gpus: bool) -> bool:
    return gpus and any(share_gpu(mine, theirs) for mine in _specs(step) for theirs in _specs(other))


def _specs(step: Step) -> List[ModelSpec]:
    """All that a step may launch; which of them it will be, nobody knows before."""
    return [choice.spec for choice in step.tries] or ([step.spec] if step.spec else [])


def share_gpu(one: ModelSpec, other: ModelSpec) -> bool:
    """Whether two models may land on one GPU. Where a model does not say which it takes, it may take any."""
    if any("n_gpu" in spec.fields and spec.fields["n_gpu"] is None for spec in (one, other)):
        return False
    if not one.gpu_idx or not other.gpu_idx:
        return True
    return bool(set(one.gpu_idx) & set(other.gpu_idx))
