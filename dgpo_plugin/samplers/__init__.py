"""Pure step functions on tensors, and the loops that call them with a velocity function."""

from dgpo_plugin.samplers.ode import dpm_solver_pp_2m_step, euler_step, sample_ode
from dgpo_plugin.samplers.sde import cps_log_probability, cps_step, flow_sde_log_probability, flow_sde_step

__all__ = [
    "cps_log_probability",
    "cps_step",
    "dpm_solver_pp_2m_step",
    "euler_step",
    "flow_sde_log_probability",
    "flow_sde_step",
    "sample_ode",
]
