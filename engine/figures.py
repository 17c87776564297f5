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
    from matplotlib.figure import (
        Figure,
    )  # late: it is a quarter of the start-up, and few commands draw

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

    def column(key):
        return [row[key] for row in steps]

    position = range(1, len(steps) + 1)
    loss.plot(position, column("loss"), color=BLUE)
    loss.set(xlabel="optimizer step", ylabel="loss", title="Loss")
    if steps[0]["loss"] > 0:
        loss.set_yscale("log")

    thin = dict(linewidth=0.8)
    ratio.plot(position, column("best_log_ratio"), color=BLUE, label="highest target", **thin)
    ratio.plot(position, column("worst_log_ratio"), color=ORANGE, label="lowest target", **thin)
    ratio.set(xlabel="optimizer step", ylabel="log π_θ/π_t (nats)")
    ratio.set_title("Log-ratio of trained responses")
    ratio.margins(y=0.25)  # room for the legend


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

    # Whole rounds at the ticks, also where there is only one.
    for axes in (spread, length):
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
