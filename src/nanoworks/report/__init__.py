"""Reports: what a run was made of and how it went, for people (Markdown, HTML) and for programs (JSON)."""

from nanoworks.report.write import write_comparison, write_report

__all__ = ["write_comparison", "write_report"]
