"""How many threads torch computes with, where other programs are busy on the same cores.

The threads of an operation wait for the slowest of them, and spin while they wait. If one has to
share its core with another program, all are as slow as it is: on two cores beside one busy program,
two threads sample several times more slowly than one.
"""

import os
import time
from pathlib import Path

import torch

STAT = Path("/proc/stat")  # Linux; elsewhere nothing is known of other programs
SECONDS = 1.0  # the least time that says something: the counters move a hundred times a second


class Threads:
    """Sets torch's threads: `wanted` of them, or with 0 as many as there are idle cores.

    None leaves them as they are: as many as cores, or as OMP_NUM_THREADS says.
    """

    def __init__(self, wanted: int | None = None):
        self.wanted = wanted
        self.most = torch.get_num_threads()
        self.before = START
        if wanted:
            torch.set_num_threads(wanted)

    def adapt(self) -> None:
        """Look at what was busy since the last call. To be called between two stages of work."""
        if self.wanted != 0 or self.before is None:
            return
        now = counters()
        seconds, busy, own = (after - before for after, before in zip(now, self.before))
        if seconds < SECONDS:
            return

        self.before = now
        idle = cores() - (busy - own) / seconds
        torch.set_num_threads(max(1, min(self.most, round(idle))))


def cores() -> int:
    """Cores that the counters are about."""
    return os.cpu_count()


def counters() -> tuple[float, float, float] | None:
    """Seconds: the time; what all cores have worked, for whatever program; what this one has."""
    if not STAT.is_file():
        return None
    user, nice, system, _, _, *interrupts = map(int, STAT.read_text().split("\n")[0].split()[1:9])
    busy = (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
    return time.monotonic(), busy, time.process_time()


START = counters()  # when the program began
