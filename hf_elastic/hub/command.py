"""``hf-elastic push``."""

from __future__ import annotations

from typing import Annotated

import typer


def push_command(
    folder: Annotated[str, typer.Argument(help="Of a model, a supernet, adapters or routers.")],
    repo: Annotated[str, typer.Argument(help="user/name on the Hub; made if it is not there.")],
    *,
    private: Annotated[bool, typer.Option("--private", help="Of a repository that is made now.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; made if it is not there.")] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    run: Annotated[
        str | None, typer.Option(help="Whose numbers the card shows; of the one beside FOLDER else.")
    ] = None,
    base_model: Annotated[str | None, typer.Option(help="Name of the base model on the Hub.")] = None,
    license_name: Annotated[
        str | None, typer.Option("--license", help="Such as apache-2.0; that of the base model's card else.")
    ] = None,
    figure: Annotated[
        str | None, typer.Option(help="Picture of the Pareto front, .png or .svg; drawn of the run's search else.")
    ] = None,
    overwrite_card: Annotated[bool, typer.Option("--overwrite-card", help="Replace a card written by hand.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show files, sizes and the card.")] = False,
) -> None:
    """Push a folder to the Hugging Face Hub with a model card, in one commit."""
    from hf_elastic.hub.pushing import plan_push, push_to_hub

    if dry_run:
        plan = plan_push(
            folder, repo, run=run, base_model=base_model, license=license_name, figure=figure,
            overwrite_card=overwrite_card,
        )  # fmt: skip
        typer.echo(f"{plan}\n\n{plan.card}")
        return
    report = push_to_hub(
        folder, repo, private=private or None, revision=revision, commit_message=message, create_pr=create_pr, run=run,
        base_model=base_model, license=license_name, figure=figure, overwrite_card=overwrite_card,
    )  # fmt: skip
    typer.echo(str(report))
