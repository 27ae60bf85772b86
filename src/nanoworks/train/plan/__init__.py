"""What a recipe would take on given devices: memory, time, cost, and which way of spreading it is the best.

`plan(workload(recipe, device), cluster("8xH200"))`; docs/scaling.md states the model behind the figures.
"""

from nanoworks.train.plan.hardware import Cluster, Hardware, cluster
from nanoworks.train.plan.planner import Forecast, Planned, forecast, plan
from nanoworks.train.plan.workload import Workload, workload

__all__ = ["Cluster", "Forecast", "Hardware", "Planned", "Workload", "cluster", "forecast", "plan", "workload"]
