"""Whose a card is: ours, a form that nobody filled in, or someone's."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard, ModelCardData

from hf_elastic.hub.readme import MARKER, is_empty_form, is_handwritten, made_by_us

PUSHED = (
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
    "automatically generated."
)


def form(**fields: str) -> str:
    pytest.importorskip("jinja2")
    return str(ModelCard.from_template(ModelCardData(library_name="peft", tags=["x"]), **fields))


def test_the_form_is_recognised_as_peft_and_transformers_write_it() -> None:
    for text in (form(), form(model_description=PUSHED), form() + "\n### Framework versions\n\n- PEFT 0.21.2\n"):
        assert is_empty_form(text) and not is_handwritten(text)
        assert is_empty_form(text.replace("\n", "\r\n"))


@pytest.mark.parametrize("field", ["model_description", "license", "developers", "direct_use", "model_id"])
def test_one_word_filled_in_is_someones_work(field: str) -> None:
    assert is_handwritten(form(**{field: "Mine"}))


def test_a_sentence_added_to_the_form_is_someones_work() -> None:
    assert is_handwritten(form() + "\nTrained with care.\n")


def test_ours_is_ours_until_its_mark_is_removed() -> None:
    ours = f"---\nlicense: mit\n---\n\n{MARKER}\n\n# A model\n"
    assert made_by_us(ours) and not is_handwritten(ours)
    assert is_handwritten(ours.replace(MARKER, ""))


def test_an_empty_file_is_nobodys() -> None:
    assert not is_handwritten("") and not is_handwritten(" \n") and is_handwritten("# Mine")
