"""Published zoos, read from a local copy.

====================  ==============================================================================
kind                  zoo
====================  ==============================================================================
``dws_inr``           SIRENs of MNIST and Fashion-MNIST: Navon et al. (2023), DWSNets
``nfn_siren``         SIRENs of MNIST, Fashion-MNIST, CIFAR-10: Zhou et al. (2023), NFN
``small_cnn_zoo``     Unterthiner et al. (2020); CC BY 4.0
``model_zoo``         Schürholt et al. (2022), ModelZooDataset, CNN-s and CNN-l; CC BY 4.0
``cnn_wild_park``     Kofinas et al. (2024), neural-graphs
====================  ==============================================================================

The module of each says what its files look like, and which of that was seen in the publisher's
code. Nothing is downloaded. Files of torch are read by its restricted unpickler: no code in them is
run.

    >>> zoo = import_zoo("dws_inr", "mnist-inrs", "zoo")  # doctest: +SKIP
"""

from datasets_zoo.published.recipe import Published as Published
from datasets_zoo.published.recipe import import_zoo as import_zoo
