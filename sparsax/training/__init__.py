"""SPION's schedule, and a thin training loop over optax."""

from sparsax.training.fit import FitConfig as FitConfig
from sparsax.training.fit import fit as fit
from sparsax.training.metrics import accuracy as accuracy
from sparsax.training.metrics import cross_entropy as cross_entropy
from sparsax.training.programs import on_device as on_device
from sparsax.training.run import FitResult as FitResult
from sparsax.training.schedule import Schedule as Schedule
from sparsax.training.schedule import ScheduleState as ScheduleState
