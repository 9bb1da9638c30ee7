"""The study: where it lives, its search space, who works on which trial, which one is best."""
