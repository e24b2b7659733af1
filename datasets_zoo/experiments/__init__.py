"""Data of the experiments in `configs/hyper`, as Lightning data modules."""

from datasets_zoo.experiments.clients import Clients as Clients
from datasets_zoo.experiments.episodes import Episodes as Episodes
from datasets_zoo.experiments.genotypes import GenotypeImages as GenotypeImages
from datasets_zoo.experiments.genotypes import genotype as genotype
from datasets_zoo.experiments.images import ImageData as ImageData
from datasets_zoo.experiments.pixels import Pixels as Pixels
from datasets_zoo.experiments.split import SplitTasks as SplitTasks
from datasets_zoo.experiments.text import TextData as TextData
