"""Lets the tests import the modules from the folder above them; on the CPU, with one thread."""

import os
import sys
from pathlib import Path

# Before torch looks. Much is compared to the last bit, and networks are too small to be shared.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))
