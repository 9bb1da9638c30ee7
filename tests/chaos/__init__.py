"""Chaos: a real study on a real cluster and a real PostgreSQL, and whatever can happen to them.

    make chaos CHAOS="--seed 7 --minutes 10"

Which faults happen, in which order, to which of the workers at work, is drawn from the seed. Then
the study is brought to its end by what the documentation tells a user to do, and checked.
"""
