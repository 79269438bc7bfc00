"""The test suite. What is set here counts for every process of a run, pytest-xdist's workers included.

Containers often set PYTHONDONTWRITEBYTECODE. Then each plugin that a test starts, and each worker, would compile all
that it imports once more, which takes a quarter of their time.
"""

import os
import sys

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
