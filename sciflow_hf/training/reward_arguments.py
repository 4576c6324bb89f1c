"""Options of training by rewards."""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..diffusion.rewards import OLD_POLICY_DECAYS, REWARD_ALGORITHMS, SPREADS
from ..errors import SciflowError, counted
from ..options import arguments, option
from .arguments import DiffusionTrainingArguments


def _check_algorithm(args: Any) -> None:
    for name, algorithm in (("nft_beta", "nft"), ("rft_threshold", "rft")):
        if getattr(args, name) != getattr(type(args), name) and args.reward_algorithm != algorithm:
            raise SciflowError(
                f"`{name}` {getattr(args, name):g} is for `--reward_algorithm {algorithm}`, and that is "
                f"{args.reward_algorithm}: change one of them."
            )


@arguments
class RewardArguments:
    """How a network learns from the rewards of its own images."""

    heading: ClassVar[str] = "Rewards"

    reward_funcs: list[str] = option(
        [], "Rewards that train: names as of `sciflow-hf prefer score`, or dotted paths of functions."
    )
    reward_weights: list[float] = option([], "Weight of each in the sum; 1 by default.", within="(-inf, inf)")
    watch_rewards: list[str] = option(
        [],
        "Rewards that do not train, but must not fall: they are measured on the held-out prompts, against hacking of "
        "the others.",
    )
    stop_if_watched_falls: bool = option(
        False, "Stop where one of --watch_rewards is below its start with 95 % confidence; else a warning."
    )
    reward_timeout: float = option(
        600.0, "Seconds that the rewards may take for the images of one draw; 0 waits for ever.", within="[0, inf)"
    )
    reward_algorithm: str = option(
        "nft",
        "nft, DiffusionNFT; or rft, its baseline: plain training on those images that are better than the others of "
        "their prompt.",
        choices=REWARD_ALGORITHMS,
    )
    num_generations: int = option(
        8,
        "Images of each prompt, a group.",
        within="[2, inf)",
        advice="Images are compared with the others of their prompt.",
    )
    prompts_per_rollout: int = option(16, "Prompts that are drawn before the weights are updated.", within="[1, inf)")
    rollout_batch_size: int = option(
        8,
        "Images that are drawn at once; a prompt's are never divided, so at least --num_generations are.",
        within="[1, inf)",
    )
    rollout_steps: int = option(10, "Sampling steps of the images that are learnt from.", within="[1, inf)")
    rollout_guidance: float | None = option(
        None, "Their guidance; none when not given, as in the paper: the rewards replace it.", within="[0, inf)"
    )
    updates_per_rollout: int | None = option(
        None,
        "Optimizer steps after each rollout, which together are an epoch; as many as show every image once when not "
        "given.",
        within="[1, inf)",
    )
    nft_beta: float = option(
        1.0,
        "How far the implied good policy lies from the one that draws; .1 is bolder, and published for texts and "
        "several rewards.",
        within="(0, inf)",
        check=_check_algorithm,
    )
    rft_threshold: float = option(
        0.0,
        "Least advantage of images that rft trains on, in standard deviations.",
        within="(-inf, inf)",
        check=_check_algorithm,
    )
    advantage_spread: str = option(
        "rollout",
        "Whose standard deviation advantages are measured in: that of all rewards of a rollout, or of each group.",
        choices=SPREADS,
    )
    kl_weight: float = option(
        1e-4, "Weight of the squared distance to the velocity that training began with.", within="[0, inf)"
    )
    old_policy_decay: str = option(
        "on_policy",
        "How the policy that draws follows the trained one after rollout n: on_policy, at once; slow, keeping "
        "min(.001 n, .5) of itself; late, at once up to n = 75, then keeping min(.0075 (n - 75), .999).",
        choices=OLD_POLICY_DECAYS,
    )


@dataclass(frozen=True)
class RolloutRows:
    """The images that the steps after a rollout take, as rows of a data set."""

    buckets: list[str]

    def __len__(self) -> int:
        return len(self.buckets)


@arguments
class RewardTrainingArguments(RewardArguments, DiffusionTrainingArguments):
    """Every option of `DiffusionTrainingArguments`, and those of rewards; an epoch is a rollout."""

    heading: ClassVar[str] = "Training by rewards"

    @property
    def images_per_rollout(self) -> int:
        """Images of a rollout."""
        return self.prompts_per_rollout * self.num_generations

    @property
    def rows_of_epoch(self) -> RolloutRows:
        """The rows of an epoch, which no shape divides.

        Raises:
            SciflowError: steps that show fewer images than a rollout has.
        """
        images, step = self.images_per_rollout, self.total_batch
        steps = self.updates_per_rollout or -(-images // step)
        if steps * step < images:
            raise SciflowError(
                f"`updates_per_rollout` {steps}: with {counted(step, 'image')} a step these show {steps * step} of the "
                f"{images} images of a rollout. Give at least {-(-images // step)}, larger steps, or smaller rollouts "
                "(`--prompts_per_rollout`, `--num_generations`)."
            )
        return RolloutRows(["images of a rollout"] * (steps * step))
