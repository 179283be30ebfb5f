"""`cortexicon space`: a page to try a checkpoint, here or as a folder for the Hub."""

import argparse
from pathlib import Path


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command's options, and nothing that takes time to import."""
    command = commands.add_parser("space", help="a page to try a checkpoint, here or on the Hub")
    command.add_argument(
        "checkpoint", metavar="CHECKPOINT", type=Path, help="a codec, or a language model of codes"
    )
    command.add_argument(
        "--atlas-folder",
        type=Path,
        default=None,
        help="holds the label volume of the checkpoint's atlas, for visitors' NIfTI files",
    )
    command.add_argument("--host", default="127.0.0.1", help="address (default: this machine only)")
    command.add_argument("--port", type=int, default=None, help="default: the first free from 7860")
    command.add_argument(
        "--export",
        metavar="FOLDER",
        type=Path,
        default=None,
        help="write a folder that can be pushed as a Space, and serve nothing",
    )
    command.add_argument("--title", default="Cortexicon", help="of the exported Space")


def run(arguments: argparse.Namespace) -> int:
    """Serve until interrupted, or write the folder."""
    if arguments.export is not None:
        from cortexicon.model_cards.space_export import export_space

        folder = export_space(
            arguments.checkpoint, arguments.export, arguments.atlas_folder, arguments.title
        )
        print(f"Space -> {folder} (try it: python {folder / 'app.py'})")
        return 0
    from cortexicon.model_cards.space_app import serve

    serve(arguments.checkpoint, arguments.host, arguments.port, arguments.atlas_folder)
    return 0
