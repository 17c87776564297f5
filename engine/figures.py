"""Figures: one palette for the whole project, an empty figure, a figure that is written whole."""

from pathlib import Path

import torch

from engine.files import atomic_write

# Okabe and Ito's colours, told apart by colour-blind eyes.
BLUE = "#0072B2"
ORANGE = "#D55E00"
GREEN = "#009E73"
PINK = "#CC79A7"
SKY = "#56B4E9"
YELLOW = "#E69F00"
GREY = "#777777"


def new_figure(width: float, height: float):
    """An empty figure of so many inches."""
    # Imported late: it is a quarter of the start-up, and few commands draw.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def write_figure(path: str | Path, figure) -> None:
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def error_bars(values: list[float], intervals: list[list[float]]) -> list[list[float]]:
    """How far each interval reaches below and above its value, as matplotlib wants it."""
    # Rounding may put the mean of equal numbers outside of their interval.
    pairs = list(zip(values, intervals, strict=True))
    below = [max(0.0, value - low) for value, (low, _) in pairs]
    above = [max(0.0, high - value) for value, (_, high) in pairs]
    return [below, above]


def whole_ticks(axis) -> None:
    """Ticks of an axis at whole numbers only, also where there is only one."""
    axis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def label_ends(axes, ends: list[tuple[float, str, str]], gap: float = 0.07) -> None:
    """Names to the right of the axes, in place of a legend.

    `ends` are (last value of a curve, its name, colour). Call it when the limits are set: names
    stand at these values, but at least `gap` of the height apart.
    """
    # From data to shares of the height, whatever the scale.
    transform = axes.transData + axes.transAxes.inverted()
    ends = sorted(ends)
    heights = [transform.transform((1, value))[1] for value, _, _ in ends]
    heights = [min(max(height, 0), 1) for height in heights]

    # Upwards until nobody touches the one below, then down again from the top.
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    ceiling = 1.0
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], ceiling)
        ceiling = heights[i] - gap

    place = dict(transform=axes.transAxes, ha="left", va="center", fontsize=9)
    for height, (_, name, colour) in zip(heights, ends):
        axes.text(1.02, height, name, color=colour, **place)


def slope(x, y) -> float:
    """Least-squares slope of log y against log x."""
    x = torch.as_tensor(x, dtype=torch.float64).log()
    y = torch.as_tensor(y, dtype=torch.float64).log()
    return (((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()).item()


def draw_curves(lines: list[dict], path: str | Path) -> None:
    """curves.png of a run, from its metrics.jsonl: what each optimizer step and each round did."""
    figure = new_figure(11, 6.5)
    (loss, ratio), (spread, length) = figure.subplots(2, 2)
    draw_steps(loss, ratio, [row for row in lines if "loss" in row])
    draw_rounds(spread, length, [row for row in lines if "loss" not in row])

    for axes in (ratio, spread):
        axes.legend(frameon=False, loc="upper center", ncols=2)
    write_figure(path, figure)


def draw_steps(loss, ratio, steps: list[dict]) -> None:
    """Two panels against the optimizer step: the loss, and the log-ratios of trained responses."""
    # Imported late, as in `new_figure`.
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    def column(key):
        return [row[key] for row in steps]

    position = range(1, len(steps) + 1)
    loss.plot(position, column("loss"), color=BLUE)
    loss.set(xlabel="optimizer step", ylabel="loss", title="Loss")
    if min(column("loss")) > 0:
        # Plain numbers at 1, 2, 5, 10, ...: 2 × 10¹ is slow to read.
        loss.set_yscale("log")
        loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        loss.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        loss.yaxis.set_minor_formatter(NullFormatter())

    thin = dict(linewidth=0.8)
    ratio.plot(position, column("best_log_ratio"), color=BLUE, label="highest target", **thin)
    ratio.plot(position, column("worst_log_ratio"), color=ORANGE, label="lowest target", **thin)
    ratio.set(xlabel="optimizer step", ylabel="log π_θ/π_t (nats)")
    ratio.set_title("Log-ratio of trained responses")
    ratio.margins(y=0.25)  # room for the legend

    number = column("round")
    for axes in (loss, ratio):
        mark_rounds(axes, number)
        whole_ticks(axes.xaxis)


def mark_rounds(axes, number: list[int]) -> None:
    """A thin line where a round begins; number[i] is the round of step i."""
    first = [i for i in range(1, len(number)) if number[i] != number[i - 1]]
    # Of many rounds, every tenth or so: the curves should stay in front.
    every = 1 + len(first) // 20
    for i in first[every - 1 :: every]:
        axes.axvline(i + 0.5, color=GREY, linewidth=0.6, linestyle=":", zorder=0)
    if first:
        name = "dotted: a new round" if every == 1 else f"dotted: every {every} rounds"
        axes.set_xlabel(f"optimizer step ({name})")


def draw_rounds(spread, length, rounds: list[dict]) -> None:
    """Two panels against the round: the spread of win rates, and the length of responses."""

    def column(key):
        return [row[key] for row in rounds]

    number = column("round")
    spread.plot(number, column("best_win_rate"), ".-", color=BLUE, label="best of K")
    spread.plot(number, column("worst_win_rate"), ".-", color=ORANGE, label="worst of K")
    spread.axhline(0.5, color=GREY, linewidth=0.8)
    spread.set(xlabel="round", ylabel="win rate against π_t", ylim=(0, 1.1))
    spread.set_title("Spread of win rates")

    length.plot(number, column("mean_tokens"), ".-", color=BLUE)
    length.set(xlabel="round", ylabel="tokens", title="Mean length of a response")
    length.set_ylim(0, 1.2 * max(column("mean_tokens")))

    for axes in (spread, length):
        whole_ticks(axes.xaxis)
