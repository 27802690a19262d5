"""Makes the files beside the tests importable by their names, as `tests/conftest.py` does for its own."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
