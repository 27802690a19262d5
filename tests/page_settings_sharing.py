"""What the snippets of the pages on runtimes, the Hub, reports, evaluation and many machines need."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from page_settings import GROUPS, LLAMA, Names, Settings, encoder_files, llama, token_batches, training
from peft import get_peft_model
from tiny_checkpoints import (
    bert_tokenizer,
    classifier,
    decoder_tokenizer,
    language_model,
    masked_model,
    options,
    sentence_encoder,
    sentences,
    write_rows,
    write_text,
)
from tokenizers import Tokenizer
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import hf_elastic as he


def report_files(folder: Path) -> None:
    encoder_files(folder)
    made = options(folder / "my-encoder", folder / "text.txt", folder / "OUTPUT", recipe="fast")
    he.compress(made, say=lambda text: None)


def report_page() -> Names:
    supernet = he.add_routing(llama(), he.RoutingConfig(mlp_tokens=[0.6, 0.8], share="model"))
    return {"he": he, "supernet": supernet, "batches": token_batches(8, labels=False), "folder": Path("OUTPUT.run")}


def try_files(folder: Path) -> None:
    """Exports of every kind of model, each beside its parent."""
    makers = {"decoder": language_model, "masked": masked_model, "classifier": classifier, "encoder": sentence_encoder}
    widths = he.ElasticConfig(intermediate_size=[0.5, 1.0])
    for name, make in makers.items():
        parent = make(folder / f"parent-{name}")
        supernet = he.make_elastic(_with_head(parent, name), widths)
        he.export(supernet, supernet.space.smallest(), folder / name, source=parent)


def _with_head(folder: Path, name: str) -> PreTrainedModel:
    heads = {
        "decoder": AutoModelForCausalLM, "masked": AutoModelForMaskedLM, "encoder": AutoModel,
        "classifier": AutoModelForSequenceClassification,
    }  # fmt: skip
    model: PreTrainedModel = heads[name].from_pretrained(folder)
    return model


def runtime_files(folder: Path) -> None:
    language_model(folder / "small", **LLAMA)


def runtime_page() -> Names:
    supernet = he.make_elastic(llama(), he.ElasticConfig(intermediate_size=[0.5, 1.0]))
    return {"supernet": supernet, "architecture": supernet.space.midpoint()}


def graph_files(folder: Path) -> None:
    for name in ("small", "parent"):
        sentence_encoder(folder / name, max_position_embeddings=128)
    write_text(folder / "text.txt")


def graph_page() -> Names:
    model = llama(max_position_embeddings=128)
    supernet = he.make_elastic(model, he.ElasticConfig(intermediate_size=[0.5, 1.0]))
    ids = torch.randint(6, 30, (2, 8), generator=torch.Generator().manual_seed(0))
    feeds = {"ids": ids.numpy(), "mask": torch.ones_like(ids).numpy()}
    return {**training(), **feeds, "batches": token_batches(2, labels=False), "supernet": supernet}


def gguf_files(folder: Path) -> None:
    """A model whose tokenizer joins something, without which llama.cpp takes none, and a supernet of it."""
    stated = json.loads(decoder_tokenizer().backend_tokenizer.to_str())
    stated["model"] |= {"vocab": {**stated["model"]["vocab"], "th": 258}, "merges": [["t", "h"]]}
    backend = Tokenizer.from_str(json.dumps(stated))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    small = language_model(folder / "small", vocab_size=259, **GROUPS)
    model = AutoModelForCausalLM.from_pretrained(small)
    he.make_elastic(model, he.ElasticConfig(intermediate_size=[0.5, 1.0])).save_pretrained(folder / "supernet")
    for name in ("small", "supernet"):
        tokenizer.save_pretrained(folder / name)


def hub_files(folder: Path) -> None:
    encoder_files(folder)
    made = options(folder / "my-encoder", folder / "text.txt", folder / "small", recipe="fast")
    he.compress(made, say=lambda text: None)


def hub_page() -> Names:
    """Handles of every kind, on a base that is on the Hub."""
    base = language_model(Path("base"), **LLAMA)
    he.push_to_hub(base, "tester/base", license="mit")
    supernet = he.make_elastic(
        AutoModelForCausalLM.from_pretrained("base"), he.ElasticConfig(intermediate_size=[0.5, 1.0])
    )
    best = supernet.space.smallest()
    config = he.ElasticLoraConfig(r=8, ranks=[4, 8], target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    tuned = he.Supernet(get_peft_model(AutoModelForCausalLM.from_pretrained("base"), config))
    routed = he.add_routing(AutoModelForCausalLM.from_pretrained("base"), he.RoutingConfig(mlp_tokens=[0.5]))
    he.fit_routers(routed, token_batches(8, labels=False))
    he.calibrate_routing(routed, token_batches(8, labels=False))
    refitted = he.refit(supernet, best, token_batches(12, labels=False))
    return {
        "supernet": supernet, "best": best, "refitted": refitted, "tuned": tuned, "ranks": tuned.space.midpoint(),
        "routed": routed,
    }  # fmt: skip


def evaluation_files(folder: Path) -> None:
    """A metric, tasks of lm-eval, an encoder and a decoder."""
    import local_metrics
    import local_tasks

    (folder / "metrics").mkdir()
    script = local_metrics.SCRIPT.replace('"share"', '"error"')
    local_metrics.script_folder(folder / "metrics", name="my_metric", text=script)
    local_tasks.task_folder(folder / "tasks")
    sentence_encoder(folder / "encoder")
    classifier(folder / "classifier")
    language_model(folder / "decoder")


def evaluation_page() -> Names:
    import local_metrics
    from sentence_transformers import SentenceTransformer

    widths = he.ElasticConfig(intermediate_size=[0.5, 1.0])
    encoder, texts = SentenceTransformer("encoder", device="cpu"), sentences(40)
    labels = torch.tensor([n % 2 for n in range(16)])
    decoders = he.make_elastic(AutoModelForCausalLM.from_pretrained("decoder"), widths)
    return {
        "supernet": he.make_elastic(AutoModelForSequenceClassification.from_pretrained("classifier"), widths),
        "encoders": he.make_elastic(encoder[0].auto_model, widths), "sentence_transformer": encoder,
        "decoders": decoders, "arc_size": he.objectives.parameters(decoders),
        "decoder_tokenizer": decoder_tokenizer(), "tokenizer": bert_tokenizer(), "local_f1": local_metrics.f1(),
        "batches": [{**batch, "labels": labels} for batch in token_batches(2, labels=False)],
        "pairs": list(zip(texts[:20], texts[20:], strict=True)), "gold": [float(n % 5) for n in range(20)],
        "queries": dict(enumerate(texts[:4])), "corpus": dict(enumerate(texts[4:])),
        "qrels": {n: {n: 1.0} for n in range(4)},
    }  # fmt: skip


def evaluation_commands(folder: Path) -> None:
    """Parents and children, rows of every kind, a metric and tasks."""
    import local_metrics
    import local_tasks

    for name, make in (("my-bert", classifier), ("my-llama", language_model), ("all-MiniLM-L6-v2", sentence_encoder)):
        make(folder / name)
        make(folder / {"all-MiniLM-L6-v2": "minilm-small"}.get(name, f"{name}-small"), intermediate_size=32)
    sentence_encoder(folder / "my-encoder")
    for name in ("sst2_dev", "cola_dev"):
        write_rows(folder / f"{name}.jsonl", count=40)
    write_text(folder / "wiki.txt")
    texts = sentences(40)
    pairs = [
        {"sentence1": a, "sentence2": b, "score": n % 5}
        for n, (a, b) in enumerate(zip(texts[:20], texts[20:], strict=True))
    ]
    judged = [{"query": texts[n % 4], "document": text, "relevance": n % 3} for n, text in enumerate(texts[4:])]
    for name, rows in (("stsb_dev", pairs), ("judged", judged)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "metrics").mkdir()
    local_metrics.script_folder(folder / "metrics", name="matthews_correlation")
    local_tasks.task_folder(folder / "tasks")


SETTINGS: dict[tuple[str, str], Settings] = {
    ("docs/report.md", ""): Settings(report_files, report_page),
    ("docs/report.md", "Parent and child side by side"): Settings(
        try_files,
        replaced=(
            ('OUTPUT --prompt "Once', 'decoder --prompt "Once'),
            ('OUTPUT --prompt "Paris', 'masked --prompt "Paris'),
            ('OUTPUT --prompt "A film', 'classifier --prompt "A film'),
            ("OUTPUT --pair", "encoder --pair"),
        ),
    ),
    ("docs/runtimes.md", ""): Settings(runtime_files, runtime_page),
    ("docs/runtimes.md", "ONNX Runtime and OpenVINO"): Settings(
        graph_files,
        graph_page,
        replaced=(
            ("evaluations=60", "evaluations=3"),
            ("batch_size=16)", "batch_size=2, seconds=1)"),
            ("batch_size=16, seq_len=128", "batch_size=2, seq_len=16"),
            ('"batch_size": 16, "seq_len": 128', '"batch_size": 2, "seq_len": 16'),
        ),
    ),
    ("docs/runtimes.md", "GGUF"): Settings(gguf_files),
    ("docs/evaluation.md", "In Python"): Settings(
        evaluation_files,
        evaluation_page,
        replaced=(
            ('evaluate.load("f1")', "local_f1"),
            ("objectives.spearman(supernet", "objectives.spearman(encoders"),
            ("objectives.ndcg(supernet", "objectives.ndcg(encoders"),
            ("lm_eval(supernet, [", "lm_eval(decoders, ["),
            ('["arc_easy"], tokenizer=', '["tiny_choice"], include="tasks", tokenizer=decoder_'),
            ("supernet.space, [arc, objectives.parameters(supernet)]", "decoders.space, [arc, arc_size]"),
            ("evaluations=100", "evaluations=3"),
            ('["arc_easy", "piqa"], include="my_tasks"', '["tiny_choice", "tiny_likelihood"], include="tasks"'),
            ("lm_eval(supernet, harness, tokenizer=", "lm_eval(decoders, harness, tokenizer=decoder_"),
            ('("arc_easy/acc_norm", "piqa/acc")', '("tiny_choice/acc_norm", "tiny_likelihood/perplexity")'),
        ),
        needs=("lm_eval",),
    ),
    ("docs/evaluation.md", "From the command line"): Settings(
        evaluation_commands,
        replaced=(
            ("--sequence-length 512", "--sequence-length 24"),
            ("lm-eval:arc_easy", "lm-eval:tiny_choice --data tasks"),
        ),
        needs=("lm_eval",),
    ),
    ("docs/hub.md", ""): Settings(hub_files, hub_page, replaced=(("me/", "tester/"),)),
}
# Pages that speak to the Hub, which is one on loopback here.
ON_THE_HUB = {"docs/hub.md"}
