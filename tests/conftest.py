"""Lets the tests import the modules from the folder above them, and run on two threads."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
