"""Results of experiments: written as JSON, and turned into a report and the list of claims.

`python -m residual_steer.report FOLDER` makes the report of every result in a folder.
"""

from .axis import Axis
from .environment import command_line, machine, portable, versions
from .pictures import Arrows, Flow, Matrix, Picture, Surface, Trajectory
from .result import Result, Verdict
from .series import Plot, Series
from .table import Cell, Column, Measured, Table

__all__ = [
    "Arrows",
    "Axis",
    "Cell",
    "Column",
    "Flow",
    "Matrix",
    "Measured",
    "Picture",
    "Plot",
    "Result",
    "Series",
    "Surface",
    "Table",
    "Trajectory",
    "Verdict",
    "command_line",
    "machine",
    "portable",
    "versions",
]
