"""``dgpo score`` and ``dgpo serve-reward``: rewards by themselves, for pictures on disk and for other processes."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from dgpo_plugin.commands.terminal import Changes, reports_user_errors, set_option, show_notes_of
from dgpo_plugin.common.errors import UserError

PROMPTS_HELP = (
    "Prompts in the pictures' order: .txt, .jsonl, .csv, .tsv, .json or a set's name. A column `file` pairs by name."
)
SHOWN = 5
"""Pictures that could not be read, that are told one by one."""


@click.command()
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--reward", "rewards", required=True, help="Names, comma-separated; see `dgpo list rewards`.")
@click.option("--prompt", help="What all of them should show.")
@click.option("--prompts", "prompt_file", help=PROMPTS_HELP)
@click.option("--output", type=click.Path(path_type=Path), help=".csv or .json file; standard output if left out.")
@set_option(help="Set a field of a run's section scoring, as batch_size=8, or rewards.NAME.options.x=1; repeatable.")
@reports_user_errors
def score(
    images: tuple[Path, ...],
    rewards: str,
    prompt: str | None,
    prompt_file: str | None,
    output: Path | None,
    overrides: Changes,
) -> None:
    """Score pictures with rewards. IMAGES are files or folders, whose pictures are taken as 2.png, 10.png.

    Folders as GenEval lays them out (00000/metadata.jsonl, 00000/samples/) bring their prompts. A picture that cannot
    be read is an empty cell and a line at the end.
    """
    from rich.progress import Progress

    from dgpo_plugin.common.files import write_text_atomically
    from dgpo_plugin.config.load import reward_terms
    from dgpo_plugin.rewards import load_rewards
    from dgpo_plugin.rewards.picture_files import as_text
    from dgpo_plugin.rewards.picture_files import score as score_pictures
    from dgpo_plugin.rewards.picture_folders import find_pictures, shortened
    from dgpo_plugin.rewards.picture_prompts import prompts_of

    if output is not None and output.suffix not in (".csv", ".json"):
        raise UserError(f"--output {output}: the name must end in .csv or .json")
    found = find_pictures(images)
    prompts, unused = prompts_of(found, prompt, prompt_file)
    for line in (*found.skipped, *unused):
        click.echo(line, err=True)
    terms, scoring = reward_terms([name.strip() for name in rewards.split(",")], overrides)
    console = Console(stderr=True)
    with console.status("loading the rewards"):
        loaded = load_rewards(terms, scoring)
        loaded.check(prompts)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("scoring", total=len(prompts))
        rows, unreadable = score_pictures(
            found.pictures, prompts, loaded, scoring.batch_size, lambda done: bar.update(task, advance=done)
        )
    text = as_text(rows, "csv" if output is None else output.suffix[1:])
    if output is None:
        click.echo(text, nl=False)
    else:
        write_text_atomically(output, text)
    if unreadable:
        told = shortened(unreadable, SHOWN)
        click.echo(f"{len(unreadable)} of {len(rows)} pictures have no score: {told}", err=True)


@click.command("serve-reward")
@click.argument("name")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address; beyond loopback it needs a token.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 for any free one.")
@click.option("--token-variable", help="Environment variable that holds the token which clients must bring.")
@click.option(
    "--max-megabytes", default=64, show_default=True, type=click.IntRange(1), help="Largest body of a request, in MiB."
)
@click.option("--log-requests", is_flag=True, help="A line for each request on standard error.")
@set_option(help="Set a field of the reward, as device=cpu or options.x=1, repeatable.")
@reports_user_errors
def serve_reward(
    name: str,
    host: str,
    port: int,
    token_variable: str | None,
    max_megabytes: int,
    log_requests: bool,
    overrides: Changes,
) -> None:
    """Serve a reward to other processes and machines. NAME as in `dgpo list rewards`, or your own file.py:name.

    SIGTERM and Ctrl-C end it once the requests in flight are answered; a second one at once.
    """
    from dgpo_plugin.config.load import reward_terms
    from dgpo_plugin.rewards.served.wire import secret

    try:
        from dgpo_plugin.rewards.served.server import serve
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("starlette", "uvicorn"):
            raise
        raise UserError(f"serve-reward needs {missing}; pip install 'dgpo-plugin[server]'") from error
    if log_requests:
        show_notes_of("dgpo_plugin.rewards.served.answers")
    token = secret("--token-variable", token_variable)
    serve(*reward_terms([name], overrides), (host, port), token, max_megabytes * 2**20, click.echo)
