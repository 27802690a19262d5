"""A Hub on loopback that tests are logged in to, from this process and from fresh ones."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))


@contextmanager
def logged_in(folder: Path) -> Iterator[Any]:
    """This process speaks to a Hub of its own, whose cache is in a folder."""
    from fake_hub import TOKEN, running
    from huggingface_hub import constants

    with running() as hub, pytest.MonkeyPatch.context() as patch:
        changed: dict[str, Any] = {
            "ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": str(folder / "cache"),
            "HF_HOME": str(folder / "home"), "HF_TOKEN_PATH": str(folder / "home" / "token"),
            "HF_HUB_DISABLE_PROGRESS_BARS": True, "HF_HUB_DISABLE_TELEMETRY": True,
        }  # fmt: skip
        for name, value in changed.items():
            patch.setattr(constants, name, value)
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setenv("NO_PROXY", "127.0.0.1")
        yield hub


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Any]:
    """A Hub for one test."""
    with logged_in(tmp_path) as started:
        yield started


@pytest.fixture(scope="module")
def shared_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A Hub for all tests of a file."""
    with logged_in(tmp_path_factory.mktemp("hub")) as started:
        yield started
