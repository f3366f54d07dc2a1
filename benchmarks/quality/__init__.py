"""What routers lose beside what is simpler, trained and measured the same way: `python -m benchmarks.quality`."""
