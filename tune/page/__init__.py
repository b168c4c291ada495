"""The report as one HTML page with figures. Importing this loads no plotting library."""

from tune.page.figure import Figure
from tune.page.figures import figures
from tune.page.page import write_page

__all__ = ["Figure", "figures", "write_page"]
