"""``push_to_hub``: one commit that holds all of an artefact and its card, or nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_elastic.errors import CheckpointError
from hf_elastic.hub.artefacts import BASE_FOLDER, Artefact
from hf_elastic.hub.card import About, figure_name, make_card
from hf_elastic.hub.connection import PUSHED_BY, Repository, connect, one_line, opened, removed_if_it_fails
from hf_elastic.hub.contents import CARD, Contents, contents_of, may_be_of_a_push, without_local_folders
from hf_elastic.hub.figures import drawn_front
from hf_elastic.hub.names import checked_repo_id, checked_revision, hub_name
from hf_elastic.hub.readme import is_handwritten
from hf_elastic.hub.saving import Thing, missing_companions, staged
from hf_elastic.hub.snippets import has_tokenizer
from hf_elastic.space import Architecture, Value


@dataclass(frozen=True)
class PushPlan:
    """What would be pushed.

    Attributes:
        repo_id: where to.
        kind: what it is.
        files: bytes of each file, by its path in the repository.
        card: the model card.
        handwritten: whether the card is the folder's own.
        left_out: files of the folder that are not shared.
        notes: what is not known, and how it is stated.
    """

    repo_id: str
    kind: str
    files: Mapping[str, int]
    card: str = field(repr=False)
    handwritten: bool
    left_out: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        width = max(map(len, self.files))
        listed = [f"  {name.ljust(width)}  {size:>13,} bytes" for name, size in self.files.items()]
        lines = [f"{self.repo_id}: {self.kind}, {len(self.files)} files, {sum(self.files.values()):,} bytes", *listed]
        lines += [f"  left out: {', '.join(self.left_out)}"] if self.left_out else []
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


@dataclass(frozen=True)
class PushReport:
    """What was pushed.

    Attributes:
        repo_id: where to, with its namespace.
        url: of the commit, or of the pull request.
        commit: its hash.
        files: paths in the repository that make up the artefact.
        removed: files of an earlier push that are gone.
        left_out: files of the folder that were not shared.
        notes: what is not known and how it is stated, and what was kept.
    """

    repo_id: str
    url: str
    commit: str
    files: tuple[str, ...]
    removed: tuple[str, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.repo_id}: {len(self.files)} files, {self.url}"]
        lines += [f"  removed: {', '.join(self.removed)}"] if self.removed else []
        lines += [f"  left out: {', '.join(self.left_out)}"] if self.left_out else []
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def plan_push(
    thing: Thing,
    repo_id: str,
    *,
    architecture: Architecture | Mapping[str, Value] | None = None,
    model: PreTrainedModel | None = None,
    merge: bool | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    run: str | Path | None = None,
    base_model: str | None = None,
    license: str | None = None,
    figure: str | Path | None = None,
    overwrite_card: bool = False,
    token: str | bool | None = None,
) -> PushPlan:
    """Says what :func:`push_to_hub` would upload, and uploads nothing; arguments are its own.

    Raises:
        CheckpointError: it could not be pushed.
    """
    about = About(run=run, base_model=base_model, license=license, figure=figure, token=token)
    checked_repo_id(repo_id)
    with (
        staged(thing, architecture=architecture, model=model, merge=merge, tokenizer=tokenizer) as folder,
        _ready(folder, repo_id, _Wanted(about, overwrite_card)) as ready,
    ):
        return ready.plan


def push_to_hub(
    thing: Thing,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
    architecture: Architecture | Mapping[str, Value] | None = None,
    model: PreTrainedModel | None = None,
    merge: bool | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    run: str | Path | None = None,
    base_model: str | None = None,
    license: str | None = None,
    figure: str | Path | None = None,
    overwrite_card: bool = False,
) -> PushReport:
    """Pushes a searched model, a supernet, adapters or routers to the Hugging Face Hub, with a card, in one commit.

    What is uploaded is checked first, and only expected files are: weights (safetensors), configs, tokenizer, code,
    card; never runs, locks or pickles. Folders of this machine do not stand in what is uploaded. Files that an earlier
    push changed last and that are not part of this one are removed in the same commit; those of others are kept. A push
    that fails changes nothing, and leaves no repository that it made.

    Args:
        thing: a folder that ``export``, ``compress``, ``save_pretrained`` or ``save_routers`` wrote; a ``Supernet``; a
            model that was extracted, refitted or recovered; what ``extract_adapter`` returned; or a ``PeftModel``.
        repo_id: ``user/name``; without a user, that of the token.
        private: of a repository that is made now; by default as the account says.
        revision: branch, made if it is not there.
        commit_message: first line of the commit.
        token: of the Hub; by default the one that is logged in.
        create_pr: open a pull request instead.
        architecture: of a ``Supernet``: push this subnet, not all of it.
        model: with it: the subnet made better, as for :func:`hf_elastic.export`.
        merge: with it: what becomes of adapters, as for :func:`hf_elastic.export`.
        tokenizer: pushed instead of the parent's, of what is no folder; beside adapters and routers only if given.
        run: the run whose numbers the card shows; by default the record inside or beside the folder.
        base_model: name of the base model on the Hub; needed for adapters and routers on a base in a folder. It stands
            in the card also where this token does not find it, which is said.
        license: stated instead of that of the base model's card.
        figure: a picture (.png or .svg) of the Pareto front, shown in the card; by default it is drawn of the run's
            search, where that lies in ``OUTPUT.run`` and matplotlib is installed (``hf-elastic[report]``).
        overwrite_card: replace a card that someone wrote, in the folder or in the repository.

    Raises:
        CheckpointError: offline, no token, a name that cannot be, a folder that is no artefact or not whole, a base
            that nobody else has, a public repository where a private one is asked for, or the Hub refuses.
    """
    checked_repo_id(repo_id)
    checked_revision(revision)
    about = About(run=run, base_model=base_model, license=license, figure=figure, token=token)
    api = connect(token)
    with (
        staged(thing, architecture=architecture, model=model, merge=merge, tokenizer=tokenizer) as folder,
        _ready(folder, repo_id, _Wanted(about, overwrite_card)) as ready,
    ):
        repository = opened(api, repo_id, private=private, revision=revision, create_pr=create_pr)
        message = commit_message or f"Push {ready.plan.kind} by hf-elastic"
        with removed_if_it_fails(repository), one_line(f"push to {repository.repo_id}"):
            return ready.named(repository.repo_id).push(repository, message=message, create_pr=create_pr)


@dataclass(frozen=True)
class _Wanted:
    """What is wanted of a card; ``drawn``: its figure was made for it, and does not go without it."""

    about: About
    overwrite_card: bool
    drawn: bool = False
    notes: tuple[str, ...] = ()

    def with_front(self, artefact: Artefact, aside: Path) -> _Wanted:
        """The same with the front of the run, drawn into a folder, where a card of ours would show it."""
        if self.about.figure is not None or _own_card(artefact, overwrite_card=self.overwrite_card) is not None:
            return self
        picture, note = drawn_front(artefact, self.about.run, into=aside)
        about = replace(self.about, figure=picture)
        return replace(self, about=about, drawn=picture is not None, notes=(note,) if note else ())


@dataclass(frozen=True)
class _Ready:
    """A plan and what it is made of."""

    plan: PushPlan
    contents: Contents
    wanted: _Wanted

    def named(self, repo_id: str) -> _Ready:
        """The same for a name with its namespace, which the card shows."""
        if repo_id == self.plan.repo_id:
            return self
        return _made_ready(self.contents, repo_id, self.wanted)

    def push(self, repository: Repository, *, message: str, create_pr: bool) -> PushReport:
        """Uploads everything in one commit on the one that was read."""
        with_card, kept = self._card_for(repository)
        sources: dict[str, str | bytes] = {name: str(file) for name, file in self.contents.files.items()}
        sources |= self.contents.rewritten
        figure = self.wanted.about.figure
        if figure is not None and (with_card or not self.wanted.drawn):
            sources[figure_name(figure)] = str(Path(figure).expanduser())
        if with_card:
            sources[CARD] = self.plan.card.encode()
        sizes = {name: self.plan.files[name] for name in sources}
        _check_nothing_is_ignored(repository, sizes, create_pr=create_pr)
        old = {name for name in repository.files - sources.keys() if may_be_of_a_push(name)}
        removed = sorted(repository.of_our_pushes(old))
        kept += _kept_of_others(repository, old - set(removed), sources.keys())
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=source) for name, source in sources.items()),
            *(CommitOperationDelete(path_in_repo=name) for name in removed),
        ]
        done = repository.api.create_commit(
            repository.repo_id, operations, commit_message=message,
            commit_description=f"{PUSHED_BY} {version('hf-elastic')}", revision=repository.revision,
            create_pr=create_pr, parent_commit=repository.head,
        )  # fmt: skip
        notes = [*self.plan.notes, *kept]
        if done.oid == repository.head:
            notes.append("nothing has changed since the last push")
        return PushReport(
            repository.repo_id, str(done.pr_url or done.commit_url), str(done.oid), tuple(sources), tuple(removed),
            self.plan.left_out, tuple(notes),
        )  # fmt: skip

    def _card_for(self, repository: Repository) -> tuple[bool, list[str]]:
        """Whether the card is uploaded, and what is said about the one that is there."""
        there = repository.text(CARD)
        if self.wanted.overwrite_card or there is None or not is_handwritten(there) or there == self.plan.card:
            return True, []
        if self.plan.handwritten:
            raise CheckpointError(
                f"{CARD} in the folder and in {repository.repo_id} are both written by hand and differ; merge them, or "
                "say overwrite_card=True"
            )
        return False, [f"{CARD} on the Hub is written by hand and was kept; overwrite_card=True replaces it"]


def _check_nothing_is_ignored(repository: Repository, sizes: Mapping[str, int], *, create_pr: bool) -> None:
    """Refuses, before anything is sent, a repository whose .gitignore would take files out of the commit."""
    if ignored := repository.ignored(sizes, create_pr=create_pr):
        raise CheckpointError(
            f"the .gitignore of {repository.repo_id} leaves out {', '.join(ignored)}; correct it and push again"
        )


def _kept_of_others(repository: Repository, kept: Set[str], pushed: Set[str]) -> list[str]:
    """What is said of files that hf_elastic did not write, and that may be of a model which was there before.

    Raises:
        CheckpointError: loaders would read one of them in the place of what is pushed.
    """
    for name in sorted(kept):
        hidden = {f"{name}.index.json", name.replace("adapter_config.json", "config.json")} - {name}
        if hidden & pushed:
            raise CheckpointError(
                f"{repository.repo_id} holds {name}, which hf-elastic did not push and which would be loaded instead "
                "of what you push; delete it there, or choose another repository"
            )
    return [f"{name} on the Hub is not of an earlier push and was kept" for name in sorted(kept)]


@contextmanager
def _ready(folder: Path, repo_id: str, wanted: _Wanted) -> Iterator[_Ready]:
    """Checks a folder and makes its card; what a supernet leaves with its parent lies aside meanwhile, and a figure."""
    contents = contents_of(folder)
    with tempfile.TemporaryDirectory(prefix="hf-elastic-push-") as aside:
        added = missing_companions(contents.artefact.folder, Path(aside))
        files = {**contents.files, **{name: Path(aside) / name for name in added}}
        wanted = wanted.with_front(contents.artefact, Path(aside))
        yield _made_ready(replace(contents, files=files), repo_id, wanted)


def _made_ready(contents: Contents, repo_id: str, wanted: _Wanted) -> _Ready:
    artefact, figure = contents.artefact, wanted.about.figure
    card = make_card(artefact, wanted.about, repo_id=repo_id)
    _check_base(artefact, card.base)
    public = without_local_folders(contents, base=card.base)
    own = _own_card(artefact, overwrite_card=wanted.overwrite_card)
    text = card.text if own is None else own
    sizes = {name: public.size(name) for name in public.files}
    if figure is not None:
        sizes[figure_name(figure)] = Path(figure).expanduser().stat().st_size
    sizes[CARD] = len(text.encode())
    notes = [*card.notes, *wanted.notes]
    if own is not None:
        notes.append(f"{CARD} of the folder is written by hand and is pushed as it is; overwrite_card=True replaces it")
    if artefact.kind == "model" and not has_tokenizer(artefact):
        notes.append("there is no tokenizer beside the weights")
    plan = PushPlan(repo_id, artefact.kind, sizes, text, own is not None, public.left_out, tuple(notes))
    return _Ready(plan, public, wanted)


def _own_card(artefact: Artefact, *, overwrite_card: bool) -> str | None:
    """The card in a folder, where someone wrote it and it is to stay."""
    file = artefact.folder / CARD
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    return text if is_handwritten(text) and not overwrite_card else None


def _check_base(artefact: Artefact, base: str | None) -> None:
    """Refuses adapters and routers whose base nobody else has."""
    alone = artefact.kind == "routers" or (artefact.kind == "adapter" and not (artefact.folder / BASE_FOLDER).is_dir())
    stated = artefact.adapter.get("base_model_name_or_path") or artefact.routers.get("base")
    if not alone or base is not None or not stated:
        return
    if hub_name(stated, beside=artefact.folder) is not None:
        raise CheckpointError(
            f"the {artefact.kind} in {artefact.folder} are of the base {stated}, which is not on the Hub, or not for "
            "this token; name it by base_model="
        )
    raise CheckpointError(
        f"the {artefact.kind} in {artefact.folder} are of the base in {stated}, which nobody else has; push that "
        "too, and name it by base_model="
    )
