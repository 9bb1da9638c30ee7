"""What a study has cost in GPU-hours, and what it will."""
