"""What every measure returns: a value, how far it may be off, and what it was made of."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

MEDIAN_TO_MEAN = math.sqrt(math.pi / 2)  # of the standard errors of a median and of a mean of normal numbers


@dataclass(frozen=True)
class Measurement:
    """A value with its standard error.

    ``standard_error``: over batches, samples or random draws, as the measure says; 0 if nothing was drawn; NaN where one
    part does not tell. ``parts``: the values that the measure is the mean or median of, in order.

    >>> m = samkern.sharpness.Measurement.mean([1.0, 2.0, 3.0])
    >>> m.value, round(m.standard_error, 3), str(m), float(m)
    (2.0, 0.577, '2 +- 0.58', 2.0)
    """

    value: float
    standard_error: float = 0.0
    parts: tuple[float, ...] = ()

    @classmethod
    def mean(cls, parts: Iterable[float]) -> Measurement:
        """The mean of parts that are equally likely, at least one.

        >>> samkern.sharpness.Measurement.mean([5.0])
        Measurement(value=5.0, standard_error=nan, parts=(5.0,))
        """
        parts = tuple(parts)
        n = len(parts)
        # fmean() refuses infinities of both signs and sums that overflow.
        value = statistics.fmean(parts) if all(abs(x) < 1e290 for x in parts) else sum(x / n for x in parts)
        return cls(value, _error_of_mean(parts), parts)

    @classmethod
    def weighted_mean(cls, parts: Iterable[float], sizes: Iterable[float]) -> Measurement:
        """The mean of parts that stand for so many samples each, as batches do that are not equally large.

        >>> samkern.sharpness.Measurement.weighted_mean([1.0, 4.0], [2, 1]).value
        2.0
        """
        parts, sizes = tuple(parts), tuple(sizes)
        shares = [size / sum(sizes) for size in sizes]
        value = sum(share * part for share, part in zip(shares, parts, strict=True))
        if len(parts) < 2 or not all(map(math.isfinite, parts)):
            return cls(value, math.nan, parts)
        variance = sum((share * (part - value)) ** 2 for share, part in zip(shares, parts, strict=True))
        return cls(value, math.sqrt(variance * len(parts) / (len(parts) - 1)), parts)

    @classmethod
    def median(cls, parts: Iterable[float]) -> Measurement:
        """Their median; the standard error is that of normal numbers, ``sqrt(pi / 2)`` times that of the mean.

        >>> samkern.sharpness.Measurement.median([1.0, 2.0, 90.0]).value
        2.0
        """
        parts = tuple(parts)
        middle = math.nan if any(map(math.isnan, parts)) else statistics.median(parts)  # NaN has no place in an order
        return cls(middle, MEDIAN_TO_MEAN * _error_of_mean(parts), parts)

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        if self.standard_error == 0:
            return f"{self.value:.4g}"
        if not math.isfinite(self.standard_error) or not math.isfinite(self.value):
            return f"{self.value:.4g} +- ?"
        # Two digits of the error, and the value to the same place.
        place = math.floor(math.log10(self.standard_error)) - 1
        if place >= 0:
            return f"{round(self.value, -place):.0f} +- {round(self.standard_error, -place):.0f}"
        if place < -6:
            return f"{self.value:.4g} +- {self.standard_error:.2g}"
        return f"{_short(self.value, -place)} +- {_short(self.standard_error, -place)}"


def _short(value: float, decimals: int) -> str:
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if float(text) == int(float(text)) else text


def _error_of_mean(parts: tuple[float, ...]) -> float:
    if len(parts) < 2 or not all(map(math.isfinite, parts)):
        return math.nan
    return statistics.stdev(parts) / math.sqrt(len(parts))
