"""Python that loads an artefact, exactly as a card shows it; tests run what the cards show."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hf_elastic.checkpoint.companions import TOKENIZER_FILES
from hf_elastic.files import read_json
from hf_elastic.hub.artefacts import BASE_FOLDER, CAUSAL_TYPES, CONFIG_FILE, Artefact
from hf_elastic.hub.names import hub_name

_PEFT_TASKS: Mapping[str, str] = {
    "CAUSAL_LM": "ForCausalLM", "SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering", "FEATURE_EXTRACTION": "ForFeatureExtraction",
}  # fmt: skip
_TRUST = ", trust_remote_code=True"


def snippet_of(artefact: Artefact, where: str, *, base: str | None) -> str:
    """Python that loads an artefact.

    Args:
        artefact: what.
        where: its folder or its name on the Hub.
        base: name or folder of its base, for adapters and routers.
    """
    name, base_name = json.dumps(where), json.dumps(base or "the model that it was trained on")
    if artefact.kind == "supernet":
        return _supernet(artefact, name)
    if artefact.kind == "routers":
        auto = "AutoModelForCausalLM" if artefact.routers.get("model_type") in CAUSAL_TYPES else "AutoModel"
        loaded = f"model = {auto}.from_pretrained({base_name})"
        imports = f"import hf_elastic as he\nfrom transformers import {auto}"
        return f"{imports}\n\n{loaded}\nsupernet = he.load_routers(model, {name})"
    if artefact.kind == "adapter":
        return _adapter(artefact, name, base=base)
    return _model(artefact, name)


def _supernet(artefact: Artefact, name: str) -> str:
    companions = {"adapter": "load_adapter", "routers": "load_routers"}
    inside = [(folder, load) for folder, load in companions.items() if (artefact.folder / folder).is_dir()]
    if not inside:
        return f"import hf_elastic as he\n\nsupernet = he.Supernet.from_pretrained({name})"
    puts = [f'supernet = he.{load}(supernet.model, f"{{folder}}/{folder}")' for folder, load in inside]
    return "\n".join(
        [
            "import hf_elastic as he\nfrom huggingface_hub import snapshot_download\n",
            f"folder = snapshot_download({name})",
            "supernet = he.Supernet.from_pretrained(folder)  # its base; then what stands on it",
            *puts,
        ]
    )


def _model(artefact: Artefact, name: str) -> str:
    trust = _TRUST if artefact.remote_code else ""
    if artefact.sentence_transformers:
        return (
            "from sentence_transformers import SentenceTransformer\n\n"
            f"model = SentenceTransformer({name}{trust})\n"
            'vectors = model.encode(["A sentence.", "Another one."])'
        )
    names, lines = [model_loader(artefact)], []
    lines.append(f"model = {names[0]}.from_pretrained({name}{trust})")
    if has_tokenizer(artefact):
        names.append("AutoTokenizer")
        lines.append(f"tokenizer = AutoTokenizer.from_pretrained({name}{trust})")
    return f"from transformers import {', '.join(sorted(names))}\n\n" + "\n".join(lines)


def model_loader(artefact: Artefact) -> str:
    """Name of the class of transformers that loads a model."""
    stated = (artefact.config.get("architectures") or ["AutoModel"])[0]
    if not artefact.remote_code:
        return str(stated)
    mapped = artefact.config["auto_map"].items()
    return next((auto for auto, target in mapped if str(target).rpartition(".")[2] == stated), "AutoModel")


def has_tokenizer(artefact: Artefact) -> bool:
    """Whether a tokenizer is beside the weights."""
    names = [name for name in TOKENIZER_FILES if not name.startswith("chat_template")]
    return any((artefact.folder / name).is_file() for name in names)


def _adapter(artefact: Artefact, name: str, *, base: str | None) -> str:
    head = _PEFT_TASKS.get(str(artefact.adapter.get("task_type")), "")
    labels = _labels(artefact.architecture)
    if (artefact.folder / BASE_FOLDER).is_dir():
        stated, place = read_json(artefact.folder / BASE_FOLDER / CONFIG_FILE), f'{name}, subfolder="{BASE_FOLDER}"'
        return _on_base(name, place, head=head, labels=labels, config=stated)
    where = json.dumps(base) if base else '"the model that it was trained on"'
    if artefact.elastic:
        imports = f"import hf_elastic as he\nfrom transformers import {_auto(head)}"
        loaded = f"model = {_auto(head)}.from_pretrained({where}{labels})"
        return f"{imports}\n\n{loaded}\nsupernet = he.load_adapter(model, {name})"
    if hub_name(base) is None or not head:
        return _on_base(name, where, head=head, labels=labels, config={})
    auto = f"AutoPeftModel{head}"
    return f"from peft import {auto}\n\nmodel = {auto}.from_pretrained({name}{labels})"


def _on_base(name: str, place: str, *, head: str, labels: str, config: Mapping[str, Any]) -> str:
    """Loads a base, unpacked where it is of integers, as peft needs weights, and an adapter onto it."""
    packed = (config.get("quantization_config") or {}).get("quant_method") == "compressed-tensors"
    auto = str((config.get("architectures") or [_auto(head)])[0])
    names = sorted([auto, *(["CompressedTensorsConfig"] if packed else [])])
    unpacked = ", quantization_config=CompressedTensorsConfig(dequantize=True)" if packed else ""
    return (
        f"from peft import PeftModel\nfrom transformers import {', '.join(names)}\n\n"
        f"base = {auto}.from_pretrained({place}{unpacked}{labels})\n"
        f"model = PeftModel.from_pretrained(base, {name})"
    )


def _auto(head: str) -> str:
    return f"AutoModel{head}" if head and head != "ForFeatureExtraction" else "AutoModel"


def _labels(architecture: Mapping[str, Any]) -> str:
    """Arguments that give a base the labels an adapter was trained for."""
    names = architecture.get("labels") or []
    if not names:
        return ""
    if len(names) > 8:
        return f", num_labels={len(names)}"
    stated = ", ".join(f"{number}: {json.dumps(str(name))}" for number, name in enumerate(names))
    return f", id2label={{{stated}}}"
