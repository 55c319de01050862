"""The commands: `pretrain` learns an encoder from pictures alone, `probe` reads a diagnosis off it.

This file only wires: it parses, seeds, chooses the device and the paths, and prints. What is
computed stands in data.py (pictures, groups, splits, views), simclr.py (encoder, loss,
pretraining), evaluate.py (the numbers) and heads.py (the classifiers), to be read in this order.

    pretrain:  pictures of no val or test group -- two views --> simclr.pretrain --> encoder.pt
    probe:     encoder.pt, frozen -- features --> heads.train_probe --> classifier.pt, metrics.json

Next: nothing; this is the last.
"""

import argparse
import csv
import io
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import data
import evaluate
import heads
import simclr

RUNS = Path("runs")
PUBLISHED = {"image_size": 128} | asdict(simclr.Pretraining())
# On the phantoms a command takes minutes on a laptop; these settings, and no others, differ there.
PHANTOM_DEFAULTS = {"image_size": 64, "batch_size": 32, "epochs": 12}
PARTS = ("train", "val", "test", "dropped")
CHECKPOINT_SECONDS = 60  # at most one checkpoint a minute, so that writing costs next to nothing

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
    bf16, why = simclr.native_bf16(torch.device(name))
    if args.precision != "auto":
        bf16, why = args.precision == "bf16", f"--precision {args.precision}"
    return Machine(torch.device(name), bf16, f"{name}, {'bf16' if bf16 else 'float32'} ({why})")


def run_folder(args: argparse.Namespace, name: str) -> Path:
    """--out or, where it was not given, runs/`name`, checked before anything is computed.

    Raises:
        UserError: it is a file, or lies inside the data, where its pictures would be read as scans.
    """
    out = args.out or base_folder(args) / name
    if out.exists() and not out.is_dir():
        raise data.UserError(f"{out} is a file; --out takes a folder")
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


def load_data(args: argparse.Namespace, image_size: int) -> data.Collection:
    """Read --data or the phantoms; say what is there, what cannot be read, and what is suspect.

    Args:
        image_size: of the encoder, in pixels; the split does not depend on it.

    Raises:
        UserError: the data cannot be read.
    """
    collection = data.load(args.data, image_size, RUNS / "cache", partial(tqdm, leave=False))
    paths, groups = collection.pictures.paths, len(np.unique(collection.groups))
    where = args.data or "phantoms, drawn by code (--data takes your own scans)"
    others = f", {collection.other_files:,} other files" if collection.other_files else ""
    print(f"{where}: {len(paths):,} pictures in {groups:,} groups{others}")
    for row, why in collection.pictures.unreadable.items():
        print(f"  left out, unreadable: {paths[row]!r} ({why})")
    for task in collection.tasks.values():
        counts = ", ".join(f"{(task.split == part).sum():,} {part}" for part in PARTS)
        print(f"  task {task.name} ({', '.join(task.classes)}): {counts}")
        if task.notes["largest_group_is_suspect"]:
            print(
                f"  warning: one group holds {task.notes['largest_group']} of the "
                f"{len(task.rows):,} pictures of {task.name}: one patient's, or near-twins that "
                "have linked strangers into a chain"
            )
    return collection


def run_config(
    args: argparse.Namespace,
    collection: data.Collection,
    machine: Machine,
    settings: simclr.Pretraining | heads.Probing,
    **values: object,
) -> dict:
    """config.json: every value that shaped the run, in plain types; checkpoints hold it too.

    Args:
        settings: of the training; its fields are written one by one.
        values: what else shaped the run.
    """
    return {
        "command": args.command,
        "data": str(args.data.resolve()) if args.data else None,
        "phantoms": args.data is None,
        "fingerprint": collection.fingerprint(),
        **values,
        **asdict(settings),
        "device": machine.device.type,
        "precision": "bf16" if machine.bf16 else "fp32",
        "threads": torch.get_num_threads(),
        "versions": {module.__name__: str(module.__version__) for module in (torch, np, PIL)}
        | {"python": platform.python_version()},
    }


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with data.write_atomically(path) as file:
        file.write(text.encode("utf8", "surrogateescape"))


