"""What the scripts of the laboratory share: flags, files, the triangle of three actions."""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from engine.command import Parser, exit_code
from engine.figures import GREY, write_figure
from engine.files import write_json


def script(
    name: str,
    description: str,
    measure: Callable,
    print_table: Callable,
    draw: Callable,
    arguments: list[str] | None = None,
    flags: Callable = lambda parser: None,
    short: Callable | None = None,
) -> int:
    """The command `python -m toy.NAME`: measures, prints a table, and writes its files.

    OUT/NAME.json holds result = measure(args), OUT/NAME.png the figure draw(result), and
    OUT/NAME-short.png, if there is one, the part of it that docs/laboratory.md shows. args has
    `seed`, `out` and what `flags(parser)` adds. Returns the exit code: 0; or 2, after one sentence,
    if something could not be read or written.
    """
    parser = Parser(description=description)
    files = f"folder for {name}.png and {name}.json, which are replaced [%(default)s]"
    parser.add_argument("--out", default="out/toy", help=files)
    parser.add_argument("--seed", type=int, default=0, help="random seed [%(default)s]")
    flags(parser)
    args = parser.parse_args(arguments)

    start = time.monotonic()
    out = Path(args.out)
    # For matrices this small a second thread only waits.
    torch.set_num_threads(1)

    def work():
        # Refused before the work, not after it.
        if args.seed < 0:
            raise ValueError(f"--seed is {args.seed}, expected 0 or more")
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out {out}: not a folder")

        result = measure(args)
        write_json(out / f"{name}.json", result)
        write_figure(out / f"{name}.png", draw(result))
        if short:
            write_figure(out / f"{name}-short.png", short(result))
        print_table(result)
        print(f"\n{out / name}.png, {out / name}.json: {time.monotonic() - start:.0f} s")

    return exit_code(f"toy.{name}", work)


def triangle(axes, names: list[str]) -> Callable:
    """Draw the simplex of three actions, with their names at its corners.

    Returns the function from policies (..., 3) to their points (2, ...).
    """
    corners = torch.tensor([[0, 0], [1, 0], [0.5, 0.75**0.5]], dtype=torch.float64)
    axes.fill(*corners.T, fill=False, color=GREY, linewidth=0.8)

    # Each name stands a little outside its corner.
    shifts = torch.tensor([[-0.02, -0.06], [0.02, -0.06], [0, 0.03]])
    for place, name in zip(corners + shifts, names):
        axes.text(*place, name, ha="center", va="center")
    axes.set_aspect("equal")
    axes.axis("off")

    def point(policies):
        """A policy mixes the corners; coordinates come first, as plot(x, y) takes them."""
        policies = torch.as_tensor(policies, dtype=torch.float64)
        return (policies @ corners).movedim(-1, 0)

    return point
