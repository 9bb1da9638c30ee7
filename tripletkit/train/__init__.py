"""The trainer: head, loss, bandit, sampler, retrieval metrics, checkpoints, loop."""
