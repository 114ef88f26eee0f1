"""What the checks found: one line each, and a verdict."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        name: what was looked at.
        result: what was found, in words and figures.
        passed: False for a failure; None where nothing can fail, or nothing could be decided.
    """

    name: str
    result: str
    passed: bool | None


@dataclass(frozen=True)
class CheckReport:
    """All findings about one flow and one molecule."""

    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return all(f.passed is not False for f in self.findings)

    @property
    def verdict(self) -> str:
        """One sentence."""
        failed = [f.name for f in self.findings if f.passed is False]
        if failed:
            return f"FAILED: {', '.join(failed)}; do not use this flow with this System before that is resolved"
        if self.findings[-1].passed is None:
            return f"nothing failed, but the kernel test decided nothing: {self.findings[-1].result}"
        return "passed: flow moves of this flow sample this System exactly, as far as these tests can see"

    def rows(self) -> list[tuple[str, str, str]]:
        """(what, result, ok / FAILED / -) of every finding."""
        words = {True: "ok", False: "FAILED", None: "-"}
        return [(f.name, f.result, words[f.passed]) for f in self.findings]

    def to_dict(self) -> dict[str, Any]:
        """Findings and verdict for JSON."""
        return {"passed": self.passed, "verdict": self.verdict, "findings": [asdict(f) for f in self.findings]}
