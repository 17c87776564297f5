"""What the scripts of the laboratory share: their flags and files, their colours, the triangle of three actions."""

import argparse
import time
from pathlib import Path

import torch

from command import exit_code
from data import write_figure, write_json

# Okabe and Ito's colours, told apart by colour-blind eyes.
BLUE, ORANGE, GREEN, PINK, SKY, YELLOW, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#777777"


def script(name, description, measure, print_table, draw, arguments=None, flags=lambda parser: None):
    """The command `python -m toy.NAME`: OUT/NAME.json <- measure(args), OUT/NAME.png <- draw(result), and a table.

    args has `seed`, `out` and what `flags(parser)` adds. Returns the exit code: 2, and one sentence, if something could
    not be read or written.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out/toy", help=f"folder for {name}.png and {name}.json [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of everything random [%(default)s]")
    flags(parser)
    args, start = parser.parse_args(arguments), time.monotonic()
    out = Path(args.out)
    torch.set_num_threads(1)  # for matrices this small a second thread only waits

    def work():
        if args.seed < 0:
            raise ValueError(f"--seed is {args.seed}, expected 0 or more")
        if out.exists() and not out.is_dir():  # said before the work, not after it
            raise ValueError(f"--out {out}: not a folder")
        result = measure(args)
        write_json(out / f"{name}.json", result)
        write_figure(out / f"{name}.png", draw(result))
        print_table(result)
        print(f"\n{out / name}.png, {out / name}.json: {time.monotonic() - start:.0f} s")

    return exit_code(f"toy.{name}", work)


def triangle(axes, names):
    """Draw the simplex of three actions; returns the function from policies (..., 3) to their points (2, ...)."""
    corners = torch.tensor([[0, 0], [1, 0], [0.5, 0.75**0.5]], dtype=torch.float64)
    axes.fill(*corners.T, fill=False, color=GREY, linewidth=0.8)
    for corner, name, shift in zip(corners, names, ((-0.02, -0.06), (0.02, -0.06), (0, 0.03))):
        axes.text(*(corner + torch.tensor(shift)), name, ha="center", va="center")
    axes.set_aspect("equal")
    axes.axis("off")
    return lambda policies: (torch.as_tensor(policies, dtype=torch.float64) @ corners).movedim(-1, 0)


def slope(x, y):
    """Least-squares slope of log y against log x."""
    x, y = torch.as_tensor(x, dtype=torch.float64).log(), torch.as_tensor(y, dtype=torch.float64).log()
    return (((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()).item()
