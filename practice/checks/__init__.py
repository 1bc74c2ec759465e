"""Checks of the formulas, for pytest and for learners: `check_gae(my_function)`.

Each check draws inputs from a seed, works the answer out in a way of its own (GAE as
an explicit sum, losses over the real tokens alone, each text by itself), and prints the
largest difference. Where a function is wrong, it names the first known mistake that
gives the same answer: each check has a list of them, as wrong functions. Nothing here
uses the formulas of `utils`: what the code under test expects would prove nothing.

    from practice.checks import check_gae

    check_gae(my_gae)                    # prints one line, never raises
    assert check_gae(my_gae, seed=7)     # in a test

Any callable with the arguments of the function in `utils` will do.
"""

# ruff: noqa: F401

from practice.checks.comparison import Result, compare
from practice.checks.models import (
    check_evaluate_responses,
    check_lm_labels,
    check_reward_head,
    check_token_logprobs,
)
from practice.checks.more import (
    check_adapted_layer,
    check_bradley_terry_loss,
    check_dpo_loss,
    check_grpo_advantages,
    check_grpo_loss,
    check_merged_weight,
    check_read_one_base,
    check_rloo_advantages,
)
from practice.checks.ppo import (
    check_gae,
    check_kl_estimate,
    check_policy_loss,
    check_token_rewards,
    check_value_loss,
    check_whiten,
)
