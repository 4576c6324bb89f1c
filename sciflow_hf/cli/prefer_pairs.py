"""`sciflow-hf prefer pairs`: a winner and its losers among the scored candidates of each prompt.

Writes a table of the chosen candidates with a column `role`. A training chooses in the same way by itself: this command
shows what thresholds cost, and keeps a choice.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SciflowError, counted

if TYPE_CHECKING:
    import numpy as np

    from ..data.candidates import Candidates
    from ..data.preferences import PreferenceTuple, TupleArguments

# The options of `TupleArguments`, which the help must not import.
_RULES: dict[str, tuple[Any, str]] = {
    "min_candidates": (int, "groups with fewer scored candidates are left out (default 2)"),
    "min_winner_reward": (float, "a winner has at least this reward (default 0)"),
    "min_reward_gap": (float, "a loser has at least so much less reward (default 0.2)"),
    "min_axis_gap": (float, "a loser of an axis is at least so much worse there (default 0.3)"),
    "max_other_gap": (float, "and on every other axis no better, and at most so much worse (default 0.5)"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `sciflow-hf prefer pairs`, and its function as `run`."""
    add = parser.add_argument
    parser.set_defaults(run=_pairs)
    add("--dataset_dir", help="a cache of the candidates; the table is an index of its payloads")
    add("--payload_dir", help="where `cache_path` is rooted (default: --dataset_dir)")
    add("--input_dir", help="folder of scored candidates with a metadata.jsonl (or .csv, .parquet) instead")
    add("--table", help="a .jsonl, .csv or .parquet file of scored candidates instead")
    add("--output_file", required=True, help="table to write: .parquet, of candidates also .jsonl or .csv")
    add("--axes", nargs="+", help="score columns, each with a loser of its own (default: one loser, the worst)")
    for name, (kind, text) in _RULES.items():
        add(f"--{name}", type=kind, help=text)
    add("--no_every_axis", dest="every_axis", action="store_false", default=None, help="keep groups that lack a loser")
    add("--global_worst", action="store_true", default=None, help="also take the candidate of the least reward")


def _pairs(args: argparse.Namespace) -> None:
    from ..data.preferences import TupleArguments

    names = [*_RULES, "axes", "every_axis", "global_worst"]
    rules = TupleArguments(**{name: getattr(args, name) for name in names if getattr(args, name) is not None})
    if sum(bool(given) for given in (args.dataset_dir, args.input_dir, args.table)) != 1:
        raise SciflowError("give one of `--dataset_dir`, a cache, `--input_dir`, a folder of candidates, or `--table`.")
    number, kept, how = _of_cache(args, rules) if args.dataset_dir else _of_candidates(args, rules)
    sys.stdout.write(f"{counted(kept, 'candidate')} of {counted(number, 'group')} in {args.output_file}. {how}\n")


def _of_candidates(args: argparse.Namespace, rules: "TupleArguments") -> tuple[int, int, str]:
    """Chooses among the rows of a table of images."""
    from dataclasses import replace

    from ..data.candidates import SUFFIXES, read_candidates
    from ..data.preferences import GROUP, REWARD, ROLE, choose_tuples

    output = Path(args.output_file)
    if output.suffix not in SUFFIXES:
        raise SciflowError(f"`output_file` {str(output)!r}: give a file that ends with {', '.join(SUFFIXES)}.")
    found = read_candidates(input_dir=args.input_dir, table=args.table)
    if output.resolve() == found.file.resolve():
        raise SciflowError(f"`output_file` {str(output)!r} is the table of candidates itself. Name another file.")
    columns = dict.fromkeys(name for row in found.rows for name in row)
    if ROLE in columns:
        raise SciflowError(f"{found.file} has a column `{ROLE}`: its winners and losers are chosen already.")
    if GROUP not in columns:
        raise SciflowError(
            f"{found.file} has no column `{GROUP}`, which says which candidates are of one prompt, but "
            f"{', '.join(columns)}. `sciflow-hf prefer draw` writes it."
        )
    groups = [None if row.get(GROUP) is None else str(row[GROUP]) for row in found.rows]
    seen = [_seen(found, row) for row in range(len(found.rows))]
    tuples, report = choose_tuples(
        groups,
        _numbers(found, REWARD),
        {axis: _numbers(found, axis) for axis in rules.axes},
        rules,
        kinds=[kind for kind, _ in seen],
        contents=[content for _, content in seen],
    )
    sys.stdout.write(f"{report}\n")
    rows, added = _chosen(tuples)
    table = replace(found, rows=[found.rows[row] | more for row, more in zip(rows, added, strict=True)], schema=None)
    table.write(output, [])
    return len(tuples), len(rows), f"Build their cache by `sciflow-hf cache build --input_dir {output}`."


