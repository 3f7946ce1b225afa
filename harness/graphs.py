"""Steps captured as CUDA graphs: a GPU replays thousands of launches as one."""

from __future__ import annotations

import collections
import warnings

import torch

from harness.files import reason


class CapturedStep:
    """A step as a GPU runs it fastest: captured once for each shape of its inputs, then replayed.

    step: a function of tensors that returns tensors. What else changes between its calls must be tensors that are
    changed in place, or drawn from torch's own random generator. The first `WARM_UP` calls of each shape are plain
    ones, in which optimizers make their state. If a step cannot be captured, plain steps go on, with one warning.
    """

    WARM_UP = 3

    def __init__(self, step, device: torch.device):
        self.step, self.device = step, torch.device(device)
        self.calls, self.captured, self.refused = collections.Counter(), {}, False
        self._prepare()

    def __call__(self, *inputs):
        key = tuple((t.shape, t.dtype) for t in inputs)
        self.calls[key] += 1
        if self.refused or self.calls[key] <= self.WARM_UP:
            return self._plain(inputs)
        if key not in self.captured:
            try:
                self.captured[key] = self._capture([t.clone() for t in inputs])
            except RuntimeError as error:
                self.refused = True
                self._recover()
                warnings.warn(f"plain steps instead of CUDA graphs ({reason(error)})", RuntimeWarning, stacklevel=2)
                return self._plain(inputs)
        replay, buffers, results = self.captured[key]
        for buffer, t in zip(buffers, inputs):
            buffer.copy_(t)
        replay()
        return [t.clone() for t in results]

    def _prepare(self):
        with torch.cuda.device(self.device):
            self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def _plain(self, inputs):
        """On the stream of the capture, where the memory that optimizers and autograd keep must come from."""
        present = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(present)
        with torch.cuda.stream(self.stream), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Adam's, that it could be faster where nothing is captured
            results = self.step(*inputs)
        present.wait_stream(self.stream)
        for t in results:
            t.record_stream(present)
        return results

    def _capture(self, buffers):
        """-> a function that runs the step on what lies in `buffers`, these, and where it leaves its results."""
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, self.pool, self.stream):
                results = self.step(*buffers)
        return graph.replay, buffers, results

    def _recover(self):
        """A capture that fails leaves torch's generator believing that it is being captured: it gets a new state."""
        torch.cuda.synchronize(self.device)
        with torch.cuda.device(self.device):
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
        if hasattr(generator, "graphsafe_set_state"):
            fresh = torch.Generator(generator.device).manual_seed(generator.initial_seed())
            generator.graphsafe_set_state(fresh.graphsafe_get_state())
