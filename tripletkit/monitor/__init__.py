"""What users look at, and steer with: the study, its jobs and their logs, side by side."""
