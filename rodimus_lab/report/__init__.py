"""Reports: tables and figures made of run records and of the paper's numbers. Needs neither torch nor a GPU."""

from rodimus_lab.report.absent import NotRun
from rodimus_lab.report.artefacts import quoted_tables
from rodimus_lab.report.caption import told_runs
from rodimus_lab.report.comparison import NOT_RUN, Metric, paper_vs_measured
from rodimus_lab.report.diagram import Box, Diagram, Wire, diagrams_of
from rodimus_lab.report.figure import (
    FIGURES,
    Axis,
    Band,
    Drawing,
    Figure,
    HeatMap,
    Line,
    Panels,
    tell_points,
    write_figure,
    write_figures,
)
from rodimus_lab.report.on_terminal import terminal_tables
from rodimus_lab.report.order import with_order
from rodimus_lab.report.overlap import overlaps
from rodimus_lab.report.paper import PaperResults, PaperRow, Printed, paper_table
from rodimus_lab.report.runs import runs_json, runs_table
from rodimus_lab.report.table import Cell, Column, Table
from rodimus_lab.report.writers import to_csv, to_latex, to_markdown, write

__all__ = [
    "FIGURES",
    "NOT_RUN",
    "Axis",
    "Band",
    "Box",
    "Cell",
    "Column",
    "Diagram",
    "Drawing",
    "Figure",
    "HeatMap",
    "Line",
    "Metric",
    "NotRun",
    "Panels",
    "PaperResults",
    "PaperRow",
    "Printed",
    "Table",
    "Wire",
    "diagrams_of",
    "overlaps",
    "paper_table",
    "paper_vs_measured",
    "quoted_tables",
    "runs_json",
    "runs_table",
    "tell_points",
    "terminal_tables",
    "to_csv",
    "to_latex",
    "to_markdown",
    "told_runs",
    "with_order",
    "write",
    "write_figure",
    "write_figures",
]
