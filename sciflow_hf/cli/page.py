"""`sciflow-hf page`: look at a training or an evaluation in a browser: images side by side, scores, losses."""

import argparse
import sys


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `sciflow-hf page`, and its function as `run`."""
    parser.set_defaults(run=_page)
    add = parser.add_argument
    add("output_dir", metavar="OUTPUT_DIR", help="folder of a training, which may be running, or of an evaluation")
    add("--port", type=int, default=8765, help="port on 127.0.0.1; 0 takes any that is free")
    add("--write", action="store_true", help="only write OUTPUT_DIR/report.html, one file that needs no network")


def _page(args: argparse.Namespace) -> None:
    from ..options import check_range
    from ..report.page import write_page
    from ..report.page_data import page_of
    from ..report.page_server import PageServer

    check_range("port", args.port, "[0, 65535]")
    if args.write:
        sys.stdout.write(f"{write_page(page_of(args.output_dir), args.output_dir)}\n")
        return
    with PageServer(args.output_dir, args.port) as server:
        sys.stdout.write(f"{args.output_dir} is at {server.url}; Ctrl-C ends it.\n")
        sys.stdout.flush()
        server.serve_forever()
