"""What adaptation does to a model, measured: each function takes a model and a loader and returns a small result.

| measure | of what |
| --- | --- |
| `attention_entropy` | how widely each layer and head attends (lemmas 1 and 2) |
| `memory_length` | the same question for an SSM: how far back its states remember |
| `stream_energy` | the modern Hopfield energy of the states against their layer's keys (arXiv 2008.02217) |
| `neural_collapse` | NC1 to NC4 (arXiv 2008.08186); `collapse_over_training` draws them over steps |
| `control_effort` | how hard a field steers, layer by layer, and in how many directions |
| `drift` | how far the stream is moved, on the task's data and on others |
| `displacement` | the field of displacements of several methods side by side (figure 1b) |
| `landscape` | the loss over a plane of the stream, with the ways that states take (figure 1a) |
| `plane` | the first two principal directions of the stream at a layer |

- `model` is steered; or, with a `reference`, adapted in any way. The `reference` is the frozen model, on the same
  device; None is the same model with its fields off. Both come back as they were: modes, hooks, random generators.
- `loader` gives batches as for `fit`. It is read once, and labels are not needed, except where it says so. Padding is
  left out, as are tokens that a method put into the stream; in an encoder-decoder, whose mask is not that of both
  halves, all count. Under several processes each measures the batches that it is given: give all the same.
- `layer` is the block whose outgoing stream is looked at; negative ones count from the end.
- A result has a `.table()`, which prints and whose `.rows` pandas takes, and a `.plot(ax=None)`, a matplotlib Figure.
- A SteerError is raised where there is nothing to compare with, no data, or NaN or infinity in what is measured.
"""

from .collapse import CollapseOverTraining, NeuralCollapse, collapse_over_training, neural_collapse
from .displacement import Displacement, FieldMeasures, MethodField, displacement
from .drift import Drift, drift
from .effort import ControlEffort, LayerEffort, control_effort
from .energy import StreamEnergy, hopfield_energy, stream_energy
from .entropy import AttentionEntropy, attention_entropy
from .landscape import Landscape, Path, Plane, landscape, plane
from .memory_length import MemoryLength, memory_length

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
