"""What adaptation does to a model, measured: each function takes a model and a loader and returns a small result.

Every result has a `.table()`, which prints and whose `.rows` pandas takes, and a `.plot(ax=None)`, a matplotlib Figure.
The model comes back as it was. Under several processes each measures the batches that it is given: give all the same.

===================  =============================================================================================
`attention_entropy`  how widely each layer and head attends (lemmas 1 and 2)
`memory_length`      the same question for an SSM: how far back its states remember
`stream_energy`      the modern Hopfield energy of the states against their layer's keys (arXiv 2008.02217)
`neural_collapse`    NC1 to NC4 (arXiv 2008.08186); `collapse_over_training` draws them over steps
`control_effort`     how hard a field steers, layer by layer, and in how many directions
`drift`              how far the stream is moved, on the task's data and on others
`displacement`       the field of displacements of several methods side by side (figure 1b)
`landscape`          the loss over a plane of the stream, with the ways that states take (figure 1a)
`plane`              the first two principal directions of the stream at a layer
===================  =============================================================================================
"""

from ._field_measures import FieldMeasures
from .collapse import CollapseOverTraining, NeuralCollapse, collapse_over_training, neural_collapse
from .displacement import Displacement, MethodField, displacement
from .drift import Drift, drift
from .effort import ControlEffort, LayerEffort, control_effort
from .energy import StreamEnergy, hopfield_energy, stream_energy
from .entropy import AttentionEntropy, attention_entropy
from .landscape import Landscape, Path, landscape
from .memory import MemoryLength, memory_length
from .plane import Plane, plane

__all__ = [
    "AttentionEntropy",
    "CollapseOverTraining",
    "ControlEffort",
    "Displacement",
    "Drift",
    "FieldMeasures",
    "Landscape",
    "LayerEffort",
    "MemoryLength",
    "MethodField",
    "NeuralCollapse",
    "Path",
    "Plane",
    "StreamEnergy",
    "attention_entropy",
    "collapse_over_training",
    "control_effort",
    "displacement",
    "drift",
    "hopfield_energy",
    "landscape",
    "memory_length",
    "neural_collapse",
    "plane",
    "stream_energy",
]
