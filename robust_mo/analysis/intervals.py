"""How far one share, a backdoor rate or an accuracy, could move had other prompts been drawn.

Numbers read off a frontier rest on many shares at once: see resampling.py.
"""

import math
import statistics

from robust_mo.errors import InputError


def wilson(successes: int, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share, as (low, high); no continuity correction.

    Raises:
      InputError: count below 1, successes outside [0, count], or confidence outside (0, 1).
    """
    if count < 1:
        raise InputError(f"an interval of {successes} of {count} does not exist: evaluate at least one prompt")
    if not 0 <= successes <= count:
        raise InputError(f"{successes} successes out of {count} are impossible: give between 0 and {count}")
    if not 0 < confidence < 1:
        raise InputError(f"confidence is {confidence}: give a number between 0 and 1, such as 0.95")
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / count
    centre = share + z**2 / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    scale = 1 + z**2 / count
    # At both ends the formula gives 0 and 1 but for rounding.
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == count else (centre + half) / scale
    return low, high
