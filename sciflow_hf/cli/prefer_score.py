"""`sciflow-hf prefer score`: columns of scores for the candidates of `prefer draw`, or for any table of images.

Each reward gives a column of its name, and `reward` is their weighted sum. Scores are kept by the content of the image,
its prompt and the reward: the same command continues after a kill, and a further reward scores nothing again.
"""

import argparse
import logging
from pathlib import Path

from ..errors import SciflowError, counted
from .judge import add_judge, judge_of
from .scoring import NAMES, Kept, Scoring

logger = logging.getLogger(__name__)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `sciflow-hf prefer score`, and its function as `run`."""
    from ..metrics.rewards.base import BUILT_IN

    add = parser.add_argument
    parser.set_defaults(run=_score)
    add("--input_dir", help="folder of images with a metadata.jsonl (or .csv, .parquet), as `prefer draw` writes it")
    add("--table", help="a .jsonl, .csv or .parquet file instead, with columns file_name and caption")
    add(
        "--reward",
        nargs="+",
        required=True,
        metavar="NAME",
        help=f"{', '.join(BUILT_IN)}, or the dotted path of a function of prompts and images, such as my_module.mine",
    )
    add("--reward_weights", nargs="+", type=float, default=[], metavar="W", help="of the sum, one a reward (default 1)")
    add("--output_file", help="table to write (default: the one that was read, complete or not at all)")
    add("--batch_size", type=int, default=16, help="images scored at once, and lost by a kill (default 16)")
    add_judge(parser)


def _score(args: argparse.Namespace) -> None:
    from ..data.candidates import SUFFIXES, read_candidates
    from ..metrics.rewards.base import load_rewards
    from ..options import check_range

    check_range("batch_size", args.batch_size, "[1, inf)")
    judge = judge_of(args, args.reward)
    rewards = load_rewards(args.reward, args.reward_weights, judge=judge)
    candidates = read_candidates(input_dir=args.input_dir, table=args.table)
    output = Path(args.output_file or candidates.file)
    if output.suffix not in SUFFIXES:
        raise SciflowError(f"`output_file` {str(output)!r}: give a file that ends with {', '.join(SUFFIXES)}.")
    taken = [reward.name for reward in rewards if reward.name in (candidates.key, candidates.caption, *NAMES)]
    if taken:
        raise SciflowError(f"`reward` {taken[0]!r} has the name of a column that says what the image is. Rename it.")
    kept = Kept(output)
    for reward in rewards:
        if reward.name not in kept.rewards and any(reward.name in row for row in candidates.rows):
            logger.warning("The column %s of %s is replaced by the scores.", reward.name, candidates.file)
    scoring = Scoring(candidates, rewards, kept)
    if judge is not None:
        judge.announce(len(candidates.rows), scoring.columns)
    scores = scoring.run(args.batch_size)
    scores.check([row[candidates.key] for row in candidates.rows])
    columns = scores.table(rewards)
    candidates.with_columns(columns).write(output, list(columns))
    for name, column in columns.items():
        known = [score for score in column if score is not None]
        mean = f"mean {sum(known) / len(known):.4f}, {min(known):.4f} to {max(known):.4f}" if known else "no score"
        logger.info("%s: %s of %s, %s", name, f"{len(known):,}", counted(len(column), "image"), mean)
    logger.info("The scores are in %s.", output)
