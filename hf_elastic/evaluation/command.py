"""``hf-elastic evaluate``: checkpoints on a file of data, in one table."""

from __future__ import annotations

from typing import Annotated

import typer


def evaluate_command(
    folder: Annotated[str, typer.Argument(help="Folder of a checkpoint, such as the parent.")],
    *,
    data: Annotated[
        str | None, typer.Option(help=".jsonl, .csv or .txt file; with lm-eval:TASK a folder of task files, or none.")
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="accuracy, perplexity, spearman, ndcg, evaluate:METRIC or lm-eval:TASK; what the model is for else."
        ),
    ] = None,
    compare: Annotated[list[str] | None, typer.Option(help="Folder to set beside it: an export. Repeat.")] = None,
    key: Annotated[str | None, typer.Option(help="Which value of METRIC or TASK.")] = None,
    text_column: Annotated[str | None, typer.Option(help="text, sentence or sentence1 else.")] = None,
    pair_column: Annotated[str | None, typer.Option(help="Of the second text; sentence2 by sentence1 else.")] = None,
    label_column: Annotated[str | None, typer.Option(help="label else; of spearman score.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Longest sequence in tokens; at most 512 else.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows of a forward.")] = 16,
    limit: Annotated[int | None, typer.Option(help="Rows, or documents of a task, to read.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples before each question of a task.")] = None,
    k: Annotated[int | None, typer.Option(help="Ranks that count for ndcg; 10 else.")] = None,
) -> None:
    """Measure checkpoints on data and print one table, the first beside those of --compare."""
    from hf_elastic.evaluation.folder import FolderOptions, compare_folders

    options = FolderOptions(
        metric=metric, text_column=text_column, pair_column=pair_column, label_column=label_column, key=key,
        sequence_length=sequence_length, batch_size=batch_size, limit=limit, num_fewshot=num_fewshot, k=k,
    )  # fmt: skip
    folders = [folder, *(compare or ())]
    typer.echo(compare_folders(folders, data, options=options, say=lambda line: typer.echo(line, err=True)))
