"""Random changes of networks for training: exact ones, changes of their input, noise, and mixing.

- `Symmetry` keeps the function of a network.
- `Translate`, `Rotate`, `Zoom` and `Flip` change it into ``f(A x + t)``, exactly, by the parameters
  that read its input: for networks that show images, shapes or fields.
- `Noise`, `Drop` and `Quantile` change it a little.
- `MixUp`, `PermutedMixUp`, `AlignedMixUp` and `SelfMixUp` mix networks; a `Mixture` says what the
  targets are.
- `Compose` does several, each always or sometimes.

Every class says in `effect` which of these it is. All work on batches of graphs (`wspace.encode`),
each network in its own way, and draw from the generator that they are given.
"""

from wspace.augment.approximate import Drop as Drop
from wspace.augment.approximate import Noise as Noise
from wspace.augment.approximate import Quantile as Quantile
from wspace.augment.augmentation import Augment as Augment
from wspace.augment.augmentation import Augmentation as Augmentation
from wspace.augment.augmentation import Augmented as Augmented
from wspace.augment.augmentation import Compose as Compose
from wspace.augment.augmentation import Effect as Effect
from wspace.augment.augmentation import augmented as augmented
from wspace.augment.augmentation import effect_of as effect_of
from wspace.augment.augmentation import mixes as mixes
from wspace.augment.coordinates import Flip as Flip
from wspace.augment.coordinates import InputMap as InputMap
from wspace.augment.coordinates import Rotate as Rotate
from wspace.augment.coordinates import Translate as Translate
from wspace.augment.coordinates import Zoom as Zoom
from wspace.augment.coordinates import with_input as with_input
from wspace.augment.exact import Symmetry as Symmetry
from wspace.augment.mixture import Mixture as Mixture
from wspace.augment.mixup import AlignedMixUp as AlignedMixUp
from wspace.augment.mixup import MixUp as MixUp
from wspace.augment.mixup import PermutedMixUp as PermutedMixUp
from wspace.augment.mixup import SelfMixUp as SelfMixUp
