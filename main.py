"""The commands: look at the data, pretrain an encoder, train classifiers on it, compare, use them.

This file only wires: it parses, seeds, chooses the device and the paths, and prints. What is
computed stands in data.py (images, groups, splits), simclr.py (views, encoder, loss, pretraining),
evaluate.py (the numbers), heads.py (classifiers) and gradcam.py (heat maps), read in this order.

    data:      images -- groups, splits --> splits.csv, report.md, and what a leak would score
    pretrain:  images of no val or test group -- two views --> simclr.pretrain --> encoder.pt
    probe:     encoder.pt, frozen -- features --> cosine MLP --> classifier.pt, report.md
    finetune:  encoder.pt, all of it trained, or random weights --> classifier.pt, report.md
    compare:   all of these on the same few labels --> table.md
    evaluate:  classifier.pt, images it has not seen --> report.md
    predict:   classifier.pt, files and folders --> predictions.csv
    explain:   classifier.pt, images --> where it looked: index.html, and what that is worth
    embed:     encoder.pt, a folder --> features.npz

Nearly every command writes one folder, which config.json describes. Results of other data or
settings are replaced with --restart alone, or the command says so. This is the last file.
"""

import multiprocessing
import os
import signal
import sys

if __name__ == "__main__":

    def interrupted(*_: object) -> None:
        """Ctrl-C at any moment, also during the slow imports below, is one line."""
        if multiprocessing.parent_process() is None and os.environ.get("RANK", "0") == "0":
            text = "interrupted; what is finished is kept: type the same command again to go on"
            print(f"\n{text}", file=sys.stderr)
        raise SystemExit(130)

    signal.signal(signal.SIGINT, interrupted)

import difflib
import hashlib
import json
import math
import platform
import re
import shlex
import subprocess
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from datetime import date, timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

import data
import evaluate
import gradcam
import heads
import simclr
from simclr import Pretraining

RUNS = Path("runs")
# On the phantoms a command takes minutes on a laptop; these settings, and no others, differ there.
PHANTOM_DEFAULTS = {"image_size": 64, "batch_size": 32, "epochs": 12}
KNN_EVERY = 5  # epochs of a pretraining between two looks at what the features are worth
ENOUGH_STEPS = 2000  # with fewer pretraining hardly pays (docs/results.md)
MAX_UNREADABLE = (5, 0.01)  # more than five *and* more than 1 % unreadable images stop a run
EXPLAINED = 32  # images explained at once, and images whose maps are made again, weights shuffled
SPLITS = ("train", "val", "test", "dropped")
CAUTION = "For research, not for diagnosis."
SHUFFLED = ["head", "encoder.layer4", "encoder.layer3", "encoder.layer2", "encoder.layer1"]
# Which process this is and of how many, as torchrun says; only the first one writes and prints.
RANK = int(os.environ.get("RANK", 0))
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))
# What commands write, and --restart deletes; nothing else that lies there.
RUN_FILE = re.compile(
    r"(config|metrics)\.json|(log|fits)\.jsonl|(checkpoint|encoder|classifier)\.pt|\d{5}-map\.png|"
    r"(curve|confusion|roc|reliability|leak|label_efficiency)\.png|(report|table)\.md|index\.html|"
    r"(splits|predictions|table|explain)\.csv"
)
# How a refusal calls settings whose values say nothing to a reader.
OTHER = dict.fromkeys(("fingerprint", "images", "pixels"), "other images")
OTHER |= {"weights": "another encoder", "pretraining": "another encoder"}
OTHER |= {"model": "another classifier"}
# What may differ between two starts of one run: it moves its speed, and the last bits at most.
MACHINE = {"data", "device", "processes", "threads", "typed", "folder", "commit", "versions"}

# ---------------------------------------------------------------------------------------------
# What the commands share
# ---------------------------------------------------------------------------------------------

# The bar is drawn on a terminal only: a log file gets one line for each epoch.
progress_bar = partial(tqdm, disable=True if RANK else None, leave=False)


def visible(text: str) -> str:
    """One line, whatever a file's name holds: line breaks, control characters, broken bytes."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return shown.encode("utf8", "backslashreplace").decode("utf8")


def say(line: str) -> None:
    """Print a line, once on all processes together."""
    if RANK == 0:
        tqdm.write(visible(line))


def choose_device(args: Namespace) -> None:
    """Set args.device, and args.bf16: whether training takes bf16 there; say both.

    Raises:
        UserError: --device names one that is not here.
    """
    names = ["cpu"]
    if torch.backends.mps.is_available():
        names.insert(0, "mps")
    if torch.cuda.is_available():
        names.insert(0, "cuda")
    name = names[0] if args.device == "auto" else args.device
    if name not in names:
        raise data.UserError(f"this machine has no {name} device; give --device {names[0]}")
    args.device = torch.device(name)
    if name == "cuda":
        args.device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(args.device)
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    native, why = simclr.native_bf16(args.device)
    precision = getattr(args, "precision", "fp32")  # only commands that train have the flag
    args.bf16 = native if precision == "auto" else precision == "bf16"
    say(f"on {name}, " + (f"training in bf16 ({why})" if args.bf16 else "in float32"))


def load_study(args: Namespace, image_size: int) -> data.Study:
    """Read --data or the phantoms; say what is there, and what cannot be read.

    Raises:
        UserError: the data cannot be read, or too many of its images.
    """
    if RANK:
        dist.barrier()  # the first process decodes, the others find all in the cache
    pattern = re.compile(args.patient_pattern) if args.patient_pattern else None
    how = {"pattern": pattern, "labels": args.labels, "resplit": args.resplit}
    study = data.load(args.data, image_size, RUNS / "cache", progress_bar, **how)
    if PROCESSES > 1 and RANK == 0:
        dist.barrier()
    n, known = len(study.images.names), int((study.patients != "").sum())
    place = args.data or "phantoms, drawn by code (--data takes your own scans)"
    say(f"{place}: {n:,} images in {len(np.unique(study.groups)):,} groups")
    say(f"  the patient is known of {known:,} of {n:,} images")
    for notice in study.notices:
        say(f"  {notice}")
    readable_rows(study.images)
    return study


def readable_rows(images: data.Images) -> np.ndarray:
    """The images that can be read, (k,) int64; the others are named.

    Raises:
        UserError: these are too many.
    """
    bad, n = images.unreadable, len(images.names)
    for row, why in bad.items():
        say(f"  left out, unreadable: {images.names[row]} ({why})")
    least, share = MAX_UNREADABLE
    if len(bad) > max(least, share * n) or len(bad) == n:
        raise data.UserError(f"{len(bad)} of {n} images cannot be read; replace or remove them")
    return np.setdiff1d(np.arange(n), list(bad))


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A hint at the choice that is spelled most alike; '' where none is."""
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def find_task(args: Namespace, study: data.Study) -> data.Task:
    """The task called --task or, where that was not given, the only one.

    Raises:
        UserError: there is none, or more than one to choose from.
    """
    names = sorted(study.tasks)
    if args.task is None and len(names) == 1:
        return study.tasks[names[0]]
    if args.task in names:
        return study.tasks[args.task]
    wanted = f"no task {args.task!r} here" if args.task else "--task is needed"
    found = ", ".join(names) or "none (a task is a folder with two or more class folders)"
    raise data.UserError(f"{wanted}; found: {found}{did_you_mean(args.task or '', names)}")


