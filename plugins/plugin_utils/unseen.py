# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Having a host say something that nobody else may read."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, Iterator


@contextmanager
def unseen(action: Any) -> Iterator[None]:
    """Keep what a host says inside the block out of the output, also with -vvv, as `no_log` does for a whole task.

    The task's own result and its errors are shown as ever. Connections look at this setting before they tell what a
    command said (plugins/connection/ssh.py of ansible-core).
    """
    contexts = [action._play_context, getattr(action._connection, "_play_context", action._play_context)]
    before = [context.no_log for context in contexts]
    for context in contexts:
        context.no_log = True
    try:
        yield
    finally:
        for context, value in zip(contexts, before, strict=True):
            context.no_log = value
