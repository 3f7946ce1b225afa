"""Tests of several processes: they compute the same as one, agree, and stop and resume together."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

import kernels
import pdarts
from harness import cli
from harness.conftest import (
    ENVIRONMENT,
    FAST_SEARCH,
    ONE_STAGE,
    ROOT,
    assert_same_run,
    beside,
    fast_search,
    in_two_processes,
    random_images,
    write_images,
)
from harness.distributed import (
    Shared,
    average,
    broadcast,
    check_agreement,
    gather,
    largest,
    process_group,
    processes,
    share_buffers,
)
from harness.run import Stopped
from pdarts import InputError, SearchNetwork, loss_and_logits

FEW = (("none", "skip_connect", "sep_conv_3x3"),) * 14


class Numbers:
    """A loader of the numbers from 0 on, as images and labels."""

    def __init__(self, images, batch):
        self.y = torch.arange(images)
        self.config = pdarts.SearchConfig(batch_size=batch)

    def epoch(self, seed, start=0):
        yield from list(zip(self.y.split(self.config.batch_size), self.y.split(self.config.batch_size)))[start:]


# --- two processes, without torchrun ----------------------------------------------------------------------------------


def gradients(images, labels):
    """Of weights and alphas, by a process for its part of the batch; statistics are frozen."""
    rank, number = processes()
    torch.manual_seed(0)
    network = SearchNetwork(2, 3, 3, FEW, FEW).double().eval()
    loss, _ = loss_and_logits(network, images[rank::number].double(), labels[rank::number])
    return average(torch.autograd.grad(loss, [*network.weights(), *network.alphas()]))


def check_what_two_processes_agree_on(rank):
    assert processes() == (rank, 2) and gather(("a", "b")[rank]) == ["a", "b"]
    assert broadcast(rank) == 0 and largest(rank) == 1 and largest(0) == 0
    first, none, last = average([torch.full((2, 1), 1.0 + rank), None, torch.tensor(3.0 * rank)])
    assert none is None and first.tolist() == [[1.5], [1.5]] and last.tolist() == 1.5
    assert average([None]) == [None]
    norm = torch.nn.BatchNorm1d(2)
    norm.running_mean += rank
    norm.num_batches_tracked += rank
    share_buffers(norm)
    assert norm.running_mean.tolist() == [0, 0] and norm.num_batches_tracked == rank
    check_agreement([torch.ones(2)], "the same")
    for tensor, other in (torch.full((2,), 1 + 1e-6 * rank), "the same"), (torch.ones(2), f"of {rank}"):
        with pytest.raises(RuntimeError, match="the processes hold different alphas"):
            check_agreement([tensor], other)
    with pytest.raises(InputError, match="batch is 7, of 16 images, for 2 processes; expected 2 images or more for ea"):
        Shared(Numbers(16, 7))
    with pytest.raises(InputError, match="batch is 2, of 16 images, for 2 processes"):
        Shared(Numbers(16, 2))
    parts = [[labels.tolist() for _, labels in Shared(Numbers(n, 4)).epoch(0, n // 4 - 1)] for n in (8, 10, 13, 15)]
    # The last batch whole; 2, one for each, left out; 1, left out; and 3, too few as well.
    assert parts == [[[4 + rank, 6 + rank]], [[4 + rank, 6 + rank]], [[8 + rank, 10 + rank]], [[8 + rank, 10 + rank]]]
    assert [len(Shared(Numbers(n, 8))) for n in (8, 11, 12, 16)] == [1, 1, 2, 2]  # 4 of 8: two for each


def check_that_two_processes_stop_and_go_on_together(rank, folder):
    """Where only one of them gets a signal; its settings and data must be the other's."""
    images, alternate = random_images((8, 8), 3, 24), pdarts.Search.alternate
    fast_search(ONE_STAGE, images, f"{folder}/whole")

    def interrupted(*arguments):
        results = alternate(*arguments)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return results

    pdarts.Search.alternate = interrupted
    way = {"out": f"{folder}/run"}
    for _ in range(3):  # after every step of an epoch
        with pytest.raises(Stopped):
            fast_search(ONE_STAGE, images, **way)
        way = {"resume": f"{folder}/run"}
    pdarts.Search.alternate = alternate
    fast_search(ONE_STAGE, images, **way)
    with pytest.raises(InputError, match="the processes have different settings or data; expected the same on every"):
        fast_search(ONE_STAGE, random_images((8, 8), 3, 24 + rank), f"{folder}/other")
    assert rank or not os.path.exists(f"{folder}/other")  # rank 0 claims it, and leaves nothing there


def of_two(rank, number, folder, images, labels):
    kernels.use("off")
    torch.set_num_threads(1)
    if rank == 0:
        torch.save(gradients(images, labels), f"{folder}/one.pt")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=number)
    torch.save(gradients(images, labels), f"{folder}/{rank}.pt")
    check_what_two_processes_agree_on(rank)
    check_that_two_processes_stop_and_go_on_together(rank, folder)
    dist.destroy_process_group()
    os._exit(0)  # as the command line ends: torch's threads abort Python's own end at random


@beside
def test_two_processes_compute_what_one_does_agree_and_stop_together(folder):
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(6) % 3
    in_two_processes(of_two, folder, images, labels)
    right, *both = (torch.load(folder / f"{name}.pt", weights_only=True) for name in ("one", 0, 1))
    for mine in both:
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(mine, right, strict=True))
    assert_same_run(folder / "whole", folder / "run")


