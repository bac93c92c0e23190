"""One file a method: a function of times that returns a plan, and a frozen dataclass that draws the times."""

from trajsurgery.methods.draft import DRaFTLV, draft_lv
from trajsurgery.methods.drtune import DRTune, drtune
from trajsurgery.methods.leapalign import LeapAlign, leapalign, leaps
from trajsurgery.methods.refl import ReFL, refl

__all__ = ["DRTune", "DRaFTLV", "LeapAlign", "ReFL", "draft_lv", "drtune", "leapalign", "leaps", "refl"]
