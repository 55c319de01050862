"""The commands: look at the data, pretrain an encoder, train classifiers on it, compare, use them.

This file only wires: it parses, seeds, chooses the device and the paths, and prints. What is
computed stands in data.py (pictures, groups, views), simclr.py (encoder, loss, pretraining),
evaluate.py (the numbers), heads.py (splits and classifiers) and gradcam.py (heat maps), to be read
in this order.

    data:      pictures -- groups, splits --> splits.csv, and what a leak would score
    pretrain:  pictures of no val or test group -- two views --> simclr.pretrain --> encoder.pt
    probe:     encoder.pt, frozen -- features --> heads.train_probe --> classifier.pt, metrics.json
    finetune:  encoder.pt, all of it trained, or random weights --> classifier.pt, metrics.json
    compare:   all of these on the same few labels --> table.md
    evaluate:  classifier.pt, pictures it has not seen --> metrics.json
    predict:   classifier.pt, files and folders --> class probabilities
    explain:   classifier.pt, pictures --> where it looked: index.html, and what that is worth
    embed:     encoder.pt, a folder --> features.npz

Next: nothing; this is the last.
"""

import argparse
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
from torch import nn
from tqdm import tqdm

import data
import evaluate
import gradcam
import heads
import simclr

RUNS = Path("runs")
PUBLISHED = {"image_size": 128, "arch": "resnet18"} | asdict(simclr.Pretraining())
# On the phantoms a command takes minutes on a laptop; these settings, and no others, differ there.
PHANTOM_DEFAULTS = {"image_size": 64, "batch_size": 32, "epochs": 12}
KNN_EVERY = 5  # epochs of a pretraining between two looks at what the features know
COLLAPSED = 0.1  # of a healthy standard deviation
EXPLAINED = 32  # pictures explained at once
STAGES = ("head", *(f"encoder.{part}" for part in reversed(("conv1", "bn1", *simclr.STRIDES))))
# Which process this is and of how many, as torchrun says; only the first one writes and prints.
RANK, PROCESSES = (int(os.environ.get(name, k)) for k, name in enumerate(("RANK", "WORLD_SIZE")))
progress_bar = partial(tqdm, disable=RANK > 0)

# ---------------------------------------------------------------------------------------------
# What the commands share
# ---------------------------------------------------------------------------------------------


class Machine(NamedTuple):
    """What a command computes on."""

    device: torch.device
    bf16: bool  # of training's steps; all else is float32
    text: str  # which, and why


def choose_machine(args: argparse.Namespace) -> Machine:
    """The device and the precision, as asked for or as the machine can.

    Raises:
        UserError: --device names one that is not here.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    name = ("cuda" if cuda else "mps" if mps else "cpu") if args.device == "auto" else args.device
    if (name == "cuda" and not cuda) or (name == "mps" and not mps):
        raise data.UserError(f"this machine has no {name} device; give --device auto or cpu")
    device = torch.device(name)
    if name == "cuda":
        device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # a step's shapes are those of the step before
    bf16, why = simclr.native_bf16(device)
    if "precision" not in args:
        bf16, why = False, "only training takes bf16"
    elif args.precision != "auto":
        bf16, why = args.precision == "bf16", f"--precision {args.precision}"
    many = f"{PROCESSES} processes, " * (PROCESSES > 1)
    precision = "bf16 in training" if bf16 else "float32"
    return Machine(device, bf16, f"{many}{name}, {precision} ({why})")


def run_folder(args: argparse.Namespace, name: str) -> Path:
    """--out or, where it was not given, runs/`name`, checked before anything is computed.

    Raises:
        UserError: it is a file, or lies inside the data, where its pictures would be read as scans.
    """
    out = args.out or base_folder(args) / name
    for folder in (out, *out.parents):
        if folder.exists() and not folder.is_dir():
            raise data.UserError(f"{folder} is a file, and results go into a folder")
    given = [*filter(None, [args.data]), *vars(args).get("paths", [])]
    for folder, scans in ((f, path) for f in (out, RUNS) for path in given if path.is_dir()):
        if folder.resolve().is_relative_to(scans.resolve()):
            name = "--data " * (scans == args.data)
            raise data.UserError(
                f"results would go to {folder.resolve()}, inside {name}{scans}, and be read as "
                "scans next time; start the command from another folder, or give another --out"
            )
    return out


def base_folder(args: argparse.Namespace) -> Path:
    """Where the runs lie; apart for phantoms, so that no default encoder is of the other kind."""
    return RUNS if args.data else RUNS / "phantoms"


def encoder_path(args: argparse.Namespace) -> Path:
    """--encoder or, where it was not given, that of `pretrain` on the same kind of data."""
    return args.encoder or base_folder(args) / "pretrain" / "encoder.pt"


def load_data(args: argparse.Namespace, image_size: int) -> heads.Study:
    """Read --data or the phantoms; say what is there, what cannot be read, and what is suspect.

    Args:
        image_size: of the encoder, in pixels; the split does not depend on it.

    Raises:
        UserError: the data cannot be read, or too many of its pictures (`data` shows them all).
    """
    how = partial(progress_bar, leave=False), args.group_pattern
    load = partial(heads.load, args.data, image_size, RUNS / "cache", *how, resplit=args.resplit)
    loaded: list[heads.Study] = []
    # of many processes the first decodes, with a progress bar, and the others find all in the cache
    simclr.on_every_rank(lambda: loaded.append(load()))
    study = loaded[0] if loaded else load()
    paths, bad = study.pictures.paths, study.pictures.unreadable
    where = args.data or "phantoms, drawn by code (--data takes your own scans)"
    counts = f"{len(bad):,} unreadable, {study.other_files:,} other files"
    print(f"{where}: {len(paths):,} pictures in {study.groups.max() + 1:,} groups, {counts}")
    name_unreadable(study.pictures, refuse=args.command != "data")
    for name, task in study.tasks.items():
        counts = ", ".join(f"{(task.split == part).sum():,} {part}" for part in evaluate.PARTS)
        if args.command == "pretrain" or name == args.task:
            print(f"  task {name} ({', '.join(task.classes)}): {counts}")
        if task.notes["largest_group_is_suspect"]:
            size = f"{task.notes['largest_group']} of the {len(task.rows):,} pictures of {name}"
            print(f"  warning: one group holds {size}: a patient, or strangers chained by twins")
    return study


def name_unreadable(pictures: data.Pictures, refuse: bool) -> None:
    """Name what could not be read.

    Args:
        refuse: where it is too much, stop.

    Raises:
        UserError: it is too much.
    """
    paths, bad = pictures.paths, pictures.unreadable
    for row, why in bad.items():
        print(f"  left out, unreadable: {paths[row]!r} ({why})")
    least, share = data.MAX_UNREADABLE
    if refuse and len(bad) > max(least, share * len(paths)):
        raise data.UserError(
            f"{len(bad)} of {len(paths)} pictures cannot be read, the first is "
            f"{paths[min(bad)]!r} ({bad[min(bad)]}); replace or remove them"
        )


def readable(pictures: data.Pictures) -> np.ndarray:
    """(m,) int64: the pictures that could be read.

    Raises:
        UserError: there are none.
    """
    rows = np.setdiff1d(np.arange(len(pictures.paths)), list(pictures.unreadable))
    if not len(rows):
        raise data.UserError("no picture can be read; give others")
    return rows


def load_paths(args: argparse.Namespace, image_size: int) -> tuple[data.Pictures, np.ndarray]:
    """Read the files and folders that were typed: their pictures, and those that can be read."""
    progress = partial(progress_bar, leave=False)
    pictures = data.load_files(args.paths, image_size, RUNS / "cache", progress)
    name_unreadable(pictures, refuse=True)
    return pictures, readable(pictures)


def one_line(text: object) -> str:
    """A text without control characters: a file's name may hold line breaks, and worse."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def data_flags(args: argparse.Namespace) -> list[str]:
    """The words that make the next command read the same data in the same way."""
    words = ["--data", str(args.data)] if args.data else []
    words += ["--group-pattern", args.group_pattern.pattern] if args.group_pattern else []
    return words + ["--resplit"] * args.resplit


