"""Options of training on comparisons."""

from typing import Any, ClassVar

from ..diffusion.preferences import PREFERENCE_LOSSES
from ..errors import SciflowError
from ..options import arguments, option
from .arguments import DiffusionTrainingArguments


def _check_weights(args: Any) -> None:
    if args.preference_loss != "mdpo_mean":
        name = next(n for n in ("preference_weights", "worst_weight") if getattr(args, n) != getattr(type(args), n))
        raise SciflowError(
            f"`{name}` {getattr(args, name)} is for `--preference_loss mdpo_mean`, and that is {args.preference_loss}: "
            "change one of them."
        )


@arguments
class PreferenceArguments:
    """How comparisons are learnt."""

    heading: ClassVar[str] = "Preferences"

    preference_loss: str = option(
        "dpo",
        "dpo, the mean over a group's losers; or, for groups with a loser for each axis, mdpo_contrastive, "
        "mdpo_adaptive or mdpo_mean.",
        choices=PREFERENCE_LOSSES,
    )
    preference_beta: float = option(
        2000.0,
        "How strongly a difference between losses counts, which are means over elements: 2000 to 5000 are usual.",
        within="(0, inf)",
    )
    preference_weights: str = option(
        "uniform",
        "Weights of the axes in mdpo_mean: uniform, or hard, which favours losers of a large loss.",
        choices=("uniform", "hard"),
        check=_check_weights,
    )
    worst_weight: float = option(
        1.0,
        "Weight of the worst of all (--global_worst) in mdpo_mean, next to 1 for all axes together.",
        within="[0, inf)",
        check=_check_weights,
    )
    sft_weight: float = option(
        0.0,
        "Weight of the winner's own loss, in units of beta/4, the size of the preference's gradient at the start. It "
        "anchors the winner; 1 is a good value.",
        within="[0, inf)",
    )
    max_winner_drift: float = option(
        1.2,
        "Stop where the winners' loss exceeds that of the reference this many times, between two logs and over at "
        "least 16 groups; 0 never stops.",
        within="[0, inf)",
    )
    reference_model: str | None = option(
        None,
        "Folder or Hub repository of the reference, or of a pipeline that has it. By default it is what training "
        "begins with: the network without its adapter, the adapter of --adapter_path, or with --no_adapter a frozen "
        "second copy of the network.",
    )


@arguments
class PreferenceTrainingArguments(PreferenceArguments, DiffusionTrainingArguments):
    """Every option of `DiffusionTrainingArguments`, and those of preferences."""

    heading: ClassVar[str] = "Training by preferences"
