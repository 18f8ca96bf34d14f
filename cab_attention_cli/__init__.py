"""The `cab-attention` command: attention implementations and eviction methods on one's own prompt.

Only what a command needs is imported, inside it: `--help` does not load torch.
"""

import typer

from cab_attention_cli.benchmark import benchmark
from cab_attention_cli.flash import flash
from cab_attention_cli.generate import generate
from cab_attention_cli.implementations import implementations
from cab_attention_cli.selftest import selftest
from cab_attention_cli.serve import serve

app = typer.Typer(
    help="Compare attention implementations and KV-cache eviction methods on your own prompt.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (implementations, generate, flash, benchmark, selftest, serve):
    app.command()(command)
