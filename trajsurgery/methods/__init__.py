"""The methods, one file each: functions of times that return a plan, and frozen dataclasses that draw the times."""

from trajsurgery.methods.draft import AlignProp as AlignProp
from trajsurgery.methods.draft import DRaFT1 as DRaFT1
from trajsurgery.methods.draft import DRaFTK as DRaFTK
from trajsurgery.methods.draft import DRaFTLV as DRaFTLV
from trajsurgery.methods.draft import WholeTrajectory as WholeTrajectory
from trajsurgery.methods.draft import draft_k as draft_k
from trajsurgery.methods.draft import draft_lv as draft_lv
from trajsurgery.methods.draft import whole_trajectory as whole_trajectory
from trajsurgery.methods.drtune import DRTune as DRTune
from trajsurgery.methods.drtune import drtune as drtune
from trajsurgery.methods.flowbp import FlowBPBridge as FlowBPBridge
from trajsurgery.methods.flowbp import FlowBPLagrange as FlowBPLagrange
from trajsurgery.methods.flowbp import FlowBPSparse as FlowBPSparse
from trajsurgery.methods.flowbp import flowbp_bridge as flowbp_bridge
from trajsurgery.methods.flowbp import flowbp_lagrange as flowbp_lagrange
from trajsurgery.methods.flowbp import flowbp_sparse as flowbp_sparse
from trajsurgery.methods.leapalign import LeapAlign as LeapAlign
from trajsurgery.methods.leapalign import leapalign as leapalign
from trajsurgery.methods.leapalign import leaps as leaps
from trajsurgery.methods.refl import ReFL as ReFL
from trajsurgery.methods.refl import refl as refl
from trajsurgery.methods.reno import ReNO as ReNO
from trajsurgery.methods.reno import reno as reno
from trajsurgery.methods.srpo import SRPO as SRPO
from trajsurgery.methods.srpo import srpo as srpo
