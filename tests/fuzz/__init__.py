"""Bad input by the thousand: whatever it is, we take it or refuse it with an error of ours.

`python -m tests.fuzz --help` says how to run it for longer than the tests do.
"""