def describe_run(args: Namespace, study: data.Study | None, **values: object) -> dict:
    """config.json: every value that shaped the run, in plain types; checkpoints hold it too."""
    config = {"command": args.command, **values}
    if study:
        digest = hashlib.sha256("\n".join(study.images.names).encode("utf8", "surrogateescape"))
        digest.update(study.images.hashes.tobytes())
        config |= {"fingerprint": digest.hexdigest(), "phantoms": study.root is None}
        config["data"] = str(args.data.resolve()) if args.data else None
        config["labels"] = str(args.labels.resolve()) if args.labels else None
        config |= {"patient_pattern": args.patient_pattern, "resplit": args.resplit}
    git = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True)
        config["commit"] = answer.stdout.strip() or None
    except OSError:  # no git here
        config["commit"] = None
    versions = {module.__name__: str(module.__version__) for module in (torch, np, PIL)}
    versions["python"] = platform.python_version()
    config |= {"typed": args.typed, "folder": str(Path.cwd()), "versions": versions}
    config |= {"processes": PROCESSES, "threads": torch.get_num_threads()}
    config["device"] = str(args.device)
    return json.loads(json.dumps(config))  # tuples become lists, as in the file


@contextmanager
def open_run(args: Namespace, out: Path, config: dict) -> Iterator[dict | None]:
    """Hold a run's folder, a new one or one of the same settings; yield its checkpoint, if any.

    Raises:
        UserError: another process holds the folder, or it has results of other settings.
    """
    with data.lock_folder(out) if RANK == 0 else nullcontext():
        if RANK == 0:
            for file in out.iterdir():  # of a write that was killed, or of a run to be replaced
                if file.suffix == ".tmp" or (args.restart and RUN_FILE.fullmatch(file.name)):
                    file.unlink()
            refuse_other_settings(args, out, config)
            write(out, {"config.json": config})
        if PROCESSES > 1:
            dist.barrier()
        state, path = None, out / "checkpoint.pt"
        if path.exists():
            what = "the checkpoint of a run; --restart begins anew"
            state = simclr.load_checkpoint(path, what)
            if not isinstance(state, dict) or not {"weights", "optimizer", "records"} <= set(state):
                raise data.UserError(f"{path} is not {what}")
        yield state


def refuse_other_settings(args: Namespace, out: Path, config: dict) -> None:
    """Compare config.json, where a folder has one, with the run that is about to begin.

    A finished pretraining may be given more epochs. `data`, `predict` and `explain`, which are
    quickly typed again, say that they replace what is there.

    Raises:
        UserError: they differ in anything else.
    """
    place = out / "config.json"
    if not place.exists():
        return
    try:
        former = dict(json.loads(place.read_text()))
    except (ValueError, TypeError):
        raise data.UserError(f"{place} is no config of a run; --restart replaces it") from None
    different = []
    for key in sorted(config.keys() - MACHINE):
        before, now = former.get(key), config[key]
        longer = key == "epochs" and args.command == "pretrain" and (before or 0) < now
        if before != now and not longer:
            values = f"{key} {before!s:.30} there, {now!s:.30} here"
            different.append(OTHER.get(key, values))
    if different and args.command in ("data", "predict", "explain"):
        say(f"replaces what was in {out}")
    elif different:
        raise data.UserError(
            f"{out} has results of {'; '.join(dict.fromkeys(different))}; give the same to go on, "
            "another --out for a second run, or --restart to replace it"
        )


def write(out: Path, files: dict[str, object]) -> None:
    """Write files (by name, as `evaluate.as_bytes` takes them), each whole or not at all."""
    for name, value in files.items():
        if RANK == 0:
            with data.write_atomically(out / name) as file:
                file.write(evaluate.as_bytes(name, value))


def conclude(out: Path, files: dict[str, object], following: list[str]) -> None:
    """Write a command's files; print its report, what lies there now, what to type next.

    Args:
        following: the next command's words after main.py.
    """
    write(out, files)
    for line in (files.get("report.md") or files.get("table.md", "")).splitlines():
        say(line)
    there = sorted(path.name for path in out.iterdir() if not path.name.endswith("-map.png"))
    say(f"in {out}/ now: {', '.join(there)}")
    say_next(following)


def say_next(following: list[str]) -> None:
    """Print the command to type next; `following` are its words after main.py."""
    program = sys.argv[0] if sys.argv[0].endswith("main.py") else "main.py"
    say("next: " + shlex.join(["python", program, *following]))


def data_flags(args: Namespace) -> list[str]:
    """The words that make the next command read the same data in the same way."""
    words = ["--resplit"] if args.resplit else []
    for name in ("data", "patient_pattern", "labels"):
        value = getattr(args, name)
        if value:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words


# ---------------------------------------------------------------------------------------------
# data
# ---------------------------------------------------------------------------------------------


def survey(args: Namespace) -> None:
    """Show what is there, what belongs together, how it splits, and what leaks would score."""
    study = load_study(args, args.image_size)
    for name in [find_task(args, study).name] if args.task else sorted(study.tasks):
        task = study.tasks[name]
        out = args.out / name if args.out else args.runs / f"data-{name}"
        with open_run(args, out, describe_run(args, study, task=name)):
            thumbnails = study.images.thumbnails[task.rows]
            meter = evaluate.leak_meter(thumbnails, task.labels, task.groups)
            files = {
                "report.md": survey_report(task, meter),
                "splits.csv": split_table(study, task),
            }
            write(out, files | {"leak.png": evaluate.leak_figure(meter)})
            for line in files["report.md"].splitlines():
                say(line)
            say(f"in {out}/ now: leak.png, report.md, splits.csv")
    why = Counter(data.left_out(study))
    if why[""] < 2:
        raise data.UserError("fewer than 2 images are left to pretrain on; --resplit may help")
    if not study.tasks:
        say(
            "no task here: two or more class folders side by side make one; is --data their folder?"
        )
    say_next(["pretrain", *data_flags(args)])


