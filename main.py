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
import re
import shlex
import subprocess
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from datetime import date, timedelta
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import evaluate
import gradcam
import heads
import simclr

RUNS = Path("runs")
CACHE = RUNS / "cache"
# On the phantoms a command takes minutes on a laptop; these settings, and no others, differ there.
PHANTOM_DEFAULTS = {
    "data": {"image_size": 64},
    "pretrain": {"image_size": 64, "batch_size": 32, "epochs": 12, "lr": 1e-3, "temperature": 0.2},
    "finetune": {"image_size": 64, "epochs": 12},
    "compare": {"epochs": 12},
}
KNN_EVERY = 5  # epochs of a pretraining between two looks at what the features are worth
ENOUGH_STEPS = 2000  # features still became better up to there (docs/results.md)
MAX_UNREADABLE = 5  # images; more than these, if they are more than 1 % too, stop a run
EXPLAINED = 32  # images explained at once, and images whose maps are made again, weights shuffled
SPLITS = ("train", "val", "test", "dropped")
CAUTION = "For research, not for diagnosis."
SHUFFLED = ["head", "encoder.layer4", "encoder.layer3", "encoder.layer2", "encoder.layer1"]
# Which process this is and of how many, as torchrun says; only the first one writes and prints.
RANK = int(os.environ.get("RANK", 0))
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))
# What commands write, and --restart deletes; nothing else that lies there.
RUN_FILES = "config.json metrics.json log.jsonl fits.jsonl checkpoint.pt encoder.pt classifier.pt "
RUN_FILES += "report.md table.md table.csv splits.csv predictions.csv explain.csv index.html "
RUN_FILES += "curve.png confusion.png roc.png reliability.png leak.png label_efficiency.png "
RUN_FILES += "[0-9][0-9][0-9][0-9][0-9]-map.png"
# Values in `args` that decide no result: they may differ between two starts of one run.
NO_SETTINGS = "run runs typed out restart device precision data paths label_fractions seeds "
NO_SETTINGS += "config pretraining"
# How a refusal calls settings whose values are digests.
DIGESTS = {"encoder": "another encoder", "model": "another model"}
DIGESTS["fingerprint"] = "other images, or another table of labels"


# ---------------------------------------------------------------------------------------------
# What the commands share
#
# `args` holds the typed flags and, from `parse`, `choose_device` and `open_run` on, also: phantoms,
# runs (the folder of the runs), device, bf16, out (the folder of this run) and config.
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


def counted(n: int, noun: str) -> str:
    """A number with its noun: 1 image, 1,200 images."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def choose_device(args: Namespace) -> None:
    """Set args.device, and args.bf16: whether training takes bf16 there; say both.

    Raises:
        UserError: --device names one that is not here.
    """
    best = "cpu"
    if torch.backends.mps.is_available():
        best = "mps"
    if torch.cuda.is_available():
        best = "cuda"
    name = best if args.device == "auto" else args.device
    if name not in ("cpu", best):
        raise data.UserError(f"this machine has no {name} device; give --device {best}")
    args.device = torch.device(name)
    if name == "cuda":
        args.device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(args.device)
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    native, why = simclr.native_bf16(args.device)
    precision = getattr(args, "precision", "fp32")  # only commands that train have the flag
    args.bf16 = native if precision == "auto" else precision == "bf16"
    say(f"on {name}, " + (f"training in bf16 ({why})" if args.bf16 else "in float32"))


def load_study(args: Namespace) -> data.Study:
    """Read --data or the phantoms; say what is there, and what cannot be read.

    Raises:
        UserError: the data cannot be read, or too many of its images.
    """
    if args.labels and args.labels.suffix.lower() not in (".csv", ".tsv"):
        raise data.UserError(f"--labels {args.labels} is no table: give a .csv or .tsv")
    pattern = re.compile(args.patient_pattern) if args.patient_pattern else None
    if RANK:
        dist.barrier()  # the first process decodes, the others find all in the cache
    study = data.load(
        args.data, args.image_size, CACHE, progress_bar, pattern, args.labels, args.resplit
    )
    if PROCESSES > 1 and RANK == 0:
        dist.barrier()
    images = counted(len(study.images.names), "image")
    place = args.data or "phantoms, drawn by code (--data takes your own scans)"
    say(f"{place}: {images} in {counted(len(np.unique(study.groups)), 'group')}")
    say(f"  the patient is known of {(study.patients != '').sum():,} of {images}")
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
    if len(bad) == n or len(bad) > max(MAX_UNREADABLE, 0.01 * n):
        raise data.UserError(f"{len(bad)} of {n} images cannot be read; replace or remove them")
    return images.readable(np.arange(n))


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A hint at the choice that is spelled most alike; '' where none is."""
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def find_task(args: Namespace, study: data.Study) -> data.Task:
    """The task called --task or, without that, the only one, whose name args.task then is.

    Raises:
        UserError: there is none, or more than one to choose from.
    """
    names = sorted(study.tasks)
    if args.task is None and len(names) == 1:
        args.task = names[0]
    if args.task not in names:
        hint = did_you_mean(args.task or "", names)
        found = ", ".join(names) or "none; a task is a folder with two or more class folders"
        raise data.UserError(f"--task is needed, one of those found: {found}{hint}")
    return study.tasks[args.task]


