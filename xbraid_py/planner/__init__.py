"""The planner: measures a machine, simulates the critical path of an update, predicts and recommends."""

from xbraid_py.planner.machine import CLUSTER, SHARED_MEMORY, Costs, Link, Machine, SolveCosts, StepCost
from xbraid_py.planner.maps import Map, draw, in_sentences, make_map
from xbraid_py.planner.measure import Workload, measure_costs
from xbraid_py.planner.messages import assumed_machine, measure_machine, probe_machine
from xbraid_py.planner.modules import ModuleWorkload, measure_module, named_workload
from xbraid_py.planner.plan import SERIAL, Plan
from xbraid_py.planner.predict import Planner, Prediction, candidates
from xbraid_py.planner.recommend import advice, measured, measured_planner
from xbraid_py.planner.rule import CONVOLUTION, TRANSFORMER, Choice, Constants, Layer, choose, search

__all__ = [
    "CLUSTER",
    "CONVOLUTION",
    "SERIAL",
    "SHARED_MEMORY",
    "TRANSFORMER",
    "Choice",
    "Constants",
    "Costs",
    "Layer",
    "Link",
    "Machine",
    "Map",
    "ModuleWorkload",
    "Plan",
    "Planner",
    "Prediction",
    "SolveCosts",
    "StepCost",
    "Workload",
    "advice",
    "assumed_machine",
    "candidates",
    "choose",
    "draw",
    "in_sentences",
    "make_map",
    "measure_costs",
    "measure_machine",
    "measure_module",
    "measured",
    "measured_planner",
    "named_workload",
    "probe_machine",
    "search",
]