def split_table(study: data.Study, task: data.Task) -> list[tuple]:
    """splits.csv, header first: path, label, group, split, pixel_hash (hexadecimal)."""
    table = [("path", "label", "group", "split", "pixel_hash")]
    for i, row in enumerate(task.rows):
        label, digest = task.classes[task.labels[i]], study.images.hashes[row].tobytes().hex()
        group, split = int(task.groups[i]), str(task.split[i])
        table.append((study.images.names[row], label, group, split, digest))
    return table


def survey_report(task: data.Task, meter: dict) -> str:
    """report.md of `data`: a task as a table, what is dropped, and what leaks would score."""
    width = max(6, *map(len, task.classes))
    lines = [f"# {task.name}: {len(task.rows):,} images, {task.notes['rule']}", ""]
    lines.append(f"| {'class':{width}} | images | groups |  train |    val |   test | dropped |")
    lines.append(f"| {'---':{width}} | -----: | -----: | -----: | -----: | -----: | ------: |")
    for k, name in enumerate([*task.classes, "all"]):
        chosen = (task.labels == k) | (k == len(task.classes))
        numbers = [chosen.sum(), len(np.unique(task.groups[chosen]))]
        numbers += [(task.split[chosen] == split).sum() for split in SPLITS]
        line = " | ".join(f"{number:6,}" for number in numbers)
        lines.append(f"| {name:{width}} | {line}  |")
    tested = task.published == "test"
    leaked = np.isin(task.groups[tested], task.groups[task.published == "train"]).sum()
    if tested.any():
        text = "test images have images of their own group in training"
        lines.append(f"\nAs published, {leaked:,} of {tested.sum():,} {text}.")
    scores = {key: evaluate.number(meter[key]) for key in ("by image", "by group", "commonest")}
    lines.append("\nAccuracy of the nearest neighbour on 32x32 pixels, which was never trained:")
    lines.append(f"split by image {scores['by image']}, split by group {scores['by group']}; ")
    lines[-1] += f"of always answering the commonest class {scores['commonest']}."
    for reason, count in task.notes.items():
        if reason.startswith("dropped") and count:
            lines.append(f"\n{reason.replace('_', ' ')}: {count:,} images")
    try:
        data.check_split(task)
    except data.UserError as error:
        lines.append(f"\nIt cannot be probed: {error}.")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------
# pretrain
# ---------------------------------------------------------------------------------------------


@contextmanager
def process_group() -> Iterator[None]:
    """Meet the other processes that torchrun has started; alone, do nothing."""
    if PROCESSES > 1:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))  # decoding may take long
    yield
    if PROCESSES > 1:
        dist.destroy_process_group()


def pretrain(args: Namespace) -> None:
    """Learn an encoder from images without labels, or go on learning; leaves encoder.pt."""
    study = load_study(args, args.image_size)
    why, rows = Counter(data.left_out(study)), data.pretraining_rows(study)
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in why.items() if reason)
    say(f"  pretraining takes {len(rows):,} images; left out: {reasons or 'none'}")
    torch.manual_seed(args.seed)  # the networks' first weights
    encoder, mean, std = simclr.init_encoder(args.arch, args.init)
    head = simclr.ProjectionHead(encoder.feature_dim)
    networks = nn.ModuleDict({"encoder": encoder, "projection_head": head})
    given = ("epochs", "lr", "temperature", "chunk_size", "seed")
    values = {name: getattr(args, name) for name in given}
    values |= {"batch_size": fit_batch(args.batch_size, len(rows)), "mean": mean, "std": std}
    settings = Pretraining(**values)
    values |= {"arch": args.arch, "init": args.init, "image_size": args.image_size}
    config = describe_run(args, study, **values, images=len(rows), bf16=args.bf16)
    out = args.out or args.runs / "pretrain"
    with open_run(args, out, config) as state:
        advise_steps(args, settings, len(rows))
        seen = torch.from_numpy(study.images.hashes[rows])

        def save_encoder(epoch: int) -> None:
            kept = simclr.encoder_checkpoint(encoder, config, epoch, seen)
            simclr.save(kept, out / "encoder.pt")

        def save(state: dict) -> None:
            save_encoder(state["epoch"])
            simclr.save(state, out / "checkpoint.pt")  # last: it says that all is there

        how = (settings, args.device, args.bf16, state, partial(progress_bar, unit="step"))
        epochs = simclr.pretrain(networks, study.images.squares, rows, *how)
        look = partial(look_at_epoch, encoder, study, settings)
        records = train(out, epochs, state, settings.epochs, save, look)
        if RANK == 0 and not (out / "encoder.pt").exists():  # after --epochs 0, or deleted
            save_encoder(len(records))
        names = {"loss": "NT-Xent, nats", "contrastive_accuracy": "contrastive accuracy"}
        names["knn_accuracy"] = "kNN accuracy on val"
        files = {"curve.png": evaluate.curve_figure("Pretraining", records, names)}
        if RANK == 0:  # another machine has no such folder
            conclude(out, files, probe_or_embed(args, study, args.out and out / "encoder.pt"))


def fit_batch(batch_size: int, n: int) -> int:
    """The batch size, or as much of it as n images fill.

    Raises:
        UserError: too few images are left, or processes cannot share the batch.
    """
    if n < 2 * PROCESSES:
        raise data.UserError(f"{n} images are left to pretrain on (see above); it takes at least 2")
    if n < batch_size:
        batch_size = n - n % PROCESSES
        say(f"  the batch shrinks to the {batch_size} images that are there")
    if batch_size % PROCESSES:
        raise data.UserError(f"--batch-size {batch_size} is no multiple of {PROCESSES} processes")
    return batch_size


