"""Results of experiments: written as JSON, and turned into a report and the list of claims.

`python -m residual_steer.report FOLDER` makes the report of every result in a folder.
"""

from .environment import command_line, machine, portable, versions
from .result import Axis, Plot, Result, Series, Verdict
from .table import Cell, Column, Measured, Table

__all__ = [
    "Axis",
    "Cell",
    "Column",
    "Measured",
    "Plot",
    "Result",
    "Series",
    "Table",
    "Verdict",
    "command_line",
    "machine",
    "portable",
    "versions",
]
