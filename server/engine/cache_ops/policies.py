"""Changing policies while they work."""

from __future__ import annotations

from kvcore.policies import ALIASES, POLICIES, make_policy
from server.engine.admin_messages import AdminErrorKind, PolicyReport, SetPolicy
from server.engine.cache_ops.interface import OperationContext, OperationRefused
from server.engine.cache_ops.looking import report_policies

__all__ = ["set_policy"]

MAX_CANARY_SHARE = 0.5


def set_policy(context: OperationContext, op: SetPolicy) -> PolicyReport:
    """Change the live policy, those on trial and the canary, as far as named; all of it or nothing.

    The policy that is live already goes on with what it has learned.
    """
    cache = context.cache
    control, num_blocks, size = cache.control, cache.pool.num_blocks, cache.block_size
    if op.policy is not None:
        _check_name(op.policy, "policy")
    for name in op.trial or ():
        _check_name(name, "trial")
    if op.trial and context.trial is None:
        raise OperationRefused(AdminErrorKind.UNSUPPORTED, "this engine runs no trials", "trial")
    if op.canary is not None:
        name, share = op.canary
        if not 0.0 <= share <= MAX_CANARY_SHARE:
            reason = f"a canary's share is 0 to {MAX_CANARY_SHARE}"
            raise OperationRefused(AdminErrorKind.INVALID, reason, "canary.share")
        if share:
            _check_name(name, "canary.policy")
    trial, is_new = context.trial, op.policy is not None and op.policy != control.policy.name
    if op.policy is not None and is_new:
        control.set_policy(make_policy(op.policy, capacity_blocks=num_blocks, block_tokens=size))
    if trial is not None and (op.trial is not None or (is_new and trial.policies)):
        trial.choose(trial.policies if op.trial is None else op.trial)  # beside another live policy: anew
    if op.canary is not None:
        name, share = op.canary
        if share:
            capacity = max(1, round(share * num_blocks))
            control.start_canary(make_policy(name, capacity_blocks=capacity, block_tokens=size), share)
        else:
            control.end_canary()
    return report_policies(context)


def _check_name(name: str, field: str) -> None:
    if name not in POLICIES and name not in ALIASES:
        reason = f"no such policy; there are: {', '.join(POLICIES)}"
        raise OperationRefused(AdminErrorKind.INVALID, reason, field)