def write_json(path: Path, value: dict) -> None:
    """Write JSON that people can read."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_log(path: Path, records: list[dict]) -> None:
    """Write one line of JSON for each epoch."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def write_csv(path: Path, header: list[str], rows: list[tuple]) -> None:
    """Write a table."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_text(path, text.getvalue())


def write_picture(path: Path, image: Image.Image) -> None:
    """Write a PNG."""
    with data.write_atomically(path) as file:
        image.save(file, "PNG")


def print_written(out: Path, command: list[str]) -> None:
    """Say what lies where now, and what to type next.

    Args:
        out: the run's folder.
        command: the next command's words after main.py; none = say nothing.
    """
    print(f"wrote {out}/: {', '.join(sorted(path.name for path in out.iterdir()))}")
    if command:
        print("next:", shlex.join(["python", "main.py", *command]))


# ---------------------------------------------------------------------------------------------
# pretrain
# ---------------------------------------------------------------------------------------------


def pretrain(args: argparse.Namespace) -> None:
    """Learn an encoder from pictures without labels; leaves encoder.pt."""
    out, machine = run_folder(args, "pretrain"), choose_machine(args)
    for name, value in PHANTOM_DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, PUBLISHED[name] if args.data else value)
    collection = load_data(args, args.image_size)
    rows = collection.pretraining_rows()
    settings = pretraining_settings(args, collection, len(rows))
    values = {"arch": args.arch, "image_size": args.image_size, "leaked": False}
    config = run_config(args, collection, machine, settings, **values, pictures=len(rows))
    write_json(out / "config.json", config)
    torch.manual_seed(args.seed)  # the networks' first weights
    encoder = simclr.ARCHITECTURES[args.arch]()
    networks = torch.nn.ModuleList([encoder, simclr.ProjectionHead(encoder.feature_dim)])
    networks.to(machine.device, memory_format=simclr.memory_format(machine.device, machine.bf16))
    optimizer = simclr.adamw(networks, lr=settings.lr, weight_decay=settings.weight_decay)
    images = torch.from_numpy(collection.pictures.images[rows])[:, None]  # (n, 1, S, S) uint8
    seen = torch.from_numpy(collection.pictures.hashes[rows])
    steps = len(rows) // settings.batch_size
    print(
        f"pretrain {args.arch} on {len(rows):,} pictures at {args.image_size} px, "
        f"{settings.epochs} epochs of {steps} steps of {settings.batch_size}, on {machine.text}"
    )
    records, saved = [], time.monotonic()
    with tqdm(total=settings.epochs * steps, unit="step", desc="pretrain") as bar:
        on_step = partial(show_step, bar, settings.batch_size)
        for record in simclr.pretrain(
            images.to(machine.device), *networks, optimizer, settings, machine.bf16, on_step
        ):
            records.append(record)
            write_log(out / "log.jsonl", records)
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                save_pretraining(out, *networks, optimizer, record["epoch"], config, seen)
                saved = time.monotonic()
    save_pretraining(out, *networks, optimizer, settings.epochs, config, seen)
    finish_pretraining(args, out, records, collection)


def pretraining_settings(
    args: argparse.Namespace, collection: data.Collection, n: int
) -> simclr.Pretraining:
    """The settings for n pictures; says what is held out, and when the batch has to shrink."""
    held = len(collection.pictures.paths) - len(collection.pictures.unreadable) - n
    tasks = f"the val and test groups of {', '.join(collection.tasks)}, and what was dropped"
    print(f"  held out of pretraining: {held:,} pictures ({tasks if held else 'no task is here'})")
    if n < 2:
        raise data.UserError(f"{n} pictures are left to pretrain on; contrasting takes at least 2")
    if args.batch_size > n:
        print(f"  the batch shrinks from {args.batch_size} to the {n} pictures there are")
    return simclr.Pretraining(
        epochs=args.epochs,
        batch_size=min(args.batch_size, n),
        lr=args.lr,
        temperature=args.temperature,
        seed=args.seed,
    )


def show_step(bar: tqdm, batch_size: int, step: int, sums: Tensor) -> None:
    """Move the progress bar by a step; where it is redrawn, with the epoch's means so far.

    Args:
        batch_size: slices a step; the speed is given in slices, not in views.
        step, sums: as `simclr.pretrain` hands them to its on_step.
    """
    if bar.update():  # True = redrawn. Reading the sums makes the device wait, so only then.
        loss, accuracy, _ = (sums / step).tolist()
        speed = (bar.format_dict["rate"] or 0) * batch_size
        bar.set_postfix_str(
            f"loss {loss:.3f}, contrastive accuracy {accuracy:.2f}, {speed:.0f} images/s"
        )


def save_pretraining(
    out: Path,
    encoder: simclr.ResNet,
    projection_head: simclr.ProjectionHead,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    config: dict,
    seen: Tensor,
) -> None:
    """Write checkpoint.pt, the state of the training, and encoder.pt, all that using it needs.

    Args:
        epoch: the last one that was finished.
        config: of the run; image size, mean and std are copied out of it, to be found at once.
        seen: (n, 16) uint8, the hashes of the pictures pretrained on, so that a probe can refuse
            a test part that holds one of them.
    """
    weights = {name: value.cpu().contiguous() for name, value in encoder.state_dict().items()}
    both = {"encoder": weights, "epoch": epoch, "config": config}
    training = {
        "projection_head": projection_head.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    simclr.save(both | training, out / "checkpoint.pt")
    described = {key: config[key] for key in ("arch", "image_size", "mean", "std")}
    described |= {"feature_dim": encoder.feature_dim, "seen": seen}
    simclr.save(both | described, out / "encoder.pt")


def finish_pretraining(
    args: argparse.Namespace, out: Path, records: list[dict], collection: data.Collection
) -> None:
    """Draw the curve; say what was reached, what was written and what to type next.

    Args:
        records: of all epochs, as `simclr.pretrain` yields them; none after --epochs 0.
    """
    panels = {
        "NT-Xent (nats)": {"loss": [r["loss"] for r in records]},
        "contrastive accuracy": {"accuracy": [r["contrastive_accuracy"] for r in records]},
    }
    write_picture(out / "curve.png", evaluate.curve_picture(panels, "Pretraining"))
    if records:
        last, minutes = records[-1], sum(r["seconds"] for r in records) / 60
        print(
            f"epoch {last['epoch']}: loss {last['loss']:.3f}, contrastive accuracy "
            f"{last['contrastive_accuracy']:.2f}, {last['images_per_second']:.0f} images/s; "
            f"{minutes:.1f} minutes of training"
        )
    following = []
    if collection.tasks:
        task = "tumor" if args.data is None else min(collection.tasks)
        following = ["probe", *(["--data", str(args.data)] if args.data else []), "--task", task]
        following += ["--encoder", str(out / "encoder.pt")] if args.out else []
    print_written(out, following)


# ---------------------------------------------------------------------------------------------
# probe
# ---------------------------------------------------------------------------------------------


def probe(args: argparse.Namespace) -> None:
    """Train the cosine MLP on the frozen encoder, and on the baselines; leaves classifier.pt."""
    out, machine = run_folder(args, f"probe-{args.task}"), choose_machine(args)
    path = args.encoder or base_folder(args) / "pretrain" / "encoder.pt"
    encoder, checkpoint = simclr.load_encoder(path)
    collection = load_data(args, checkpoint["image_size"])
    task = collection.task(args.task)
    leaked = refuse_leak(collection, task, checkpoint["seen"].numpy(), args.allow_leak)
    settings = heads.Probing(epochs=args.epochs, seed=args.seed)
    values = {"task": task.name, "encoder": str(path.resolve()), "leaked": bool(leaked)}
    values["pretraining"] = checkpoint["config"]
    config = run_config(args, collection, machine, settings, **values)
    print(f"probe {task.name} with {path}, on {machine.text}")
    features = representations(encoder, checkpoint, collection, task, machine, args.seed)
    fits = {name: fit_probe(h, task, settings, name) for name, h in features.items()}
    results = {name: measure(task, probs) for name, (_, _, probs) in fits.items()}
    head, records, probs = fits["pretrained encoder"]
    used = task.rows[np.isin(task.split, ("train", "val"))]
    seen = torch.cat([checkpoint["seen"], torch.from_numpy(collection.pictures.hashes[used])])
    described = {"task": task.name, "classes": list(task.classes), "config": config}
    trained = {"head": head.state_dict(), "head_type": "cosine_mlp", "seen": seen.unique(dim=0)}
    simclr.save(checkpoint | described | trained, out / "classifier.pt")
    write_json(out / "config.json", config)
    caption = f"LEAKED: the encoder has seen {len(leaked)} test pictures" if leaked else ""
    write_results(out, collection, task, results, probs, caption)
    write_training(out, records, f"Probe of {task.name}", caption)
    later = [name for name in sorted(collection.tasks) if name > task.name]
    flags = ["--data", str(args.data)] if args.data else []
    flags += ["--encoder", str(args.encoder)] if args.encoder else []
    print_written(out, ["probe", *flags, "--task", later[0]] if later else [])


def representations(
    encoder: simclr.ResNet,
    checkpoint: dict,
    collection: data.Collection,
    task: data.Task,
    machine: Machine,
    seed: int,
) -> dict[str, Tensor]:
    """What the same head is trained on: the encoder's features and two that have learnt nothing.

    Returns:
        by name, (n, E) float32 for the task's pictures, each row in the order of `task.rows`.
    """
    torch.manual_seed(seed)
    untrained = simclr.ARCHITECTURES[checkpoint["arch"]]()
    images = collection.pictures.images[task.rows]  # (n, S, S) uint8
    scaling = {"mean": checkpoint["mean"], "std": checkpoint["std"]}
    features = {
        name: simclr.encode(
            network.to(machine.device), images, **scaling, device=machine.device, bf16=machine.bf16
        )
        for name, network in (("pretrained encoder", encoder), ("untrained encoder", untrained))
    }
    pixels = torch.from_numpy(collection.pictures.thumbnails[task.rows]).flatten(1)  # (n, 1024)
    return features | {"raw 32x32 pixels": pixels.float() / 127.5 - 1}


def refuse_leak(
    collection: data.Collection, task: data.Task, seen: np.ndarray, allowed: bool
) -> list[str]:
    """The test pictures that the encoder was pretrained on, if that is allowed.

    Args:
        seen: (n, 16) uint8, what the encoder's checkpoint remembers.
        allowed: --allow-leak was given.

    Returns:
        Their paths; none for an honest result.

    Raises:
        UserError: there are some, and --allow-leak was not given.
    """
    leaked = collection.seen_in_test(task, seen)
    if leaked and not allowed:
        raise data.UserError(
            f"the encoder was pretrained on {len(leaked)} of the {len(task.part('test')[0])} test "
            f"pictures of {task.name}, the first is {leaked[0]!r}; pretrain with the same --data, "
            "which holds them out, or give --allow-leak for a figure not to be believed"
        )
    return leaked


def fit_probe(
    h: Tensor, task: data.Task, settings: heads.Probing, name: str
) -> tuple[heads.CosineMLP, list[dict], np.ndarray]:
    """Train a head on the train part and choose its epoch on the val part.

    Args:
        h: (n, E) float32, the features of all the task's pictures in the order of `task.rows`.
        name: of the representation, for the progress bar.

    Returns:
        (the head, a record for each epoch, probabilities (N, K) of the test part)
    """
    labels = torch.from_numpy(task.labels)
    train, val, test = (torch.from_numpy(task.split == p) for p in ("train", "val", "test"))
    torch.manual_seed(settings.seed)  # the head's first weights
    head = heads.CosineMLP(h.shape[1], len(task.classes))
    epochs = heads.train_probe(head, (h[train], labels[train]), (h[val], labels[val]), settings)
    records = list(tqdm(epochs, f"head, {name}", settings.epochs, unit="epoch", leave=False))
    return head, records, heads.probabilities(head, h[test]).numpy()


def measure(task: data.Task, probs: np.ndarray) -> dict:
    """The metrics of the test part's probabilities (N, K), with their intervals."""
    _, labels, groups = task.part("test")
    metrics = evaluate.classification_metrics(labels, probs, task.classes)
    intervals = evaluate.group_bootstrap(labels, probs, groups)
    return {"n_groups": len(np.unique(groups)), **metrics, "ci95": intervals}


