"""The `nanoworks` command. Each verb is one file; nothing heavy is imported before a verb runs."""

from __future__ import annotations

import logging
import sys

import typer

from nanoworks.cli.bench import app as bench_app
from nanoworks.cli.chat import chat_command
from nanoworks.cli.config import config_command
from nanoworks.cli.convert import convert_command
from nanoworks.cli.demo import demo_command
from nanoworks.cli.eval import eval_command
from nanoworks.cli.inspect import inspect_command
from nanoworks.cli.keys import app as keys_app
from nanoworks.cli.plan import plan_command
from nanoworks.cli.report import report_command
from nanoworks.cli.serve import serve_command
from nanoworks.cli.sweep_capacity import sweep_capacity_command
from nanoworks.cli.tokenizer import app as tokenizer_app
from nanoworks.cli.train import train_command
from nanoworks.cli.upcycle import upcycle_command
from nanoworks.common.errors import UserError

app = typer.Typer(
    help="From raw text to a production endpoint for small language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo_command)
app.command("train")(train_command)
app.command("config")(config_command)
app.command("plan")(plan_command)
app.command("eval")(eval_command)
app.command("chat")(chat_command)
app.command("serve")(serve_command)
app.command("report")(report_command)
app.command("convert")(convert_command)
app.command("inspect")(inspect_command)
app.command("upcycle")(upcycle_command)
app.command("sweep-capacity")(sweep_capacity_command)
app.add_typer(keys_app, name="keys", help="API keys of a server: create, list, limit, rotate, revoke.")
app.add_typer(bench_app, name="bench", help="Measure a server under load.")
app.add_typer(tokenizer_app, name="tokenizer", help="Train and compare tokenizers.")


def main() -> None:
    """Run the command line; a UserError is one readable message and exit status 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for chatty in ("gguf", "httpx", "rustbpe", "matplotlib"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