def describe_run(args: Namespace, images: data.Images, more: dict) -> dict:
    """config.json: every value that shaped the run, in plain types; checkpoints hold it too.

    All decide the result, but for those under "started", which may differ between two starts of
    one run: they move its speed, and the last bits at most.
    """
    config = {key: value for key, value in vars(args).items() if key not in NO_SETTINGS.split()}
    digest = hashlib.sha256("\n".join(images.names).encode("utf8", "surrogateescape"))
    digest.update(images.hashes.tobytes())
    if config.get("labels"):
        digest.update(args.labels.read_bytes())
        config["labels"] = args.labels.resolve()
    config["fingerprint"] = digest.hexdigest()
    for key in ("encoder", "model"):
        if config.get(key):
            config[key] = hashlib.sha256(config[key].read_bytes()).hexdigest()
    git = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    started = {"typed": args.typed, "folder": Path.cwd(), "device": args.device, "commit": None}
    with suppress(OSError):  # without git
        answer = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True)
        started["commit"] = answer.stdout.strip() or None
    versions = {module.__name__: str(module.__version__) for module in (torch, np, PIL)}
    started["versions"] = versions | {"python": sys.version}
    started |= {"processes": PROCESSES, "threads": torch.get_num_threads()}
    started["pretraining"] = getattr(args, "pretraining", None)
    # As in the file: tuples become lists, paths become texts.
    return json.loads(json.dumps(config | more | {"started": started}, default=str))


@contextmanager
def open_run(args: Namespace, name: str, images: data.Images, /, **more: object) -> Iterator:
    """Hold --out or else the run called `name`, and set args.out and args.config.

    Args:
        images: what the run works on.
        more: settings that are not in `args`.

    Yields:
        Its checkpoint, where it has one of the same settings; else None.

    Raises:
        UserError: another process holds the folder, or it has results of other settings.
    """
    args.out = args.out or args.runs / name
    args.config = describe_run(args, images, more)
    with data.lock_folder(args.out) if RANK == 0 else nullcontext():
        if RANK == 0:
            for pattern in RUN_FILES.split():
                outdated = [*args.out.glob(f".{pattern}.*.tmp")]  # their writing was killed
                if args.restart:
                    outdated += args.out.glob(pattern)
                for file in outdated:
                    file.unlink()
            refuse_other_settings(args)
            write(args, {"config.json": args.config})
        if PROCESSES > 1:
            dist.barrier()
        state, path = None, args.out / "checkpoint.pt"
        if path.exists():
            state = simclr.load_checkpoint(path, "optimizer")
        yield state


def refuse_other_settings(args: Namespace) -> None:
    """Compare config.json, where the folder has one, with the run that is about to begin.

    `data`, `predict` and `explain`, which are quickly typed again, say that they replace what is
    there.

    Raises:
        UserError: it is of other settings.
    """
    place, now = args.out / "config.json", args.config
    if not place.exists():
        return
    with simclr.one_line(f"{place} is no config of a run; --restart replaces it"):
        former = dict(json.loads(place.read_text()))
        if args.command == "pretrain" and former["epochs"] < args.epochs:
            former["epochs"] = args.epochs  # a finished pretraining may be given more
    different = []
    for key in sorted(now.keys() - {"started"}):
        if former.get(key) != now[key]:
            values = f"{key} {former.get(key)!s:.30}, not {now[key]!s:.30}"
            different.append(DIGESTS.get(key, values))
    if different and args.command in ("data", "predict", "explain"):
        say(f"replaces the earlier results in {args.out}: those of {'; '.join(different)}")
    elif different:
        raise data.UserError(
            f"{args.out} has results of {'; '.join(different)}; give the same to go on, "
            "another --out for a second run, or --restart to replace it"
        )


def write(args: Namespace, files: dict[str, object]) -> None:
    """Write files (by name, as `evaluate.as_bytes` takes them), each whole or not at all."""
    for name, value in files.items():
        if RANK == 0:
            with data.write_atomically(args.out / name) as file:
                file.write(evaluate.as_bytes(name, value))


def conclude(args: Namespace, files: dict[str, object]) -> None:
    """Write a command's files; print its report, and what lies there now."""
    write(args, files)
    for name in ("report.md", "table.md"):
        for line in files.get(name, "").splitlines():
            say(line)
    there = sorted(path.name for path in args.out.iterdir() if not path.name.endswith("-map.png"))
    say(f"in {args.out}/ now: {', '.join(there)}")


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
    study, home = load_study(args), args.out
    tasks = [find_task(args, study)] if args.task else study.tasks.values()
    for task in tasks:
        args.out = home / task.name if home else None
        with open_run(args, f"data-{task.name}", study.images, task=task.name):
            thumbnails = study.images.thumbnails[task.rows]
            meter = evaluate.leak_meter(thumbnails, task.labels, task.groups)
            report, figure = survey_report(task, meter), evaluate.leak_figure(meter)
            splits = split_table(study, task)
            conclude(args, {"report.md": report, "splits.csv": splits, "leak.png": figure})
    if len(data.pretraining_rows(study)) < 2:
        raise data.UserError("fewer than 2 images are left to pretrain on; --resplit may help")
    if not study.tasks:
        say("no task here: two or more folders side by side in --data would be its classes")
    say_next(["pretrain", *data_flags(args)])


def split_table(study: data.Study | heads.Setup, task: data.Task) -> list[tuple]:
    """splits.csv, header first: path, label, group, split, pixel_hash (hexadecimal)."""
    table = [("path", "label", "group", "split", "pixel_hash")]
    for i, row in enumerate(task.rows):
        path, label = study.images.names[row], task.classes[task.labels[i]]
        pixel_hash = study.images.hashes[row].tobytes().hex()
        table.append((path, label, int(task.groups[i]), str(task.split[i]), pixel_hash))
    return table


