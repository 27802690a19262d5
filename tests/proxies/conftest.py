"""Makes `proxy_oracles` importable by its name, as `tests/conftest.py` does for the files beside it."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
