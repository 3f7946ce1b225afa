"""Several processes: torchrun starts one for each GPU; each has the whole network and takes its part of every batch."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import time

import torch
import torch.distributed as dist

from harness.files import reason
from pdarts import InputError


def processes() -> tuple[int, int]:
    """Return (rank of this process, number of processes): (0, 1) unless torch.distributed is initialised."""
    several = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if several else (0, 1)


def environment_number(name: str, default: int | None = None, least: int = 0) -> int:
    """Return a variable that a launcher sets; InputError if it is no number from `least` on, or missing."""
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal() or int(text) < least:
        found = "not set" if text is None else repr(text)
        raise InputError(f"the variable {name} is {found}; expected a number from {least}, as torchrun sets it")
    return int(text)


# In which torchrun and other launchers say how many processes they have started.
SIZES = "WORLD_SIZE SLURM_STEP_NUM_TASKS SLURM_NTASKS OMPI_COMM_WORLD_SIZE PMI_SIZE MV2_COMM_WORLD_SIZE".split()
SIZES += ["FLUX_JOB_SIZE", "JSM_NAMESPACE_SIZE"]


def several_started() -> bool:
    """Return whether torchrun started several processes; InputError if another launcher did."""
    if "LOCAL_RANK" not in os.environ:
        found = [f"{name}={os.environ[name]}" for name in SIZES if os.environ.get(name, "1") not in ("", "1")]
        found += [f"RANK={os.environ['RANK']}"] if os.environ.get("RANK", "0") not in ("", "0") else []
        if found:
            without = " ".join(f"-u {variable.partition('=')[0]}" for variable in found)
            raise InputError(
                f"{found[0]} stands for several processes, but LOCAL_RANK is not set; expected torchrun, which sets "
                f"both, or, for one process alone, env {without}"
            )
        return False
    return environment_number("WORLD_SIZE", least=1) > 1


@contextlib.contextmanager
def process_group(device: str):
    """Join the other processes, if torchrun started several; yield the device of this one."""
    if not several_started():
        yield device
        return
    on_gpu = device == "cuda" or device == "auto" and torch.cuda.is_available()
    if device.startswith("cuda:"):
        raise InputError(f"device is {device} for several processes; expected cuda, each gets its own, or cpu")
    if on_gpu:
        local = environment_number("LOCAL_RANK")
        if local >= torch.cuda.device_count():
            raise InputError(
                f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}; expected "
                "--nproc-per-node no larger, or --device cpu"
            )
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    from torch.distributed.rendezvous import rendezvous  # not every build of torch has it

    rank, number, port = (environment_number(name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if rank >= number:
        raise InputError(f"the variable RANK is {rank} of {number} processes; expected 0 to {number - 1}")
    if not os.environ.get("MASTER_ADDR"):
        raise InputError("the variable MASTER_ADDR is not set; expected the address of rank 0, as torchrun sets it")
    # gloo beside NCCL: what all processes agree on besides gradients does not wait for the GPU.
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    timeout = datetime.timedelta(minutes=10)
    try:
        store, _, _ = next(rendezvous("env://", timeout=timeout))
        # Where torchrun starts the processes again, the store still holds the addresses of those before.
        store = dist.PrefixStore(f"start {environment_number('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend, timeout=timeout, world_size=number, rank=rank, store=store)
    except (RuntimeError, ValueError, OSError) as error:  # such as an address that cannot be reached
        raise InputError(
            f"the processes cannot meet at {os.environ['MASTER_ADDR']}:{port} ({reason(error)}); expected MASTER_ADDR "
            "and MASTER_PORT of rank 0"
        ) from None
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