def _chosen(tuples: "Sequence[PreferenceTuple]") -> tuple[list[int], list[dict[str, Any]]]:
    """Rows of winners and losers, group by group, and their further columns."""
    from ..data.preferences import AXIS, LOSER, ROLE, WINNER

    rows, added = [], []
    for chosen in tuples:
        rows += [chosen.winner, *chosen.losers]
        added.append({ROLE: WINNER, AXIS: None})
        added += [{ROLE: LOSER, AXIS: axis} for axis in chosen.axes]
    return rows, added


def _seen(found: "Candidates", row: int) -> tuple[tuple[Any, ...], str]:
    """A key of all that candidates of a group share (size, caption, sources), and a hash of the image."""
    import hashlib

    from PIL import Image

    from ..data.build.sources.edits import SOURCE_COLUMNS
    from ..data.build.sources.pixels import oriented_size, unreadable

    file, columns = found.image(row), found.rows[row]
    try:
        with Image.open(file) as image:
            size = oriented_size(image)
            content = hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()
    except Exception as error:  # PIL lets through whatever its decoders raise
        raise SciflowError(f"{file}: {unreadable(error)}. Draw it again, or remove its row.") from error
    return (size, columns[found.caption], *(str(columns.get(name)) for name in SOURCE_COLUMNS)), content


def _numbers(found: "Candidates", name: str) -> "np.ndarray":
    """A column of scores, NaN where there is none: (N,) float64; that of an axis may end with `_score`."""
    import numpy as np

    columns = dict.fromkeys(name for row in found.rows for name in row)
    column = name if name in columns else f"{name}_score"
    if column not in columns:
        raise SciflowError(
            f"{found.file} has no column {name!r}, but {', '.join(columns)}. Score the candidates first "
            "(`sciflow-hf prefer score`), or name other `--axes`."
        )
    scores = []
    for row in found.rows:
        value = row.get(column)
        try:
            scores.append(float("nan") if value in (None, "") else float(value))
        except (TypeError, ValueError) as error:
            raise SciflowError(
                f"{found.file}: `{column}` of {row[found.key]} is {value!r:.60}, but must be a number."
            ) from error
    return np.array(scores)


def _of_cache(args: argparse.Namespace, rules: "TupleArguments") -> tuple[int, int, str]:
    """Chooses among the rows of a cache; the table is an index of the same payloads."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ..data.inspect.repair import light_index
    from ..data.load import load_cache
    from ..data.preference_groups import load_groups
    from ..data.preferences import AXIS, ROLE
    from ..data.writing import output_file

    output, folder = Path(args.output_file).resolve(), Path(args.dataset_dir).resolve()
    if output.suffix != ".parquet":
        raise SciflowError(f"`output_file` {args.output_file!r}: of a cache it is an index, a .parquet file.")
    if not folder.is_dir() or output.is_relative_to(folder):
        raise SciflowError(
            f"`dataset_dir` {args.dataset_dir!r} must be the local folder of one cache, and `output_file` lie outside "
            "of it, where it would be a part of its index."
        )
    cache: Any = load_cache(args.dataset_dir, payload_dir=args.payload_dir)
    if cache.strings(ROLE) is not None:
        raise SciflowError(
            f"`dataset_dir` {args.dataset_dir!r} has a column `{ROLE}`: its winners and losers are chosen already."
        )
    tuples = load_groups(cache, rules).tuples
    rows, added = _chosen(tuples)
    tables = [light_index(reader.file, folder)[0] for reader in cache.readers]
    table = pa.concat_tables(tables, promote_options="permissive").take(rows)
    for name in (ROLE, AXIS):
        column = pa.array([more[name] for more in added], pa.string())
        at = table.schema.get_field_index(name)
        table = table.append_column(name, column) if at < 0 else table.set_column(at, name, column)
    with output_file(output) as handle:
        pq.write_table(table.replace_schema_metadata(tables[0].schema.metadata), handle)
    root = args.payload_dir or args.dataset_dir
    return len(tuples), len(rows), f"Train with `--dataset_dir {args.output_file} --payload_dir {os.fspath(root)}`."
