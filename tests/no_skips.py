# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A plugin of pytest: in CI (CI=true) a test that cannot run is a failure, elsewhere it is skipped."""

from __future__ import annotations

import os
from typing import Generator

import pytest

IN_CI = os.environ.get("CI", "").lower() in ("1", "true")


def _complaint(why: object) -> str:
    return f"In CI this has to run, and was skipped: {why}"


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The report of a file, failed where it would have been skipped as a whole in CI."""
    report = yield
    if report.skipped and IN_CI:
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", _complaint(why)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(call: pytest.CallInfo[None]) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """The report of a phase of a test, failed where it would have been skipped in CI."""
    report = yield
    expected = hasattr(report, "wasxfail")
    if report.skipped and not expected and IN_CI:
        report.outcome = "failed"
        report.longrepr = _complaint(call.excinfo.value if call.excinfo else "")
    return report