def run_config(
    args: argparse.Namespace,
    study: heads.Study,
    machine: Machine,
    settings: simclr.Pretraining | heads.Probing | heads.FineTuning | None,
    **values: object,
) -> dict:
    """config.json: every value that shaped the run, in plain types; checkpoints hold it too.

    Args:
        settings: of the training, where there is one; its fields are written one by one.
        values: what else shaped the run.
    """
    config = {"command": args.command, "data": str(args.data.resolve()) if args.data else None}
    config |= {"phantoms": args.data is None, "fingerprint": heads.fingerprint(study)}
    config |= {"group_pattern": args.group_pattern.pattern if args.group_pattern else None}
    config |= {"resplit": args.resplit, **values, **(asdict(settings) if settings else {})}
    config |= {"device": machine.device.type, "precision": "bf16" if machine.bf16 else "fp32"}
    config |= {"processes": PROCESSES, "threads": torch.get_num_threads()}
    return config | origin(args)


def origin(args: argparse.Namespace) -> dict:
    """What a run is repeated from: the words that were typed, the code's commit, the versions."""
    versions = {module.__name__: str(module.__version__) for module in (torch, np, PIL)}
    git = "git describe --always --dirty --abbrev=40 --exclude=*".split()
    how = {"cwd": Path(__file__).parent, "capture_output": True, "text": True}
    try:
        commit = subprocess.run(git, **how).stdout.strip() or None
    except OSError:  # no git here
        commit = None
    about = {"typed": args.typed, "folder": str(Path.cwd()), "commit": commit}
    return about | {"versions": versions | {"python": platform.python_version()}}


def write(out: Path, files: dict[str, object]) -> None:
    """Write files (by name, as `evaluate.as_bytes` takes them), each whole or not at all."""
    for name, value in files.items() if not RANK else ():  # of many processes, the first one does
        with data.write_atomically(out / name) as file:
            file.write(evaluate.as_bytes(name, value))


def conclude(out: Path, files: dict[str, object], command: list[str] | None = None) -> None:
    """Write a command's files; print the report among them, what lies there, what to type next.

    Args:
        command: the next command's words after main.py.
    """
    write(out, files)
    print(files.get("report.txt", ""), end="")
    there = sorted(path.name for path in out.glob("*"))
    named = [name for name in there if name in files or len(there) <= 20]  # not all overlays
    more = f" and {len(there) - len(named)} more" * (len(named) < len(there))
    print(f"in {out}/ now: {', '.join(named)}{more}")
    if command:
        print("next:", shlex.join(["python", "main.py", *command]))


# ---------------------------------------------------------------------------------------------
# data
# ---------------------------------------------------------------------------------------------


def survey(args: argparse.Namespace) -> None:
    """Show what is there, what belongs together, how it splits, and what leaks would score."""
    run_folder(args, "")
    study = load_data(args, args.image_size)
    pictures = study.pictures
    for name in [args.task] if args.task else sorted(study.tasks):
        task = study.task(name)
        if not len(task.rows):
            print(f"task {name}: none of its pictures can be read")
            continue
        meter = evaluate.leak_meter(pictures.thumbnails[task.rows], task.labels, task.groups)
        report = heads.survey(study, task, meter)
        out = run_folder(args, f"data-{name}") / ("" if args.task or not args.out else name)
        files = {"splits.csv": heads.split_table(study, task), "report.txt": report}
        conclude(out, files | {"leak.png": evaluate.leak_picture(meter, name)})
    labelled = sum(len(task.rows) for task in study.tasks.values())
    loose = len(pictures.paths) - len(pictures.unreadable) - labelled
    print(f"{loose:,} readable pictures are of no task: not in class folders side by side")


# ---------------------------------------------------------------------------------------------
# pretrain
# ---------------------------------------------------------------------------------------------


