"""The table of a joint sweep, for a person."""

from collections.abc import Sequence

from modcompile.joint_sweep import JointPoint, frontier


def joint_table(points: Sequence[JointPoint]) -> str:
    """A line for each point, the fewest bytes first; what no other beats has a star."""
    best = frontier(points)
    lines = [f"{'':15}  {'bits':>6}  {'active ratio':>12}  {'MB a token':>10}  {'perplexity':>10}"]
    for point in sorted(points, key=lambda point: point.bytes_per_token):
        line = f"{point.way:15}  {point.bits:>6}  {point.active_ratio:12.3f}  {point.bytes_per_token / 1e6:10.2f}"
        lines.append(f"{line}  {point.measured.perplexity:10.3f}{'  *' if point in best else ''}")
    return "\n".join([*lines, "* no other point has less perplexity at as few bytes of weights"])
