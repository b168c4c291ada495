"""The report as one HTML page with figures. Importing this loads no plotting library."""

from tune.report.html.figure import Figure
from tune.report.html.figures import figures
from tune.report.html.page import write_page

__all__ = ["Figure", "figures", "write_page"]
