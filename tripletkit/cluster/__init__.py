"""What touches the scheduler: signals now, queue and launch later."""
