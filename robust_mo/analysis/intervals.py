"""How far one share, a backdoor rate or an accuracy, could move had other prompts been drawn, and a difference of two.

Numbers read off a frontier rest on many shares at once: see resampling.py.
"""

import math
import statistics

from robust_mo.errors import InputError


def wilson(successes: int, count: int) -> tuple[float, float]:
    """Wilson's 95% score interval (1927) of a share, as (low, high); no continuity correction.

    Raises:
      InputError: count below 1, or successes outside [0, count].
    """
    if count < 1:
        raise InputError(f"an interval of {successes} of {count} does not exist: evaluate at least one prompt")
    if not 0 <= successes <= count:
        raise InputError(f"{successes} successes out of {count} are impossible: give between 0 and {count}")
    z = statistics.NormalDist().inv_cdf(0.975)
    share = successes / count
    centre = share + z**2 / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    scale = 1 + z**2 / count
    # At both ends the formula gives 0 and 1 but for rounding.
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == count else (centre + half) / scale
    return low, high


def paired_difference(before: list[bool], after: list[bool]) -> tuple[float, float, float]:
    """(value, low, high) of the share after less that before, on the same prompts.

    95%, by Newcombe's square-and-add of Wilson's intervals for paired shares (1998, method 10): it has a width where no
    prompt changed, too.
    """
    count = len(before)
    both, first, second = (
        sum(pair == which for pair in zip(before, after, strict=True))
        for which in ((True, True), (True, False), (False, True))
    )
    neither = count - both - first - second
    (low_before, high_before), (low_after, high_after) = (wilson(both + one, count) for one in (first, second))
    share_before, share_after = (both + first) / count, (both + second) / count
    together = both * neither - first * second
    product = (both + first) * (second + neither) * (both + second) * (first + neither)
    if together > 0:
        together = max(together - count / 2, 0)
    phi = together / math.sqrt(product) if product else 0.0

    def half(of_after: float, of_before: float) -> float:
        return math.sqrt(max(of_after**2 - 2 * phi * of_after * of_before + of_before**2, 0))

    value = share_after - share_before
    low = value - half(share_after - low_after, high_before - share_before)
    return value, low, value + half(high_after - share_after, share_before - low_before)
