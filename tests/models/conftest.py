"""Makes ``tiny_static`` importable, here and in the processes that tests start."""

from __future__ import annotations

import sys
from pathlib import Path

from hf_elastic.models import register_auto_classes

sys.path.insert(0, str(Path(__file__).parent))

register_auto_classes()