def survey_report(task: data.Task, meter: dict) -> str:
    """report.md of `data`: a task as a table, what is dropped, and what leaks would score."""
    rows = [["class", "images", "groups", *SPLITS]]
    for k, name in enumerate([*task.classes, "all"]):
        members = (task.labels == k) | (k == len(task.classes))  # (m,) bool, all of them for "all"
        counts = [members.sum(), len(np.unique(task.groups[members]))]
        for split in SPLITS:
            counts.append((task.split[members] == split).sum())
        rows.append([evaluate.markdown(name), *map("{:,}".format, counts)])
    title = f"# {task.name}: {counted(len(task.rows), 'image')}, {task.notes['rule']}"
    lines = [title, "", evaluate.table(rows)]
    tested = task.published == "test"
    leaked = np.isin(task.groups[tested], task.groups[task.published == "train"]).sum()
    if tested.any():
        text = "test images have images of their own group in training"
        lines.append(f"\nAs published, {leaked:,} of {tested.sum():,} {text}.")
    scores = {key: evaluate.number(meter[key]) for key in ("by image", "by group", "commonest")}
    lines.append("\nAccuracy of the nearest neighbour on 32x32 pixels, which was never trained:")
    lines.append(f"split by image {scores['by image']}, split by group {scores['by group']};")
    lines.append(f"of always answering the commonest class {scores['commonest']}.")
    for reason, count in task.notes.items():
        if reason.startswith("dropped") and count:
            lines.append(f"\n{reason.replace('_', ' ')}: {counted(count, 'image')}")
    try:
        data.check_split(task)
    except data.UserError as error:
        lines.append(f"\nIt cannot be probed: {error}.")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------
# pretrain
# ---------------------------------------------------------------------------------------------


def pretrain(args: Namespace) -> None:
    """Learn an encoder from images without labels, or go on learning; leaves encoder.pt."""
    study = load_study(args)
    rows, images = data.pretraining_rows(study), study.images
    plan_steps(args, study, len(rows))
    torch.manual_seed(args.seed)  # the networks' first weights
    encoder, mean, std = simclr.init_encoder(args.arch, args.init)
    head = simclr.ProjectionHead(encoder.feature_dim)
    networks = torch.nn.ModuleDict({"encoder": encoder, "projection_head": head})
    names = ("epochs", "batch_size", "lr", "temperature", "chunk_size", "seed")
    values = {name: getattr(args, name) for name in names} | {"mean": mean, "std": std}
    settings = simclr.Pretraining(**values)
    with open_run(args, "pretrain", images, images=len(rows), mean=mean, std=std) as state:
        seen = torch.from_numpy(images.hashes[rows])

        def save_encoder(epoch: int) -> None:
            checkpoint = simclr.encoder_checkpoint(encoder, args.config, epoch, seen)
            simclr.save(checkpoint, args.out / "encoder.pt")

        bar, pixels = partial(progress_bar, unit="step"), images.squares
        epochs = simclr.pretrain(
            networks, pixels, rows, settings, args.device, args.bf16, state, bar
        )
        epochs = with_knn(args, epochs, encoder, study)
        records = train(args, epochs, state, args.epochs, save_encoder)
        if RANK == 0:  # another machine has no such folder
            if not (args.out / "encoder.pt").exists():  # after --epochs 0, or deleted
                save_encoder(len(records))
            curve = evaluate.curve_figure("Pretraining", records, {"loss": "NT-Xent, nats"})
            conclude(args, {"curve.png": curve})
            say_next(probe_or_embed(args, study, args.out / "encoder.pt"))


