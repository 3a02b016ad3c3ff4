"""The pass pipelines, by what a target's hardware can do."""

from __future__ import annotations

from tilewright.ir.target import Target

#: what every program goes through first, still on values
SIMPLIFY = "canonicalize,cse,licm,dce"

#: copies by an engine or by their own warps, handed over through hardware barriers. A function that `schedule` sends
#: through prefetch passes these by, as one with roles passes by prefetch.
ROLES = (
    f"{SIMPLIFY},spread,schedule,tile-order,communicate,canonicalize,cse,placement,row-copies,pipeline,roles,"
    f"alternate,waiting-rows,load-ahead,copy-ahead,prefetch,{SIMPLIFY},split-products,skew,peel,canonicalize,cse,dce,"
    "issue-ahead,mma,turns,layouts,mailboxes,late-signals,staging,barriers,hand-back,fences"
)

#: copies by the computing warps themselves, ahead of their use
PREFETCH = (
    f"{SIMPLIFY},schedule,tile-order,communicate,canonicalize,cse,placement,row-copies,waiting-rows,load-ahead,"
    f"copy-ahead,prefetch,{SIMPLIFY},layouts"
)


def default_pipeline(target: Target, check: bool = True) -> str:
    """The textual pipeline from a frontend's module to scheduled IR for ``target``; ``check``: prove the schedule."""
    middle = ROLES if target.has("setmaxnreg") else PREFETCH
    proofs = ",check-schedule,check-protocol" if check else ""
    launch = ",launch-overlap" if target.has("dependent_launch") else ""
    return (
        f"collectives,{middle},rank-order,register-limit,exchange-turns,own-copies,shared-plan,cse,dce{launch}{proofs}"
    )
