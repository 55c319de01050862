"""The commands: look at the data, pretrain an encoder, probe it, score the result elsewhere.

This file only wires: it parses, seeds, chooses the device and the paths, and prints. What is
computed stands in data.py (pictures, groups, splits, views), simclr.py (encoder, loss,
pretraining), evaluate.py (the numbers) and heads.py (the classifiers), to be read in this order.

    data:      pictures -- groups, splits --> splits.csv, and what a leak would score
    pretrain:  pictures of no val or test group -- two views --> simclr.pretrain --> encoder.pt
    probe:     encoder.pt, frozen -- features --> heads.train_probe --> classifier.pt, metrics.json
    evaluate:  classifier.pt, pictures it has not seen --> metrics.json

Next: nothing; this is the last.
"""

import argparse
import os
import platform
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
from tqdm import tqdm

import data
import evaluate
import heads
import simclr

RUNS = Path("runs")
PUBLISHED = {"image_size": 128} | asdict(simclr.Pretraining())
# On the phantoms a command takes minutes on a laptop; these settings, and no others, differ there.
PHANTOM_DEFAULTS = {"image_size": 64, "batch_size": 32, "epochs": 12}
# Which process this is and of how many, as torchrun says; only the first one writes and prints.
RANK, PROCESSES = (int(os.environ.get(name, k)) for k, name in enumerate(("RANK", "WORLD_SIZE")))
progress_bar = partial(tqdm, disable=RANK > 0)

# ---------------------------------------------------------------------------------------------
# What the commands share
# ---------------------------------------------------------------------------------------------


class Machine(NamedTuple):
    """What a command computes on."""

    device: torch.device
    bf16: bool
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
    if args.precision != "auto":
        bf16, why = args.precision == "bf16", f"--precision {args.precision}"
    many = f"{PROCESSES} processes, " * (PROCESSES > 1)
    return Machine(device, bf16, f"{many}{name}, {'bf16' if bf16 else 'float32'} ({why})")


def run_folder(args: argparse.Namespace, name: str) -> Path:
    """--out or, where it was not given, runs/`name`, checked before anything is computed.

    Raises:
        UserError: it is a file, or lies inside the data, where its pictures would be read as scans.
    """
    out = args.out or base_folder(args) / name
    for folder in (out, *out.parents):
        if folder.exists() and not folder.is_dir():
            raise data.UserError(f"{folder} is a file, and results go into a folder")
    for folder in (out, RUNS):
        if args.data and folder.resolve().is_relative_to(args.data.resolve()):
            raise data.UserError(
                f"results would go to {folder.resolve()}, inside --data {args.data}, and be read "
                "as scans next time; start the command from another folder, or give another --out"
            )
    return out


def base_folder(args: argparse.Namespace) -> Path:
    """Where the runs lie; apart for phantoms, so that no default encoder is of the other kind."""
    return RUNS if args.data else RUNS / "phantoms"


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
    for row, why in bad.items():
        print(f"  left out, unreadable: {paths[row]!r} ({why})")
    least, share = data.MAX_UNREADABLE
    if len(bad) > max(least, share * len(paths)) and args.command != "data":
        raise data.UserError(
            f"{len(bad)} of {len(paths)} pictures below {where} cannot be read, the first is "
            f"{paths[min(bad)]!r} ({bad[min(bad)]}); replace or remove them"
        )
    for name, task in study.tasks.items():
        counts = ", ".join(f"{(task.split == part).sum():,} {part}" for part in evaluate.PARTS)
        if args.command in ("pretrain", "probe"):
            print(f"  task {name} ({', '.join(task.classes)}): {counts}")
        if task.notes["largest_group_is_suspect"]:
            size = f"{task.notes['largest_group']} of the {len(task.rows):,} pictures of {name}"
            print(f"  warning: one group holds {size}: a patient, or strangers chained by twins")
    return study


def data_flags(args: argparse.Namespace) -> list[str]:
    """The words that make the next command read the same data in the same way."""
    words = ["--data", str(args.data)] if args.data else []
    words += ["--group-pattern", args.group_pattern.pattern] if args.group_pattern else []
    return words + ["--resplit"] * args.resplit