@contextmanager
def note_signals() -> Iterator[list[int]]:
    """Note Ctrl-C and SIGTERM down, so that a step can be finished; a second one quits at once.

    Yields:
        The numbers of the signals that have come.
    """
    noted: list[int] = []

    def note(number: int, _: object) -> None:
        """Python calls this between any two instructions, even of a print: it only writes bytes."""
        if noted and PROCESSES == 1:  # torchrun may hand on what has come already
            os._exit(128 + number)
        noted.append(number)
        os.write(2, b"\nfinishing this step, then saving; once more quits at once\n" * (not RANK))

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(
    run: simclr.Run,
    steps: Iterator[dict | None],
    out: Path,
    config: dict,
    save: Callable[[], float],
    look: Callable[[dict], None] = lambda record: None,
) -> None:
    """Train a run to its end; show, log and save it on the way.

    Args:
        steps: of `simclr.pretrain` or `heads.finetune`.
        save: writes a checkpoint; returns when to do so again, on time.monotonic's clock.
        look: is shown each epoch's record, and may add to it.

    Raises:
        SystemExit: a signal came; the run is saved, the status is 128 + the signal's number.
    """
    done, total = len(run.records) * run.steps + run.step, run.epochs * run.steps
    if done and not run.finished:
        print(f"  goes on after step {run.step} of epoch {len(run.records) + 1}")
    write(out, {"config.json": config, "log.jsonl": run.records})
    due = time.monotonic() + simclr.CHECKPOINT_SECONDS
    bar = progress_bar(total=total, initial=done, unit="step", desc=config["command"])
    with note_signals() as noted, bar:
        simclr.on_any_rank(0)  # waits until every rank listens to signals
        for record in steps:
            show_step(bar, run)
            if record:
                look(record)
                write(out, {"log.jsonl": run.records})
                run.since = time.perf_counter()  # looking is not training
            number = simclr.on_any_rank(noted[0] if noted else 0)
            if not run.finished and (number or time.monotonic() > due):  # the end saves anyway
                due = save()
            if number and not run.finished:
                bar.close()
                print(f"stopped after step {run.step} of epoch {len(run.records) + 1}, and saved")
                print("the same command goes on from there (without --restart)")
                raise SystemExit(128 + number)
        save()


def pretrain(args: argparse.Namespace) -> None:
    """Learn an encoder from pictures without labels, or go on learning; leaves encoder.pt."""
    out, machine = run_folder(args, "pretrain"), choose_machine(args)
    with simclr.many_processes(PROCESSES, machine.device), ExitStack() as held:
        study = load_data(args, args.image_size)
        rows, pictures = heads.pretraining_rows(study), study.pictures
        torch.manual_seed(args.seed)  # the networks' first weights
        encoder, *scaling = simclr.init_encoder(args.arch, args.init)
        settings = pretraining_settings(args, study, len(rows), scaling)
        values = {"arch": args.arch, "init": args.init, "image_size": args.image_size}
        config = run_config(args, study, machine, settings, leaked=False, **values)
        config["pictures"] = len(rows)
        simclr.check_equal(config["fingerprint"])
        run = simclr.pretraining(encoder, settings, len(rows), *machine[:2])
        state = simclr.on_every_rank(partial(simclr.open_run, held, out, config, args.restart))
        if state:
            run.restore(state)
        if state and run.finished and simclr.on_every_rank((out / "encoder.pt").exists):
            print(f"{out} holds this run, and it is finished; --restart would begin it anew")
        else:
            size = f"{len(rows):,} pictures at {args.image_size} px"
            print(f"pretrain {args.arch} on {size}, on {machine.text}")
            print(f"  {run.epochs} epochs of {run.steps} steps of {settings.batch_size} slices")
            seen = torch.from_numpy(pictures.hashes[rows])
            save = partial(simclr.save_run, run, out, config, seen)
            steps = simclr.pretrain(run, pictures.cached["square"], pictures.place[rows])
            train(run, steps, out, config, save, partial(look_at_epoch, args, run, study))
        finish_pretraining(args, out, run.records, study)


def look_at_epoch(
    args: argparse.Namespace, run: simclr.Run, study: heads.Study, record: dict
) -> None:
    """Say what the loss does not: whether projections collapse and, with labels, what h knows."""
    spread, loss = record["embedding_std"], record["loss"]
    if spread < COLLAPSED * simclr.PROJECTION**-0.5 and not RANK:
        nothing = math.log(2 * run.settings.batch_size - 1)
        tqdm.write(
            f"warning: the projections have collapsed: standard deviation {spread:.2g} where "
            f"{simclr.PROJECTION**-0.5:.2g} is healthy; loss {loss:.3f}, and log(2N - 1), of "
            f"nothing learnt, is {nothing:.3f}. Where it stays so, lower --lr"
        )
    task, epoch = study.tasks.get(following_task(args, study)), record["epoch"]
    if task and not RANK and (epoch % KNN_EVERY == 0 or run.finished):
        how = vars(run.settings), study.pictures, task, run.device
        accuracy = heads.knn_accuracy(run.networks["encoder"], *how)
        if accuracy is not None:
            record["knn_accuracy"] = accuracy
            tqdm.write(
                f"epoch {epoch}: loss {loss:.3f}, kNN accuracy {accuracy:.3f} on the val "
                f"part of {task.name}"
            )


def following_task(args: argparse.Namespace, study: heads.Study) -> str | None:
    """The task to look at first; None where there is none."""
    return "tumor" if args.data is None else min(study.tasks, default=None)


