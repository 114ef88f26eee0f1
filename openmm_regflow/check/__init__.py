"""What the tests of this package run on its own molecules, run on yours: a table of findings and a verdict."""

from openmm_regflow.check.findings import jacobian_log_determinant, run_checks, system_findings
from openmm_regflow.check.kernel import HybridMonteCarlo, kernel_test, largest_score, thinned
from openmm_regflow.check.report import CheckReport, Finding

__all__ = [
    "CheckReport",
    "Finding",
    "HybridMonteCarlo",
    "jacobian_log_determinant",
    "kernel_test",
    "largest_score",
    "run_checks",
    "system_findings",
    "thinned",
]
