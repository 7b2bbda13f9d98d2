"""CUDA graphs of a run: all of its evaluations in one, or each by itself for callbacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


class StepGraphs:
    """Captures `evaluate(k)` over ranges of k, once each, and replays them.

    All graphs of a plan share one memory pool.

    Args:
        device: graphs exist on CUDA alone.
        evaluate: launches one evaluation on the current stream, without host synchronization.
        warm_up: evaluations that together launch every kernel of the run; they are run once before
            the first capture, so that lazy set-up (workspaces, compiled kernels) is in no graph.
    """

    def __init__(
        self, device: torch.device, evaluate: Callable[[int], None], warm_up: Sequence[int]
    ) -> None:
        self.usable = device.type == "cuda"
        self._device = device
        self._evaluate = evaluate
        self._warm_up = tuple(warm_up)
        self._graphs: dict[range, torch.cuda.CUDAGraph] = {}
        self._pool: tuple[int, int] | None = None
        self.nbytes = 0

    def prepare(self, ranges: Sequence[range]) -> None:
        """Capture what of `ranges` is not captured yet; the state of the run is overwritten."""
        missing = [wanted for wanted in ranges if wanted not in self._graphs]
        if not missing:
            return
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            if self._pool is None:
                with torch.cuda.stream(stream):
                    for index in self._warm_up:
                        self._evaluate(index)
                self._pool = torch.cuda.graph_pool_handle()
            before = torch.cuda.memory_reserved()
            for wanted in missing:
                self._graphs[wanted] = self._capture(wanted, stream)
            self.nbytes += max(0, torch.cuda.memory_reserved() - before)
            torch.cuda.current_stream().wait_stream(stream)

    def replay(self, evaluations: range) -> None:
        """Launch evaluations that `prepare` captured."""
        self._graphs[evaluations].replay()

    def _capture(self, evaluations: range, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            for index in evaluations:
                self._evaluate(index)
        return graph
