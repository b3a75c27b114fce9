"""What flooding is, in NumPy: values, multipliers, means over groups, windows."""

import numpy as np


def reflect(r):
    """|r| and its derivative; a tie descends."""
    return np.abs(r), np.where(r >= 0, 1.0, -1.0)


def soft(scale):
    return lambda r: (
        scale**2 * (np.hypot(1, r / scale) - 1),
        r / np.hypot(1, r / scale),
    )


def pause(r):
    return np.maximum(r, 0.0), np.where(r >= 0, 1.0, 0.0)


def asymmetric(ascent, dead_band):
    return lambda r: (
        np.where(r >= -dead_band, r, -ascent * (r + dead_band) - dead_band),
        np.where(r >= -dead_band, 1.0, -ascent),
    )


# the shapes of tests/forms.py, with their numbers
SHAPES = {
    "reflect": reflect,
    "soft": soft(0.7),
    "pause": pause,
    "asymmetric": asymmetric(0.5, 0.125),
}


def bend(loss, level, shape=reflect):
    """phi(loss - level) + level and phi'(loss - level), in the loss's dtype.

    Above the level, and where flooding is off, the reflected value is the loss itself;
    NaN stays NaN in both.
    """
    loss = np.asarray(loss)
    loss, level = np.broadcast_arrays(loss, np.asarray(level, loss.dtype))
    off = level == -np.inf
    with np.errstate(invalid="ignore", over="ignore"):
        r = loss - np.where(off, 0, level)
        phi, slope = shape(r)
        value = phi + np.where(off, 0, level)
    slope = np.where(np.isnan(loss), np.nan, slope)
    value = np.where(off | np.isnan(loss) | (phi == r), loss, value)
    return value.astype(loss.dtype), np.where(off, 1, slope).astype(loss.dtype)


def mean(losses, level, *, groups=None, weights=None, shape=reflect):
    """Sum over groups of n_k/n [phi(mean_k - b_k) + b_k], and its slope by each loss.

    Args:
        losses: Of shape [n], computed with in float64.
        level: One for all groups, or one per group.
        groups: The group of every loss, ints in [0, k); all are one group by default.
        weights: What every loss counts; one by default. Zero: nowhere, NaN included.
        shape: One of the shapes above.
    """
    losses = np.asarray(losses, np.float64)
    groups = np.zeros(len(losses), int) if groups is None else np.asarray(groups)
    weights = np.ones(len(losses)) if weights is None else np.asarray(weights, float)
    levels = np.broadcast_to(level, (max(groups.max() + 1, np.size(level)),))
    counted = weights > 0
    total = weights[counted].sum()
    if not total:
        return np.nan, np.full(len(losses), np.nan)
    value, slopes = 0.0, np.zeros(len(losses))
    for k in np.unique(groups[counted]):
        rows = counted & (groups == k)
        share = weights[rows].sum() / total
        average = (weights[rows] @ losses[rows]) / weights[rows].sum()
        bent, slope = bend(average, levels[k], shape)
        value += share * bent
        slopes[rows] = slope * weights[rows] / total
    return float(value), slopes


def windows(
    grads,
    values,
    sizes,
    level,
    *,
    weights=None,
    flushes=None,
    skip=False,
    shape=reflect,
    band=0.0,
):
    """What accumulation gives after each micro-batch: a window is one large batch.

    Args:
        grads: Of shape [steps, ...].
        values: Of shape [steps].
        sizes: How many micro-batches make a window: an int, or one for each window.
        level: The level of every window, or one for each.
        weights: What each counts; one by default. Zero: its place alone, NaN included.
        flushes: After which the window closes early; none by default.
        skip: Whether a micro-batch that is not finite takes no place.
        shape: One of the shapes above.
        band: Half of the width of the band around the level.

    Returns:
        The flooded gradients, zero inside a window; the losses of the closed windows.
    """
    grads, values = np.asarray(grads, np.float64), np.asarray(values, np.float64)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, float)
    flushes = np.zeros(len(values), bool) if flushes is None else flushes
    updates, closed, window, rises = np.zeros(grads.shape), [], [], False
    for i, (grad, value) in enumerate(zip(grads, values, strict=True)):
        finite = np.isfinite(grad).all() and np.isfinite(value)
        if finite or not skip or not weights[i]:
            window.append(i)
        size = sizes[len(closed)] if np.ndim(sizes) else sizes
        if len(window) < size and not flushes[i]:
            continue
        rows, window = [row for row in window if weights[row] != 0], []
        if rows:
            total = weights[rows].sum()
            loss = weights[rows] @ values[rows] / total
            end = level[len(closed)] if np.ndim(level) else level
            end += band if rises else -band
            rises = bool(loss < end)
            slope = bend(loss, end, shape)[1]
            updates[i] = slope * np.tensordot(weights[rows], grads[rows], 1) / total
            closed.append(loss)
    return updates, np.asarray(closed)


def strokes(losses, level, band, counts=None):
    """The end of the band that each loss meets, and the multiplier of its step.

    The end is the upper one after a step below its end, else the lower one. A NaN loss
    is below nothing, and off, -inf, is off.

    Args:
        losses: Of shape [steps], of the dtype in which they meet their level.
        level: One, or one for each step.
        band: Half of its width: one, or one for each step.
        counts: Whether each loss counts; all do by default. The others leave no trace.
    """
    kind = losses.dtype.type
    levels, bands = (np.broadcast_to(x, losses.shape) for x in (level, band))
    ends, multipliers, rises = [], [], False
    for i, loss in enumerate(losses):
        middle, half = kind(levels[i]), kind(bands[i])
        ends.append(middle + half if rises else middle - half)
        if counts is not None and not counts[i]:
            multipliers.append(kind(0))
            continue
        rises = bool(loss < ends[-1])
        multiplier = np.nan if np.isnan(loss) and ends[-1] != -np.inf else 1.0
        multipliers.append(kind(-1.0 if rises else multiplier))
    return np.array(ends), np.array(multipliers)


def average(visited, decay):
    """The sum of the parameters after each update, each times its share of it.

    Args:
        visited: Arrays, one for each update, in their order.
        decay: Of an update, once there are 1 / (1 - decay) of them; the plain mean
            until then.
    """
    visited = np.stack([np.asarray(params, np.float64) for params in visited])
    parts = np.minimum(np.arange(1, len(visited) + 1), 1 / (1 - decay))
    stays = np.cumprod(1 - 1 / parts[:0:-1])[::-1]  # what later updates leave of each
    return np.tensordot(np.append(stays, 1) / parts, visited, 1)
