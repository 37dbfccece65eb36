from .machine import (
    CLUSTER as CLUSTER,
    SHARED_MEMORY as SHARED_MEMORY,
    Costs as Costs,
    Link as Link,
    Machine as Machine,
    SolveCosts as SolveCosts,
    StepCost as StepCost,
)
from .maps import Map as Map, draw as draw, in_sentences as in_sentences, make_map as make_map
from .measure import Workload as Workload, measure_costs as measure_costs
from .messages import (
    assumed_machine as assumed_machine,
    measure_machine as measure_machine,
    probe_machine as probe_machine,
)
from .modules import (
    ModuleWorkload as ModuleWorkload,
    measure_module as measure_module,
    named_workload as named_workload,
)
from .plan import SERIAL as SERIAL, Plan as Plan
from .predict import Planner as Planner, Prediction as Prediction, candidates as candidates
from .recommend import advice as advice, measured as measured, measured_planner as measured_planner
from .rule import (
    CONVOLUTION as CONVOLUTION,
    TRANSFORMER as TRANSFORMER,
    Choice as Choice,
    Constants as Constants,
    Layer as Layer,
    choose as choose,
    search as search,
)
