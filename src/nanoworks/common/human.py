"""Numbers as a person reads them: `12.3K`, `3m 12s`, `41.2%`. One spelling for the console and the report."""

from __future__ import annotations


def count(value: float) -> str:
    """Return three digits and K, M, B or T (powers of 1000); below 10,000 the number itself."""
    if abs(value) < 10_000:
        return f"{value:,.0f}" if abs(value) >= 100 or float(value).is_integer() else f"{value:.3g}"
    for unit in ("K", "M", "B"):
        value /= 1000
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
    return f"{value / 1000:,.3g}T"


def duration(seconds: float) -> str:
    """Return the two largest units: `0.4s`, `42s`, `3m 12s`, `1h 04m`, `2d 03h`."""
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60}h {minutes % 60:02d}m"
    hours = round(seconds / 3600)
    return f"{hours // 24}d {hours % 24:02d}h"


def percent(fraction: float) -> str:
    """Return a fraction as a percentage with one decimal: 0.412 is `41.2%`."""
    return f"{100 * fraction:.1f}%"
