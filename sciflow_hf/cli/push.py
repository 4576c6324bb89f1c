"""`sciflow-hf push`: push a finished run to the Hub, if it was not pushed at its end or the upload failed."""

import argparse
import sys


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `sciflow-hf push`, and its function as `run`."""
    parser.set_defaults(run=_push)
    add = parser.add_argument
    add("output_dir", metavar="OUTPUT_DIR", help="folder of a finished run, or one of its checkpoints")
    add("--hub_model_id", help="user/name, or name in your own namespace (default: as the run's facts say)")
    add("--hub_private_repo", "--private", action="store_true", help="make a new repository private")
    add("--hub_token", help="access token (default: that of `hf auth login`, or HF_TOKEN)")
    add("--hub_revision", help="branch to push to, which must exist (default: main)")
    add("--commit_message", default="Push of a finished run", help="message of the commit")


def _push(args: argparse.Namespace) -> None:
    from ..hub.upload import push_folder

    done = push_folder(
        args.output_dir,
        args.hub_model_id,
        token=args.hub_token,
        private=args.hub_private_repo or None,
        revision=args.hub_revision,
        commit_message=args.commit_message,
    )
    sys.stdout.write(f"{args.output_dir} is at {done.commit_url}\n")
