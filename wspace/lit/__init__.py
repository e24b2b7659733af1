"""Training on model zoos with Lightning: data, tasks, checkpoints, and `wspace fit`.

- `ZooDataModule` gives batches of a zoo; `wspace.augment` changes them in training.
- `Classification`, `Prediction`, `Editing` and `Contrastive` are tasks; each makes its metanet by
  name (`build_metanet`) for the zoo it meets. `Nowcasting` trains predictors of future states.
- `NowcastCallback` jumps ahead in any training, `IterativePruning` prunes in stages within it, and
  `GroupSparsityCallback` prepares that.
- `load_task` reads a trained task, `predict` and `predict_zoo` ask it.

This package alone imports Lightning, and nothing else imports this package at import time.
"""

from wspace.augment import Drop as Drop
from wspace.augment import Noise as Noise
from wspace.augment import Symmetry as Symmetry
from wspace.lit.checkpoint import Checkpoints as Checkpoints
from wspace.lit.checkpoint import SafeCheckpoints as SafeCheckpoints
from wspace.lit.contrastive import Contrastive as Contrastive
from wspace.lit.data import SpaceBatches as SpaceBatches
from wspace.lit.data import ZooDataModule as ZooDataModule
from wspace.lit.models import build_metanet as build_metanet
from wspace.lit.modules import Classification as Classification
from wspace.lit.modules import Editing as Editing
from wspace.lit.modules import Prediction as Prediction
from wspace.lit.nowcast import NowcastCallback as NowcastCallback
from wspace.lit.nowcasting import Nowcasting as Nowcasting
from wspace.lit.predict import load_task as load_task
from wspace.lit.predict import predict as predict
from wspace.lit.predict import predict_zoo as predict_zoo
from wspace.lit.pruning import GroupSparsityCallback as GroupSparsityCallback
from wspace.lit.pruning import IterativePruning as IterativePruning
from wspace.lit.task import Optimization as Optimization
from wspace.lit.task import Task as Task
from wspace.lit.windows import Windows as Windows
