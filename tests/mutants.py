"""Plant small faults, one by one, and see that each turns a test red.

    python tests/mutants.py [WORD ...]

A test that nothing can fail proves nothing. Each fault in tests/mutants.txt is a change to a copy of
the code on which the named tests have to fail. First all of them run once without any fault, and
have to pass: a fault "found" by a test that is red anyway is not found. `.ci/run` runs this.
"""

import os
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import run
from typing import NamedTuple

HERE = Path(__file__).parent.parent
PYTEST = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]


class Fault(NamedTuple):
    """`old`, which stands in a module once, becomes `new`."""

    what: str
    module: str
    named: str  # tests of tests/test_<module>.py, as pytest's -k takes them
    old: str
    new: str


def read_faults() -> list[Fault]:
    """A fault is a paragraph: module, tests, what it is; lines with - that become those with +."""
    faults = []
    for paragraph in (HERE / "tests/mutants.txt").read_text().strip().split("\n\n"):
        title, *changes = paragraph.split("\n")
        module, named, what = title.split(": ")
        old = "\n".join(line[2:] for line in changes if line[0] == "-")
        new = "\n".join(line[2:] for line in changes if line[0] == "+")
        faults.append(Fault(what, module, named, old, new))
    return faults


def plant(fault: Fault) -> bool:
    """Run a fault's tests on a copy of the code that has it; True = they failed, as they have to."""
    with tempfile.TemporaryDirectory() as place:
        for file in [*HERE.glob("*.py"), *HERE.glob("tests/*")]:
            if file.is_file():
                copy = Path(place, file.relative_to(HERE))
                copy.parent.mkdir(exist_ok=True)
                shutil.copy(file, copy)
        module = Path(place, f"{fault.module}.py")
        text = module.read_text()
        assert text.count(fault.old) == 1, f"{text.count(fault.old)} times in {module}: {fault}"
        module.write_text(text.replace(fault.old, fault.new))
        command = [*PYTEST, f"tests/test_{fault.module}.py", "-k", fault.named]
        done = run(command, cwd=place, capture_output=True)
        found = done.returncode == 1  # 1: tests failed; all else: passed, or did not even run
        print(f"{'found' if found else 'NOT FOUND'}: {fault.what}", flush=True)
        return found


def main() -> int:
    """Plant all faults, or those whose names hold a given word; status 1 if one was not found."""
    words, faults = sys.argv[1:], read_faults()
    faults = [f for f in faults if not words or any(word in f.what for word in words)]
    os.environ["OMP_NUM_THREADS"] = "1"
    named = {}
    for fault in faults:
        named[fault.module] = f"{named.get(fault.module, 'nothing')} or {fault.named}"
    commands = []
    for module, names in named.items():
        commands.append([*PYTEST, f"tests/test_{module}.py", "-k", names])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in pool.map(lambda words: run(words, cwd=HERE, capture_output=True), commands):
            if done.returncode:
                sys.exit(f"red without any fault:\n{done.stdout.decode()}")
        missed = list(pool.map(plant, faults)).count(False)
    print(f"{missed} of {len(faults)} faults were not found")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