def write_results(
    out: Path,
    collection: data.Collection,
    task: data.Task,
    results: dict[str, dict],
    probs: np.ndarray,
    caption: str,
) -> None:
    """Print and write what was measured on the test part.

    Args:
        results: by representation, `measure` of it; the first is the encoder in question.
        probs: (N, K) of the first.
        caption: the warning of a leaked result, '' for an honest one; it goes into every output.
    """
    measured, untrained, pixels = results.values()
    metrics = {"task": task.name, "classes": list(task.classes), **measured}
    metrics |= {"baseline": untrained, "raw_pixels": pixels}
    metrics |= {"split": task.notes, "leaked": bool(caption)}
    write_json(out / "metrics.json", metrics)
    report = (
        f"{evaluate.classification_report(measured)}\n{evaluate.comparison_table(results)}"
        f"{measured['n']:,} test pictures of {measured['n_groups']:,} groups; 95 % intervals "
        f"from resampling groups\n{caption}".rstrip()
        + "\n"
    )
    write_text(out / "report.txt", report)
    print(report, end="")
    header = ["path", "label", "group", "split", "pixel_hash"]
    write_csv(out / "splits.csv", header, collection.split_table(task))
    header = ["path", "group", "label", "prediction", *(f"p_{name}" for name in task.classes)]
    predictions = [
        (collection.pictures.paths[r], g, task.classes[k], task.classes[p.argmax()])
        + tuple(f"{value:.9g}" for value in p)
        for r, k, g, p in zip(*task.part("test"), probs, strict=True)
    ]
    write_csv(out / "predictions.csv", header, predictions)
    title = f"{task.name}, test part: accuracy {metrics['accuracy']:.3f}"
    matrix = metrics["confusion_matrix"]
    picture = evaluate.confusion_picture(matrix, task.classes, title, caption)
    write_picture(out / "confusion.png", picture)


