"""Several processes: torchrun starts one for each GPU; each has the whole network and takes its part of every batch."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import time

import torch
import torch.distributed as dist

from pdarts import InputError


def processes() -> tuple[int, int]:
    """Return (rank of this process, number of processes): (0, 1) unless torch.distributed is initialised."""
    several = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if several else (0, 1)


@contextlib.contextmanager
def process_group(device: str):
    """Join the other processes, if torchrun started several; yield the device of this one."""
    if "LOCAL_RANK" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        yield device
        return
    on_gpu = device == "cuda" or device == "auto" and torch.cuda.is_available()
    if device.startswith("cuda:"):
        raise InputError(f"device is {device} for several processes; expected cuda, each gets its own, or cpu")
    if on_gpu:
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise InputError(
                f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}; expected "
                "--nproc-per-node no larger, or --device cpu"
            )
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    from torch.distributed.rendezvous import rendezvous  # not every build of torch has it

    # gloo beside NCCL: what all processes agree on besides gradients does not wait for the GPU.
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    timeout = datetime.timedelta(minutes=10)
    store, rank, number = next(rendezvous("env://", timeout=timeout))
    # Where torchrun starts the processes again, the store still holds the addresses of those before.
    store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, timeout=timeout, world_size=number, rank=rank, store=store)
    yield device
    dist.destroy_process_group()  # not after an error: the others may be gone


def average(gradients):
    """Return each gradient's mean over all processes, the same bits in all of them; None stays None.

    A network of a few million parameters needs no overlap with the backward pass: one message holds them all.
    """
    _, number = processes()
    present = [g for g in gradients if g is not None]
    if number == 1 or not present:
        return gradients
    flat = torch.cat([g.flatten() for g in present])
    dist.all_reduce(flat)
    means = iter((flat / number).split([g.numel() for g in present]))
    return [None if g is None else next(means).view_as(g) for g in gradients]


def gather(value) -> list:
    """Return the `value` of every process, by rank."""
    values = [value]
    if processes()[1] > 1:
        values = [None] * processes()[1]
        dist.all_gather_object(values, value)
    return values


def broadcast(value):
    """Return the `value` of rank 0."""
    values = [value]
    if processes()[1] > 1:
        dist.broadcast_object_list(values, 0)
    return values[0]


def largest(number: int) -> int:
    """Return the largest `number` of all processes."""
    if processes()[1] == 1:
        return number
    tensor = torch.tensor(number)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def share_buffers(network):
    """Take over the running statistics of rank 0, as the official code does on several GPUs."""
    if processes()[1] > 1:
        buffers = [b for b in network.buffers() if b.is_floating_point()]
        flat = torch.cat([b.flatten() for b in buffers])
        dist.broadcast(flat, 0)
        for buffer, part in zip(buffers, flat.split([b.numel() for b in buffers])):
            buffer.copy_(part.view_as(buffer))


def check_agreement(tensors, *others):
    """Raise RuntimeError unless all processes hold the same tensors, bit for bit, and the same `others`."""
    text = repr((others, [tensor.tolist() for tensor in tensors]))
    if len(set(gather(hashlib.sha256(text.encode()).hexdigest()))) > 1:
        raise RuntimeError("the processes hold different alphas or candidates; expected the same in all of them")


def batches_for(images: int, batch: int, number: int) -> int:
    """Return the batches of an epoch, without a last one of a single image for each process: batch norms need two."""
    if batch % number or min(batch, images) < 2 * number:
        raise InputError(
            f"batch is {batch}, of {images} images, for {number} process{'es' * (number > 1)}; expected 2 images or "
            "more for each, and as many for all"
        )
    whole, rest = divmod(images, batch)
    return whole + (rest >= 2 * number)


class Shared:
    """This process's part of every batch of a loader: every n-th image, the same number in all processes.

    Augmentation does not depend on the number of processes. Batch norms take the statistics of a process's own images,
    as the official code's do. The last batch is cut to a multiple of the number. A loader with `part(rank, number)`
    yields the part itself. waited: seconds that its batches took to come.
    """

    def __init__(self, loader):
        self.loader, (self.rank, self.number), self.waited = loader, processes(), 0.0
        if hasattr(loader, "part"):
            self.loader, self.rank, self.number = loader.part(*processes()), 0, 1
        if hasattr(loader, "config"):  # a pdarts.Loader
            self.batches = batches_for(len(loader.y), loader.config.batch_size, self.number)
        else:
            self.batches = len(self.loader)

    def __len__(self):
        return self.batches

    def epoch(self, seed, start=0):
        batches = self.loader.epoch(seed, start)
        for _ in range(start, self.batches):
            started = time.monotonic()
            if (batch := next(batches, None)) is None:
                raise InputError(f"the loader ended before its {self.batches} batches; expected as many as its length")
            self.waited += time.monotonic() - started
            images, labels = batch
            end = len(labels) // self.number * self.number
            if end < 2 * self.number:
                raise InputError(
                    f"the loader yields {len(labels)} images for {self.number} processes; expected 2 or more for each"
                )
            yield images[self.rank : end : self.number], labels[self.rank : end : self.number]
