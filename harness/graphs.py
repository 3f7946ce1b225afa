"""Steps captured as CUDA graphs: a GPU replays thousands of launches as one."""

from __future__ import annotations

import collections
import contextlib
import warnings

import torch

from harness.files import reason


class CapturedStep:
    """A step as a GPU runs it fastest: captured once for each shape of its inputs, then replayed.

    step: a function of tensors that returns tensors. Everything else that changes between its calls must be a tensor
    that changes in place, or be drawn from torch's own random generator. The first `WARM_UP` calls of each shape are
    plain ones, in which optimizers make their state. A step that cannot be captured stays plain, with one warning.
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
            except Exception as error:  # of any kind: the plain step raises it again if the capture is not to blame
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
        """Run a plain step on the stream of the capture: the memory of optimizers and autograd must come from there."""
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
        """Return a function that runs the step on the `buffers`, these, and the tensors of its results."""
        # The outer block puts the stream back where a capture fails at its end: torch does not.
        with torch.cuda.device(self.device), torch.cuda.stream(torch.cuda.current_stream(self.device)):
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Other threads may allocate and pin memory meanwhile, as loaders with workers do.
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                results = self.step(*buffers)
        return graph.replay, buffers, results

    def _recover(self):
        """Let go of a capture that failed, in which torch's allocator and generator believe themselves to be still."""
        torch.cuda.synchronize(self.device)
        with torch.cuda.device(self.device):
            index = torch.cuda.current_device()
        with contextlib.suppress(RuntimeError):  # that it has ended
            torch._C._cuda_endAllocateToPool(index, self.pool)
        generator = torch.cuda.default_generators[index]
        if hasattr(generator, "graphsafe_set_state"):
            fresh = torch.Generator(generator.device).manual_seed(generator.initial_seed())
            generator.graphsafe_set_state(fresh.graphsafe_get_state())