def write_training(out: Path, records: list[dict], title: str, caption: str) -> None:
    """Write log.jsonl and curve.png of a head's training.

    Args:
        records: as `heads.train_probe` yields them.
        caption: the warning of a leaked result, or ''.
    """
    write_log(out / "log.jsonl", records)
    scored = [r for r in records if r["val_loss"] is not None]
    losses = {"train": [r["train_loss"] for r in records], "val": [r["val_loss"] for r in scored]}
    accuracy = {"val": [r["val_accuracy"] for r in scored]}
    panels = {"cross-entropy (nats)": losses, "val accuracy": accuracy}
    write_picture(out / "curve.png", evaluate.curve_picture(panels, title, caption))


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
        return action.help if action.default is None else super()._get_help_string(action)


def at_least(low: int, text: str) -> int:
    """An argparse type, with `low` bound by partial: a whole number not below `low`."""
    if not text.isdecimal() or int(text) < low:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} up")
    return int(text)


def positive(text: str) -> float:
    """An argparse type: a number above 0."""
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return float(text)


def shared_flags() -> Parser:
    """The flags of every command that computes."""
    shared = Parser(add_help=False)
    flag = shared.add_argument_group("data and output").add_argument
    text = "folder of scans: <task>/<class>/ or <task>/Training/<class>/ below it; else phantoms"
    flag("--data", type=Path, help=text)
    flag("--out", type=Path, help="folder of this run; one below runs/ where not given")
    flag = shared.add_argument_group("machine").add_argument
    text = "moves first weights, order, views and dropout, never the split"
    flag("--seed", type=partial(at_least, 0), default=0, help=text)
    text = "auto takes CUDA, then Apple's MPS, then the CPU"
    flag("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help=text)
    text = "auto takes bf16 where the machine computes it natively; the loss stays float32"
    flag("--precision", choices=("auto", "bf16", "fp32"), default="auto", help=text)
    return shared


def build_parser() -> Parser:
    """One parser, one subcommand a stage.

    The help of a command is the first line of the function that runs it, and what it holds out.
    """
    parser = Parser(prog="main.py", description="SimCLR for brain scans, by hand, in PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(run: Callable, held_out: str) -> Callable:
        """Add a subcommand; what is returned declares a flag of it."""
        summary = run.__doc__.splitlines()[0]
        sub = commands.add_parser(
            run.__name__,
            parents=[shared_flags()],
            help=summary,
            formatter_class=HelpFormatter,
            description=f"{summary} Held out: {held_out}",
        )
        sub.set_defaults(run=run)
        return sub.add_argument_group("model and optimisation").add_argument

    flag = command(pretrain, "the val and test groups of every task below --data.")
    text = "encoder; resnet50 has twice the parameters and four times the features"
    flag("--arch", choices=tuple(simclr.ARCHITECTURES), default="resnet18", help=text)
    for name, low, text in (
        ("image_size", 32, "side of the square pictures, in pixels"),
        ("batch_size", 2, "slices a step; more negatives, more memory"),
        ("epochs", 0, "passes over the pictures; 0 leaves random weights"),
    ):
        text += f" (default: {PUBLISHED[name]}; {PHANTOM_DEFAULTS[name]} on phantoms)"
        flag(f"--{name.replace('_', '-')}", type=partial(at_least, low), help=text)
    text = "learning rate at the start; halve it if the loss turns NaN"
    flag("--lr", type=positive, default=PUBLISHED["lr"], help=text)
    text = "softmax scale of NT-Xent in cosine units; lower stresses the hardest negatives"
    flag("--temperature", type=positive, default=PUBLISHED["temperature"], help=text)

    flag = command(probe, "the test part, opened once; the val part chooses the epoch.")
    flag("--task", required=True, help="one of those that pretrain lists, such as tumor")
    flag("--encoder", type=Path, help="where pretrain/encoder.pt of the same data is not meant")
    text = "passes of the head over the features"
    flag("--epochs", type=partial(at_least, 0), default=heads.Probing.epochs, help=text)
    text = "go on although the encoder has seen test pictures; every output then says so"
    flag("--allow-leak", action="store_true", help=text)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; status 0, or 2 for a mistake that one line on standard error explains."""
    try:
        args = build_parser().parse_args(argv)
        args.run(args)
    except data.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
