"""Checks of the formulas, for pytest and for learners: `check_gae(my_function)`.

Each check draws inputs from a seed, works the answer out from a definition of its
own, token by token in plain Python, and prints the largest difference. Where a
function is wrong, it names the known mistake that gives the same answer. Nothing here
uses the formulas of `utils`: what the code under test expects would prove nothing.

    from utils.practice.checks import check_gae

    check_gae(my_gae)                    # prints one line, never raises
    assert check_gae(my_gae, seed=7)     # in a test

Any callable with the arguments of the function in `utils` will do.
"""

from utils.practice.checks.advantages import check_gae, check_whiten
from utils.practice.checks.comparison import Result, compare
from utils.practice.checks.estimators import (
    check_grpo_advantages,
    check_grpo_loss,
    check_rloo_advantages,
)
from utils.practice.checks.lora import (
    check_adapted_layer,
    check_merged_weight,
    check_read_one_base,
)
from utils.practice.checks.losses import check_policy_loss, check_value_loss
from utils.practice.checks.models import (
    check_evaluate_responses,
    check_lm_labels,
    check_reward_head,
    check_token_logprobs,
)
from utils.practice.checks.preferences import (
    check_bradley_terry_loss,
    check_dpo_loss,
)
from utils.practice.checks.rewards import (
    check_kl_estimate,
    check_shaped_rewards,
    check_token_rewards,
)

__all__ = [
    "Result",
    "compare",
    "check_whiten",
    "check_gae",
    "check_policy_loss",
    "check_value_loss",
    "check_token_rewards",
    "check_kl_estimate",
    "check_shaped_rewards",
    "check_token_logprobs",
    "check_lm_labels",
    "check_evaluate_responses",
    "check_reward_head",
    "check_rloo_advantages",
    "check_grpo_advantages",
    "check_grpo_loss",
    "check_bradley_terry_loss",
    "check_dpo_loss",
    "check_adapted_layer",
    "check_merged_weight",
    "check_read_one_base",
]
