"""Kill a pretraining again and again, let it end, and compare it with one that was left alone.

    python tests/survive.py --kills 100

Real processes and real signals: SIGKILL at random moments (while a run reads, trains, or writes a
checkpoint), then Ctrl-C, SIGTERM and a second run in the same folder. What is left must be to the
bit what an undisturbed run leaves. The network is shallow and is saved three times a second, not
once a minute, so that many kills meet a write. The suite runs this with a few kills.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import data  # noqa: E402
import main  # noqa: E402
import simclr  # noqa: E402

COMMAND = ["pretrain", "--image-size", "32", "--batch-size", "8", "--epochs", "3"]


def begin(*words: str, pause: bool = False) -> int:
    """Start the command in a process of its own, which says everything into a file.

    Args:
        pause: it stops itself (SIGSTOP) behind each step, until SIGCONT comes.
    """
    Path("said").write_text("")  # of the process before
    pid = os.fork()  # the modules are imported already: a start costs no seconds
    if pid:
        return pid
    status = 1
    with open("said", "w") as said, contextlib.suppress(BaseException):
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        if pause:
            main.show_step = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)
        try:
            status = main.main([*COMMAND, *words])
        except SystemExit as stop:
            status = stop.code
    sys.stdout.flush()
    os._exit(status)


def end(pid: int) -> int:
    """Wait for a process: its exit status, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_after(seconds: float, number: int, *words: str) -> int:
    """Start, wait, send a signal; how it ended."""
    pid = begin(*words)
    time.sleep(seconds)
    os.kill(pid, number)
    return end(pid)


def begin_training(*words: str) -> int:
    """Start, and wait until it pauses behind its first step, however fast it computes."""
    pid = begin(*words, pause=True)
    check(os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1]), "a run comes to its first step")
    return pid


def go_on(pid: int) -> int:
    """Let what pauses go on to its end: how it ended."""
    while True:
        os.kill(pid, signal.SIGCONT)
        status = os.waitpid(pid, os.WUNTRACED)[1]
        if not os.WIFSTOPPED(status):
            return os.waitstatus_to_exitcode(status)


def left_behind(folder: Path) -> tuple[dict, list[dict]]:
    """What a finished run holds: every tensor of its checkpoints, and its log without the times."""
    tensors = {}
    for name in ("encoder.pt", "checkpoint.pt"):
        checkpoint = torch.load(folder / name, weights_only=True)
        for part in ("encoder", "projection_head"):
            tensors |= {(name, part, k): v for k, v in checkpoint.get(part, {}).items()}
        for i, state in checkpoint.get("optimizer", {}).get("state", {}).items():
            tensors |= {(name, i, key): value for key, value in state.items()}
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return tensors, [{k: v for k, v in line.items() if "second" not in k} for line in log]


def check(true: bool, claim: str) -> None:
    """Stop with what was said last where a claim does not hold."""
    if not true:
        sys.exit(f"not so: {claim}; the last process said:\n{Path('said').read_text()}")


def compare(folder: str) -> None:
    """See that a run left what the undisturbed one did."""
    tensors, log = left_behind(Path("alone"))
    found, lines = left_behind(Path(folder))
    check(found.keys() == tensors.keys(), f"{folder}: the same {len(tensors)} tensors")
    check(all(torch.equal(found[k], tensors[k]) for k in tensors), f"{folder}: the same bits")
    check(lines == log, f"{folder}: the same log, without gaps and repeats")
    check(not list(Path(folder).glob(".*")), f"{folder}: no leftovers of a write")


def run(kills: int) -> None:
    """All of it, in an empty folder."""
    end(begin("--out", "decoded", "--epochs", "0"))
    began = time.monotonic()
    check(end(begin("--out", "alone")) == 0, "a run that is left alone ends well")
    took = time.monotonic() - began
    simclr.CHECKPOINT_SECONDS, simclr.CHECKPOINT_SHARE = 0.3, 1e9
    left, ends, torn = kills, 0, 0
    while left:
        status = kill_after(random.uniform(0, took), signal.SIGKILL, "--out", "killed")
        torn += bool(list(Path("killed").glob(".*.tmp")))
        left -= status == -signal.SIGKILL
        check(
            status in (0, -signal.SIGKILL), "a killed run was not stopped by a mistake of its own"
        )
        if status == 0 or not left:
            check(end(begin("--out", "killed")) == 0, "a run that was killed goes on to its end")
            compare("killed")
            check(end(begin("--out", "killed")) == 0, "a finished run exits with 0")
            check("it is finished" in Path("said").read_text(), "a finished run says so")
            shutil.rmtree("killed")
            ends += 1
    for number in (signal.SIGINT, signal.SIGTERM):
        pid = begin_training("--out", "stopped")
        os.kill(pid, number)
        status = go_on(pid)
        check(status == 128 + number, f"signal {number} exits with {128 + number}, not {status}")
        check("goes on from there" in Path("said").read_text(), "a stopped run says how to go on")
    first = begin_training("--out", "stopped")
    try:
        check(end(begin("--out", "stopped")) == 2, "a second run into one folder is refused")
        check("another run is writing" in Path("said").read_text(), "and is told why")
    finally:  # else it would pause for ever
        status = go_on(first)
    check(status == 0, "the first one goes on to its end")
    compare("stopped")
    print(f"{kills} kills, {torn} of them in a write; {ends} runs of {took:.0f} s, the same bits")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the moments to kill at")
    args = parser.parse_args()
    random.seed(args.seed)
    torch.set_num_threads(1)
    data.PHANTOM_PATIENTS = 3
    shallow = partial(simclr.ResNet, simclr.BasicBlock, (1, 1, 1, 1), 1)
    simclr.ARCHITECTURES["resnet18"] = shallow
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        run(args.kills)