# --- one process ------------------------------------------------------------------------------------------------------


def test_one_process_is_alone():
    tensors = [torch.ones(2), None]
    assert processes() == (0, 1) and gather("a") == ["a"] and broadcast("a") == "a" and largest(3) == 3
    assert average(tensors) is tensors
    check_agreement(tensors[:1], "anything")


def test_all_of_one_process_is_what_the_loader_gives():
    for number in 8, 9, 10, 11:
        alone = Shared(Numbers(number, 4))
        given = [labels.tolist() for _, labels in alone.epoch(0)]
        left_out = number == 9  # a single image, on which batch norm cannot be trained
        assert given == [part.tolist() for part in torch.arange(8 if left_out else number).split(4)]
        assert len(alone) == len(given) and [labels.tolist() for _, labels in alone.epoch(0, 1)] == given[1:]


def test_the_rendezvous_waits_only_where_torchrun_started_several(monkeypatch):
    with process_group("auto") as device:
        assert device == "auto"
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with process_group("cpu") as device:
        assert device == "cpu"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="device is cuda:1 for several processes; expected cuda, each gets its own"):
        with process_group("cuda:1"):
            pass
    monkeypatch.setenv("LOCAL_RANK", "99")
    with pytest.raises(InputError, match=r"process 99 of this machine has no GPU: there are \d+; expected"):
        with process_group("cuda"):
            pass


TORCHRUN = {"LOCAL_RANK": "0", "WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1234"}


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2 stands for several processes, but LOCAL_RANK is not set; exp"),
        ({"RANK": "1"}, "RANK=1 stands for several processes, but LOCAL_RANK is not set; expected torchrun, which"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, "SLURM_NTASKS=2 stands for several processes, but LOCAL_RANK is"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, ".* or, for one process alone, env -u OMPI_COMM_WORLD_SIZE"),
        (TORCHRUN | {"WORLD_SIZE": "x"}, "the variable WORLD_SIZE is 'x'; expected a number from 1, as torchrun sets"),
        (TORCHRUN | {"WORLD_SIZE": "0"}, "the variable WORLD_SIZE is '0'; expected a number from 1"),
        (TORCHRUN | {"RANK": None}, "the variable RANK is not set; expected a number from 0"),
        (TORCHRUN | {"RANK": "2"}, "the variable RANK is 2 of 2 processes; expected 0 to 1"),
        (TORCHRUN | {"MASTER_ADDR": None}, "the variable MASTER_ADDR is not set; expected the address of rank 0"),
        (TORCHRUN | {"MASTER_PORT": "x"}, "the variable MASTER_PORT is 'x'; expected a number from 0"),
        (TORCHRUN | {"MASTER_PORT": "99999"}, "the processes cannot meet at localhost:99999 .* expected MASTER_ADDR"),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "0"}, "the variable LOCAL_WORLD_SIZE is '0'; expe"),
        ({"TORCHELASTIC_RESTART_COUNT": "x"}, "the variable TORCHELASTIC_RESTART_COUNT is 'x'; expected a number"),
    ],
)
def test_wrong_variables_of_a_launcher_get_one_line(tmp_path, monkeypatch, capsys, variables, message):
    monkeypatch.chdir(tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)
    assert cli.command(["search", *FAST_SEARCH, "--device", "cpu"]) == 2
    assert re.fullmatch(f"pdarts.py: error: {message}.*\n", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_variables_of_a_launcher_of_one_process_change_nothing(monkeypatch):
    for name in "WORLD_SIZE", "SLURM_NTASKS":
        monkeypatch.setenv(name, "1")
    with process_group("auto") as device:
        assert device == "auto"


# --- torchrun ---------------------------------------------------------------------------------------------------------


# Seen by every Python that is started: a process that dies, as a machine's might, and one that says how it ends.
SITE = """
import atexit, os, signal
if "LOCAL_RANK" in os.environ:
    atexit.register(print, "Python's own end", flush=True)
    if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
        import harness.run
        stop_if_asked, calls = harness.run.Run.stop_if_asked, []

        def killed(self, *arguments, **more):
            stop_if_asked(self, *arguments, **more)
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGKILL)

        harness.run.Run.stop_if_asked = killed
"""


@beside
def test_a_search_of_two_processes_goes_on_when_one_dies_and_both_end_together(folder):
    write_images(folder)
    (folder / "sitecustomize.py").write_text(SITE)
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
    options = "--channels 8 --batch-size 8 --epochs 2 --alpha-start 1 --device cpu --data own.npz --out found".split()
    command = [sys.executable, *torchrun, ROOT / "pdarts.py", "search", *FAST_SEARCH, *options]
    environment = ENVIRONMENT | {"PDARTS_KERNELS": "off", "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=170)
    assert result.returncode == 0, result.stderr
    assert "failed (exitcode: " in result.stderr  # one died in its second epoch, and then the other
    assert "Python's own end" not in result.stdout  # where torch's threads abort or block it, at random
    # Rank 0 speaks, and resumes after the first epoch.
    assert result.stdout.count("epoch  0/1") == 1 and result.stdout.count("epoch  1/1") == 1
    assert result.stdout.count("node 0 =") == 2
    log = [json.loads(line) for line in (folder / "found/log.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in log] == [0, 1]
    assert json.loads((folder / "found/config.json").read_text())["processes"] == 2
