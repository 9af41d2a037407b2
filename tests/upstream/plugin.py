"""pytest plugin of `run.py`: provides the stand-ins and writes down how each test ended."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import families
import pytest
import stand_ins

RANK = {"passed": 0, "skipped": 1, "failed": 2}


class Outcomes:
    """Collects, per test, the worst of what its phases and subtests reported, and the reason."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = "::".join(report.nodeid.split("::")[1:])
        test = self.tests.setdefault(name, {"outcome": "passed", "reason": ""})
        # A test whose subtests skip counts as skipped, though pytest reports it as passed.
        if RANK[report.outcome] > RANK[test["outcome"]]:
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            test["outcome"] = report.outcome
            # The message of the error, which is the last of its traceback, on one line.
            test["reason"] = " ".join(str(crash.message if crash else reason).split())[:300]
            if report.failed:
                test["text"] = report.longreprtext

    def pytest_sessionfinish(self) -> None:
        self.file.write_text(json.dumps(self.tests, indent=1), encoding="utf-8")


def pytest_configure(config: pytest.Config) -> None:
    """Runs before the tests are imported, which import the common files."""
    source = Path(os.environ["LONGCLIP_UPSTREAM_SOURCE"])
    stand_ins.install(source)
    folder = tempfile.TemporaryDirectory(prefix="tiny-models-")
    config.add_cleanup(folder.cleanup)
    stand_ins.write_tiny_models(families.family(), Path(folder.name))
    config.pluginmanager.register(Outcomes(Path(os.environ["LONGCLIP_UPSTREAM_OUTCOMES"])))
