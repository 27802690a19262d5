"""Makes links that leave docs/ work on the site too: README.md becomes a page of it, and so does every source file that
a page links to. The pages themselves keep the links that work on GitHub."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
ROLE = re.compile(r":(?:class|func|meth|attr|data|mod|exc|obj):(<code>)~?(?:[\w.]*\.)?(\w+(?:\(\))?)(</code>)")
README, README_PAGE, SOURCES = "README.md", "readme.md", "source"
FENCES = {".py": "python", ".sh": "bash", ".yml": "yaml", ".toml": "toml"}


def on_files(files: Files, *, config: Any) -> Files:
    """Adds README.md and the linked sources to the files of the site."""
    root, docs = Path(config.config_file_path).parent, Path(config.docs_dir)
    readme = (root / README).read_text(encoding="utf-8")
    files.append(File.generated(config, README_PAGE, content=_readme(readme, docs.name)))
    pages = {file.src_uri: Path(file.abs_src_path) for file in files.documentation_pages() if file.abs_src_path}
    texts = {name: path.read_text(encoding="utf-8") for name, path in pages.items()}
    outside = {target for name, text in texts.items() for target in _outside(text, f"{docs.name}/{name}", docs.name)}
    outside |= {target for target in _outside(readme, README, docs.name)}
    for target in sorted(outside - {README}):
        path = root / target
        if path.is_file() and path.suffix in FENCES:
            source = path.read_text(encoding="utf-8")
            text = f"# {target}\n\n````{FENCES[path.suffix]}\n{source}````\n"
            files.append(File.generated(config, f"{SOURCES}/{target}.md", content=text))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Points links that leave docs/ to where their target is on the site."""
    uri = page.file.src_uri
    if uri.startswith(f"{SOURCES}/"):
        return markdown
    here = README if uri == README_PAGE else f"{Path(config.docs_dir).name}/{uri}"
    return LINK.sub(lambda found: _moved(found, here, uri=uri, docs=Path(config.docs_dir).name), markdown)


def on_page_content(html: str, *, page: Any, config: Any, files: Files) -> str:
    """Shows what roles of docstrings name, and not the roles."""
    return ROLE.sub(r"\1\2\3", html)


def _readme(text: str, docs: str) -> str:
    return re.sub(rf'src(set)?="{docs}/', r'src\1="', text)


def _outside(text: str, here: str, docs: str) -> set[str]:
    targets = {_resolved(found.group(2), here) for found in LINK.finditer(text) if "://" not in found.group(2)}
    return {target for target in targets if not target.startswith((f"{docs}/", ".."))}


def _resolved(link: str, here: str) -> str:
    """A link of a file, as a path below the root."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(here), link))


def _moved(found: re.Match[str], here: str, *, uri: str, docs: str) -> str:
    before, link, anchor, after = found.groups(default="")
    if "://" in link or link.startswith(("mailto:", "/")):
        return found.group()
    target = _resolved(link, here)
    if target.startswith(f"{docs}/"):
        place = target.removeprefix(f"{docs}/")
    elif target == README:
        place = README_PAGE
    else:
        place = f"{SOURCES}/{target}.md"
    return f"{before}{posixpath.relpath(place, posixpath.dirname(uri) or '.')}{anchor}{after}"
