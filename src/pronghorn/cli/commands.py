"""What can be typed. Each command imports what it needs when it runs, so that `--help` answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Batch inference over any LLM engine, behind OpenAI's Files and Batch API.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
jobs = typer.Typer(help="Jobs: the ids that batches are created under.", no_args_is_help=True)
engine = typer.Typer(help="Engines that can be started on their own.", no_args_is_help=True)
app.add_typer(jobs, name="jobs")
app.add_typer(engine, name="engine")

Upstream = Annotated[
    list[str] | None,
    typer.Option("--upstream", metavar="URL", help="OpenAI-compatible server to send lines to; may be repeated."),
]
Config = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="Settings as TOML (pronghorn.toml).")]
BaseUrl = Annotated[
    str, typer.Option("--base-url", envvar="PRONGHORN_BASE_URL", metavar="URL", help="The server to talk to.")
]
DEFAULT_BASE_URL = "http://127.0.0.1:8080"


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.  [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 picks a free one.  [default: 8080]")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where files, batches and the database live.")
    ] = None,
    config: Config = None,
    upstream: Upstream = None,
) -> None:
    """Start the server; prints BASE_URL and JOB_ID when it is ready."""
    from pronghorn.cli import serve as command

    command.serve(command.settings_from(config, host=host, port=port, data_dir=data_dir, upstream=upstream))


@app.command()
def run(
    input_path: Annotated[Path, typer.Option("--input", "-i", metavar="FILE", help="Lines to run, as JSONL.")],
    output_path: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where answers go.")],
    errors_path: Annotated[
        Path | None, typer.Option("--errors", "-e", metavar="FILE", help="Where failed lines go.")
    ] = None,
    deduplicate: Annotated[bool, typer.Option("--deduplicate", help="Run lines with identical bodies once.")] = False,
    upstream: Upstream = None,
    config: Config = None,
    data_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the run's files live until it has ended.")
    ] = None,
) -> None:
    """Run one file without a server; after an interruption the same command goes on where it stopped.

    Exit status: 0 when every line succeeded, 3 when some failed, 2 when the input is invalid, 1 otherwise.
    """
    from pronghorn.cli import run as command
    from pronghorn.cli.serve import settings_from

    paths = command.Paths(input_path, output_path, errors_path)
    settings = settings_from(config, data_dir=data_dir or command.state_dir(paths), upstream=upstream)
    raise typer.Exit(command.run(paths, settings, deduplicate=deduplicate))


@app.command()
def models(base_url: BaseUrl = DEFAULT_BASE_URL, config: Config = None, upstream: Upstream = None) -> None:
    """List the models that lines can name, where they come from, and whether they are ready."""
    from pronghorn.cli import client

    client.show_models(base_url, config, upstream)


@jobs.command("create")
def create_job(
    name: Annotated[str, typer.Argument(help="What the job is for.")],
    weight: Annotated[int, typer.Option(help="Its share of the engine against other jobs.")] = 1,
    base_url: BaseUrl = DEFAULT_BASE_URL,
) -> None:
    """Make a job and print its id."""
    from pronghorn.cli import client

    client.create_job(base_url, name, weight)


@jobs.command("list")
def list_jobs(base_url: BaseUrl = DEFAULT_BASE_URL) -> None:
    """List the jobs of a server."""
    from pronghorn.cli import client

    client.show_jobs(base_url)


@engine.command("scripted")
def scripted(
    port: Annotated[int, typer.Option(help="Port to listen on; 0 picks a free one.")] = 0,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting of the engine, see docs/SCRIPTED.md; repeatable."),
    ] = None,
) -> None:
    """Start an engine with deterministic answers, set latency and set faults; prints its base URL."""
    from pronghorn.cli import scripted as command

    command.serve(port, settings or [])
