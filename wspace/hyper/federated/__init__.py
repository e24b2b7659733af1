"""Personalised federated learning: a network for every client, made by a server that sees no data.

`methods` holds the methods, `servers` what a server does, `local` what a client does, `messages`
what they send each other, `networks` the small networks of the recipes.
"""

from wspace.hyper.federated.local import Client as Client
from wspace.hyper.federated.local import Examples as Examples
from wspace.hyper.federated.local import LocalTraining as LocalTraining
from wspace.hyper.federated.local import accuracies as accuracies
from wspace.hyper.federated.local import draw_batches as draw_batches
from wspace.hyper.federated.local import local_steps as local_steps
from wspace.hyper.federated.local import train_locally as train_locally
from wspace.hyper.federated.messages import Message as Message
from wspace.hyper.federated.messages import Round as Round
from wspace.hyper.federated.messages import size_of as size_of
from wspace.hyper.federated.methods import FedAvg as FedAvg
from wspace.hyper.federated.methods import FederatedMethod as FederatedMethod
from wspace.hyper.federated.methods import LocalOnly as LocalOnly
from wspace.hyper.federated.methods import PeFLL as PeFLL
from wspace.hyper.federated.methods import PFedHN as PFedHN
from wspace.hyper.federated.methods import descriptors as descriptors
from wspace.hyper.federated.networks import ImageLabels as ImageLabels
from wspace.hyper.federated.networks import Labels as Labels
from wspace.hyper.federated.networks import Standardised as Standardised
from wspace.hyper.federated.networks import lenet as lenet
from wspace.hyper.federated.servers import AverageServer as AverageServer
from wspace.hyper.federated.servers import HyperServer as HyperServer
