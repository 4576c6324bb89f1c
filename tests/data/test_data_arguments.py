"""`DataArguments`: ranges, and options that do not go together; what their checks cost."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import sciflow_hf as sf
from sciflow_hf.options import Options, arguments, option


@arguments
class Either(Options):
    """Two options of which one is needed."""

    one: list[str] = option([], "first.", required_unless="other", advice="give `--one` (a file) or `--other`.")
    other: str | None = option(None, "second.")


@arguments
class Plain(Options):
    """The same without words of its own."""

    one: str = option("", "first.", required_unless="other")
    other: str = option("", "second.")


@pytest.mark.promise("B02")
def test_one_of_two_options_is_needed() -> None:
    assert Either(one=["x"]).one == ["x"] and Either(other="y").one == []
    with pytest.raises(sf.SciflowError, match=r"^give `--one` \(a file\) or `--other`\.$"):
        Either()
    with pytest.raises(sf.SciflowError, match=r"^give `--one` or `--other`\.$"):
        Plain()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, r"^give `--dataset_dir` \(a cache\) or `--input_dir` \(a folder of captioned images\)\.$"),
        ({"dataset_dir": ["a", "b"], "input_dir": "c"}, "with `--input_dir` it is the one cache to build"),
        ({"dataset_dir": ["a"], "eval_fraction": 1.0}, r"`eval_fraction` 1\.0: in \[0, 1\)"),
        ({"dataset_dir": ["a"], "caption_dropout": -0.1}, r"`caption_dropout` -0\.1: in \[0, 1\)"),
        ({"dataset_dir": ["a"], "text_encoding": "no"}, "`text_encoding` 'no': use one of cached, online"),
        ({"dataset_dir": ["a"], "payload": "tar"}, "`payload` 'tar': use one of npz, shards, inline"),
        ({"dataset_dir": ["a"], "encode_batch_size": 0}, "`encode_batch_size` 0: at least 1"),
        ({"dataset_dir": ["a"], "remote_cache_gb": 0.0}, r"`remote_cache_gb` 0\.0: above 0"),
        ({"dataset_dir": ["a"], "streaming": True, "max_train_samples": 3}, "`max_train_samples` does not go with"),
        ({"dataset_dir": ["a"], "max_train_samples": 0}, "`max_train_samples` 0: at least 1"),
        ({"dataset_dir": ["a"], "prior_loss_weight": 2.0}, "weighs nothing"),
        ({"dataset_dir": ["a"], "source_dir": ["b"]}, r"`source_dir` \['b'\] is for `--input_dir`"),
        ({"dataset_dir": ["a"], "edit_masks": "computed"}, "`edit_masks` computed is for `--input_dir`"),
        ({"input_dir": "a", "edit_masks": "drawn"}, "`edit_masks` 'drawn': use one of given, computed"),
    ],
)
def test_wrong_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(sf.SciflowError, match=words):
        sf.DataArguments(**options)


def test_options_at_their_defaults_enter_one_file() -> None:
    """Checks of several options run only where one of them is given."""
    code = (
        "import sys, sciflow_hf as sf\n"
        "kind, files = sf.DataArguments, set()\n"
        "def trace(frame, event, arg):\n"
        "    if frame.f_code.co_filename.startswith(sf.__path__[0]): files.add(frame.f_code.co_filename)\n"
        "sys.settrace(trace)\n"
        "kind(dataset_dir=['x'])\n"
        "sys.settrace(None)\n"
        "print(*sorted(file.removeprefix(sf.__path__[0]) for file in files))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["/options.py"] and "__post_init__" not in vars(sf.DataArguments)
    assert Path(sf.__path__[0], "options.py").is_file()
