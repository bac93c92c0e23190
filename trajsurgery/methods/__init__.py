"""The methods, one file each: functions of times that return a plan, and frozen dataclasses that draw the times."""

from trajsurgery.methods.draft import (
    AlignProp,
    DRaFT1,
    DRaFTK,
    DRaFTLV,
    WholeTrajectory,
    draft_k,
    draft_lv,
    whole_trajectory,
)
from trajsurgery.methods.drtune import DRTune, drtune
from trajsurgery.methods.flowbp import (
    FlowBPBridge,
    FlowBPLagrange,
    FlowBPSparse,
    flowbp_bridge,
    flowbp_lagrange,
    flowbp_sparse,
)
from trajsurgery.methods.leapalign import LeapAlign, leapalign, leaps
from trajsurgery.methods.refl import ReFL, refl
from trajsurgery.methods.reno import ReNO, reno
from trajsurgery.methods.srpo import SRPO, srpo

__all__ = [
    "SRPO",
    "AlignProp",
    "DRTune",
    "DRaFT1",
    "DRaFTK",
    "DRaFTLV",
    "FlowBPBridge",
    "FlowBPLagrange",
    "FlowBPSparse",
    "LeapAlign",
    "ReFL",
    "ReNO",
    "WholeTrajectory",
    "draft_k",
    "draft_lv",
    "drtune",
    "flowbp_bridge",
    "flowbp_lagrange",
    "flowbp_sparse",
    "leapalign",
    "leaps",
    "refl",
    "reno",
    "srpo",
    "whole_trajectory",
]
