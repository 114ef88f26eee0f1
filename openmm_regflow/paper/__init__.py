"""The paper's table on this machine: architectures x ways of training, with equal budgets of seconds for every run.

Rehman et al. 2025, arXiv 2506.01158, tables 1 to 4, in Cartesian coordinates. A run's budget covers everything that it
trains on: teacher, pairs and student. Each finished run is one JSON file; runs that are there are not run again.
"""

from openmm_regflow.paper.design import REGULARISERS, Cell, PaperConfig, cells, load_config, settings
from openmm_regflow.paper.runs import TeacherSampler, clock_of, evaluate_cell, run_cell, train_cell
from openmm_regflow.paper.table import equal_times, plot_trends, render, run_table, table, write_table

__all__ = [
    "REGULARISERS",
    "Cell",
    "PaperConfig",
    "TeacherSampler",
    "cells",
    "clock_of",
    "equal_times",
    "evaluate_cell",
    "load_config",
    "plot_trends",
    "render",
    "run_cell",
    "run_table",
    "settings",
    "table",
    "train_cell",
    "write_table",
]
