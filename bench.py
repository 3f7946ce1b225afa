#!/usr/bin/env python3
"""Benchmarks of the kernels against plain torch and against the official code.

    python bench.py                            # the fused mixed operation, the same as: bench.py operations
    python bench.py step [--official DIR]      # the steps of a search, in each stage
    python bench.py evaluate [--official DIR]  # the steps of an evaluation
    python bench.py search                     # the epochs of a search, and hours of the paper's
    python bench.py losses [--data DIR]        # the losses of training with the kernels and without

`python bench.py COMMAND --help` describes each. Longer measurements, and those of a GPU:

    python -m harness.measure gpu --out DIR                # all of that and more on a GPU, in half an hour
    python -m harness.measure traffic                      # launches and bytes of a step on CUDA, counted without one
    python -m harness.measure model                        # and from these its time on an H200, modelled
    python -m harness.measure claims --data DIR --out DIR  # the paper's claims, in hours
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import sys

import torch

import pdarts
from harness.devices import keep_freed_memory, pick_device, pick_kernels
from harness.measure.epochs import epoch_rows, projected_hours
from harness.measure.evaluation_steps import evaluation_sides, verify_evaluation
from harness.measure.losses import SIDES, loss_rows
from harness.measure.operations import OPERATIONS, operation_rows
from harness.measure.operations import verify as verify_operations
from harness.measure.options import Parser, add_command, run_command
from harness.measure.search_steps import (
    NO_DROPOUT,
    SKIP_DROPOUT,
    batches,
    candidates,
    official_module,
    search_sides,
    verify_step,
)
from harness.measure.timing import copy_bandwidth, header, matrix_peak, operations_of, time_steps


def begin(args):
    """Return the device, for which the kernels are built, and the images of a step."""
    device = pick_device(args.device)
    pick_kernels("on", device)
    return device, getattr(args, "batch", None) or (32 if device.type == "cpu" else 96)


def operations(args):
    """The fused mixed operation against torch, once its results and gradients are found right.

    The tensors are those of the paper's search: the feature maps of the three parts of a network at batch 96, with the
    8, 5 and 3 candidates of the three stages. Every row is one operation, fused, and how many times longer other ways
    take:

        eager     the plain torch version, kernels.mixed_sum_ref or kernels.mixed_norm_sum_ref
        compile   torch.compile of it (the time that it takes to compile is reported apart)
        einsum    the outputs stacked into one tensor, then torch.einsum with the probabilities
        limit     every input read and every result written once, at the bandwidth of a large copy, measured in this run

    All sides run in turn, each with inputs that need gradients; the figure is the median, +- half the distance of the
    quartiles. On a GPU every side is captured as a CUDA graph that visits several sets of inputs, so that neither
    launches nor the L2 cache decide. The result of each call is allocated anew, as in use.
    """
    device, _ = begin(args)
    dtype = getattr(torch, args.dtype)
    print(*header(device), f"{args.dtype}, {'channels-last' if args.channels_last else 'NCHW'}", sep="\n")
    for name, error in verify_operations(device, dtype, args.channels_last).items():
        print(f"verified: {name} and its gradients, largest relative error {error:.1e}")
    bandwidth = copy_bandwidth(device)
    print(f"copy bandwidth {bandwidth / 1e9:.1f} GB/s\n")
    print(f"{'operation':15}{'shape':16}{'K':>2}  {'pass':9}{'fused ms':>16}{'GB/s':>7}   ", end="")
    print(f"{'eager':>7}{'compile':>9}{'einsum':>8}{'limit':>7}   saved MB, eager")
    rows = []
    for r in operation_rows(device, dtype, args.channels_last, 96, args.compile, args.seconds, bandwidth):
        rows.append(r)
        ms, fused = r["ms"], r["ms"]["fused"]
        ratio = {side: f"{ms[side] / fused:.2f}x" if side in ms else "-" for side in ("eager", "compile", "einsum")}
        saved = [f"{r['bytes_saved'][side] / 1e6:.1f}" for side in ("fused", "eager")]
        print(f"{r['operation']:15}{str(r['shape']):16}{r['candidates']:>2}  {r['pass']:9}{fused:>9.3f} ", end="")
        print(f"+-{r['spread_ms']['fused']:5.3f}{r['minimum_bytes'] / fused / 1e6:>7.1f}   ", end="")
        print(f"{ratio['eager']:>7}{ratio['compile']:>9}{ratio['einsum']:>8}", end="")
        print(f"{r['limit_ms'] / fused:>6.2f}x   {', '.join(saved)}", flush=True)
    if args.compile:
        compiling = sum(r["compile_seconds"] or 0.0 for r in rows)
        print(f"\ntorch.compile took {compiling:.0f} s to compile, not in the figures (its cache may have helped)")
    for problem in sorted({r["compile_problem"] for r in rows} - {None}):
        print(f"torch.compile failed: {problem}")
    print("\ntimes faster than (geometric mean of the sizes)")
    for name in OPERATIONS:
        for direction in ("forward", "fwd+bwd"):
            mine = [r for r in rows if r["operation"] == name and r["pass"] == direction]
            means = {
                side: statistics.geometric_mean(r["ms"][side] / r["ms"]["fused"] for r in mine if side in r["ms"])
                for side in mine[0]["ms"]
                if side != "fused"
            }
            print(f"{name:15} {direction:8} " + "   ".join(f"{side} {mean:.2f}" for side, mean in means.items()))
    return rows


def step(args):
    """A step of the weights and one of the alphas, in each stage of a search.

    A step is forward, backward and optimizer on one batch of generated images. All sides have the skip dropout on, at
    the initial rates of the paper's search: 0.1, 0.4 and 0.7 in the three stages. (Stage 1 has the rate of CIFAR-100
    instead of CIFAR-10's 0.0, so that every stage shows the cost of the dropout.) Before the timing, loss and gradients
    are found right without dropout, since every side draws masks of its own.

        ours      with the kernels
        graph     ours, replayed as a CUDA graph
        plain     the same network in plain torch
        official  the code of a checkout of github.com/chenxin061/pdarts in the folder DIR, always in float32

    On the CPU all sides take turns, and of three calls the third counts: two find the memory as the other sides left
    it. On a GPU one side after the other is alone in memory. "Of peak" is the share of the rate of this machine's own
    matrix products, of 2048 x 2048 (8192 x 8192 on a GPU), that a side reaches: the operations of the step's products
    and convolutions in the time that it takes. "Saved" is the memory that autograd saves for the backward pass.

    The first stage has all candidates; stages 2 and 3, on all sides, have those that the official code keeps in a
    search of testdata/derive.json, which differ from edge to edge: the first one, or with --search N the N-th.
    """
    device, batch = begin(args)
    if args.official:
        official_module(args.official, "model_search")
    candidates(1, args.search)  # a wrong number is refused before anything is built
    rates = args.skip_dropout or SKIP_DROPOUT
    config = dataclasses.replace(pdarts.CIFAR10, channels=args.channels, dtype=args.dtype, skip_dropout=rates)
    print(*header(device), f"{args.dtype}, batch {batch}, C = {args.channels}", sep="\n")
    print(f"candidates of stages 2 and 3: those of search {args.search} of testdata/derive.json")
    ((images, labels),) = batches(1, batch, device)
    peak, rows = matrix_peak(device, args.dtype, min(1, args.seconds)), []
    for stage in args.stages:
        distances = verify_step(stage, config, images, labels, args.search)
        print("\nverified: relative distances of loss {:.1e} and gradients {:.1e} from plain torch".format(*distances))
        makers = search_sides(stage, config, device, args.official, args.search)
        about = {"stage": stage, "cells": config.depths[stage - 1], "K": config.keep[stage - 1]}
        about["dropout"] = rates[stage - 1]
        rows += print_steps(args, about, makers, ("weights", "alphas"), images, labels, peak)
    return rows


def evaluate(args):
    """A step of an evaluation: training the network of the P-DARTS cell, with auxiliary head and a drop-path of 0.2.

    The sides are those of `bench.py step`, and "official-cl" is the official code in channels-last. Before the timing,
    loss, logits and gradients are found right in float64, against the official code too, which takes our state_dict.
    """
    device, batch = begin(args)
    if args.official:
        official_module(args.official, "model")
    print(*header(device), f"{args.dtype}, batch {batch}, the P-DARTS cell", sep="\n")
    ((images, labels),) = batches(1, batch, device)
    peak, rows = matrix_peak(device, args.dtype, min(1, args.seconds)), []
    for channels, cells in args.networks:
        config = pdarts.EvaluateConfig(channels=channels, depth=cells, dtype=args.dtype)
        distances = verify_evaluation(config, images[:8], labels[:8], args.official)
        for side, distance in distances.items():
            print(f"\nverified: in float64 ours has a relative distance of {distance:.1e} from {side}", end="")
        print()
        makers = evaluation_sides(config, device, args.official)
        rows += print_steps(args, {"C": channels, "cells": cells}, makers, ("weights",), images, labels, peak)
    return rows


def print_steps(args, about, makers, kinds, images, labels, peak):
    """Print a table of all sides, {name: function of images and labels}, ours first, and return its rows."""
    print("".join(f"{name:>8}" for name in about), f"  {'step of':9}{'side':12}", end="")
    print(f"{'seconds':>17}{'to ours':>10}{'of peak':>9}{'saved MB/image':>16}")
    plain = makers["plain"](images[:2], labels[:2])
    work = {which: operations_of(plain, which) * len(labels) / 2 for which in kinds}
    together = [makers] if images.device.type == "cpu" else [{name: make} for name, make in makers.items()]
    ours, rows = {}, []
    for group in together:
        built = {name: functools.partial(make, images, labels) for name, make in group.items()}
        for r in time_steps(built, kinds, images.device, args.seconds, args.rounds):
            seconds, reference = r["seconds"], ours.setdefault(r["step"], r["seconds"])
            share = work[r["step"]] / seconds / peak
            rows.append({**about, **r, "times_ours": seconds / reference, "of_peak": share})
            print("".join(f"{value:>8}" for value in about.values()), f"  {r['step']:9}{r['side']:12}", end="")
            print(f"{seconds:>9.4f} +-{r['spread']:6.4f}{seconds / reference:>8.2f} x{share:>8.1%}", end="")
            print(f"{r['saved_per_image'] / 1e6:>16.1f}" + (f"   peak {r['peak'] / 1e6:.0f} MB" if r["peak"] else ""))
            sys.stdout.flush()
    return rows


def search(args):
    """Seconds per epoch of each stage, and the hours that the paper's search would take.

    A search of the paper's networks on a few generated images, as a run makes it: with the skip dropout of the paper's
    search on CIFAR-10, which starts stage 1 at 0.0. A step takes the same time at every rate above 0, so that the
    measured epochs stand for all epochs of their kind.
    """
    device, batch = begin(args)
    half = batch * (20 if device.type == "cuda" else 1)  # images of each half
    rates = args.skip_dropout or pdarts.CIFAR10.skip_dropout
    settings = {"channels": args.channels, "dtype": args.dtype, "batch_size": batch, "skip_dropout": rates}
    print(*header(device), f"{args.dtype}, batch {batch}, C = {args.channels}, {half} images in each half", sep="\n")
    rows = epoch_rows(dataclasses.replace(pdarts.CIFAR10, **settings), device, half, True, args.graphs)
    print("\nseconds per 25,000 images, and the rate of the skip dropout")
    print(f"{'stage':7}{'cells':>5}{'K':>3}{'weights only':>16}{'dropout':>9}{'with alphas':>15}{'dropout':>9}")
    for r in rows:
        print(f"{r['stage']:<7}{r['cells']:>5}{r['K']:>3}{r['epoch']:>16.1f}{r['skip_dropout']:>9.2f}", end="")
        print(f"{r['epoch_with_alphas']:>15.1f}{r['skip_dropout_with_alphas']:>9.2f}")
    hours = projected_hours(rows)
    print(f"\nprojected, not measured: {hours:.2f} hours for the 75 epochs of the paper's search")
    return rows


def losses(args):
    """The losses of training with the kernels and without, on the same images, from the same start.

    A step of the weights and one of the alphas in turn; the table has the relative distances of their losses from plain
    torch in float64. The skip dropout is off, since the two ways draw different masks. "Last bit" is plain torch too,
    from weights of which the last bits were changed: it shows how far rounding alone carries a network away from
    itself. The exit status is 1 if the kernels' losses in float64 are not the same to 4 digits.
    """
    device, batch = begin(args)
    candidates(1, args.search)  # a wrong number is refused before anything is built
    config = dataclasses.replace(pdarts.CIFAR10, channels=args.channels, skip_dropout=NO_DROPOUT)
    data = batches(2 * args.steps, batch, device, args.data)
    source = "CIFAR-10" if args.data else "generated images"
    print(*header(device), f"batch {batch}, C = {args.channels}, {source}, no skip dropout", sep="\n")
    print(f"candidates of stages 2 and 3: those of search {args.search} of testdata/derive.json")
    rows = []
    for stage in args.stages:
        print(f"\n{'stage':7}{'step':6}{'of':9}{'plain, float64':>14}   distance from it:", end="")
        print("".join(f"{name:>18}" for name in SIDES))
        for r in loss_rows(stage, config, data, args.search):
            rows.append(r)
            if r["step"] in (1, 2, 5, args.steps) or r["step"] % 10 == 0:
                print(f"{stage:<7}{r['step']:<6}{r['of']:9}{r['loss']:>14.10f}{'':20}", end="")
                print("".join(f"{r['distance'][name]:>18.1e}" for name in SIDES), flush=True)
    worst, itself = (max(r["distance"][name] for r in rows) for name in ("kernels, float64", "last bit"))
    print(f"\nlargest distance in float64: {worst:.1e}; of plain torch from itself, last bit changed: {itself:.1e}")
    if not worst < 1e-4:
        sys.exit("the kernels' losses are not plain torch's to 4 digits; expected that as long as the last bit's are")
    return rows


def main(arguments: list[str]) -> int:
    parser = Parser(prog="python bench.py", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    everywhere = "device", "json"
    steps = *everywhere, "dtype", "batch", "rounds", "seconds", "official"
    some = add_command(commands, operations, *everywhere, "seconds", "channels-last", "no-compile", seconds=0.8)
    some.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    add_command(commands, step, *steps, "channels", "stages", "skip-dropout", "search")
    add_command(commands, evaluate, *steps, "networks")
    add_command(commands, search, *everywhere, "dtype", "batch", "channels", "skip-dropout", "no-graphs")
    add_command(commands, losses, *everywhere, "batch", "channels", "stages", "search", "steps", "data")
    alone = not arguments or arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")
    run_command(parser, ["operations", *arguments] if alone else arguments)
    return 0


if __name__ == "__main__":
    keep_freed_memory()
    raise SystemExit(main(sys.argv[1:]))
