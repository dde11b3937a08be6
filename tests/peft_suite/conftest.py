"""A skip that PEFT's tests decide on by themselves fails: every skip is one of those that README.md lists."""

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.when == "call" and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"{item.name} skips itself and is not in LEFT_OUT: {report.longrepr[-1]}"
    return report
