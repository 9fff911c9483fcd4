"""One line about the golden cases that are skipped, instead of one for each."""

from collections import Counter
from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Gives all pending cases one reason that lists their kinds and counts, and likewise those not required."""
    for beginning in ("pending", "not required"):
        prefix = f"Skipped: {beginning}: "
        reports = [
            report
            for report in terminalreporter.stats.get("skipped", [])
            if isinstance(report.longrepr, tuple) and report.longrepr[2].startswith(prefix)
        ]
        names = Counter(report.longrepr[2].removeprefix(prefix).split(" ")[0] for report in reports)
        listed = ", ".join(name if count == 1 else f"{name} ({count})" for name, count in sorted(names.items()))
        for report in reports:
            report.longrepr = (*report.longrepr[:2], prefix + listed)
