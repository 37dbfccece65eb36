"""The planner: measures a machine, simulates the critical path of an update, predicts and recommends."""

from xbraid_py.planner.cycles import Plan
from xbraid_py.planner.machine import CLUSTER, SHARED_MEMORY, Costs, Link, Machine, SolveCosts, StepCost
from xbraid_py.planner.measure import Workload, measure_costs
from xbraid_py.planner.messages import assumed_machine, measure_machine, probe_machine
from xbraid_py.planner.predict import SERIAL, Planner, Prediction, candidates
from xbraid_py.planner.recommend import advice, measured_planner, recommend

__all__ = [
    "CLUSTER",
    "SERIAL",
    "SHARED_MEMORY",
    "Costs",
    "Link",
    "Machine",
    "Plan",
    "Planner",
    "Prediction",
    "SolveCosts",
    "StepCost",
    "Workload",
    "advice",
    "assumed_machine",
    "candidates",
    "measure_costs",
    "measure_machine",
    "measured_planner",
    "probe_machine",
    "recommend",
]
