"""Tests of modcompile: `tests/x/test_y.py` tests `x/y.py`."""
