"""Reports: one HTML file about a run or a study, and its figures for a paper."""
