"""Where a command's prompt comes from, and the options that several commands share."""

import sys
from pathlib import Path
from typing import Annotated

import typer

Text = Annotated[str | None, typer.Option(help="The prompt; - reads it from standard input. Default: a built-in one.")]
File = Annotated[Path | None, typer.Option(help="A file that holds the prompt.")]
Model = Annotated[str, typer.Option(help="demo (built in), a local folder or a hub id.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: the GPU if there is one.")]


def read_prompt(text: str | None, file: Path | None) -> str:
    """The prompt, or a built-in one if there is neither text nor file. Raises ValueError for both, or no text."""
    if text is not None and file is not None:
        raise ValueError("--text and --file are both given: give one of them")
    if text is None and file is None:
        from cab_attention.builtin_demo import demo_prompt

        return demo_prompt()
    try:
        if file is not None:
            prompt = file.read_text(encoding="utf-8")
        else:
            prompt = sys.stdin.read() if text == "-" else str(text)
        prompt.encode()  # of an argument, bytes that cannot be decoded are half surrogates
    except UnicodeError:
        raise ValueError("the prompt is not valid UTF-8") from None
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    return prompt