def advise_steps(args: Namespace, settings: Pretraining, n: int) -> None:
    """Say when a run takes so few steps that it can hardly pay, and what would be enough."""
    steps = settings.epochs * (n // settings.batch_size)
    say(f"  {settings.epochs} epochs, {steps:,} steps of {settings.batch_size} slices")
    if args.data and 0 < steps < ENOUGH_STEPS:
        batch_size = min(settings.batch_size, max(2, n // 8))
        epochs = math.ceil(ENOUGH_STEPS / (n // batch_size))
        say(f"  these are few: --batch-size {batch_size} --epochs {epochs} would be enough to pay")


def look_at_epoch(encoder: simclr.ResNet, study: data.Study, settings: Pretraining, record: dict):
    """Add to an epoch's record, now and then, the kNN accuracy on val of a task with labels."""
    task = next((task for task in study.tasks.values() if len(task.part("val"))), None)
    due = record["epoch"] % KNN_EVERY == 0 or record["epoch"] == settings.epochs
    if task and due and RANK == 0:
        device, scaling = encoder.conv1.weight.device, asdict(settings)
        accuracy = heads.knn_accuracy(encoder, study.images, task, scaling, device)
        record["knn_accuracy"] = accuracy


def train(
    out: Path, epochs: Iterator, state: dict, total: int, save: Callable, look: Callable
) -> list:
    """Show, log and save a training, epoch by epoch.

    A checkpoint is written when an epoch ends and 100 times what the last one took has passed: so
    saving costs 1 % of the time, and a run that is killed goes on from there with the same bits.

    Args:
        epochs: of `simclr.pretrain` or `heads.finetune`: (record, state) of each.
        state: the checkpoint that they go on from, or None.
        save: writes a state.
        look: is shown each record, and may add to it.

    Returns:
        The records of all epochs.
    """
    records = state["records"] if state else []
    if state:
        say(f"  goes on after epoch {len(records)}")
    due = 0.0
    for record, state in epochs:
        look(record)
        records.append(record)
        cells = [f"epoch {len(records)} of {total}"]
        for key, value in record.items():
            if key != "epoch" and value is not None:
                cells.append(f"{key.replace('_', ' ')} {value:.4g}")
        say(f"  {', '.join(cells)}")
        write(out, {"log.jsonl": records})
        if RANK == 0 and (time.monotonic() > due or len(records) == total):
            began = time.monotonic()
            save(state | {"records": records})
            due = time.monotonic() + 100 * (time.monotonic() - began)
    return records


def probe_or_embed(args: Namespace, study: data.Study, encoder: Path | None) -> list[str]:
    """What follows a pretraining: a probe where a task can be split, else `embed`.

    Args:
        encoder: to be typed; None = the default one.
    """
    flags = data_flags(args)
    if encoder:
        flags += ["--encoder", str(encoder)]
    for name in ("tumor", *sorted(study.tasks)):
        try:
            if name in study.tasks:
                data.check_split(study.tasks[name])
                return ["probe", *flags, "--task", name]
        except data.UserError:
            continue
    return ["embed", *flags]


# ---------------------------------------------------------------------------------------------
# probe, finetune, compare
# ---------------------------------------------------------------------------------------------


def prepare(args: Namespace, from_scratch: bool = False) -> tuple[data.Study, heads.Setup]:
    """Read the encoder and the data; refuse to test on what the encoder was trained on."""
    if from_scratch:
        torch.manual_seed(args.seed)
        encoder, mean, std = simclr.init_encoder(args.arch, args.init)
        config = {"arch": args.arch, "image_size": args.image_size, "mean": mean, "std": std}
        seen = torch.zeros(0, 16, dtype=torch.uint8)
        checkpoint = simclr.encoder_checkpoint(encoder, config, 0, seen)
    else:
        encoder, checkpoint = read_encoder(args)
    study = load_study(args, checkpoint["image_size"])
    task = find_task(args, study)
    data.check_split(task)
    data.refuse_leak(study, task, checkpoint["seen"].numpy())
    counts = ", ".join(f"{len(task.part(split)):,} {split}" for split in SPLITS)
    say(f"task {task.name} ({', '.join(task.classes)}): {counts}")
    return study, heads.Setup(study.images, task, encoder, checkpoint, args.device, args.bf16)


def read_encoder(args: Namespace) -> tuple[simclr.ResNet, dict]:
    """The encoder of --encoder or, where that was not given, of `pretrain` on such data."""
    path = args.encoder or args.runs / "pretrain" / "encoder.pt"
    encoder, checkpoint = simclr.load_encoder(path)
    if "head" in checkpoint:  # its encoder would know the labels beforehand
        raise data.UserError(f"{path} is a classifier; --encoder takes an encoder.pt")
    say(f"{path}: {checkpoint['arch']} after {checkpoint['epoch']} epochs of pretraining")
    return encoder, checkpoint


def describe_fit(args: Namespace, study: data.Study, setup: heads.Setup, settings: object) -> dict:
    """`describe_run` of what starts from an encoder: its weights are part of the settings."""
    weights = hashlib.sha256()
    for value in setup.checkpoint["encoder"].values():
        weights.update(value.numpy().tobytes())
    values = {"task": setup.task.name, "weights": weights.hexdigest(), "bf16": setup.bf16}
    values |= {"head": getattr(args, "head", "fc"), "pretraining": setup.checkpoint["config"]}
    return describe_run(args, study, **values, **asdict(settings))


def probe(args: Namespace) -> None:
    """Train a head on the frozen encoder, and on two baselines; leaves classifier.pt."""
    study, setup = prepare(args)
    settings = heads.Probing(epochs=args.epochs, seed=args.seed)
    kind = "linear" if args.head == "linear" else "probe"
    out = args.out or args.runs / f"{kind}-{setup.task.name}"
    config = describe_fit(args, study, setup, settings)
    with open_run(args, out, config):
        say("reading features")
        features = heads.task_features(setup, setup.encoder)
        fitted = heads.fit_probe(features, setup.task, settings, args.head, progress_bar)
        head, records, probs = fitted
        answers = {f"pretrained encoder, {args.head}": probs}
        answers |= heads.baselines(setup, settings, args.head, progress_bar)
        trained = Trained(heads.Classifier(setup.encoder, head), records, answers)
        finish(args, out, config, study, setup, trained)


def finetune(args: Namespace) -> None:
    """Train encoder and a fully connected head end to end; --from-scratch is the baseline."""
    study, setup = prepare(args, args.from_scratch)
    kind, lrs = "finetune", heads.FineTuning.lrs
    if args.from_scratch:
        kind, lrs = "scratch", heads.SCRATCH_LRS
    if args.lr:
        lrs = (args.lr,)
    settings = heads.FineTuning(epochs=args.epochs, lrs=lrs, seed=args.seed)
    out = args.out or args.runs / f"{kind}-{setup.task.name}"
    config = describe_fit(args, study, setup, settings)
    with open_run(args, out, config) as state:
        K = len(setup.task.classes)
        head = heads.new_head("fc", setup.encoder.feature_dim, K, args.seed)
        classifier = heads.Classifier(setup.encoder, head)
        say(f"  {args.epochs} epochs for each of the peak rates {lrs}; val chooses")
        bar = partial(progress_bar, unit="step")
        epochs = heads.finetune(setup, classifier, settings, state, bar)
        save = partial(simclr.save, path=out / "checkpoint.pt")
        records = train(out, epochs, state, len(lrs) * args.epochs, save, look=bool)
        say("reading features")
        probs = {part: heads.part_probs(setup, classifier, part) for part in ("val", "test")}
        answers = {"from scratch" if args.from_scratch else "fine-tuned": probs}
        answers |= heads.baselines(setup, heads.Probing(seed=args.seed), "linear", progress_bar)
        finish(args, out, config, study, setup, Trained(classifier, records, answers))


class Trained(NamedTuple):
    """What `probe` and `finetune` have come to."""

    classifier: heads.Classifier
    records: list[dict]  # of its epochs
    answers: dict[str, dict]  # name -> probabilities of val and test; of its baselines, too


def finish(
    args: Namespace,
    out: Path,
    config: dict,
    study: data.Study,
    setup: heads.Setup,
    trained: Trained,
) -> None:
    """Set a result beside its baselines; write classifier.pt and what belongs to it."""
    task, test, path = setup.task, test_set(study, setup.task), out / "classifier.pt"
    name, probs = next(iter(trained.answers.items()))
    val = task.part("val")
    temperature = evaluate.fit_temperature(task.labels[val], probs["val"])
    results = {name: test.measure(probs["test"], temperature)}
    for row, answer in trained.answers.items():
        if row != name:
            results[row] = test.measure(answer["test"])
    heads.save_classifier(path, trained.classifier, setup, config["head"], temperature, config)
    names = {"train_loss": "training loss, nats", "val_loss": "val loss, nats"}
    names["val_accuracy"] = "val accuracy"
    chosen = max(trained.records, key=heads.merit)["epoch"]
    title = f"{task.name}: {name}"
    files = result_files(test, probs["test"], results, temperature, task.notes, len(val))
    files |= {"log.jsonl": trained.records, "splits.csv": split_table(study, task)}
    files["curve.png"] = evaluate.curve_figure(title, trained.records, names, chosen)
    own, untrained, *_ = results.values()
    if args.command == "probe" and own["accuracy"] <= untrained["accuracy"]:
        say("It is no better than an untrained encoder: try more epochs, or larger images.")
    conclude(out, files, ["explain", *data_flags(args), "--model", str(path)])


def test_set(study: data.Study, task: data.Task) -> evaluate.TestSet:
    """The test images of a task, as evaluate.py takes them."""
    test = task.part("test")
    paths = [study.images.names[row] for row in task.rows[test]]
    return evaluate.TestSet(task.name, task.classes, paths, task.labels[test], task.groups[test])


def result_files(
    test: evaluate.TestSet, probs: np.ndarray, results: dict, temperature: float, notes: dict, n_val
) -> dict[str, object]:
    """The files of a result: metrics.json, report.md, predictions.csv and the figures.

    Args:
        probs: (N, K), not calibrated, of the first of `results`.
        n_val: as `evaluate.report` takes it.
    """
    name, metrics = next(iter(results.items()))
    calibrated = evaluate.with_temperature(probs, temperature)
    answers = {"as it is": probs, "after temperature scaling": calibrated}
    figures = ["confusion.png", "roc.png", "reliability.png"]
    title = f"{test.task}: {name}, {date.today()}"
    return {
        "metrics.json": metrics | {"split": notes, "baseline": list(results.values())[1]},
        "report.md": evaluate.report(title, results, n_val, notes, figures),
        "predictions.csv": evaluate.prediction_table(test.paths, calibrated, test.classes, test),
        "confusion.png": evaluate.confusion_figure(metrics["confusion_matrix"], test.classes),
        "roc.png": evaluate.roc_figure(test, probs),
        "reliability.png": evaluate.reliability_figure(test.labels, answers),
    }


def compare(args: Namespace) -> None:
    """Compare pretraining with training from scratch on the same few labels; leaves table.md."""
    study, setup = prepare(args)
    out = args.out or args.runs / f"compare-{setup.task.name}"
    settings = heads.FineTuning(epochs=args.epochs)
    # Shares and seeds are no settings: another one adds its fits to those that are there.
    config = describe_fit(args, study, setup, settings)
    with open_run(args, out, config):
        fits = read_fits(out / "fits.jsonl")
        for seed in range(args.seeds):
            for fraction in sorted(set(args.label_fractions)):
                for method in evaluate.METHODS:
                    key = (method, fraction, seed)
                    if key in fits:
                        continue
                    say(f"  {method}, {100 * fraction:g} % of the labels, seed {seed}")
                    bar = partial(progress_bar, desc=method)
                    fits[key] = heads.fit(setup, method, fraction, seed, settings, bar)
                    write(out, {"fits.jsonl": fits.values()})
        chosen = []
        for fit in fits.values():
            if fit["seed"] < args.seeds and fit["fraction"] in args.label_fractions:
                chosen.append(fit)
        test = test_set(study, setup.task)
        about = (
            f"{len(test.paths):,} test images of {len(set(test.groups)):,} groups. Mean over "
            f"{args.seeds} draws of labels, heads and order; brackets: 95 % intervals from "
            f"resampling test groups. Fine-tuning: {args.epochs} epochs; from scratch as many for "
            f"each of the rates {heads.SCRATCH_LRS}; val chooses."
        )
        title = f"{setup.task.name}: what labels are worth, {date.today()}"
        files = evaluate.compare_files(chosen, test, title, about)
        following = ["embed", *data_flags(args)]
        if args.encoder:
            following += ["--encoder", str(args.encoder)]
        conclude(out, files, following)


def read_fits(file: Path) -> dict[tuple, dict]:
    """The finished fits of a comparison, by (method, fraction, seed)."""
    fits = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        fit = json.loads(line)
        fits[fit["method"], fit["fraction"], fit["seed"]] = fit
    return fits


# ---------------------------------------------------------------------------------------------
# evaluate, predict, explain, embed
# ---------------------------------------------------------------------------------------------


def read_model(args: Namespace) -> tuple[heads.Classifier, dict]:
    """The classifier of --model, and its checkpoint; its digest becomes args.model_digest."""
    classifier, checkpoint = heads.load_classifier(args.model)
    with open(args.model, "rb") as file:
        args.model_digest = hashlib.file_digest(file, "sha256").hexdigest()
    return classifier, checkpoint


def load_like(args: Namespace, checkpoint: dict) -> data.Study:
    """Read --data with a former run's own --patient-pattern, unless that finds nobody here."""
    own = checkpoint["config"].get("patient_pattern")
    typed = args.patient_pattern
    args.patient_pattern = typed or own
    try:
        return load_study(args, checkpoint["image_size"])
    except data.UserError as error:
        if typed or not own:
            raise
        say(f"without the --patient-pattern that {checkpoint['config']['command']} had: {error}")
        args.patient_pattern = None
        return load_study(args, checkpoint["image_size"])


def unseen_images(args: Namespace, checkpoint: dict) -> tuple[data.Study, data.Task, np.ndarray]:
    """Read --data; its task, the classifier's own unless another is given, and the rows to test."""
    study = load_like(args, checkpoint)
    if args.task is None and checkpoint["task"] in study.tasks:
        args.task = checkpoint["task"]
    task = heads.unseen_task(study, find_task(args, study), checkpoint)
    test = task.part("test")
    seen, dropped = task.notes["dropped_as_seen"], task.notes["dropped_by_the_split"]
    why = f"{seen:,} as seen in training, {dropped:,} by the split"
    say(f"{len(test):,} images of {task.name} count; left out: {why}")
    return study, task, task.rows[test]


def score_elsewhere(args: Namespace) -> None:
    """Score a classifier on images from elsewhere that it has not seen; leaves report.md."""
    classifier, checkpoint = read_model(args)
    study, task, rows = unseen_images(args, checkpoint)
    out = args.out or args.runs / f"evaluate-{task.name}"
    test = test_set(study, task)
    config = describe_run(args, study, task=task.name, model=args.model_digest)
    with open_run(args, out, config):
        squares = study.images.squares
        probs = heads.predict_probs(classifier, squares, rows, checkpoint, args.device)
        shares = np.bincount(test.labels, minlength=len(task.classes)) / len(test.labels)
        temperature = checkpoint["temperature"]
        results = {"this classifier": test.measure(probs, temperature)}
        constant = np.tile(shares, (len(test.labels), 1))
        results["always the commonest class"] = test.measure(constant)
        files = result_files(test, probs, results, temperature, task.notes, None)
        files["splits.csv"] = split_table(study, task)
        conclude(out, files, ["explain", *data_flags(args), "--model", str(args.model)])


def calibrated_probs(
    args: Namespace, model: tuple[heads.Classifier, dict], squares: np.ndarray, rows
) -> np.ndarray:
    """(k, K) what a classifier answers, at its temperature: the same digits in every command."""
    classifier, checkpoint = model
    probs = heads.predict_probs(classifier, squares, rows, checkpoint, args.device)
    return evaluate.with_temperature(probs, checkpoint["temperature"])


def predict(args: Namespace) -> None:
    """Say what a classifier makes of files and folders; leaves predictions.csv."""
    classifier, checkpoint = read_model(args)
    if not args.paths:
        raise data.UserError("give the files or folders to predict")
    images, rows = read_paths(args, checkpoint["image_size"])
    out = args.out or args.runs / f"predict-{checkpoint['task']}"
    pixels = hashlib.sha256(images.hashes.tobytes()).hexdigest()
    config = describe_run(args, None, model=args.model_digest, images=images.names, pixels=pixels)
    with open_run(args, out, config):
        probs = calibrated_probs(args, (classifier, checkpoint), images.squares, rows)
        names, classes = [images.names[row] for row in rows], checkpoint["classes"]
        of_patient = defaultdict(list)
        for i, patient in enumerate(patients_of(names, checkpoint)):
            say(f"{names[i]}: {answer_in_words(probs[i], classes)}")
            of_patient[patient].append(i)
        for patient, chosen in of_patient.items():
            if patient:
                answer = answer_in_words(probs[chosen].mean(axis=0), classes)
                say(f"patient {patient}, {len(chosen)} images: {answer}")
        say(CAUTION)
        if checkpoint["config"].get("phantoms"):
            say("This classifier was trained on phantoms: of a real scan its answer means nothing.")
        table = evaluate.prediction_table(names, probs, classes)
        paths = [str(path) for path in args.paths]
        following = ["explain", "--model", str(args.model), *paths]
        conclude(out, {"predictions.csv": table}, following)


def patients_of(names: list[str], checkpoint: dict) -> list[str]:
    """Whom the names of images name, by the classifier's own --patient-pattern; '' = nobody."""
    own = checkpoint["config"].get("patient_pattern")
    pattern = re.compile(own) if own else None
    return [data.read_patient(name, pattern) for name in names]


def answer_in_words(probs: np.ndarray, classes: list[str]) -> str:
    """The classes with their probabilities, the most probable first."""
    order = np.argsort(-probs, kind="stable")
    return ", ".join(f"{classes[k]} {probs[k]:.4f}" for k in order)


def read_paths(args: Namespace, image_size: int) -> tuple[data.Images, np.ndarray]:
    """The images of the files and folders that were typed, and the rows that can be read."""
    images = data.load_files(args.paths, image_size, RUNS / "cache", progress_bar)
    return images, readable_rows(images)


class Asked(NamedTuple):
    """The images that `explain` explains."""

    images: data.Images
    root: Path | None  # below which their names lie; None = phantoms
    rows: np.ndarray  # (k,) int64
    labels: np.ndarray  # (k,) str, '' = unknown
    groups: np.ndarray  # (k,) int64


def images_to_explain(args: Namespace, checkpoint: dict) -> Asked:
    """The typed files and folders or, of --data, what the classifier has not seen."""
    if args.paths and args.data:
        raise data.UserError("give --data (its test images are explained) or files, not both")
    if not args.paths:
        study, task, rows = unseen_images(args, checkpoint)
        test = task.part("test")
        labels = np.array(task.classes)[task.labels[test]]
        return Asked(study.images, study.root, rows, labels, task.groups[test])
    images, rows = read_paths(args, checkpoint["image_size"])
    patients = patients_of([images.names[row] for row in rows], checkpoint)
    owners = [patient or f"row {i}" for i, patient in enumerate(patients)]
    groups = np.unique(owners, return_inverse=True)[1]
    return Asked(images, Path(), rows, np.full(len(rows), ""), groups)


def explain(args: Namespace) -> None:
    """Show where a classifier looked, and how far to believe it; leaves index.html."""
    classifier, checkpoint = read_model(args)
    if checkpoint["image_size"] <= simclr.STRIDES[args.layer]:
        size = f"images of {checkpoint['image_size']} pixels have one cell in {args.layer}"
        raise data.UserError(f"{size}, so no map; give an earlier --layer")
    asked = images_to_explain(args, checkpoint)
    names, classes = np.array(asked.images.names)[asked.rows], checkpoint["classes"]
    out = args.out or args.runs / f"explain-{checkpoint['task']}"
    values = {"model": args.model_digest, "layer": args.layer, "images": names.tolist()}
    with open_run(args, out, describe_run(args, None, **values)):
        model = (classifier, checkpoint)
        probs = calibrated_probs(args, model, asked.images.squares, asked.rows)
        columns = {"path": names, "group": asked.groups, "label": asked.labels}
        columns["prediction"] = np.array(classes)[probs.argmax(axis=1)]
        columns |= {f"p_{name}": probs[:, k] for k, name in enumerate(classes)}
        columns["overlay"] = np.array([f"{i:05d}-map.png" for i in range(len(names))])
        columns |= draw_maps(args, out, model, asked)
        some = np.linspace(0, len(names) - 1, min(EXPLAINED, len(names))).astype(int)
        x = heads.normalised(asked.images.squares[asked.rows[some]], checkpoint, args.device)
        shuffled = gradcam.randomisation_check(classifier, f"encoder.{args.layer}", x, SHUFFLED)
        title = f"{checkpoint['task']}: where the classifier looked ({args.layer})"
        files = {
            "report.md": gradcam.report(title, columns, shuffled),
            "explain.csv": [list(columns), *zip(*columns.values(), strict=True)],
            "index.html": gradcam.page(title, columns, shuffled),
        }
        paths = args.paths or [args.data]
        following = ["predict", "--model", str(args.model), *map(str, paths)]
        if not paths[0]:  # phantoms
            following = ["compare", "--task", checkpoint["task"]]
        conclude(out, files, following)


def draw_maps(args: Namespace, out: Path, model: tuple, asked: Asked) -> dict[str, np.ndarray]:
    """Write the overlay of each image; the measures of its map, by name."""
    classifier, checkpoint = model
    measured = []
    layer, stride = f"encoder.{args.layer}", simclr.STRIDES[args.layer]
    encoder, K = heads.untrained(checkpoint["arch"], 0), len(checkpoint["classes"])
    head = heads.new_head(checkpoint["head_type"], encoder.feature_dim, K, 0)
    random = heads.Classifier(encoder, head).to(args.device)
    with (
        gradcam.GradCAM(classifier.to(args.device), layer, stride) as cam,
        gradcam.GradCAM(random, layer, stride) as untrained,
    ):
        for start in progress_bar(range(0, len(asked.rows), EXPLAINED), desc="explain"):
            rows = asked.rows[start : start + EXPLAINED]
            squares, lesions = asked.images.squares[rows], []
            for row in rows:
                name = asked.images.names[row]
                lesions.append(data.lesion_of(asked.root, name, squares.shape[1]))
            x, sick = heads.normalised(squares, checkpoint, args.device), np.stack(lesions)
            generator = simclr.generator_for(start)
            maps, measures = gradcam.explain(cam, untrained, x, torch.from_numpy(sick), generator)
            measured.append(measures)
            for i in range(len(rows)):
                figure = gradcam.overlay(squares[i], maps[i], lesions[i])
                write(out, {f"{start + i:05d}-map.png": figure})
    return {name: np.concatenate([batch[name] for batch in measured]) for name in measured[0]}


def embed(args: Namespace) -> None:
    """Write the features of every image of a folder, with the split of the pretraining."""
    encoder, checkpoint = read_encoder(args)
    config = checkpoint["config"]
    args.resplit = args.resplit or config.get("resplit", False)
    if config.get("labels") and not args.labels:
        args.labels = Path(config["labels"])
    place = args.out or args.runs / "features.npz"
    if place.suffix != ".npz":
        raise data.UserError(f"--out {place} is the file of the features; its name ends in .npz")
    study = load_like(args, checkpoint)
    names = np.array(study.images.names)
    labels, tasks, splits = np.full((3, len(names)), "", object)
    for task in study.tasks.values():
        labels[task.rows] = np.array(task.classes)[task.labels]
        tasks[task.rows], splits[task.rows] = task.name, task.split
    seen = data.was_seen(study, checkpoint["seen"].numpy())
    splits[seen & np.isin(splits, ("", "test", "val"))] = "pretrain"  # no test of this encoder
    rows = np.setdiff1d(np.arange(len(names)), list(study.images.unreadable))
    say(f"reading the features of {len(rows):,} images")
    h = heads.features_of(encoder, study.images.squares, rows, checkpoint, args.device).numpy()
    columns = {"paths": names[rows], "labels": labels[rows].astype(str)}
    columns |= {"tasks": tasks[rows].astype(str), "splits": splits[rows].astype(str)}
    if place.exists():
        say(f"replaces {place}")
    write(place.parent, {place.name: {"features": h, **columns}})
    say(f"in {place} now: features {h.shape}, paths, labels, tasks, splits")
    say_next(probe_or_embed(args, study, args.encoder))


# ---------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------


class Parser(ArgumentParser):
    """Takes no abbreviated flags; reports a mistyped command as one line, as all mistakes are."""

    def __init__(self, **options: object) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> None:
        """Raise, where argparse would print the usage."""
        raise data.UserError(f"{message}; see: python {self.prog} --help")


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a number of a kind, from `low` to `high`."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            named = "whole number" if kind is int else "number"
            raise ArgumentTypeError(f"{text!r} is no {named} from {low:g} to {high:g}")
        return value

    return read


def pattern(text: str) -> str:
    """An argparse type: a regular expression with a capture group."""
    try:
        compiled = re.compile(text)
    except re.error as error:
        raise ArgumentTypeError(f"{text!r} is no regular expression ({error})") from None
    if not compiled.groups:
        raise ArgumentTypeError(f"{text!r} has no (group) around what is the patient")
    return text


COUNT, PAIRS = number(int, 1, 10**6), number(int, 2, 10**6)
SIDE, SEED, EPOCHS = number(int, 32, 1024), number(int, 0, 2**63 - 1), number(int, 0, 10**6)
RATE, SHARE = number(float, 1e-9, 1e3), number(float, 1e-6, 1)
ARCHS, STAGES = list(simclr.ARCHITECTURES), list(simclr.STRIDES)
DEVICES, PRECISIONS, HEADS = (
    "auto cpu cuda mps".split(),
    "auto bf16 fp32".split(),
    list(heads.HEADS),
)
SHARES = [0.01, 0.1, 1.0]
SMALLER, FEWER, SHORTER = PHANTOM_DEFAULTS.values()  # pixels, slices, epochs
FLAGS = {  # the default stands in brackets
    "paths": {"type": Path, "nargs": "*", "help": "images, volumes, shards and folders"},
    "--data": {"type": Path, "help": "folder of scans, <task>/<class>/ in it [phantoms]"},
    "--labels": {"type": Path, "help": "table with the columns path, label (task, patient, split)"},
    "--patient-pattern": {"type": pattern, "help": "regex; its first (group) is the patient"},
    "--resplit": {"action": "store_true", "help": "pool published splits, and split anew"},
    "--task": {"help": "such as tumor (`data` lists them) [the only one]"},
    "--encoder": {"type": Path, "help": "an encoder.pt [that of `pretrain`]"},
    "--model": {"type": Path, "required": True, "help": "a classifier.pt of probe or finetune"},
    "--head": {
        "choices": HEADS[:2],
        "default": HEADS[0],
        "help": "linear: the usual probe [%(default)s]",
    },
    "--from-scratch": {"action": "store_true", "help": "begin with --init: supervised baseline"},
    "--layer": {
        "choices": STAGES,
        "default": gradcam.LAYER,
        "help": "later is coarser [%(default)s]",
    },
    "--arch": {"choices": ARCHS, "default": ARCHS[0], "help": "encoder [%(default)s]"},
    "--init": {
        "default": "random",
        "help": "random, imagenet, or a file of torchvision's [random]",
    },
    "--image-size": {"type": SIDE, "help": f"pixels a side [128; {SMALLER} on phantoms]"},
    "--batch-size": {"type": PAIRS, "help": f"slices a step [512; {FEWER} on phantoms]"},
    "--chunk-size": {
        "type": COUNT,
        "help": "slices in memory at once; the loss is the batch's [all]",
    },
    "--epochs": {"type": EPOCHS, "help": f"[pretrain 200, probe 150, else 30; phantoms {SHORTER}]"},
    "--lr": {"type": RATE, "help": "peak; halve it if the loss bursts [5e-4; fine-tuning 1e-4]"},
    "--temperature": {"type": RATE, "default": 0.07, "help": "lower: hardest negatives [0.07]"},
    "--label-fractions": {"type": SHARE, "nargs": "+", "default": SHARES, "help": "[0.01 0.1 1]"},
    "--seeds": {"type": COUNT, "default": 3, "help": "draws of labels and weights [3]"},
    "--seed": {"type": SEED, "default": 0, "help": "moves weights and views, never the split [0]"},
    "--precision": {
        "choices": PRECISIONS,
        "default": "auto",
        "help": "of training [bf16 if native]",
    },
    "--out": {"type": Path, "help": "folder of the run (of embed, the file) [below runs/]"},
    "--restart": {"action": "store_true", "help": "delete what is there, and begin anew"},
    "--device": {"choices": DEVICES, "default": "auto", "help": "[CUDA, else MPS, else the CPU]"},
}
READING = "--data --labels --patient-pattern --resplit"
COMPARED = "--label-fractions --seeds --epochs --precision"
NETWORK = "--arch --init --image-size --epochs --lr --seed --precision"
COMMON = "--out --restart --device"
COMMANDS = {  # each with its own flags; all have the COMMON ones
    "data": (survey, f"{READING} --task --image-size"),
    "pretrain": (pretrain, f"{READING} {NETWORK} --batch-size --chunk-size --temperature"),
    "probe": (probe, f"{READING} --task --encoder --head --epochs --seed"),
    "finetune": (finetune, f"{READING} --task --encoder --from-scratch {NETWORK}"),
    "compare": (compare, f"{READING} --task --encoder {COMPARED}"),
    "evaluate": (score_elsewhere, f"{READING} --task --model"),
    "predict": (predict, "paths --model"),
    "explain": (explain, f"paths {READING} --task --model --layer"),
    "embed": (embed, f"{READING} --encoder"),
}


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser, and that of each command; a command's help is its function's first line."""
    parser = Parser(prog="main.py", description=f"SimCLR for brain scans. {CAUTION}")
    adding = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands = {}
    for name, (run, flags) in COMMANDS.items():
        summary = run.__doc__.splitlines()[0]
        commands[name] = adding.add_parser(name, help=summary, description=summary)
        commands[name].set_defaults(run=run)
        for flag in f"{flags} {COMMON}".split():
            commands[name].add_argument(flag, **FLAGS[flag])
    return parser, commands


def parse(argv: list[str]) -> Namespace:
    """The typed words as values.

    Raises:
        UserError: a word is wrong; the line says which was perhaps meant.
    """
    parser, commands = build_parser()
    if argv and argv[0][:1] != "-" and argv[0] not in commands:
        hint = did_you_mean(argv[0], commands)
        raise data.UserError(f"no command {argv[0]!r}{hint}; see: python main.py --help")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        hint = did_you_mean(unknown[0], f"{COMMANDS[args.command][1]} {COMMON}".split())
        see = f"see: python main.py {args.command} --help"
        raise data.UserError(f"{args.command} does not know {unknown[0]!r}{hint}; {see}")
    args.typed = argv
    fill_in(args)
    return args


def fill_in(args: Namespace) -> None:
    """Give what was not typed the defaults that differ by command and on phantoms."""
    if args.command == "finetune" and not args.from_scratch:
        if args.image_size or args.init != "random" or args.arch != "resnet18":
            raise data.UserError("--arch, --init and --image-size go with --from-scratch alone")
    phantoms = getattr(args, "data", None) is None and not getattr(args, "paths", None)
    # Runs on phantoms lie apart, so that no default encoder is of the other kind.
    args.runs = RUNS / "phantoms" if phantoms else RUNS
    defaults = {"image_size": 128, "batch_size": 512, "epochs": 30}
    if phantoms:
        defaults |= PHANTOM_DEFAULTS
    if args.command == "pretrain":
        defaults |= {"epochs": defaults["epochs"] if phantoms else 200, "lr": Pretraining.lr}
    if args.command == "probe":
        defaults["epochs"] = 150
    for name, value in defaults.items():
        if getattr(args, name, value) is None:
            setattr(args, name, value)
    if args.out and getattr(args, "data", None):
        if args.data.resolve().is_relative_to(args.out.resolve()):
            raise data.UserError(f"--out {args.out} holds the scans; give another folder")
    if getattr(args, "epochs", 1) == 0 and args.command != "pretrain":
        raise data.UserError(f"{args.command} --epochs 0 trains nothing; give 1 or more")


def main(argv: list[str] | None = None) -> int:
    """Run one command; status 0, or 2 for a mistake that one line on standard error explains."""
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        if PROCESSES > 1 and args.command != "pretrain":
            raise data.UserError(f"{args.command} runs in one process: start it without torchrun")
        with process_group():
            choose_device(args)
            args.run(args)
    except BrokenPipeError:  # `main.py data | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (data.UserError, OSError, MemoryError, RuntimeError) as error:
        if type(error) is RuntimeError and "memory" not in str(error):
            raise
        if RANK == 0:
            print(f"error: {visible(str(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