def plan_steps(args: Namespace, study: data.Study, n: int) -> None:
    """Set args.batch_size to as much of it as n images fill; say how many steps that makes.

    Raises:
        UserError: too few images are left, or processes cannot share the batch.
    """
    why = Counter(data.left_out(study))
    why["in the val and test groups"] = why.pop("held out", 0)
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in why.items() if reason and count)
    say(f"  pretraining takes {counted(n, 'image')}; left out: {left_out or 'none'}")
    if n < 2 * PROCESSES:
        raise data.UserError("too few images are left to pretrain on (see above): at least 2")
    if n < args.batch_size:
        args.batch_size = n - n % PROCESSES
        say(f"  the batch shrinks to the {args.batch_size} images that are there")
    if args.batch_size % PROCESSES:
        raise data.UserError(f"--batch-size {args.batch_size} is no multiple of {PROCESSES}")
    steps = args.epochs * (n // args.batch_size)
    say(f"  {counted(args.epochs, 'epoch')}, {counted(steps, 'step')} of {args.batch_size} images")
    if args.data and 0 < steps < ENOUGH_STEPS:
        size = min(args.batch_size, 128, max(2, n // 8))
        tip = f"--batch-size {size} --epochs {math.ceil(ENOUGH_STEPS / (n // size))}"
        say(f"  few steps: features become better up to about {ENOUGH_STEPS:,}; try {tip}")


def with_knn(args: Namespace, epochs: Iterator, encoder: simclr.ResNet, study: data.Study):
    """Add to the records of `simclr.pretrain`, now and then, the kNN accuracy on val.

    It is that of the first task with labels; the loss alone does not tell what features are worth.
    """
    tasks = [task for task in study.tasks.values() if len(task.part("val"))]
    for record, state in epochs:
        due = record["epoch"] % KNN_EVERY == 0 or record["epoch"] == args.epochs
        if tasks and due and RANK == 0:
            record["knn_accuracy"] = heads.knn_accuracy(
                encoder, study.images, tasks[0], args.config, args.device
            )
        yield record, state


def train(args: Namespace, epochs: Iterator, state: dict, total: int, save=lambda epoch: None):
    """Show, log and save a training, epoch by epoch.

    A checkpoint is written when an epoch ends and 100 times what the last one took has passed: so
    saving costs 1 % of the time, and a run that is killed goes on from there with the same bits.

    Args:
        epochs: of `simclr.pretrain` or `heads.finetune`: (record, state) of each.
        state: the checkpoint that they go on from, or None.
        save: called with the epoch before a checkpoint is written.

    Returns:
        The records of all epochs.
    """
    records = state["records"] if state else []
    if state:
        say(f"  goes on after epoch {len(records)}")
    due = 0.0
    for record, reached in epochs:
        records.append(record)
        line = f"  epoch {len(records)} of {total}"
        for key, value in record.items():
            if key != "epoch" and value is not None:
                line += f", {key.replace('_', ' ')} {value:.4g}"
        say(line)
        write(args, {"log.jsonl": records})
        if RANK == 0 and (time.monotonic() > due or len(records) == total):
            began = time.monotonic()
            save(len(records))
            simclr.save(reached | {"records": records}, args.out / "checkpoint.pt")
            due = time.monotonic() + 100 * (time.monotonic() - began)
    return records


def probe_or_embed(args: Namespace, study: data.Study, encoder: Path) -> list[str]:
    """What follows a pretraining: a probe where a task can be split, else `embed`."""
    flags = [*data_flags(args), "--encoder", str(encoder)]
    for name in ("tumor", *sorted(study.tasks)):
        with suppress(KeyError, data.UserError):  # no such task, or none that can be probed
            data.check_split(study.tasks[name])
            return ["probe", *flags, "--task", name]
    return ["embed", *flags]


# ---------------------------------------------------------------------------------------------
# probe, finetune, compare
# ---------------------------------------------------------------------------------------------


def read_encoder(args: Namespace) -> tuple[simclr.ResNet, dict]:
    """The encoder of --encoder or, where that was not given, of `pretrain` on such data."""
    args.encoder = args.encoder or args.runs / "pretrain" / "encoder.pt"
    encoder, checkpoint = simclr.load_encoder(args.encoder)
    args.pretraining = checkpoint["config"]
    args.arch = checkpoint["arch"]
    args.image_size = checkpoint["image_size"]
    epochs = counted(checkpoint["epoch"], "epoch")
    say(f"{args.encoder}: {args.arch} after {epochs} of pretraining")
    return encoder, checkpoint


def prepare(args: Namespace, from_scratch: bool = False) -> heads.Setup:
    """Read the encoder and the data; refuse to test on what the encoder was trained on."""
    if from_scratch:
        torch.manual_seed(args.seed)
        encoder, mean, std = simclr.init_encoder(args.arch, args.init)
        config = {"arch": args.arch, "image_size": args.image_size, "mean": mean, "std": std}
        seen = torch.zeros(0, 16, dtype=torch.uint8)
        checkpoint = simclr.encoder_checkpoint(encoder, config, 0, seen)
    else:
        encoder, checkpoint = read_encoder(args)
    study = load_study(args)
    task = find_task(args, study)
    data.check_split(task)
    data.refuse_leak(study, task, checkpoint["seen"].numpy())
    counts = ", ".join(f"{len(task.part(split)):,} {split}" for split in SPLITS)
    say(f"task {task.name} ({', '.join(task.classes)}): {counts}")
    return heads.Setup(study.images, task, encoder, checkpoint, args.device, args.bf16)


def probe(args: Namespace) -> None:
    """Train a head on the frozen encoder, and on two baselines; leaves classifier.pt."""
    setup = prepare(args)
    settings = heads.Probing(epochs=args.epochs, seed=args.seed)
    kind = "linear" if args.head == "linear" else "probe"
    with open_run(args, f"{kind}-{setup.task.name}", setup.images, **asdict(settings)):
        say("reading features")
        h = heads.task_features(setup, setup.encoder)
        head, records, probs = heads.fit_probe(h, setup.task, settings, args.head, progress_bar)
        answers = {f"pretrained encoder, {args.head}": probs}
        answers |= heads.baselines(setup, settings, args.head, progress_bar)
        finish(args, setup, heads.Classifier(setup.encoder, head), records, answers)


def finetune(args: Namespace) -> None:
    """Train encoder and a fully connected head end to end; --from-scratch is the baseline."""
    setup = prepare(args, args.from_scratch)
    kind, answer, lrs = "finetune", "fine-tuned", (args.lr,)
    if args.from_scratch:
        kind, answer = "scratch", "from scratch"
        if args.init != "random":
            answer = f"supervised, from {args.init}"
    if args.from_scratch and not was_typed(args, "lr"):
        lrs = heads.SCRATCH_LRS
    args.head = "fc"
    settings = heads.FineTuning(epochs=args.epochs, lrs=lrs, seed=args.seed)
    name = f"{kind}-{setup.task.name}"
    with open_run(args, name, setup.images, **asdict(settings)) as state:
        K = len(setup.task.classes)
        head = heads.new_head("fc", setup.encoder.feature_dim, K, args.seed)
        classifier = heads.Classifier(setup.encoder, head)
        say(f"  {counted(args.epochs, 'epoch')} for each of the peak rates {lrs}; val chooses")
        bar = partial(progress_bar, unit="step")
        epochs = heads.finetune(setup, classifier, settings, state, bar)
        records = train(args, epochs, state, len(lrs) * args.epochs)
        say("reading features")
        probs = {part: heads.part_probs(setup, classifier, part) for part in ("val", "test")}
        probing = heads.Probing(seed=args.seed)
        baselines = heads.baselines(setup, probing, "linear", progress_bar)
        finish(args, setup, classifier, records, {answer: probs} | baselines)


def finish(args: Namespace, setup: heads.Setup, classifier, records: list, answers: dict) -> None:
    """Set a result beside its baselines; write classifier.pt and what belongs to it.

    Args:
        records: of the epochs.
        answers: name -> the probabilities of val and test; of the classifier, then of baselines.
    """
    task, path, val = setup.task, args.out / "classifier.pt", setup.task.part("val")
    name, probs = next(iter(answers.items()))
    temperature = evaluate.fit_temperature(task.labels[val], probs["val"])
    heads.save_classifier(path, classifier, setup, args.head, temperature, args.config)
    of_test = {row: answer["test"] for row, answer in answers.items()}
    files = result_files(setup, task, of_test, temperature, len(val))
    losses = {"train_loss": "training loss, nats", "val_loss": "val loss, nats"}
    chosen = max(records, key=heads.merit)["epoch"]
    curve = evaluate.curve_figure(f"{task.name}: {name}", records, losses, chosen)
    conclude(args, files | {"log.jsonl": records, "curve.png": curve})
    metrics = files["metrics.json"]
    if args.command == "probe" and metrics["accuracy"] <= metrics["baseline"]["accuracy"]:
        say("It is no better than an untrained encoder: try more epochs, or larger images.")
    say_next(["explain", *data_flags(args), "--model", str(path)])


def test_set(images: data.Images, task: data.Task) -> evaluate.TestSet:
    """The test images of a task, as evaluate.py takes them."""
    test = task.part("test")
    paths = [images.names[row] for row in task.rows[test]]
    return evaluate.TestSet(task.name, task.classes, paths, task.labels[test], task.groups[test])


def result_files(
    study: data.Study | heads.Setup, task: data.Task, answers: dict, temperature: float, n_val
) -> dict[str, object]:
    """The files of a result: metrics.json, report.md, the tables and the figures.

    Args:
        answers: name -> probabilities (N, K) of the test images, not calibrated; of the classifier,
            then of its baselines.
        temperature: the classifier's.
        n_val: as `evaluate.report` takes it.
    """
    test = test_set(study.images, task)
    name, *baselines = answers
    results = {name: test.measure(answers[name], temperature)}
    for baseline in baselines:
        results[baseline] = test.measure(answers[baseline])
    metrics = results[name] | {"split": task.notes, "baseline": results[baselines[0]]}
    calibrated = evaluate.with_temperature(answers[name], temperature)
    curves = {"as it is": answers[name], "after temperature scaling": calibrated}
    title = f"{task.name}: {name}, {date.today()}"
    figures = ["confusion.png", "roc.png", "reliability.png"]
    return {
        "metrics.json": metrics,
        "report.md": evaluate.report(title, results, n_val, task.notes, figures),
        "splits.csv": split_table(study, task),
        "predictions.csv": evaluate.prediction_table(test.paths, calibrated, test.classes, test),
        "confusion.png": evaluate.confusion_figure(metrics["confusion_matrix"], test.classes),
        "roc.png": evaluate.roc_figure(test, answers[name]),
        "reliability.png": evaluate.reliability_figure(test.labels, curves),
    }


def compare(args: Namespace) -> None:
    """Compare pretraining with training from scratch on the same few labels; leaves table.md."""
    setup = prepare(args)
    settings = heads.FineTuning(epochs=args.epochs)
    # Shares and seeds are no settings: another one adds its fits to those that are there.
    with open_run(args, f"compare-{setup.task.name}", setup.images, **asdict(settings)):
        fits, file = {}, args.out / "fits.jsonl"
        finished = file.read_text().splitlines() if file.exists() else []
        for fit in map(json.loads, finished):
            fits[fit["seed"], fit["fraction"], fit["method"]] = fit
        fractions = sorted(set(args.label_fractions))
        wanted = list(product(range(args.seeds), fractions, evaluate.METHODS))
        for seed, fraction, method in wanted:
            if (seed, fraction, method) not in fits:
                say(f"  {method}, {100 * fraction:g} % of the labels, seed {seed}")
                bar = partial(progress_bar, desc=method)
                fit = heads.fit(setup, method, fraction, seed, settings, bar)
                fits[seed, fraction, method] = fit
                write(args, {"fits.jsonl": fits.values()})
        test = test_set(setup.images, setup.task)
        n, groups = len(test.paths), len(set(test.groups))
        about = (
            f"{counted(n, 'test image')} of {counted(groups, 'group')}. Mean over "
            f"{counted(args.seeds, 'draw')} of labels, heads and order; brackets: 95 % intervals "
            f"from resampling test groups. Fine-tuning: {counted(args.epochs, 'epoch')}; from "
            f"scratch as many for each of the rates {heads.SCRATCH_LRS}; val chooses."
        )
        title = f"{setup.task.name}: what labels are worth, {date.today()}"
        conclude(args, evaluate.compare_files([fits[key] for key in wanted], test, title, about))
    say_next(["embed", *data_flags(args), "--encoder", str(args.encoder)])


# ---------------------------------------------------------------------------------------------
# evaluate, predict, explain, embed
# ---------------------------------------------------------------------------------------------


def read_model(args: Namespace) -> tuple[heads.Classifier, dict]:
    """The classifier of --model, and its checkpoint."""
    classifier, checkpoint = heads.load_classifier(args.model)
    args.image_size = checkpoint["image_size"]
    return classifier, checkpoint


def load_like(args: Namespace, checkpoint: dict) -> data.Study:
    """Read --data with a former run's own --patient-pattern, unless that finds nobody here."""
    typed, own = args.patient_pattern, checkpoint["config"].get("patient_pattern")
    args.patient_pattern = typed or own
    try:
        return load_study(args)
    except data.UserError as error:
        if typed or not own:
            raise
        say(f"without the --patient-pattern of {checkpoint['config']['command']}: {error}")
        args.patient_pattern = None
        return load_study(args)


def unseen_images(args: Namespace, checkpoint: dict) -> tuple[data.Study, data.Task]:
    """Read --data as a test set: the classifier's own task and --patient-pattern unless typed.

    Returns:
        The data; the task, whose split is "test" for what the classifier has not seen.
    """
    study = load_like(args, checkpoint)
    if args.task is None and checkpoint["task"] in study.tasks:
        args.task = checkpoint["task"]
    task = heads.unseen_task(study, find_task(args, study), checkpoint)
    seen, dropped = task.notes["dropped_as_seen"], task.notes["dropped_by_the_split"]
    why = f"{seen:,} as seen in training, {dropped:,} by the split"
    say(f"{counted(len(task.part('test')), 'image')} of {task.name} to test; left out: {why}")
    return study, task


def score_elsewhere(args: Namespace) -> None:
    """Score a classifier on images from elsewhere that it has not seen; leaves report.md."""
    classifier, checkpoint = read_model(args)
    study, task = unseen_images(args, checkpoint)
    with open_run(args, f"evaluate-{task.name}", study.images):
        test, squares = task.part("test"), study.images.squares
        rows, labels = task.rows[test], task.labels[test]
        probs = heads.predict_probs(classifier, squares, rows, checkpoint, args.device)
        shares = np.bincount(labels, minlength=len(task.classes)) / len(labels)
        constant = np.tile(shares, (len(labels), 1))
        answers = {"this classifier": probs, "always the commonest class": constant}
        conclude(args, result_files(study, task, answers, checkpoint["temperature"], None))
    say_next(["explain", *data_flags(args), "--task", task.name, "--model", str(args.model)])


def read_paths(args: Namespace, checkpoint: dict) -> tuple[data.Images, np.ndarray, list[str]]:
    """The images of the files and folders that were typed.

    Returns:
        the images; the rows (k,) that can be read; whom each of these names, by the classifier's
        own --patient-pattern, '' = nobody.
    """
    images = data.load_files(args.paths, args.image_size, CACHE, progress_bar)
    rows = readable_rows(images)
    own = checkpoint["config"].get("patient_pattern")
    pattern = re.compile(own) if own else None
    return images, rows, [data.read_patient(images.names[row], pattern) for row in rows]


def calibrated_probs(args: Namespace, model: tuple, images: data.Images, rows) -> np.ndarray:
    """(k, K) what a classifier answers, at its temperature: the same digits in every command.

    Args:
        model: as `read_model` returns it.
    """
    classifier, checkpoint = model
    probs = heads.predict_probs(classifier, images.squares, rows, checkpoint, args.device)
    return evaluate.with_temperature(probs, checkpoint["temperature"])


def predict(args: Namespace) -> None:
    """Say what a classifier makes of files and folders; leaves predictions.csv."""
    classifier, checkpoint = read_model(args)
    if not args.paths:
        raise data.UserError("give the files or folders to predict")
    images, rows, patients = read_paths(args, checkpoint)
    with open_run(args, f"predict-{checkpoint['task']}", images):
        probs = calibrated_probs(args, (classifier, checkpoint), images, rows)
        names, classes = [images.names[row] for row in rows], checkpoint["classes"]
        asked = [(name, probs[i]) for i, name in enumerate(names)]
        for patient in sorted(set(patients) - {""}):
            own = probs[np.array(patients) == patient]  # (n, K)
            asked.append((f"patient {patient}, {counted(len(own), 'image')}", own.mean(axis=0)))
        for what, answer in asked:
            ranked = np.argsort(-answer, kind="stable")
            say(f"{what}: {', '.join(f'{classes[k]} {answer[k]:.4f}' for k in ranked)}")
        say(CAUTION)
        if checkpoint["config"].get("phantoms"):
            say("This classifier was trained on phantoms: of a real scan its answer means nothing.")
        conclude(args, {"predictions.csv": evaluate.prediction_table(names, probs, classes)})
    say_next(["explain", "--model", str(args.model), *map(str, args.paths)])


def explain(args: Namespace) -> None:
    """Show where a classifier looked, and how far to believe it; leaves index.html."""
    classifier, checkpoint = read_model(args)
    if args.image_size <= simclr.STRIDES[args.layer]:
        size = f"images of {args.image_size} pixels have one cell in {args.layer}"
        raise data.UserError(f"{size}, so no map; give an earlier --layer")
    reading = args.data or args.labels or args.patient_pattern or args.resplit or args.task
    if args.paths and reading:
        raise data.UserError("give --data (its test images are explained) or files, not both")
    if args.paths:
        images, rows, patients = read_paths(args, checkpoint)
        root, labels = Path(), np.full(len(rows), "")
        alike = data.near_duplicate_groups(images.thumbnails[rows])
        owners = [patients[i] or f"alike {number}" for i, number in enumerate(alike)]
        groups = np.unique(owners, return_inverse=True)[1]
    else:
        study, task = unseen_images(args, checkpoint)
        images, root, test = study.images, study.root, task.part("test")
        rows, groups = task.rows[test], task.groups[test]
        labels = np.array(task.classes)[task.labels[test]]
    with open_run(args, f"explain-{checkpoint['task']}", images):
        probs = calibrated_probs(args, (classifier, checkpoint), images, rows)
        columns = {"path": np.array(images.names)[rows], "group": groups, "label": labels}
        columns["prediction"] = np.array(checkpoint["classes"])[probs.argmax(axis=1)]
        for k, name in enumerate(checkpoint["classes"]):
            columns[f"p_{name}"] = probs[:, k]
        columns["overlay"] = np.array([f"{i:05d}-map.png" for i in range(len(rows))])
        columns |= draw_maps(args, (classifier, checkpoint), images, rows, root)
        some = np.linspace(0, len(rows) - 1, min(EXPLAINED, len(rows))).astype(int)
        x = heads.normalised(images.squares[rows[some]], checkpoint, args.device)
        shuffled = gradcam.randomisation_check(classifier, f"encoder.{args.layer}", x, SHUFFLED)
        title = f"{checkpoint['task']}: where the classifier looked ({args.layer})"
        table = [list(columns), *zip(*columns.values(), strict=True)]
        files = {"report.md": gradcam.report(title, columns, shuffled), "explain.csv": table}
        conclude(args, files | {"index.html": gradcam.page(title, columns, shuffled)})
    following = ["predict", "--model", str(args.model), *map(str, args.paths or [args.data])]
    say_next(["compare", "--task", checkpoint["task"]] if args.phantoms else following)


def draw_maps(args: Namespace, model: tuple, images: data.Images, rows, root: Path | None) -> dict:
    """Write the overlay of each image; the measures of its map, by name, (k,) each.

    Args:
        model: as `read_model` returns it.
        root: below which the images' names lie; None = phantoms.
    """
    classifier, checkpoint = model
    layer, stride = f"encoder.{args.layer}", simclr.STRIDES[args.layer]
    encoder, K = heads.untrained(checkpoint["arch"], 0), len(checkpoint["classes"])
    head = heads.new_head(checkpoint["head_type"], encoder.feature_dim, K, 0)
    cam = gradcam.GradCAM(classifier.to(args.device), layer, stride)
    untrained = gradcam.GradCAM(heads.Classifier(encoder, head).to(args.device), layer, stride)
    measured = []
    with cam, untrained:
        for start in progress_bar(range(0, len(rows), EXPLAINED), desc="explain"):
            batch = rows[start : start + EXPLAINED]
            squares = images.squares[batch]
            lesions = [data.lesion_of(root, images.names[row], args.image_size) for row in batch]
            known = torch.from_numpy(np.stack(lesions))  # (n, S, S) bool
            x = heads.normalised(squares, checkpoint, args.device)
            generator = simclr.generator_for(start)
            maps, measures = gradcam.explain(cam, untrained, x, known, generator)
            measured.append(measures)
            for i in range(len(batch)):
                overlay = gradcam.overlay(squares[i], maps[i], lesions[i])
                write(args, {f"{start + i:05d}-map.png": overlay})
    return {name: np.concatenate([batch[name] for batch in measured]) for name in measured[0]}


def embed(args: Namespace) -> None:
    """Write the features of every image of a folder, with the split of the pretraining."""
    place = args.out or args.runs / "features.npz"
    if place.suffix != ".npz":
        raise data.UserError(f"--out {place} is the file of the features; its name ends in .npz")
    encoder, checkpoint = read_encoder(args)
    config = checkpoint["config"]
    args.resplit = args.resplit or config.get("resplit", False)
    if config.get("labels") and not args.labels:
        args.labels = Path(config["labels"])
    study = load_like(args, checkpoint)
    names = np.array(study.images.names)
    labels, tasks, splits = np.full((3, len(names)), "", object)  # (n,) str each
    for task in study.tasks.values():
        labels[task.rows] = np.array(task.classes)[task.labels]
        tasks[task.rows], splits[task.rows] = task.name, task.split
    seen = data.was_seen(study, checkpoint["seen"].numpy())
    splits[seen & np.isin(splits, ("", "test", "val"))] = "pretrain"  # no test of this encoder
    rows = study.images.readable(np.arange(len(names)))
    say(f"reading the features of {counted(len(rows), 'image')}")
    h = heads.features_of(encoder, study.images.squares, rows, checkpoint, args.device).numpy()
    texts = {"paths": names, "labels": labels, "tasks": tasks, "splits": splits}
    columns = {name: values[rows].astype(str) for name, values in texts.items()}
    if place.exists():
        say(f"replaces {place}")
    args.out = place.parent
    write(args, {place.name: {"features": h, **columns}})
    say(f"in {place} now: features {h.shape}, {', '.join(columns)}")
    say_next(probe_or_embed(args, study, args.encoder))


# ---------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------


class Parser(ArgumentParser):
    """Reports a mistyped command as one line, as all mistakes are."""

    def error(self, message: str) -> None:
        """Raise, where argparse would print the usage."""
        raise data.UserError(f"{message}; see: python {self.prog} --help")


def between(kind: type, low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a number of a kind, from `low` to `high`."""

    def number(text: str) -> float:  # argparse says: invalid <its name> value
        value = kind(text)
        if not low <= value <= high:
            raise ArgumentTypeError(f"{text} is not from {low:g} to {high:g}")
        return value

    number.__name__ = "whole number" if kind is int else "number"
    return number


def pattern(text: str) -> str:
    """An argparse type: a regular expression with a capture group."""
    try:
        groups = re.compile(text).groups
    except re.error as error:
        raise ArgumentTypeError(f"{text!r} is no regular expression ({error})") from None
    if not groups:
        raise ArgumentTypeError(f"{text!r} has no (group) around what is the patient")
    return text


HEADS, SHARES = ["cosine_mlp", "linear"], [0.01, 0.1, 1.0]
PRECISIONS, DEVICES = ["auto", "bf16", "fp32"], ["auto", "cpu", "cuda", "mps"]
COUNT, SEED = between(int, 1, 10**6), between(int, 0, 2**63 - 1)
RATE, SHARE = between(float, 1e-9, 1e3), between(float, 1e-6, 1)
FLAGS = {  # `build_parser` adds the default; where that is no value, brackets say what it means
    "paths": {"type": Path, "nargs": "*", "help": "images, volumes, shards and folders"},
    "--data": {"type": Path, "help": "folder of scans, <task>/<class>/ in it [phantoms]"},
    "--labels": {"type": Path, "help": "table with the columns path, label (task, patient, split)"},
    "--patient-pattern": {"type": pattern, "help": "regex; its first (group) is the patient"},
    "--resplit": {"action": "store_true", "help": "pool published splits, and split anew"},
    "--task": {"help": "such as tumor (`data` lists them) [the only one, or the model's]"},
    "--encoder": {"type": Path, "help": "an encoder.pt [that of `pretrain`]"},
    "--model": {"type": Path, "required": True, "help": "a classifier.pt of probe or finetune"},
    "--head": {"choices": HEADS, "default": "cosine_mlp", "help": "linear is the usual probe"},
    "--from-scratch": {"action": "store_true", "help": "supervised baseline; val chooses its --lr"},
    "--layer": {"choices": simclr.STRIDES, "default": gradcam.LAYER, "help": "later is coarser"},
    "--arch": {"choices": simclr.ARCHITECTURES, "default": "resnet18", "help": "the encoder"},
    "--init": {"default": "random", "help": "random, imagenet, or a file of torchvision's"},
    "--image-size": {"type": between(int, 32, 1024), "default": 128, "help": "pixels a side"},
    "--batch-size": {"type": between(int, 2, 10**6), "default": 512, "help": "images a step"},
    "--chunk-size": {"type": COUNT, "help": "images in memory at once; the loss stays [all]"},
    "--epochs": {"type": between(int, 0, 10**6), "help": "passes over the training images"},
    "--lr": {"type": RATE, "help": "peak of the learning rate; halve it if the loss bursts"},
    "--temperature": {"type": RATE, "default": 0.07, "help": "lower weighs hard negatives more"},
    "--label-fractions": {"type": SHARE, "nargs": "+", "default": SHARES, "help": "of the groups"},
    "--seeds": {"type": COUNT, "default": 3, "help": "draws of labels and weights"},
    "--seed": {"type": SEED, "default": 0, "help": "of weights and views; never moves the split"},
    "--precision": {"choices": PRECISIONS, "default": "auto", "help": "auto: bf16 if native"},
    "--out": {"type": Path, "help": "folder of the run (of embed, the file) [below runs/]"},
    "--restart": {"action": "store_true", "help": "delete what is there, and begin anew"},
    "--device": {"choices": DEVICES, "default": "auto", "help": "auto: CUDA, else MPS, else CPU"},
}
READING = "--data --labels --patient-pattern --resplit"
NETWORK = "--arch --init --image-size --seed --precision"
LONG = f"--epochs={simclr.Pretraining.epochs} --lr={simclr.Pretraining.lr}"
TUNED = f"--epochs={heads.FineTuning.epochs} --lr={heads.FineTuning.lrs[0]}"
SHORT = f"--epochs={heads.FineTuning.epochs} --label-fractions --seeds --precision"
COMMON = "--out --restart --device"
COMMANDS = {  # each with its own flags, and what their defaults are there; all have the COMMON ones
    "data": (survey, f"{READING} --task --image-size"),
    "pretrain": (pretrain, f"{READING} {NETWORK} {LONG} --batch-size --chunk-size --temperature"),
    "probe": (probe, f"{READING} --task --encoder --head --epochs={heads.Probing.epochs} --seed"),
    "finetune": (finetune, f"{READING} --task --encoder --from-scratch {NETWORK} {TUNED}"),
    "compare": (compare, f"{READING} --task --encoder {SHORT}"),
    "evaluate": (score_elsewhere, f"{READING} --task --model"),
    "predict": (predict, "paths --model"),
    "explain": (explain, f"paths {READING} --task --model --layer"),
    "embed": (embed, f"{READING} --encoder"),
}


def build_parser() -> Parser:
    """The parser of all commands; a command's help is its function's first line."""
    parser = Parser(prog="main.py", description=f"SimCLR for brain scans. {CAUTION}")
    adding = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (run, flags) in COMMANDS.items():
        summary = run.__doc__.splitlines()[0]
        command = adding.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        command.set_defaults(run=run)
        on_phantoms = PHANTOM_DEFAULTS.get(name, {})
        for word in f"{flags} {COMMON}".split():
            flag, _, default = word.partition("=")
            options, key = dict(FLAGS[flag]), flag[2:].replace("-", "_")
            default = default or options.get("default")
            if default is not None:
                shown = str(default).strip("[]")
                if key in on_phantoms:
                    shown += f"; {on_phantoms[key]} on phantoms"
                options |= {"default": default, "help": f"{options['help']} [{shown}]"}
            command.add_argument(flag, **options)
    return parser


def parse(argv: list[str]) -> Namespace:
    """The typed words as values; args.runs is where the runs lie.

    Raises:
        UserError: a word is wrong; the line says which was perhaps meant.
    """
    if argv and argv[0][:1] != "-" and argv[0] not in COMMANDS:
        hint = did_you_mean(argv[0], COMMANDS)
        raise data.UserError(f"no command {argv[0]!r}{hint}; see: python main.py --help")
    args, unknown = build_parser().parse_known_args(argv)
    if unknown:
        known = f"{COMMANDS[args.command][1]} {COMMON}".replace("=", " ").split()
        hint = did_you_mean(unknown[0], known)
        see = f"see: python main.py {args.command} --help"
        raise data.UserError(f"{args.command} does not know {unknown[0]!r}{hint}; {see}")
    args.typed = argv
    args.phantoms = not getattr(args, "data", None) and not getattr(args, "paths", None)
    # Runs on phantoms lie apart, so that no default encoder is of the other kind.
    args.runs = RUNS / "phantoms" if args.phantoms else RUNS
    if args.phantoms:
        for key, value in PHANTOM_DEFAULTS.get(args.command, {}).items():
            if not was_typed(args, key):
                setattr(args, key, value)
    if args.command == "finetune" and args.from_scratch and args.encoder:
        raise data.UserError("give --encoder, or --from-scratch to begin without one")
    if args.command == "finetune" and not args.from_scratch:
        if any(was_typed(args, key) for key in ("arch", "init", "image_size")):
            raise data.UserError("--arch, --init and --image-size go with --from-scratch alone")
    if args.out and getattr(args, "data", None):
        if args.data.resolve().is_relative_to(args.out.resolve()):
            raise data.UserError(f"--out {args.out} holds the scans; give another folder")
    if getattr(args, "epochs", 1) == 0 and args.command != "pretrain":
        raise data.UserError(f"{args.command} --epochs 0 trains nothing; give 1 or more")
    return args


def was_typed(args: Namespace, key: str) -> bool:
    """Whether a flag, called as in `args`, is among the typed words."""
    flag = f"--{key.replace('_', '-')}"
    return any(word.split("=")[0] == flag for word in args.typed)


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        Its status: 0, or 2 for a mistake, which one line on standard error explains.
    """
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        if PROCESSES > 1:
            if args.command != "pretrain":
                raise data.UserError(f"{args.command} runs in one process: leave torchrun out")
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, timeout=timedelta(days=1))  # decoding may take long
        choose_device(args)
        args.run(args)
        if PROCESSES > 1:
            dist.destroy_process_group()
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
