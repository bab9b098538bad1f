"""Reports: what evaluations, recoveries and records tell, on one web page."""

from surgery.report.page import report_page
from surgery.report.reading import Collected, read_all

__all__ = ["Collected", "read_all", "report_page"]