def pretraining_settings(
    args: argparse.Namespace, study: heads.Study, n: int, scaling: list[float]
) -> simclr.Pretraining:
    """The settings for n pictures; says what is held out, and when the batch has to shrink.

    Args:
        scaling: mean and std of the pixels.
    """
    print(*heads.usage(study), sep="\n")
    batch_size = min(args.batch_size, n // PROCESSES * PROCESSES)
    if batch_size < 2:
        text = f"{n} pictures are left to pretrain on (see above), and contrasting takes at least 2"
        raise data.UserError(f"{text}; where publishers' parts share patients, --resplit helps")
    if batch_size % PROCESSES:
        raise data.UserError(
            f"{PROCESSES} processes cannot share a --batch-size of {batch_size} evenly; give a "
            f"multiple of {PROCESSES}, such as {batch_size // PROCESSES * PROCESSES + PROCESSES}"
        )
    if args.batch_size > batch_size:
        print(f"  the batch shrinks from {args.batch_size} to {batch_size}: {n} pictures are there")
    given = {f.name: getattr(args, f.name) for f in fields(simclr.Pretraining) if f.name in args}
    given |= {"batch_size": batch_size, "mean": scaling[0], "std": scaling[1]}
    return simclr.Pretraining(**given)


def show_step(bar: tqdm, run: simclr.Run) -> None:
    """Move the progress bar by a step; where it is redrawn, with the epoch's means so far."""
    if bar.update() and run.step:  # True = redrawn. Reading sums makes the device wait: only then.
        loss, accuracy, _ = (run.sums / run.step).tolist()
        speed = (bar.format_dict["rate"] or 0) * run.batch  # in slices, not in views
        text = f"loss {loss:.3f}, accuracy {accuracy:.2f}, {speed:.0f} images/s"
        bar.set_postfix_str(text)


def finish_pretraining(
    args: argparse.Namespace, out: Path, records: list[dict], study: heads.Study
) -> None:
    """Draw the curve; say what was reached, what was written and what to type next.

    Args:
        records: of all epochs, as `simclr.pretrain` yields them; none after --epochs 0.
    """
    if records:
        text = "epoch {epoch}: loss {loss:.3f}, contrastive accuracy {contrastive_accuracy:.2f}, "
        text += "{images_per_second:.0f} images/s; {minutes:.1f} minutes of training"
        print(text.format(**records[-1], minutes=sum(r["seconds"] for r in records) / 60))
    task = following_task(args, study)
    encoder = ["--encoder", str(out / "encoder.pt")] if args.out else []
    following = ["probe", *data_flags(args), "--task", task, *encoder] if task else []
    files = {"log.jsonl": records, "curve.png": evaluate.pretraining_picture(records)}
    conclude(out, files, following)


# ---------------------------------------------------------------------------------------------
# probe, finetune, compare
# ---------------------------------------------------------------------------------------------


class Trial(NamedTuple):
    """What classifiers are trained from, and on."""

    out: Path
    machine: Machine
    encoder: simclr.ResNet
    checkpoint: dict  # the encoder's
    study: heads.Study
    task: heads.Task
    leaked: list[str]  # test pictures that the encoder has seen
    values: dict  # for config.json
    scaling: dict  # the encoder's mean and std


def prepare(args: argparse.Namespace, name: str, init: str | None = None) -> Trial:
    """Read the encoder and the data; refuse to test on what was trained on.

    Args:
        name: of the run's folder, before the task's.
        init: as `simclr.init_encoder` takes it; None = begin with --encoder.
    """
    out, machine = run_folder(args, f"{name}-{args.task}"), choose_machine(args)
    if init is None:
        path = encoder_path(args)
        encoder, checkpoint = simclr.load_encoder(path)
        if "head_type" in checkpoint:  # of a fine-tuning it would know the labels beforehand
            raise data.UserError(f"{path} is a classifier; --encoder takes an encoder.pt")
        origin = f"{path} of epoch {checkpoint['epoch']}"
        values = {"encoder": str(path.resolve()), "pretraining": checkpoint["config"]}
    else:
        torch.manual_seed(args.seed)
        encoder, mean, std = simclr.init_encoder(args.arch, init)
        origin, values = f"{init} weights", {"init": init}
        config = {"arch": args.arch, "image_size": args.image_size, "mean": mean, "std": std}
        seen = torch.zeros(0, 16, dtype=torch.uint8)
        checkpoint = simclr.encoder_checkpoint(encoder, config, 0, seen)
    study = load_data(args, checkpoint["image_size"])
    task = study.task(args.task)
    heads.check_split(task)
    leaked = heads.refuse_leak(study, task, checkpoint["seen"].numpy(), args.allow_leak)
    values |= {"task": task.name, "leaked": bool(leaked), "pretraining_epoch": checkpoint["epoch"]}
    values |= {key: checkpoint[key] for key in ("arch", "image_size")}
    values["weights"] = simclr.digest(encoder)
    print(f"{args.command} {task.name} with {origin}, on {machine.text}")
    scaling = {key: checkpoint[key] for key in ("mean", "std")}
    return Trial(out, machine, encoder, checkpoint, study, task, leaked, values, scaling)


def probe(args: argparse.Namespace) -> None:
    """Train the cosine MLP on the frozen encoder, and on the baselines; leaves classifier.pt."""
    trial = prepare(args, "probe")
    settings = heads.Probing(epochs=args.epochs, seed=args.seed)
    config = run_config(args, trial.study, trial.machine, settings, **trial.values)
    images = trial.study.pictures.squares(trial.task.rows)
    h = heads.features_of(trial.encoder, trial.checkpoint, images, trial.machine.device)
    progress = partial(progress_bar, total=args.epochs, unit="epoch", leave=False)
    head, records, probs = heads.fit_probe(h, trial.task, settings, "cosine_mlp", progress)
    fitted = {"pretrained encoder": probs}
    finish_classifier(args, trial, config, head, "cosine_mlp", settings, records, fitted)


def finetune(args: argparse.Namespace) -> None:
    """Train encoder and a fully connected head end to end; --from-scratch is the baseline."""
    args.from_scratch |= args.init == "random"
    ways = {"--encoder": args.encoder, "--init": args.init, "--from-scratch": args.from_scratch}
    if len(given := [name for name, value in ways.items() if value]) > 1:
        raise data.UserError(f"{' and '.join(given)} say where to begin; give one of them")
    name, lrs = "finetune", heads.FineTuning.lrs
    if args.from_scratch:
        name, lrs, args.init = "scratch", heads.SCRATCH_LRS, "random"
    trial = prepare(args, name, args.init)
    out, machine, encoder, checkpoint, study, task, *_, scaling = trial
    lrs = (args.lr,) if args.lr else lrs
    settings = heads.FineTuning(args.epochs, lrs=lrs, seed=args.seed, **scaling)
    config = run_config(args, study, machine, settings, **trial.values)
    of, pictures, labels = heads.parts_of(task), study.pictures, torch.from_numpy(task.labels)
    places = pictures.place[task.rows]
    parts = [(places[of[part]], labels[of[part]]) for part in ("train", "val")]
    n, K = len(parts[0][0]), len(task.classes)
    run = heads.fine_tuning(encoder, K, settings, n, *machine[:2])
    with ExitStack() as held:
        state = simclr.open_run(held, out, config, args.restart)
        if state:
            run.restore(state)
        print(f"  {run.epochs} epochs of {run.steps} steps on {n:,} pictures, learning rates {lrs}")
        steps = heads.finetune(run, pictures.cached["square"], *parts)
        train(run, steps, out, config, partial(simclr.save_run, run, out, config))
        head, images = run.networks["head"].cpu(), pictures.squares(task.rows)
        probs = {}
        for part in ("val", "test"):
            h = heads.features_of(encoder, checkpoint, images[of[part]], machine.device)
            probs[part] = heads.probabilities(head, h).numpy()
        checkpoint["encoder"] = {k: v.cpu() for k, v in encoder.state_dict().items()}
        fitted = {"from scratch" if args.from_scratch else "fine-tuned network": probs}
        how = heads.Probing(seed=args.seed), run.records, fitted
        finish_classifier(args, trial, config, head, "linear", *how)


def finish_classifier(
    args: argparse.Namespace,
    trial: Trial,
    config: dict,
    head: nn.Module,
    head_type: str,
    probing: heads.Probing,
    records: list[dict],
    fitted: dict[str, dict[str, np.ndarray]],
) -> None:
    """Set a result beside its baselines; write classifier.pt and what belongs to it.

    Args:
        probing: how the baselines are trained: the same head, on what has learnt nothing.
        records: of the training's epochs.
        fitted: the result's name, and its probabilities of the val part and the test part.
    """
    out, machine, _, checkpoint, study, task, leaked, *_ = trial
    progress = partial(progress_bar, total=probing.epochs, unit="epoch", leave=False)
    how = probing, head_type, progress, machine.device
    fitted = fitted | heads.baselines(checkpoint, study.pictures, task, *how)
    test = heads.test_part(study, task)
    results = {name: test.measure(probs["test"]) for name, probs in fitted.items()}
    probs = next(iter(fitted.values()))
    temperature = evaluate.fit_temperature(task.part("val")[1], probs["val"])
    values = {"config": config, "temperature": temperature}
    heads.save_classifier(out / "classifier.pt", checkpoint, head, head_type, study, task, **values)
    caption = evaluate.leak_caption(leaked)
    files = {"config.json": config, "log.jsonl": records}
    files |= {"splits.csv": heads.split_table(study, task)}
    title = f"{out.name}: training"
    files |= {"curve.png": evaluate.training_picture(records, title, caption)}
    how = results, task.notes, temperature, caption
    files |= evaluate.result_files(test, probs["test"], *how)
    later = [name for name in sorted(study.tasks) if name > task.name]
    flags = data_flags(args) + (["--encoder", str(args.encoder)] if args.encoder else [])
    following = ["explain", *data_flags(args), "--model", str(out / "classifier.pt")]
    again = args.command == "probe" and later
    conclude(out, files, ["probe", *flags, "--task", later[0]] if again else following)


def compare(args: argparse.Namespace) -> None:
    """Compare pretraining with training from scratch on the same few labels; leaves table.md."""
    trial = prepare(args, "compare")
    out, machine, encoder, checkpoint, study, task, leaked, values, scaling = trial
    settings = heads.FineTuning(args.epochs, **scaling)
    config = run_config(args, study, machine, settings, **values)
    fractions, methods = sorted(set(args.label_fractions)), evaluate.METHODS
    plan = [(f, s, m) for s in range(args.seeds) for f in fractions for m in methods]
    with ExitStack() as held:
        state = simclr.open_run(held, out, config, args.restart) or {"cells": []}
        cells = {(c["fraction"], c["seed"], c["method"]): c for c in state["cells"]}
        todo = [fit for fit in plan if fit not in cells]
        print(f"  {len(plan)} fits, {len(plan) - len(todo)} of them done before")
        write(out, {"config.json": config})
        images = study.pictures.squares(task.rows)
        on = heads.Comparison(task, images, encoder, checkpoint, settings, *machine[:2])
        with progress_bar(total=on.count_steps(todo), unit="step", desc="compare") as bar:
            for cell in on.fit(todo):
                if cell is None:
                    bar.update()
                else:
                    cells[cell["fraction"], cell["seed"], cell["method"]] = cell
                    state = {"config": config, "cells": [*cells.values()]}
                    simclr.save(state, out / "checkpoint.pt")
                    bar.set_postfix_str(f"{len(cells)} of {len(plan)} fits")
    test, caption = heads.test_part(study, task), evaluate.leak_caption(leaked)
    about = (
        f"{task.name}: {len(test.labels):,} test pictures of {len(set(test.groups)):,} groups; "
        f"{(task.split == 'val').sum():,} val pictures choose the epoch and, from scratch, the "
        f"learning rate. One encoder; mean over {args.seeds} draws of labels, heads and order, ± "
        "their standard deviation; in brackets the 95 % interval of that mean from resampling test "
        "groups, which leaves the draw of labels out. "
        f"Fine-tuning: {args.epochs} epochs; from scratch as many for each learning rate of "
        f"{heads.SCRATCH_LRS}, and their seconds together. On {machine.text}."
    )
    files = evaluate.compare_files([cells[fit] for fit in plan], test, about, caption)
    print(files["table.md"])
    conclude(out, files)


# ---------------------------------------------------------------------------------------------
# evaluate
# ---------------------------------------------------------------------------------------------


def score(args: argparse.Namespace) -> None:
    """Score a classifier on pictures from elsewhere; leaves metrics.json and predictions.csv."""
    encoder, head, checkpoint = heads.load_classifier(args.model)
    name = args.task or checkpoint["task"]
    out, machine = run_folder(args, f"evaluate-{name}"), choose_machine(args)
    study = load_data(args, checkpoint["image_size"])
    task, leaked = heads.unseen_part(
        study, study.task(name), checkpoint["seen"].numpy(), args.allow_leak
    )
    left_out = task.notes["dropped_for_a_group_it_has_seen"]
    dropped = task.notes["dropped_by_the_split"]
    print(f"  left out: {left_out:,} pictures of groups that it was trained on, {dropped:,} twins")
    test, caption = heads.test_part(study, task), evaluate.leak_caption(leaked)
    images = study.pictures.squares(task.part("test")[0])
    probs = heads.classify(encoder, head, checkpoint, images, task.classes, machine.device)
    results = {"this classifier": test.measure(probs)}
    results["always the commonest"] = test.measure(test.shares())
    values = {"task": name, "model": str(args.model.resolve()), "leaked": bool(leaked)}
    values["training"] = checkpoint["config"]
    files = {"config.json": run_config(args, study, machine, None, **values)}
    files["splits.csv"] = heads.split_table(study, task)
    temperature = checkpoint.get("temperature", 1.0)
    files |= evaluate.result_files(test, probs, results, task.notes, temperature, caption)
    conclude(out, files)


# ---------------------------------------------------------------------------------------------
# predict, embed
# ---------------------------------------------------------------------------------------------


def predict(args: argparse.Namespace) -> None:
    """Say what a classifier makes of files and folders; leaves predictions.csv."""
    encoder, head, checkpoint = heads.load_classifier(args.model)
    args.out = args.out or RUNS / f"predict-{checkpoint['task']}"
    out, machine, size = run_folder(args, ""), choose_machine(args), checkpoint["image_size"]
    pictures, rows = load_paths(args, size)
    images, classes = pictures.squares(rows), checkpoint["classes"]
    probs = heads.classify(encoder, head, checkpoint, images, classes, machine.device)
    table = evaluate.prediction_table([pictures.paths[row] for row in rows], probs, classes)
    wide = max(len(one_line(path)) for path, *_ in table)
    for path, called, *shares in table:  # the header, and then pictures, to four digits
        shown = shares if path == "path" else [f"{float(share):.4f}" for share in shares]
        print(f"{one_line(path):{wide}}  {called:>12}", *(f"{share:>14}" for share in shown))
    config = {"command": "predict", "model": str(args.model.resolve()), "device": machine.text}
    conclude(out, {"predictions.csv": table, "config.json": config | origin(args)})


class Asked(NamedTuple):
    """The pictures to be explained."""

    root: Path | None  # below which their paths are; None = they are phantoms
    pictures: data.Pictures
    rows: np.ndarray  # (n,) int64
    labels: np.ndarray | None  # (n,) int64, as the classifier numbers them; None = unknown
    groups: np.ndarray  # (n,) int64


def asked_pictures(args: argparse.Namespace, checkpoint: dict) -> Asked:
    """What `explain` shall explain: the given files or, with labels, what is not trained on."""
    size = checkpoint["image_size"]
    if args.paths and args.data:
        raise data.UserError("give --data (its test part is explained) or files, not both")
    if args.paths:
        pictures, rows = load_paths(args, size)
        owners = [m[1] if (m := data.SLICE.match(pictures.paths[r])) else str(r) for r in rows]
        return Asked(Path(), pictures, rows, None, np.unique(owners, return_inverse=True)[1])
    study, name = load_data(args, size), args.task or checkpoint["task"]
    if not study.tasks and not args.task:  # loose pictures
        seen = heads.was_seen(study, checkpoint["seen"].numpy())
        rows = np.setdiff1d(readable(study.pictures), np.flatnonzero(seen))
        if not len(rows):
            raise data.UserError(f"it was trained on all of {args.data}; give others, or paths")
        return Asked(args.data, study.pictures, rows, None, study.groups[rows])
    task, _ = heads.unseen_part(study, study.task(name), checkpoint["seen"].numpy(), False)
    rows, labels, groups = task.part("test")
    labels = np.array(heads.columns_of(task.classes, checkpoint))[labels]
    return Asked(args.data, study.pictures, rows, labels, groups)


def overlay_files(out: Path, paths: Sequence[str]) -> list[str]:
    """Names for the overlays of pictures; those that `explain` left here before are deleted."""
    for old in out.glob("*.png") if (out / "explain.csv").exists() else ():
        if re.match(r"\d{5}-", old.name):
            old.unlink()
    stems = [re.sub("[^A-Za-z0-9-]+", "-", Path(path).stem)[:60] for path in paths]
    return [f"{i:05d}-{stem}.png" for i, stem in enumerate(stems)]


def explain(args: argparse.Namespace) -> None:
    """Show where a classifier looked, and how far to believe it; leaves index.html."""
    encoder, head, checkpoint = heads.load_classifier(args.model)
    name, classes, size = (checkpoint[key] for key in ("task", "classes", "image_size"))
    args.out = args.out or (RUNS if args.paths else base_folder(args)) / f"explain-{name}"
    out, machine = run_folder(args, ""), choose_machine(args)
    device = machine.device
    if size <= simclr.STRIDES[args.layer]:
        text = f"{args.layer} has one place for all of a picture of {size} pixels: no map; give an"
        raise data.UserError(f"{text} earlier one, such as --layer layer{int(args.layer[-1]) - 1}")
    root, pictures, rows, labels, groups = asked_pictures(args, checkpoint)
    paths = [pictures.paths[row] for row in rows]
    files = overlay_files(out, paths)
    found, where = [], (f"encoder.{args.layer}", simclr.STRIDES[args.layer])
    model = heads.Classifier(encoder, head).to(device)
    random = heads.untrained_classifier(checkpoint).to(device)
    with gradcam.GradCAM(model, *where) as cam, gradcam.GradCAM(random, *where) as untrained:
        for i in progress_bar(range(0, len(rows), EXPLAINED), unit="batch", leave=False):
            squares = pictures.squares(rows[i : i + EXPLAINED])
            lesions = [data.lesion_of(root, path, size) for path in paths[i : i + EXPLAINED]]
            x, generator = heads.scaled(squares, checkpoint, device), data.generator_for(i)
            one = gradcam.explain(cam, untrained, squares, x, np.stack(lesions), generator)
            found.append(one)
            drawn = zip(files[i : i + EXPLAINED], squares, one.maps, lesions, strict=True)
            write(out, {file: gradcam.overlay_picture(*rest) for file, *rest in drawn})
    some = np.linspace(0, len(rows) - 1, min(gradcam.CHECKED, len(rows))).round().astype(int)
    x = heads.scaled(pictures.squares(rows[some]), checkpoint, device)
    check = gradcam.randomisation_check(model, where[0], x, STAGES)
    measures = {k: np.concatenate([one.measures[k] for one in found]) for k in found[0].measures}
    probs = np.concatenate([one.probs for one in found])
    shown = gradcam.Shown(name, classes, paths, files, labels, groups, probs, measures)
    report = gradcam.report(shown, f"maps of {args.layer}", check)
    page = gradcam.gallery(shown, report, lambda file: (out / file).read_bytes())
    written = {"report.txt": report, "explain.csv": shown.table(), "index.html": page}
    config = {"command": "explain", "model": str(args.model.resolve()), "layer": args.layer}
    conclude(out, written | {"config.json": config | {"device": machine.text} | origin(args)})


def embed(args: argparse.Namespace) -> None:
    """Write the features of every picture of a folder, and draw their map."""
    place = args.out or base_folder(args) / "features.npz"
    args.out = place.parent
    out, machine = run_folder(args, ""), choose_machine(args)
    if place.suffix != ".npz" or place.is_dir():
        raise data.UserError(f"--out {place} is the file of the features; its name ends in .npz")
    encoder, checkpoint = simclr.load_encoder(encoder_path(args))
    study = load_data(args, checkpoint["image_size"])
    pictures = study.pictures
    rows = readable(pictures)
    h = heads.features_of(encoder, checkpoint, pictures.squares(rows), machine.device).numpy()
    told = np.full((3, len(pictures.paths)), "", object)  # label, task, split; '' = of no class
    for task in study.tasks.values():
        told[0, task.rows] = np.array(task.classes)[task.labels]
        told[1, task.rows], told[2, task.rows] = task.name, task.split
    paths, (labels, tasks, splits) = np.array(pictures.paths)[rows], told[:, rows].astype(str)
    features = {"features": h, "paths": paths, "labels": labels, "tasks": tasks, "splits": splits}
    names = (
        labels if len(study.tasks) < 2 else [f"{t} {k}" for t, k in zip(tasks, labels, strict=True)]
    )
    picture = evaluate.map_picture(h, names)
    conclude(out, {place.name: features, f"{place.stem}.png": picture})


# ---------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Reports a mistyped command as every other mistake is reported: one line, exit status 2."""

    def error(self, message: str) -> None:
        """Raise, where argparse would print the usage."""
        raise data.UserError(f"{message}; see: python {self.prog} --help")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Prints the default behind each flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        plain = action.default is None or action.default is False
        return action.help if plain else super()._get_help_string(action)


def number(kind: type, low: float, high: float = sys.float_info.max) -> Callable[[str], float]:
    """An argparse type: a finite number of a kind, from `low` up."""

    def read(text: str) -> float:
        """The number in `text`."""
        value = kind(text)
        if not low <= value <= high:
            raise ValueError
        return value

    read.__name__ = f"{'whole ' * (kind is int)}number from {low} up"  # argparse prints it
    return read


def pattern(text: str) -> re.Pattern:
    """An argparse type: a regular expression with a capture group."""
    try:
        found = re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression ({error})") from None
    if not found.groups:
        raise argparse.ArgumentTypeError(f"{text!r} has no (group) around what is the patient")
    return found


SMALLER = {  # what to give where memory does not suffice
    "pretrain": "a --chunk-size below the batch size (64, say), or a smaller --image-size",
    "finetune": "a smaller --image-size, with --from-scratch or to pretrain",
}
COMMANDS = {  # what runs, and what it holds out
    "data": (survey, "nothing, it trains nothing; its table shows val, test and dropped."),
    "pretrain": (pretrain, "the val and test groups of every task below --data."),
    "probe": (probe, "the test part, opened once; the val part chooses the epoch."),
    "finetune": (finetune, "the test part, opened once; the val part chooses the epoch."),
    "compare": (compare, "the test part, opened once for each fit; the val part chooses epochs."),
    "evaluate": (score, "all groups that the classifier was trained on; the rest is scored."),
    "predict": (predict, "nothing: it scores nothing."),
    "explain": (explain, "with --data all that the classifier was trained on; it trains nothing."),
    "embed": (embed, "nothing: it trains and scores nothing."),
}


def build_parser() -> Parser:
    """One parser, one subcommand a stage.

    The help of a command is the first line of the function that runs it, and what it holds out.
    """
    parser = Parser(prog="main.py", description="SimCLR for brain scans, by hand, in PyTorch.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    groups: dict[tuple[str, str], argparse._ArgumentGroup] = {}
    for name, (run, held_out) in COMMANDS.items():
        summary = run.__doc__.splitlines()[0]
        sub = subparsers.add_parser(name, help=summary, formatter_class=HelpFormatter)
        sub.description = f"{summary} Held out: {held_out}"
        sub.set_defaults(run=run, data=None, group_pattern=None, resplit=False, task=None)
        for title in ("data and output", "model", "optimisation", "machine"):
            groups[name, title] = sub.add_argument_group(title)

    def flag(title: str, commands: str, *name: str, **options: object) -> None:
        """Give a flag to some commands."""
        for command in commands.split():
            groups[command, title].add_argument(*name, **options)

    declare_data_flags(flag)
    declare_training_flags(flag)
    return parser


def text_of(name: str, text: str) -> str:
    """A help text with the two defaults of a flag that has another one on phantoms."""
    return f"{text} (default: {PUBLISHED[name]}; {PHANTOM_DEFAULTS[name]} on phantoms)"


def declare_data_flags(flag: Callable) -> None:
    """The flags that say what is read and written, each declared once for all its commands."""
    part, trials = partial(flag, "data and output"), "probe finetune compare"
    text = "pictures, volumes, shards, and folders"
    part("predict", "paths", type=Path, nargs="+", help=text)
    text += "; where not given, what of --data (or of the phantoms) it was not trained on"
    part("explain", "paths", type=Path, nargs="*", help=text)
    reading = f"data pretrain {trials} evaluate explain"
    text = "folder of scans: <task>/<class>/ or <task>/Training/<class>/ below it; else phantoms"
    part(f"{reading} embed", "--data", type=Path, help=text)
    text = "folder of this run (of embed: the file); one below runs/ where not given"
    part(f"{reading} embed predict", "--out", type=Path, help=text)
    text = "searched in each path below --data; its first (group) is the patient"
    part(reading, "--group-pattern", type=pattern, metavar="REGEX", help=text)
    text = "pool the publisher's own training and test parts, and split them anew by group"
    part(reading, "--resplit", action="store_true", help=text)
    part(trials, "--task", required=True, help="one of those that `data` lists, such as tumor")
    part("data", "--task", help="only this one; all that are there where not given")
    part("evaluate explain", "--task", help="the classifier's own where not given")

    part = partial(flag, "model")
    text = "an encoder.pt; that of `pretrain` on the same kind of data where not given"
    part(f"{trials} embed", "--encoder", type=Path, help=text)
    part("evaluate predict explain", "--model", type=Path, required=True, help="a classifier.pt")
    text = (
        "first weights: random, imagenet (torchvision's, fetched once), or a file of torchvision's"
    )
    part("pretrain", "--init", default="random", help=text)
    part("finetune", "--init", help="imagenet, or a file of torchvision's weights; not --encoder")
    text = "begin with random weights: the supervised baseline, its learning rate chosen by val"
    part("finetune", "--from-scratch", action="store_true", help=text)
    text = "encoder; resnet50 has twice the parameters and four times the features"
    text += f" (default: {PUBLISHED['arch']})"
    part("pretrain finetune", "--arch", choices=tuple(simclr.ARCHITECTURES), help=text)
    text = text_of("image_size", "side of the square pictures, in pixels; an --encoder has its own")
    text = "stage of the encoder whose map is drawn: a later one knows more, and is coarser"
    part("explain", "--layer", choices=tuple(simclr.STRIDES), default=gradcam.LAYER, help=text)
    part("data pretrain finetune", "--image-size", type=number(int, 32), help=text)
    text = "go on although test pictures were trained on; every output then says so"
    part(f"{trials} evaluate", "--allow-leak", action="store_true", help=text)


def declare_training_flags(flag: Callable) -> None:
    """The flags that say how and on what to train."""
    part, positive = partial(flag, "optimisation"), number(float, 1e-12)
    text = text_of("batch_size", "slices a step; more negatives, more memory")
    part("pretrain", "--batch-size", type=number(int, 2), help=text)
    text = "slices in memory at once, for a larger batch; the loss still is over the whole batch"
    part("pretrain", "--chunk-size", type=number(int, 1), help=text)
    text = text_of("epochs", "passes over the pictures; 0 leaves random weights")
    part("pretrain", "--epochs", type=number(int, 0), help=text)
    epochs = heads.Probing.epochs
    part("probe", "--epochs", type=number(int, 0), default=epochs, help="passes over the features")
    text = f"passes over the pictures (default: {heads.FineTuning.epochs}; "
    text += f"{PHANTOM_DEFAULTS['epochs']} on phantoms)"
    part("finetune compare", "--epochs", type=number(int, 1), help=text)
    text = f"highest learning rate (default: {heads.FineTuning.lrs[0]:g}; from scratch the best "
    text += f"on val of {', '.join(f'{lr:g}' for lr in heads.SCRATCH_LRS)})"
    part("finetune", "--lr", type=positive, help=text)
    text = "shares of the training groups whose labels are used"
    few = {"nargs": "+", "default": [0.01, 0.1, 1.0], "metavar": "SHARE", "help": text}
    part("compare", "--label-fractions", type=number(float, 1e-12, 1), **few)
    text = "how often each is fitted, each time on other groups and from other weights"
    part("compare", "--seeds", type=number(int, 1), default=3, help=text)
    text = "learning rate at the start; halve it if the loss turns NaN"
    part("pretrain", "--lr", type=positive, default=PUBLISHED["lr"], help=text)
    text = "softmax scale of NT-Xent in cosine units; lower stresses the hardest negatives"
    tau = PUBLISHED["temperature"]
    part("pretrain", "--temperature", type=positive, default=tau, help=text)
    text = "begin anew, and replace what --out holds, where the same command would go on"
    part("pretrain finetune compare", "--restart", action="store_true", help=text)
    text = "moves first weights, order, views and dropout, never the split"
    part("pretrain probe finetune", "--seed", type=number(int, 0), default=0, help=text)

    computing = "pretrain probe finetune compare evaluate predict explain embed"
    part = partial(flag, "machine", computing)
    text = "auto takes CUDA, then Apple's MPS, then the CPU"
    part("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help=text)
    text = "of a network's training steps; auto takes bf16 where the machine computes it natively; "
    text += "the loss and all that comes after training stay float32"
    how = {"choices": ("auto", "bf16", "fp32"), "default": "auto", "help": text}
    flag("machine", "pretrain finetune compare", "--precision", **how)


def main(argv: list[str] | None = None) -> int:
    """Run one command; status 0, or 2 for a mistake that one line on standard error explains."""
    if RANK:
        sys.stdout = open(os.devnull, "w")
    try:
        args = build_parser().parse_args(argv)
        args.typed = list(sys.argv[1:] if argv is None else argv)
        if PROCESSES > 1 and args.command != "pretrain":
            raise data.UserError(f"{args.command} runs in one process: start it without torchrun")
        if args.command == "finetune" and not (args.from_scratch or args.init):
            if args.image_size or args.arch:
                text = "--arch and --image-size are those of the encoder; leave them out"
                raise data.UserError(f"{text}, or give --from-scratch or --init")
        defaults = PUBLISHED | (PHANTOM_DEFAULTS if args.data is None else {})
        if args.data and args.command != "pretrain":
            defaults["epochs"] = heads.FineTuning.epochs
        for name in ("image_size", "arch", "batch_size", "epochs"):
            if getattr(args, name, 0) is None:
                setattr(args, name, defaults[name])
        args.run(args)
    except data.UserError as error:
        if not RANK:
            print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        short = re.search("out of memory|can't allocate|not enough memory", str(error))
        if not short and not isinstance(error, MemoryError):
            raise
        mend = SMALLER.get(args.command, "fewer pictures at once, or an encoder of smaller ones")
        print(f"error: out of memory ({simclr.reason(error)}); give {mend}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
