"""How many architectures a saved supernet holds, without loading its weights."""

from __future__ import annotations

import torch
from transformers import AutoConfig

from hf_elastic.conversion import make_elastic
from hf_elastic.declaration import ElasticConfig
from hf_elastic.errors import CheckpointError, ElasticError
from hf_elastic.families import Family
from hf_elastic.hub.artefacts import Artefact
from hf_elastic.stored_sizes import require_counts
from hf_elastic.supernet_folder import class_named


def space_size(artefact: Artefact) -> int:
    """Architectures of a saved supernet.

    Raises:
        CheckpointError: its records do not make a space.
    """
    record, stated = artefact.space, artefact.space.get("elastic_config")
    try:
        require_counts(artefact.folder)
        config = AutoConfig.from_pretrained(artefact.folder, trust_remote_code=False)
        with torch.device("meta"):
            model = class_named(str(record.get("class")))(config)
        declared = None if stated is None else ElasticConfig.from_dict({**stated, "layer_order": record["layer_order"]})
        row = None if record.get("family") is None else Family.from_dict(record["family"])
        return make_elastic(model, declared, family=row).space.size
    except ElasticError:
        raise
    except Exception as error:  # transformers raises whatever its parts raise
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the records in {artefact.folder} make no space: {reason}") from error
