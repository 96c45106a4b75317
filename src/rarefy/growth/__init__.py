"""What growth by gradient looks at: the exact dense gradient, or a cheaper signal in its place, one file each."""

from rarefy.growth.exact import Exact
from rarefy.growth.momentum import Momentum
from rarefy.growth.norms import NormProduct
from rarefy.growth.signal import Collector, Found, Request, Signal, registered
from rarefy.growth.tokens import SampledTokens

__all__ = [
    "Collector",
    "Exact",
    "Found",
    "Momentum",
    "NormProduct",
    "Request",
    "SampledTokens",
    "Signal",
    "registered",
]
