# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What every module shares with Ansible. Private to this collection."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Iterator, Type

from ansible.module_utils.basic import AnsibleModule


@contextmanager
def failing(module: AnsibleModule, *errors: Type[Exception]) -> Iterator[None]:
    """Turn `errors` raised inside the block into a clean failure of `module`.

    An error may carry more for the user than its text: a dictionary in its attribute `details` is returned beside
    `msg`. Any other exception is a bug of ours and keeps its traceback.
    """
    try:
        yield
    except errors as error:
        module.fail_json(msg=str(error), **getattr(error, "details", {}))
