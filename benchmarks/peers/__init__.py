"""Ours beside others that run the same model on the same machine: `python -m benchmarks.peers`.

Every runtime has a worker, a script that is run anew in every round (`timed_worker`); those of peers run in an
environment of their own, where there is no modcompile: they and what they import keep to it.
"""
