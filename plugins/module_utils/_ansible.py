# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What every module shares with Ansible. Private to this collection."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, Dict, Iterator, Type

from ansible.module_utils.basic import AnsibleModule

from .masking import masked, secrets_in


class DiscreetModule(AnsibleModule):
    """A module with options that are dictionaries of the user's own, in which secrets may stand; see `hide`.

    Ansible writes all options into the log of the host (syslog, the journal) while a module begins.
    """

    params: Dict[str, Any]

    def _log_invocation(self) -> None:
        given = self.params
        self.params = masked(given)
        try:
            super()._log_invocation()
        finally:
            self.params = given


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


def hide(module: AnsibleModule, *values: Any) -> None:
    """Keep the secrets that stand in `values` out of all that `module` returns, its invocation included.

    For options that are dictionaries of the user's own: `no_log` would censor each of their words everywhere.
    """
    for value in values:
        module.no_log_values.update(secrets_in(value))
