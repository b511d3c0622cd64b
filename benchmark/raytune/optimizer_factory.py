"""Masker config classes -> one Ray Tune search space -> ResearchAttentionConfigs.

    space = CombinationSpace(template, "ruler/4096/vt")     # a ResearchAttentionConfig, and the task it is tuned on
    space.ray_space()                                       # {"oracletopk_heavy_size": tune.loguniform(0.005, 0.5), ...}
    space.build({"oracletopk_heavy_size": 0.02})            # the template with this value

The code is in benchmark/search/space.py.
"""

from benchmark.search.space import CombinationSpace, nearest, parameter_name, to_ray_domain

__all__ = ["CombinationSpace", "nearest", "parameter_name", "to_ray_domain"]
