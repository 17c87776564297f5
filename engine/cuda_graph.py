"""A function of integers as a CUDA graph."""

from collections.abc import Callable

import torch


class Graph:
    """A function of integers: its kernels are captured, then launched together until these change.

    What it returns are the same tensors every time, which the next call overwrites.
    """

    def __init__(self, function: Callable, device: torch.device):
        self.function = function
        self.device = device
        self.arguments = None  # those that the graph was captured with
        self.graph = None
        self.result = None

    def __call__(self, *arguments: int):
        if arguments != self.arguments:
            # The last graph will not be replayed again, so the new one may have its memory.
            memory = self.graph.pool() if self.graph else None
            self.graph, self.result = capture(self.function, arguments, self.device, memory)
            self.arguments = arguments

        self.graph.replay()
        return self.result


def capture(function: Callable, arguments: tuple, device: torch.device, memory):
    """A CUDA graph of the call, and the tensors that each replay writes its results into."""
    with torch.cuda.device(device):
        # What libraries do at their first calls cannot be captured, so these come before, on a
        # stream of their own, as torch's documentation of CUDA graphs asks.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                function(*arguments)
        torch.cuda.current_stream().wait_stream(stream)

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory):
            result = function(*arguments)
    return graph, result
