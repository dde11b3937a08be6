"""What goes into report.json beside the measurements, for the scripts; `hf_fip.hub.report` makes it."""

from ..hub.card import REPORT_NAME
from ..hub.report import non_default, versions

__all__ = ["REPORT_NAME", "non_default", "versions"]
