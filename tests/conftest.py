"""Lets the tests import the modules from the folder above them; everything runs on the CPU."""

import os
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: much is compared to the last bit
sys.path.insert(0, str(Path(__file__).parent.parent))
