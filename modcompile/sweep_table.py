"""The table of a sweep, for a person."""

from modcompile.depth_sweep import DENSE, Sweep


def sweep_table(sweep: Sweep) -> str:
    """A line for each point, and one for the dense model where speeds were measured."""
    width = max(map(len, sweep.ways))
    told = [f"{'':{width}}  {'active ratio':>12}  {'block work':>10}  {'perplexity':>10}  against dense"]
    ways = {DENSE: [sweep.dense], **sweep.ways} if sweep.speeds else sweep.ways
    if sweep.speeds:
        told[0] += "  tokens/s"
    for name, points in ways.items():
        for index, point in enumerate(points):
            against = f"{point.perplexity / sweep.dense.perplexity:.3f} x"
            line = f"{name:{width}}  {point.active_ratio:12.3f}  {point.block_work:10.3f}  {point.perplexity:10.3f}"
            speed = f"{sweep.speeds[name][index]:8.1f}" if name in sweep.speeds else ""
            told.append(f"{line}  {against:13}  {speed}".rstrip())
    return "\n".join(told)
