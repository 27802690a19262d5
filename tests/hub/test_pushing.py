"""Pushes: one commit of all that is expected, or nothing; cards of people are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import made
import pytest
import torch
from fake_hub import Commit, Repository
from huggingface_hub import ModelCard
from tiny_models import supernet_of, tiny, tokenizer
from transformers import AutoModelForCausalLM

import hf_elastic as he
from hf_elastic import CheckpointError
from hf_elastic.hub.pushing import plan_push, push_to_hub
from hf_elastic.hub.readme import MARKER

MINE = "---\nlicense: mit\n---\n\n# My own words about this model\n"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A remote-code export; read only."""
    return made.remote(tmp_path_factory.mktemp("export") / "small")


def files_of(hub: Any, name: str = "tester/small", revision: str = "main") -> dict[str, bytes]:
    found: dict[str, bytes] = hub.repositories[name].files(revision)
    return found


def copied(small: Path, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for file in small.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_a_push_makes_the_repository_and_one_commit_of_all_files_and_a_card(hub: Any, small: Path) -> None:
    report = push_to_hub(small, "tester/small", commit_message="First")
    repository = hub.repositories["tester/small"]
    assert repository.history() == ["First", "initial commit"] and repository.branches["main"] == report.commit
    local = {file.name: file.read_bytes() for file in small.iterdir()}
    uploaded = files_of(hub)
    assert uploaded.keys() == {*local, "README.md", ".gitattributes"}
    same = uploaded.keys() & local.keys() - {"architecture.json"}
    assert all(uploaded[name] == local[name] for name in same) and MARKER in uploaded["README.md"].decode()
    assert set(report.files) == {*local, "README.md"} and report.url.endswith(report.commit)
    assert not (small / "README.md").exists()


def test_a_name_without_a_user_is_that_of_the_token(hub: Any, small: Path) -> None:
    assert push_to_hub(small, "small").repo_id == "tester/small"
    assert 'from_pretrained("tester/small"' in files_of(hub)["README.md"].decode()


def test_a_second_push_is_one_commit_of_what_changed(hub: Any, small: Path, tmp_path: Path) -> None:
    push_to_hub(small, "tester/small")
    before = len(hub.asked("PUT /objects"))
    other = copied(small, tmp_path / "small")
    (other / "generation_config.json").write_text('{"max_new_tokens": 7}')
    report = push_to_hub(other, "tester/small")
    assert hub.repositories["tester/small"].history()[:2] == ["Push model by hf-elastic"] * 2
    assert files_of(hub)["generation_config.json"] == b'{"max_new_tokens": 7}'
    assert len(hub.asked("PUT /objects")) == before and report.removed == ()


def test_a_push_of_the_same_again_is_no_commit(hub: Any, small: Path) -> None:
    first = push_to_hub(small, "tester/small")
    second = push_to_hub(small, "tester/small")
    assert second.commit == first.commit and "nothing has changed since the last push" in second.notes
    assert len(hub.repositories["tester/small"].history()) == 2


def by_hand(hub: Any, files: dict[str, bytes], name: str = "tester/small") -> None:
    """A commit that somebody makes without us."""
    repository = hub.repositories[name]
    repository.add(Commit("by hand", repository.branches["main"], {**repository.files(), **files}), "main")


def test_files_of_an_earlier_push_go_in_the_same_commit_and_files_of_people_stay(
    hub: Any, small: Path, tmp_path: Path
) -> None:
    tiny("bert").save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    first = push_to_hub(tmp_path / "sharded", "tester/small", commit_message="Mine")
    old = {name for name in first.files if "-of-" in name} | {"model.safetensors.index.json"}
    kept = {"notes.md": b"mine", "onnx/model.onnx": b"mine", "onnx/config.json": b"{}", "handler.py": b"mine"}
    by_hand(hub, kept)
    report = push_to_hub(small, "tester/small")
    there = files_of(hub)
    assert len(old) > 2 and not old & there.keys() and {name: there[name] for name in kept} == kept
    assert set(report.removed) == old and len(hub.repositories["tester/small"].history()) == 4


def test_files_that_others_pushed_are_kept_whatever_their_name_and_said(hub: Any, small: Path, tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    first = push_to_hub(tmp_path / "sharded", "tester/small")
    changed = sorted(name for name in first.files if "-of-" in name)[0]
    theirs = {"routers.json": b"{}", "modeling_elastic_mine.py": b"x", "base/model.safetensors": b"x", changed: b"new"}
    by_hand(hub, theirs)
    report = push_to_hub(small, "tester/small")
    assert {name: files_of(hub)[name] for name in theirs} == theirs and not theirs.keys() & set(report.removed)
    for name in theirs:
        assert f"{name} on the Hub is not of an earlier push and was kept" in report.notes
    assert "model.safetensors.index.json" in report.removed


def test_weights_of_others_that_would_be_loaded_instead_are_refused(hub: Any, small: Path, tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    for folder, name in ((tmp_path / "sharded", "model.safetensors"), (small, "adapter_config.json")):
        before = dict(hub.new("tester/small", {name: b"theirs"}).files())
        with pytest.raises(CheckpointError, match=f"holds {name}, which hf-elastic did not push and which would be"):
            push_to_hub(folder, "tester/small")
        assert files_of(hub) == before and not hub.asked("PUT /objects")


@pytest.mark.parametrize("what", ["/commit/", "PUT /objects", "/preupload/", "validate-yaml", "objects/batch"])
def test_a_push_that_fails_leaves_no_repository(hub: Any, small: Path, what: str) -> None:
    hub.refused[what] = 400
    with pytest.raises(CheckpointError, match="^cannot push to tester/small: ") as caught:
        push_to_hub(small, "tester/small")
    assert "\n" not in str(caught.value) and hub.repositories == {}


def test_a_push_that_fails_changes_nothing_that_was_there(hub: Any, small: Path) -> None:
    before = dict(hub.new("tester/small", {"config.json": b"{}", "model.safetensors": b"old"}).files())
    hub.refused["/commit/"] = 400
    with pytest.raises(CheckpointError, match="the Hub answered 400"):
        push_to_hub(small, "tester/small")
    assert files_of(hub) == before and not hub.asked("DELETE")


def test_a_failure_and_a_repository_that_cannot_be_removed_are_both_said(hub: Any, small: Path) -> None:
    hub.refused |= {"/commit/": 400, "repos/delete": 403}
    with pytest.raises(CheckpointError, match="the Hub answered 400.*tester/small was made for this push and is still"):
        push_to_hub(small, "tester/small")


def test_an_interrupted_push_leaves_no_repository(hub: Any, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        push_to_hub(small, "tester/small")
    assert hub.repositories == {}


def test_a_push_into_the_middle_of_another_is_refused(hub: Any, small: Path) -> None:
    def meanwhile(repository: Repository) -> None:
        repository.add(Commit("somebody", repository.branches["main"], {"x": b"theirs"}), "main")
        hub.before_commit = None

    hub.new("tester/small")
    hub.before_commit = meanwhile
    with pytest.raises(CheckpointError, match="somebody else pushed in the meantime; push again"):
        push_to_hub(small, "tester/small")
    assert files_of(hub) == {"x": b"theirs"}


def test_a_repository_that_somebody_filled_meanwhile_is_not_removed(hub: Any, small: Path) -> None:
    def meanwhile(repository: Repository) -> None:
        repository.add(Commit("somebody", repository.branches["main"], {"x": b"theirs"}), "main")

    hub.before_commit = meanwhile
    with pytest.raises(CheckpointError, match="somebody else pushed"):
        push_to_hub(small, "tester/small")
    assert files_of(hub) == {"x": b"theirs"}


@pytest.mark.parametrize("create_pr", [False, True])
def test_files_that_a_gitignore_would_take_out_are_noticed_before_anything_is_sent(
    hub: Any, small: Path, create_pr: bool
) -> None:
    before = dict(hub.new("tester/small").files())
    hub.gitignored = r".*\.safetensors"
    with pytest.raises(
        CheckpointError, match="the .gitignore of tester/small leaves out model.safetensors; correct it"
    ):
        push_to_hub(small, "tester/small", create_pr=create_pr)
    assert files_of(hub) == before and not hub.asked("PUT /objects") and not hub.asked("/commit/")
    assert set(hub.repositories["tester/small"].branches) == {"main"}


def test_a_branch_is_made_and_goes_again_with_a_push_that_fails(hub: Any, small: Path) -> None:
    hub.new("tester/small")
    hub.refused["/commit/"] = 400
    with pytest.raises(CheckpointError):
        push_to_hub(small, "tester/small", revision="v2")
    assert set(hub.repositories["tester/small"].branches) == {"main"}
    hub.refused.clear()
    push_to_hub(small, "tester/small", revision="v2")
    assert "model.safetensors" in files_of(hub, revision="v2") and "model.safetensors" not in files_of(hub)
    push_to_hub(small, "tester/small", revision="v2", commit_message="again", overwrite_card=True)


def test_a_pull_request_changes_nothing_itself_and_makes_no_repository(hub: Any, small: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such repository"):
        push_to_hub(small, "tester/small", create_pr=True)
    before = dict(hub.new("tester/small").files())
    report = push_to_hub(small, "tester/small", create_pr=True)
    assert report.url.endswith("/tester/small/discussions/1") and files_of(hub) == before
    assert "model.safetensors" in files_of(hub, revision="refs/pr/1")


def test_a_private_repository_is_made_and_a_public_one_is_not_taken_for_it(hub: Any, small: Path) -> None:
    push_to_hub(small, "tester/hidden", private=True)
    assert hub.repositories["tester/hidden"].private
    hub.new("tester/small")
    with pytest.raises(CheckpointError, match="tester/small is public; make it private"):
        push_to_hub(small, "tester/small", private=True)
    assert "config.json" not in files_of(hub)


# --- what is needed before


def test_offline_nothing_is_asked(hub: Any, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
        push_to_hub(small, "tester/small")
    assert hub.requests == []


def test_without_a_token_nothing_is_asked(hub: Any, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    for token in (None, False):
        with pytest.raises(CheckpointError, match="no token of the Hub: log in by `hf auth login`"):
            push_to_hub(small, "tester/small", token=token)
    assert not hub.asked("create")


def test_a_token_that_is_not_accepted_is_said(hub: Any, small: Path) -> None:
    with pytest.raises(CheckpointError, match="the token is not accepted"):
        push_to_hub(small, "small", token="hf_wrong")
    with pytest.raises(CheckpointError, match="open tester/small: the token is not accepted"):
        push_to_hub(small, "tester/small", token="hf_wrong")


def test_a_namespace_of_somebody_else_is_said(hub: Any, small: Path) -> None:
    with pytest.raises(CheckpointError, match="the token may not write there"):
        push_to_hub(small, "somebody/small")


@pytest.mark.parametrize(
    "name",
    ["", "a/b/c", "../up", "tester/..", "tester/a--b", "tester/a b", "-x", "x.git", "tester/\nx", "ü/x", "a" * 97],
)
def test_a_name_that_cannot_be_is_refused_before_anything(hub: Any, small: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="is no name of a repository"):
        push_to_hub(small, name)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["", "../up", "a..b", "a b", "/a", "a/", "a//b", "a\n"])
def test_a_branch_that_cannot_be_is_refused_before_anything(hub: Any, small: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="is no name of a branch"):
        push_to_hub(small, "tester/small", revision=name)
    assert hub.requests == []


def test_a_folder_that_is_not_whole_is_refused_before_anything(hub: Any, small: Path, tmp_path: Path) -> None:
    broken = copied(small, tmp_path / "broken")
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match="model.safetensors is truncated"):
        push_to_hub(broken, "tester/small")
    assert not hub.asked("create|commit")


# --- cards


def test_a_card_in_the_folder_that_someone_wrote_is_pushed_as_it_is(hub: Any, small: Path, tmp_path: Path) -> None:
    folder = copied(small, tmp_path / "small")
    (folder / "README.md").write_text(MINE + "\n![front](front.png)\n")
    (folder / "front.png").write_bytes(b"picture")
    report = push_to_hub(folder, "tester/small")
    assert files_of(hub)["README.md"].decode().startswith(MINE) and files_of(hub)["front.png"] == b"picture"
    assert any("is written by hand and is pushed as it is" in note for note in report.notes)
    push_to_hub(folder, "tester/small", overwrite_card=True)
    assert MARKER in files_of(hub)["README.md"].decode() and (folder / "README.md").read_text().startswith(MINE)


def test_a_card_in_the_repository_that_someone_wrote_is_kept_unless_told(hub: Any, small: Path) -> None:
    hub.new("tester/small", {"README.md": MINE.encode()})
    report = push_to_hub(small, "tester/small")
    assert files_of(hub)["README.md"] == MINE.encode() and "model.safetensors" in files_of(hub)
    assert any("on the Hub is written by hand and was kept" in note for note in report.notes)
    push_to_hub(small, "tester/small", overwrite_card=True)
    assert MARKER in files_of(hub)["README.md"].decode()


def test_two_cards_that_people_wrote_are_not_chosen_between(hub: Any, small: Path, tmp_path: Path) -> None:
    folder = copied(small, tmp_path / "small")
    (folder / "README.md").write_text(MINE)
    hub.new("tester/small", {"README.md": b"# Theirs\n"})
    with pytest.raises(CheckpointError, match="both written by hand and differ"):
        push_to_hub(folder, "tester/small")
    assert files_of(hub)["README.md"] == b"# Theirs\n" and "config.json" not in files_of(hub)


def test_the_card_of_an_earlier_push_is_made_anew(hub: Any, small: Path) -> None:
    push_to_hub(small, "tester/small")
    push_to_hub(small, "tester/small", license="mit")
    assert ModelCard(files_of(hub)["README.md"].decode()).data.license == "mit"


def test_the_empty_form_that_peft_writes_gives_way_to_our_card(hub: Any, tmp_path: Path) -> None:
    supernet = made.adapted(made.base(tmp_path))
    supernet.model.push_to_hub("tester/adapter")  # peft's own
    theirs = files_of(hub, "tester/adapter")["README.md"].decode()
    assert "[More Information Needed]" in theirs
    push_to_hub(tmp_path / "base", "tester/base")
    supernet.model.save_pretrained(tmp_path / "adapter")  # peft writes its form there too
    assert (tmp_path / "adapter" / "README.md").is_file()
    for thing in (tmp_path / "adapter", supernet, supernet.model):
        push_to_hub(thing, "tester/adapter", base_model="tester/base")
        card = ModelCard(files_of(hub, "tester/adapter")["README.md"].decode())
        assert MARKER in card.text and card.data.library_name == "peft" and card.data.base_model == "tester/base"
        assert "[More Information Needed]" not in card.text


def test_a_push_of_peft_over_ours_and_ours_over_that_end_with_our_card(hub: Any, tmp_path: Path) -> None:
    supernet = made.adapted(made.base(tmp_path))
    push_to_hub(tmp_path / "base", "tester/base")
    push_to_hub(supernet, "tester/adapter", base_model="tester/base")
    ours = files_of(hub, "tester/adapter")["README.md"]
    supernet.model.push_to_hub("tester/adapter")
    push_to_hub(supernet, "tester/adapter", base_model="tester/base")
    assert files_of(hub, "tester/adapter")["README.md"] == ours


# --- what is pushed


def test_a_supernet_handle_is_pushed_with_its_tokenizer_and_without_folders_of_this_machine(
    hub: Any, tmp_path: Path
) -> None:
    tiny("llama").save_pretrained(tmp_path / "parent")
    tokenizer().save_pretrained(tmp_path / "parent")
    parent = AutoModelForCausalLM.from_pretrained(tmp_path / "parent")
    supernet = he.make_elastic(parent, he.ElasticConfig(intermediate_size=[0.5, 1.0]))
    push_to_hub(supernet, "tester/supernet")
    there = files_of(hub, "tester/supernet")
    assert {"search_space.json", "model.safetensors", "tokenizer.json"} <= there.keys()
    assert not any(str(tmp_path).encode() in content for content in there.values())
    assert json.loads(there["search_space.json"])["parent"] == ""


def test_one_subnet_of_a_supernet_is_pushed_with_weights_that_were_made_better(hub: Any) -> None:
    supernet = supernet_of("llama")
    point = supernet.space.midpoint()
    better = he.extract(supernet, point)
    with torch.no_grad():
        better.get_input_embeddings().weight.fill_(0.25)
    push_to_hub(supernet, "tester/small", architecture=point, model=better)
    there = files_of(hub)
    assert json.loads(there["architecture.json"])["architecture"] == dict(point)
    from safetensors.torch import load

    assert bool((load(there["model.safetensors"])["model.embed_tokens.weight"] == 0.25).all())


def test_a_model_alone_is_pushed_with_its_code_and_integers_stay_packed(hub: Any) -> None:
    supernet = supernet_of("bert")
    push_to_hub(he.extract(supernet, supernet.space.midpoint(), loadability="remote-code"), "tester/small")
    assert "modeling_elastic_bert.py" in files_of(hub)
    model = tiny("llama")
    he.quantize_(model, bits=4, group_size=16, method="rtn")
    push_to_hub(model, "tester/integers")
    assert b"weight_packed" in files_of(hub, "tester/integers")["model.safetensors"]


def test_routers_are_pushed_alone(hub: Any, tmp_path: Path) -> None:
    supernet = made.routed(made.base(tmp_path))
    push_to_hub(tmp_path / "base", "tester/base")
    push_to_hub(supernet, "tester/routers", base_model="tester/base")
    there = files_of(hub, "tester/routers")
    assert there.keys() == {".gitattributes", "README.md", "routers.json", "routers.safetensors"}
    assert json.loads(there["routers.json"])["base"] == "tester/base"


def test_adapters_and_routers_on_a_base_that_nobody_has_are_refused(hub: Any, tmp_path: Path) -> None:
    base = made.base(tmp_path)
    for supernet in (made.adapted(base), made.routed(base)):
        with pytest.raises(CheckpointError, match="which nobody else has; push that too, and name it by base_model="):
            push_to_hub(supernet, "tester/alone")
    assert hub.repositories == {}


def test_a_tokenizer_goes_along_with_adapters_and_routers_where_it_is_given(hub: Any, tmp_path: Path) -> None:
    base = made.base(tmp_path)
    push_to_hub(base, "tester/base")
    adapters = made.adapted(base)
    plain = he.extract_adapter(adapters, adapters.space.largest())
    things = {"elastic": adapters, "peft": adapters.model, "plain": plain, "routers": made.routed(base)}
    given = tokenizer()
    given.save_pretrained(tmp_path / "tokenizer")
    wanted = (tmp_path / "tokenizer" / "tokenizer.json").read_bytes()
    for name, thing in things.items():
        push_to_hub(thing, f"tester/{name}", base_model="tester/base")
        assert "tokenizer.json" not in files_of(hub, f"tester/{name}")
        push_to_hub(thing, f"tester/{name}", base_model="tester/base", tokenizer=given)
        assert files_of(hub, f"tester/{name}")["tokenizer.json"] == wanted


def test_what_does_not_fit_together_is_refused(hub: Any, small: Path) -> None:
    supernet = supernet_of("llama")
    point = supernet.space.midpoint()
    with pytest.raises(CheckpointError, match="with a folder leave them out"):
        push_to_hub(small, "tester/small", architecture=point)
    with pytest.raises(CheckpointError, match="with a supernet without architecture= leave them out"):
        push_to_hub(supernet, "tester/small", model=tiny("llama"))
    with pytest.raises(CheckpointError, match="is the body of a supernet; push that, with architecture="):
        push_to_hub(supernet.model, "tester/small")
    with pytest.raises(CheckpointError, match="cannot push a dict"):
        push_to_hub({}, "tester/small")  # type: ignore[arg-type]


def test_a_plan_asks_the_hub_for_nothing_but_the_card_of_the_base(hub: Any, small: Path) -> None:
    plan = plan_push(small, "tester/small")
    assert plan.files["model.safetensors"] == (small / "model.safetensors").stat().st_size
    assert plan.files["README.md"] == len(plan.card.encode()) and MARKER in plan.card
    assert not hub.asked("POST|PUT|DELETE") and hub.repositories == {}
    assert "tester/small: model" in str(plan) and f"{plan.files['model.safetensors']:,} bytes" in str(plan)


def test_a_figure_is_pushed_beside_the_card_that_shows_it(hub: Any, small: Path, tmp_path: Path) -> None:
    (tmp_path / "my front.svg").write_text("<svg/>")
    push_to_hub(small, "tester/small", figure=tmp_path / "my front.svg")
    assert files_of(hub)["pareto_front.svg"] == b"<svg/>"
    assert "![Pareto front of the search](pareto_front.svg)" in files_of(hub)["README.md"].decode()
    with pytest.raises(CheckpointError, match="is no file with an ending of .png, .svg"):
        push_to_hub(small, "tester/small", figure=tmp_path / "front.html")
