"""The report: its data, verdict, tables, page, cards and plots."""