def run_config(
    args: argparse.Namespace,
    study: heads.Study,
    machine: Machine,
    settings: simclr.Pretraining | heads.Probing | None,
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
    versions = {module.__name__: str(module.__version__) for module in (torch, np, PIL)}
    return config | {"versions": versions | {"python": platform.python_version()}}


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
    print(f"in {out}/ now: {', '.join(sorted(path.name for path in out.glob('*')))}")
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


def pretrain(args: argparse.Namespace) -> None:
    """Learn an encoder from pictures without labels, or go on learning; leaves encoder.pt."""
    out, machine = run_folder(args, "pretrain"), choose_machine(args)
    with simclr.many_processes(PROCESSES, machine.device), ExitStack() as held:
        study = load_data(args, args.image_size)
        rows = heads.pretraining_rows(study)
        settings = pretraining_settings(args, study, len(rows))
        values = {"arch": args.arch, "image_size": args.image_size, "leaked": False}
        config = run_config(args, study, machine, settings, **values, pictures=len(rows))
        simclr.check_equal(config["fingerprint"])
        torch.manual_seed(args.seed)  # the networks' first weights
        run = simclr.Run(args.arch, settings, machine.device, machine.bf16)
        state = simclr.on_every_rank(partial(simclr.open_run, held, out, config, args.restart))
        if state:
            run.restore(state)
        if state and run.finished and simclr.on_every_rank((out / "encoder.pt").exists):
            print(f"{out} holds this run, and it is finished; --restart would begin it anew")
        else:
            size = f"{len(rows):,} pictures at {args.image_size} px"
            print(f"pretrain {args.arch} on {size}, on {machine.text}")
            train(run, study.pictures, rows, out, config)
        finish_pretraining(args, out, run.records, study)


def train(
    run: simclr.Run, pictures: data.Pictures, rows: np.ndarray, out: Path, config: dict
) -> None:
    """Train a run to its end; show, log and save it on the way.

    Args:
        rows: which of the pictures to train on.

    Raises:
        SystemExit: a signal came; the run is saved, the status is 128 + the signal's number.
    """
    steps = len(rows) // run.settings.batch_size
    done, total = len(run.records) * steps + run.step, run.settings.epochs * steps
    print(f"  {run.settings.epochs} epochs of {steps} steps of {run.settings.batch_size} slices")
    if done:
        print(f"  goes on after step {run.step} of epoch {len(run.records) + 1}")
    write(out, {"config.json": config, "log.jsonl": run.records})
    save = partial(simclr.save_run, run, out, config, torch.from_numpy(pictures.hashes[rows]))
    due = time.monotonic() + simclr.CHECKPOINT_SECONDS
    bar = progress_bar(total=total, initial=done, unit="step", desc="pretrain")
    with note_signals() as noted, bar:
        simclr.on_any_rank(0)  # waits until every rank listens to signals
        for record in simclr.pretrain(run, pictures.cached["square"], pictures.place[rows]):
            show_step(bar, run)
            if record:
                write(out, {"log.jsonl": run.records})
            number = simclr.on_any_rank(noted[0] if noted else 0)
            if not run.finished and (number or time.monotonic() > due):  # the end saves anyway
                due = save()
            if number and not run.finished:
                bar.close()
                print(f"stopped after step {run.step} of epoch {len(run.records) + 1}, and saved")
                print("the same command goes on from there (without --restart)")
                raise SystemExit(128 + number)
        save()


def pretraining_settings(
    args: argparse.Namespace, study: heads.Study, n: int
) -> simclr.Pretraining:
    """The settings for n pictures; says what is held out, and when the batch has to shrink."""
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
    return simclr.Pretraining(**given | {"batch_size": batch_size})


def show_step(bar: tqdm, run: simclr.Run) -> None:
    """Move the progress bar by a step; where it is redrawn, with the epoch's means so far."""
    if bar.update() and run.step:  # True = redrawn. Reading sums makes the device wait: only then.
        loss, accuracy, _ = (run.sums / run.step).tolist()
        speed = (bar.format_dict["rate"] or 0) * run.settings.batch_size  # in slices, not in views
        text = f"loss {loss:.3f}, contrastive accuracy {accuracy:.2f}, {speed:.0f} images/s"
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
    task = "tumor" if args.data is None else min(study.tasks, default=None)
    encoder = ["--encoder", str(out / "encoder.pt")] if args.out else []
    following = ["probe", *data_flags(args), "--task", task, *encoder] if task else []
    files = {"log.jsonl": records, "curve.png": evaluate.pretraining_picture(records)}
    conclude(out, files, following)


# ---------------------------------------------------------------------------------------------
# probe
# ---------------------------------------------------------------------------------------------


def probe(args: argparse.Namespace) -> None:
    """Train the cosine MLP on the frozen encoder, and on the baselines; leaves classifier.pt."""
    out, machine = run_folder(args, f"probe-{args.task}"), choose_machine(args)
    path = args.encoder or base_folder(args) / "pretrain" / "encoder.pt"
    encoder, checkpoint = simclr.load_encoder(path)
    study = load_data(args, checkpoint["image_size"])
    task, pictures = study.task(args.task), study.pictures
    heads.check_split(task)
    leaked = heads.refuse_leak(study, task, checkpoint["seen"].numpy(), args.allow_leak)
    settings = heads.Probing(epochs=args.epochs, seed=args.seed)
    values = {"task": task.name, "encoder": str(path.resolve()), "leaked": bool(leaked)}
    values |= {"pretraining": checkpoint["config"], "pretraining_epoch": checkpoint["epoch"]}
    config = run_config(args, study, machine, settings, **values)
    caption = evaluate.leak_caption(leaked)
    print(f"probe {task.name} with {path} of epoch {checkpoint['epoch']}, on {machine.text}")
    features = heads.representations(encoder, checkpoint, pictures, task, args.seed, *machine[:2])
    progress = partial(progress_bar, total=args.epochs, unit="epoch", leave=False)
    fits = heads.fit_probes(features, task, settings, progress)
    test = heads.test_part(study, task)
    results = {name: test.measure(probs) for name, (_, _, probs) in fits.items()}
    head, records, probs = fits["pretrained encoder"]
    heads.save_classifier(out / "classifier.pt", checkpoint, head, study, task, config)
    splits = heads.split_table(study, task)
    files = {"config.json": config, "log.jsonl": records, "splits.csv": splits}
    files |= {"curve.png": evaluate.training_picture(records, f"Probe of {task.name}", caption)}
    files |= evaluate.result_files(test, probs, results, task.notes, caption)
    later = [name for name in sorted(study.tasks) if name > task.name]
    flags = data_flags(args) + (["--encoder", str(args.encoder)] if args.encoder else [])
    following = ["evaluate", *data_flags(args), "--model", str(out / "classifier.pt")]
    conclude(out, files, ["probe", *flags, "--task", later[0]] if later else following)


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
    probs = heads.classify(encoder, head, checkpoint, images, task.classes, *machine[:2])
    results = {"this classifier": test.measure(probs)}
    results["always the commonest"] = test.measure(test.shares())
    values = {"task": name, "model": str(args.model.resolve()), "leaked": bool(leaked)}
    values["training"] = checkpoint["config"]
    files = {"config.json": run_config(args, study, machine, None, **values)}
    files["splits.csv"] = heads.split_table(study, task)
    files |= evaluate.result_files(test, probs, results, task.notes, caption)
    conclude(out, files)


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


def number(kind: type, low: float) -> Callable[[str], float]:
    """An argparse type: a finite number of a kind, from `low` up."""

    def read(text: str) -> float:
        """The number in `text`."""
        value = kind(text)
        if not low <= value < float("inf"):
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


COMMANDS = {  # what runs, and what it holds out
    "data": (survey, "nothing, it trains nothing; its table shows val, test and dropped."),
    "pretrain": (pretrain, "the val and test groups of every task below --data."),
    "probe": (probe, "the test part, opened once; the val part chooses the epoch."),
    "evaluate": (score, "all groups that the classifier was trained on; the rest is scored."),
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
        sub.set_defaults(run=run)
        for title in ("data and output", "model", "optimisation", "machine"):
            groups[name, title] = sub.add_argument_group(title)

    def flag(title: str, commands: str, *name: str, **options: object) -> None:
        """Give a flag to some commands, or to all where `commands` is ''."""
        for command in commands.split() or COMMANDS:
            groups[command, title].add_argument(*name, **options)

    declare_data_flags(flag)
    declare_training_flags(flag)
    return parser


def text_of(name: str, text: str) -> str:
    """A help text with the two defaults of a flag that has another one on phantoms."""
    return f"{text} (default: {PUBLISHED[name]}; {PHANTOM_DEFAULTS[name]} on phantoms)"


def declare_data_flags(flag: Callable) -> None:
    """The flags that say what is read and written, each declared once for all its commands."""
    part = partial(flag, "data and output")
    text = "folder of scans: <task>/<class>/ or <task>/Training/<class>/ below it; else phantoms"
    part("", "--data", type=Path, help=text)
    part("", "--out", type=Path, help="folder of this run; one below runs/ where not given")
    text = "searched in each path below --data; its first (group) is the patient"
    part("", "--group-pattern", type=pattern, metavar="REGEX", help=text)
    text = "pool the publisher's own training and test parts, and split them anew by group"
    part("", "--resplit", action="store_true", help=text)
    part("probe", "--task", required=True, help="one of those that `data` lists, such as tumor")
    part("data", "--task", help="only this one; all that are there where not given")
    part("evaluate", "--task", help="the classifier's own where not given")

    part = partial(flag, "model")
    text = "an encoder.pt; that of `pretrain` on the same kind of data where not given"
    part("probe", "--encoder", type=Path, help=text)
    part("evaluate", "--model", type=Path, required=True, help="a classifier.pt")
    text = "encoder; resnet50 has twice the parameters and four times the features"
    part("pretrain", "--arch", choices=tuple(simclr.ARCHITECTURES), default="resnet18", help=text)
    text = text_of("image_size", "side of the square pictures, in pixels")
    part("data pretrain", "--image-size", type=number(int, 32), help=text)
    text = "go on although test pictures were trained on; every output then says so"
    part("probe evaluate", "--allow-leak", action="store_true", help=text)


def declare_training_flags(flag: Callable) -> None:
    """The flags that say how and on what to train."""
    part = partial(flag, "optimisation")
    text = text_of("batch_size", "slices a step; more negatives, more memory")
    part("pretrain", "--batch-size", type=number(int, 2), help=text)
    text = "slices in memory at once, for a larger batch; the loss still is over the whole batch"
    part("pretrain", "--chunk-size", type=number(int, 1), help=text)
    text = text_of("epochs", "passes over the pictures; 0 leaves random weights")
    part("pretrain", "--epochs", type=number(int, 0), help=text)
    epochs = heads.Probing.epochs
    part("probe", "--epochs", type=number(int, 0), default=epochs, help="passes over the features")
    text = "learning rate at the start; halve it if the loss turns NaN"
    part("pretrain", "--lr", type=number(float, 1e-12), default=PUBLISHED["lr"], help=text)
    text = "softmax scale of NT-Xent in cosine units; lower stresses the hardest negatives"
    part(
        "pretrain",
        "--temperature",
        type=number(float, 1e-12),
        default=PUBLISHED["temperature"],
        help=text,
    )
    text = "begin anew, and replace what --out holds, where the same command would go on"
    part("pretrain", "--restart", action="store_true", help=text)
    text = "moves first weights, order, views and dropout, never the split"
    part("pretrain probe", "--seed", type=number(int, 0), default=0, help=text)

    part = partial(flag, "machine", "pretrain probe evaluate")
    text = "auto takes CUDA, then Apple's MPS, then the CPU"
    part("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help=text)
    text = "auto takes bf16 where the machine computes it natively; the loss stays float32"
    part("--precision", choices=("auto", "bf16", "fp32"), default="auto", help=text)


def main(argv: list[str] | None = None) -> int:
    """Run one command; status 0, or 2 for a mistake that one line on standard error explains."""
    if RANK:
        sys.stdout = open(os.devnull, "w")
    try:
        args = build_parser().parse_args(argv)
        if PROCESSES > 1 and args.command != "pretrain":
            raise data.UserError(f"{args.command} runs in one process: start it without torchrun")
        for name, value in PHANTOM_DEFAULTS.items():
            if getattr(args, name, 0) is None:
                setattr(args, name, PUBLISHED[name] if args.data else value)
        args.run(args)
    except data.UserError as error:
        if not RANK:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
